"""The layer against experts called one by one; routers and losses against their formulas."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparse_compiler as sc
import sparse_compiler.nn as sn
from sparse_compiler.formats.cost import AlwaysSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import Moe, PassContext, moe

D, H, E = 16, 24, 4


def by_hand(layer, x, routing):
    """The layer's formula, token by token."""
    act = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu": F.relu, "silu": F.silu}
    rows = []
    for token, ids, weights in zip(x, routing.ids, routing.weights, strict=True):
        total = torch.zeros_like(token)
        for e, weight in zip(ids.tolist(), weights, strict=True):
            up = layer.up[e] @ token + (0 if layer.up_bias is None else layer.up_bias[e])
            if layer.gate is None:
                hidden = act[layer.activation](up)
            else:
                gate = layer.gate[e] @ token
                gate = gate + (0 if layer.gate_bias is None else layer.gate_bias[e])
                hidden = act[layer.activation](gate) * up
            y = layer.down[e] @ hidden + (0 if layer.down_bias is None else layer.down_bias[e])
            total = total + weight * y
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("spelling", ["dense", "gathered", "grouped"])
@pytest.mark.parametrize(
    ("activation", "bias"), [("swiglu", True), ("geglu", False), ("relu", True)]
)
def test_a_layer_is_its_experts_one_by_one(spelling, activation, bias):
    dtype = torch.float32 if spelling == "grouped" else torch.float64
    router = sn.TopKRouter(D, E, 2, normalize=True, dtype=dtype)
    layer = sn.MoE(D, H, router, activation=activation, bias=bias, spelling=spelling, dtype=dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(7, D, dtype=dtype, requires_grad=True)
    y, routing = layer(x)
    expected = by_hand(layer, x, routing)
    torch.testing.assert_close(y, expected)
    leaves = [x, *layer.parameters()]
    direction = torch.randn_like(y)
    # Both graphs share the router.
    kept = {"materialize_grads": True, "retain_graph": True}
    actual = torch.autograd.grad(y, leaves, direction, **kept)
    wanted = torch.autograd.grad(expected, leaves, direction, **kept)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_leading_dimensions_and_shared_experts():
    layer = sn.MoE.mixtral(D, H, E, shared=8)
    x = torch.randn(2, 3, D)
    y, routing = layer(x)
    assert y.shape == x.shape and routing.ids.shape == (6, 2)
    with torch.no_grad():
        layer.down.zero_()
    shared = layer.shared_down(F.silu(layer.shared_gate(x)) * layer.shared_up(x))
    torch.testing.assert_close(layer(x)[0], shared)


@pytest.mark.parametrize("spelling", ["dense", "gathered"])
def test_no_tokens(spelling):
    y, routing = sn.MoE.mixtral(D, H, E, spelling=spelling)(torch.zeros(0, D))
    assert y.shape == (0, D) and routing.ids.shape == (0, 2)


def test_softmax_of_the_chosen_is_normalised_softmax():
    x = torch.randn(9, D)
    before = sn.TopKRouter(D, E, 2, normalize=True)
    after = sn.TopKRouter(D, E, 2, scoring="softmax of chosen")
    after.load_state_dict(before.state_dict())
    first, second = before(x), after(x)
    assert torch.equal(first.ids, second.ids)
    torch.testing.assert_close(first.weights, second.weights)


def test_the_bias_of_a_sigmoid_router_changes_the_choice_alone():
    router = sn.TopKRouter(D, E, 1, scoring="sigmoid", scale=2.5)
    x = torch.randn(9, D)
    scores = (x @ router.weight.t()).sigmoid()
    torch.testing.assert_close(router(x).weights, scores.max(-1, keepdim=True).values * 2.5)
    router.selection_bias[3] = 10.0
    routing = router(x)
    assert (routing.ids == 3).all()
    torch.testing.assert_close(routing.weights, scores[:, 3:] * 2.5)
    router.selection_bias.zero_()
    router.update_bias(routing.ids, rate=0.5)
    assert router.selection_bias.tolist() == [0.5, 0.5, 0.5, -0.5]
    with pytest.raises(ValueError, match="only scoring"):
        sn.TopKRouter(D, E, 1).update_bias(routing.ids)


@pytest.mark.parametrize("noise", ["gaussian", "gumbel"])
def test_noise_is_for_training(noise):
    router = sn.TopKRouter(D, E, 1, noise=noise)
    x = torch.randn(1, D).expand(4000, D)
    assert len(router(x).ids.unique()) > 1
    router.eval()
    assert len(router(x).ids.unique()) == 1


def test_gumbel_noise_draws_by_softmax():
    router = sn.TopKRouter(D, E, 1, noise="gumbel")
    x = torch.randn(1, D).expand(20_000, D)
    drawn = sn.expert_fractions(router(x).ids, E)
    expected = (x[0] @ router.weight.t()).softmax(-1)
    # Four standard deviations of a share of 20,000 draws.
    assert (drawn - expected).abs().max() < 4 * math.sqrt(0.25 / 20_000)


def test_a_capacity_drops_what_comes_last():
    router = sn.TopKRouter(D, E, 1, capacity_factor=1.0)
    x = torch.randn(1, D).expand(8, D)
    weights = router(x).weights.flatten()
    # All eight tokens want one expert, which takes ceil(8 / 4) of them.
    assert (weights[:2] > 0).all() and (weights[2:] == 0).all()
    layer = sn.MoE.switch(D, H, E, capacity_factor=1.0)
    y, routing = layer(x)
    assert (y[2:] == 0).all() and y[:2].abs().max() > 0
    assert (routing.weights[2:] == 0).all()


def test_first_choices_come_before_second_ones():
    router = sn.TopKRouter(2, 2, 2, capacity_factor=0.5, normalize=True)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    # Token 0 prefers expert 0, token 1 expert 1; each takes ceil(0.5 * 4 / 2) = 1.
    routing = router(torch.eye(2))
    assert (routing.weights > 0).tolist() == [[True, False], [True, False]]


def test_balancing_loss():
    probabilities = torch.full((8, E), 1 / E)
    even = torch.arange(8).remainder(E).unsqueeze(-1)
    torch.testing.assert_close(
        sn.load_balancing_loss(probabilities, even, alpha=0.1), torch.tensor(0.1)
    )
    one = torch.zeros(8, E)
    one[:, 2] = 1
    worst = sn.load_balancing_loss(one, torch.full((8, 1), 2), alpha=0.1)
    torch.testing.assert_close(worst, torch.tensor(0.1 * E))
    x = torch.randn(8, E, requires_grad=True)
    p = x.softmax(-1)
    ids = p.topk(2).indices
    f = torch.stack([(ids == i).float().mean() for i in range(E)])
    expected = 0.01 * E * (f * p.mean(0)).sum()
    loss = sn.load_balancing_loss(p, ids)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, x)[0].abs().max() > 0


def test_z_loss():
    logits = torch.randn(5, E)
    expected = 1e-3 * sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()) / 5
    torch.testing.assert_close(sn.router_z_loss(logits), torch.tensor(expected))


class Mixtral(nn.Module):
    """Mixtral 8x7B's parameters."""

    def __init__(self):
        super().__init__()
        made = {"device": "meta"}
        self.embed = nn.Embedding(32_000, 4096, **made)
        self.head = nn.Linear(4096, 32_000, bias=False, **made)
        self.layers = nn.ModuleList()
        for _ in range(32):
            layer = nn.ModuleDict(
                {
                    "q": nn.Linear(4096, 4096, bias=False, **made),
                    "k": nn.Linear(4096, 1024, bias=False, **made),
                    "v": nn.Linear(4096, 1024, bias=False, **made),
                    "o": nn.Linear(4096, 4096, bias=False, **made),
                    "norm1": nn.RMSNorm(4096, **made),
                    "norm2": nn.RMSNorm(4096, **made),
                    "moe": sn.MoE.mixtral(4096, 14_336, 8, **made),
                }
            )
            self.layers.append(layer)


def test_mixtral_has_46_7_and_uses_12_9_billion():
    model = Mixtral()
    assert round(sn.parameter_count(model) / 1e9, 1) == 46.7
    assert round(sn.active_parameter_count(model) / 1e9, 1) == 12.9


def test_all_is_active_without_experts():
    assert sn.active_parameter_count(nn.Linear(3, 4)) == sn.parameter_count(nn.Linear(3, 4)) == 16


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: sn.TopKRouter(D, E, 5), "1 to 4 of 4"),
        (lambda: sn.TopKRouter(D, E, 1, scoring="max"), "scoring='max' is unknown"),
        (lambda: sn.TopKRouter(D, E, 1, noise="pink"), "noise='pink' is unknown"),
        (lambda: sn.MoE.mixtral(D, H, activation="cube"), "activation='cube' is unknown"),
        (lambda: sn.MoE.mixtral(D, H, spelling="loop"), "spelling='loop' is unknown"),
    ],
)
def test_what_cannot_be(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("spelling", ["dense", "gathered"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "softmax of chosen", "sigmoid"])
def test_the_compiler_runs_chosen_experts_alone(monkeypatch, spelling, bias, scoring):
    monkeypatch.setattr(moe, "_DTYPES", (torch.float64,))
    made = {"dtype": torch.float64}
    router = sn.TopKRouter(D, E, 2, scoring=scoring, capacity_factor=1.0, **made)
    layer = sn.MoE(D, H, router, bias=bias, shared=8, spelling=spelling, **made)
    x = torch.randn(9, D, **made)
    gm = sc.canonicalize(layer, x)
    context = PassContext(Options.parse({"on_error": "raise"}), True, AlwaysSelector())
    Moe(context)(gm)
    assert [item.applied for item in context.rewrites] == [True], context.rewrites
    torch.testing.assert_close(gm(x)[0], layer(x)[0])
    wanted, found = (
        torch.autograd.grad(run(x)[0].square().sum(), list(layer.parameters()))
        for run in (layer, gm)
    )
    torch.testing.assert_close(found, wanted)

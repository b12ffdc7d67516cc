"""Loops over experts: what is refused and why, what is left to the original, copies and pickles."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from sparse_compiler.experts import routed, stacked
from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.prepare import prepare
from sparse_compiler.prepare.agree import attempt, disagreement
from sparse_compiler.prepare.moe_find import _features
from sparse_compiler.prepare.registry import PREPARERS
from sparse_compiler.prepare.swap import always_replaced

D, H, E, K = 16, 24, 4, 2


class Loop(nn.Module):
    """mistral-inference's loop, over any experts."""

    def __init__(self, make=None, experts=E):
        super().__init__()
        self.gate = nn.Linear(D, experts, bias=False)
        make = make or (lambda: nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D)))
        self.experts = nn.ModuleList(make() for _ in range(experts))

    def forward(self, x):
        weights, selected = torch.topk(self.gate(x).softmax(-1), K)
        results = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, nth = torch.where(selected == i)
            results[token] += weights[token, nth, None] * expert(x[token])
        return results


class WeightOnInput(Loop):
    """The weight scales the token, which is not the same: between the layers is no line."""

    def forward(self, x):
        weights, selected = torch.topk(self.gate(x).softmax(-1), K)
        results = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, nth = torch.where(selected == i)
            results[token] += expert(x[token] * weights[token, nth, None])
        return results


class AddsToTheInput(Loop):
    """The loop's result is added to what was there, and seen under another name."""

    def forward(self, x):
        weights, selected = torch.topk(self.gate(x).softmax(-1), K)
        results = x * 2
        for i, expert in enumerate(self.experts):
            token, nth = torch.where(selected == i)
            results = results.index_add(0, token, weights[token, nth, None] * expert(x[token]))
        return results


class UsesTheCount(Loop):
    """What the loop counts is returned too."""

    def forward(self, x):
        weights, selected = torch.topk(self.gate(x).softmax(-1), K)
        results, most = torch.zeros_like(x), 0
        for i, expert in enumerate(self.experts):
            token, nth = torch.where(selected == i)
            most = max(most, len(token))
            results[token] += weights[token, nth, None] * expert(x[token])
        return results, most * x.sum()


class Capped(Loop):
    """An expert takes three tokens, and no more."""

    def forward(self, x):
        weights, selected = torch.topk(self.gate(x).softmax(-1), K)
        results = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, nth = (part[:3] for part in torch.where(selected == i))
            results[token] += weights[token, nth, None] * expert(x[token])
        return results


class CappedHigh(Loop):
    """An expert takes forty tokens: few batches have as many."""

    def forward(self, x):
        weights, selected = torch.topk(self.gate(x).softmax(-1), K)
        results = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, nth = (part[:40] for part in torch.where(selected == i))
            results[token] += weights[token, nth, None] * expert(x[token])
        return results


class Clipped(Loop):
    """A limit that random tokens do not reach."""

    def forward(self, x):
        weights, selected = torch.topk(self.gate(x).softmax(-1), K)
        results = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, nth = torch.where(selected == i)
            results[token] += weights[token, nth, None] * expert(x[token].clamp(-6, 6))
        return results


class Looking(nn.Sequential):
    """An expert that looks at how large its values are."""

    def __init__(self):
        super().__init__(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D))

    def forward(self, x):
        y = super().forward(x)
        return y / 2 if len(y) and y.abs().max() > 10 else y


class InlineWeights(nn.Module):
    """Stacked weights in the block itself, whose experts cannot be called one by one."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.up = nn.Parameter(torch.randn(E, H, D))
        self.down = nn.Parameter(torch.randn(E, D, H))

    def forward(self, x):
        selected = self.gate(x).argmax(-1)
        results = torch.zeros_like(x)
        for i in selected.unique().tolist():
            token = (selected == i).nonzero().flatten()
            results[token] = F.relu(x[token] @ self.up[i].t()) @ self.down[i].t()
        return results


class Stack(nn.Module):
    """A decoder: a loop over layers that are alike, which is no mixture."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)) for _ in range(E)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def three_layers():
    return nn.Sequential(*(nn.Linear(D, D) for _ in range(3)))


def spectral():
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(D, H)), nn.ReLU(), nn.Linear(H, D)
    )


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.scale = nn.Parameter(torch.rand(H))

    def forward(self, x):
        return self.down(F.relu(self.up(x)) * self.scale)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.down(self.up(x).softmax(-1))


def hooked():
    model = Loop()
    model.experts[1].register_forward_hook(lambda *_: None)
    return model


def different():
    model = Loop()
    model.experts[3][1].forward = lambda x: F.silu(x) * 2
    return model


def renamed():
    model = Loop()
    model.forward = model.forward
    return model


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (hooked, "has hooks, which a single call would not run"),
        (different, "or not all do the same"),
        (renamed, "its forward was replaced on the instance already"),
        (lambda: Loop(three_layers), "an expert has 3 linear layers, 2 of them behind another"),
        (lambda: Loop(spectral), "an expert"),
        (lambda: Loop(Scaled), "not pointwise: it reads given_scale"),
        (lambda: Loop(Attending), "softmax is not pointwise"),
        (Capped, "a capacity in the loop, a norm or a factor of its own"),
        (CappedHigh, "is not the same: its output 0 differs from the original's by"),
        (Clipped, "is not the same: its output 0 differs from the original's by"),
        (lambda: Loop(Looking), "is not the same: its output 0 differs from the original's by"),
        (UsesTheCount, "what the loop makes of most is needed behind it"),
        (InlineWeights, "its weights are stacked, and its forward does not take tokens"),
    ],
)
def test_refused_with_a_sentence(make, sentence):
    model = make()
    before = [set(vars(module)) for module in model.modules()]
    prepared = prepare(model)
    assert not prepared.swapped
    assert sentence in prepared.refused[0].reason, prepared.refused[0].reason
    assert [set(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("make", [Stack, lambda: nn.Sequential(Stack(), nn.Linear(D, D))])
def test_a_loop_over_layers_is_no_mixture(make):
    prepared = prepare(make(), torch.randn(3, D))
    assert not prepared.swapped and not prepared.refused


@pytest.mark.parametrize("make", [Loop, WeightOnInput, AddsToTheInput])
def test_values_in_float64(make):
    model = make().double()
    assert len(prepare(model).swapped) == 1
    for tokens in (0, 1, 9):
        x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
        leaves = [x, *model.parameters()]
        expected = model(x)
        direction = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, leaves, direction, materialize_grads=True)
        with always_replaced():
            actual = model(x)
        found = torch.autograd.grad(actual, leaves, direction, materialize_grads=True)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(found, wanted)


def test_with_an_example():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, D)
            self.first, self.spare = Loop(), Loop()

        def forward(self, ids):
            return self.first(self.embed(ids))

    model = Model()
    prepared = prepare(model, torch.arange(5))
    assert [item.path for item in prepared.swapped] == ["first"]
    assert [item.path for item in prepared.refused] == ["spare"]
    assert "the example never reaches it" in prepared.refused[0].reason


def test_layers_alike_are_read_once():
    model = nn.Sequential(Loop(), Loop(), Loop())
    prepared = prepare(model)
    assert [len(item.checked) > 1 for item in prepared.swapped] == [True, True, True]
    x = torch.randn(6, D)
    expected = model(x)
    with always_replaced():
        torch.testing.assert_close(model(x), expected)


def test_random_experts_are_left_to_the_original_in_training():
    def make():
        return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.5), nn.Linear(H, D))

    model = Loop(make)
    prepared = prepare(model)
    assert not prepared.refused, str(prepared)
    (swapped,) = prepared.swapped
    assert "training" not in swapped.checked and "random tokens" in swapped.checked
    x = torch.randn(9, D)
    for training in (False, True):
        model.train(training)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        with always_replaced():
            torch.testing.assert_close(model(x), expected)


def test_copies_and_pickles_are_prepared():
    model = Loop()
    prepare(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.gate.weight.neg_()
        x = torch.randn(7, D)
        assert not torch.equal(twin(x), model(x))
        with always_replaced():
            torch.testing.assert_close(twin(x), Loop.forward(twin, x))
        compiled = torch.compile(twin, backend="eager", fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(x), Loop.forward(twin, x))


def test_checkpoints_load_and_undo():
    model = Loop()
    keys = list(model.state_dict())
    prepared = prepare(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(Loop().state_dict())
    x = torch.randn(7, D)
    with always_replaced():
        torch.testing.assert_close(model(x), Loop.forward(model, x))
    prepared.undo()
    assert "forward" not in vars(model)


def test_the_backend_takes_a_prepared_model():
    model = Loop().eval()
    prepare(model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="sparse", fullgraph=True, dynamic=True)
        for tokens in (3, 8):
            x = torch.randn(tokens, D)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_experts_called_by_hand():
    model = nn.Module()
    model.up = nn.Parameter(torch.randn(E, H, D, dtype=torch.float64))
    model.down = nn.Parameter(torch.randn(E, D, H, dtype=torch.float64))
    experts = stacked(["up"], "down", model, "(relu (load 0 f32 k))")
    x = torch.randn(5, D, dtype=torch.float64)
    ids = torch.tensor([[0, 1], [3, 3], [2, -1], [9, 1], [1, 0]])
    gates = torch.rand(5, 2, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t, row in enumerate(ids.tolist()):
        for k, e in enumerate(row):
            if 0 <= e < E:
                expected[t] += gates[t, k] * (model.down[e] @ F.relu(model.up[e] @ x[t]))
    torch.testing.assert_close(routed(model, experts, x, ids, gates), expected)
    whole = routed(model, experts, x[:2], ids[:2, :1])
    torch.testing.assert_close(whole[0], model.down[0] @ F.relu(model.up[0] @ x[0]))


class AnyExpert(nn.Module):
    """Gated or not, with biases or not, first layers apart or in one."""

    def __init__(self, width, hidden, act, gated, bias, together):
        super().__init__()
        self.act, self.gated, self.together = act, gated, together
        self.up = nn.Linear(width, hidden * (2 if together else 1), bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias) if gated and not together else None
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        if self.together:
            gate, up = self.up(x).chunk(2, -1)
            return self.down(self.act(gate) * up)
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.up(x) * self.act(self.gate(x)))


class Styles(nn.Module):
    """One mixture, its loop written in one of several ways."""

    def __init__(self, experts, k, width, style, make):
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.k, self.style, self.count = k, style, experts
        self.experts = nn.ModuleList(make() for _ in range(experts))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.k, -1)
        out = torch.zeros_like(x)
        if self.style == "where":
            for i, expert in enumerate(self.experts):
                token, nth = torch.where(ids == i)
                out[token] += weights[token, nth, None] * expert(x[token])
        elif self.style == "mask":
            mask = F.one_hot(ids, self.count).permute(2, 1, 0)
            for i in range(self.count):
                nth, token = torch.where(mask[i])
                out.index_add_(0, token, self.experts[i](x[token]) * weights[token, nth, None])
        elif self.style == "any":
            dense = torch.zeros(len(x), self.count, dtype=x.dtype).scatter(1, ids, weights)
            for i, expert in enumerate(self.experts):
                chosen = (ids == i).any(-1)
                if chosen.any():
                    out[chosen] += expert(x[chosen]) * dense[chosen, i].unsqueeze(-1)
        else:
            counts = torch.bincount(ids.flatten(), minlength=self.count).tolist()
            order = ids.flatten().argsort()
            pieces = x[order // self.k].split(counts)
            done = torch.cat([self.experts[i](pieces[i]) for i in range(self.count)])
            back = torch.empty_like(done)
            back[order] = done
            out = (back.view(len(x), self.k, -1) * weights.unsqueeze(-1)).sum(1)
        return out


ACTIVATIONS = [F.silu, F.gelu, F.relu, F.mish, torch.tanh, lambda x: F.relu(x).square()]


@settings(max_examples=6)
@given(
    experts=st.integers(2, 6),
    share=st.floats(0, 1),
    width=st.sampled_from([4, 9, 16]),
    hidden=st.sampled_from([3, 8, 20]),
    act=st.sampled_from(ACTIVATIONS),
    kind=st.sampled_from(["plain", "gated", "together"]),
    bias=st.booleans(),
    style=st.sampled_from(["where", "mask", "any", "split"]),
    tokens=st.integers(1, 12),
)
def test_any_mixture(experts, share, width, hidden, act, kind, bias, style, tokens):
    k = 1 + round(share * (experts - 1))
    gated, together = kind != "plain", kind == "together"
    model = Styles(
        experts, k, width, style, lambda: AnyExpert(width, hidden, act, gated, bias, together)
    ).double()
    prepared = prepare(model)
    assert len(prepared.swapped) == 1, str(prepared)
    x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), leaves, materialize_grads=True)
    with always_replaced():
        actual = model(x)
    found = torch.autograd.grad(actual.square().sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(found, wanted)


def hooked_later(model):
    model.experts[1].register_forward_hook(lambda *call: call[-1] * 2)


def exchanged_later(model):
    model.experts[1][1] = nn.Tanh()


def scaled_later(model):
    model.factor = 3.0


@pytest.mark.parametrize("change", [hooked_later, exchanged_later, scaled_later])
def test_a_module_changed_after_it_was_prepared_runs_the_original(change):
    class Factor(Loop):
        factor = 2.0

        def forward(self, x):
            weights, selected = torch.topk(self.gate(x).softmax(-1), K)
            results = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                token, nth = torch.where(selected == i)
                results[token] += weights[token, nth, None] * expert(x[token]) * self.factor
            return results

    model = Factor()
    assert len(prepare(model).swapped) == 1
    x = torch.randn(9, D)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, backend="eager", fullgraph=True)(x), model(x)
        )
        change(model)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_what_an_expert_raises_is_told():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            raise KeyError("no tokens today")

    with pytest.raises(Refused, match="takes no single tensor of tokens: KeyError: 'no tokens"):
        _features(Picky())
    result, why = attempt(lambda: torch.ones(2, requires_grad=True) * 2)
    assert why is None and not result.requires_grad


def test_nothing_is_replaced_that_was_compared_on_nothing():
    names, why = disagreement(PREPARERS[0], nn.Linear(2, 2), [])
    assert names == () and why is not None and "none of the inputs that were tried" in why

"""Mixtures of experts whose weights are gathered for each pair: spellings, and what breaks one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.passes.moe_rewriting import allow_float64, assert_rewritten, refusal, rewrite


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    allow_float64(monkeypatch)
    torch.manual_seed(0)


def x(tokens=7, dim=6):
    return torch.randn(tokens, dim, dtype=torch.float64)


class Base(nn.Module):
    """A router and stacked weights, [E, out, in]."""

    def __init__(self, experts=4, k=2, dim=6, hidden=5, turned=False, bias=False):
        super().__init__()
        self.experts, self.k, self.turned = experts, k, turned
        self.router = nn.Linear(dim, experts)
        shapes = {"w1": (hidden, dim), "w3": (hidden, dim), "w2": (dim, hidden)}
        for name, shape in shapes.items():
            shape = shape[::-1] if turned else shape
            setattr(self, name, nn.Parameter(torch.randn(experts, *shape)))
            rows = nn.Parameter(torch.randn(experts, shapes[name][0])) if bias else None
            setattr(self, name.replace("w", "b"), rows)

    def route(self, x):
        weights, ids = self.router(x).softmax(-1).topk(self.k, -1)
        return ids, weights

    def forward(self, x):
        return self.dispatch(x, *self.route(x))


class Batched(Base):
    """``bmm`` over pairs in one dimension."""

    def copies(self, x):
        return x.repeat_interleave(self.k, 0)

    def linear(self, rows, weight, bias, ids):
        if self.turned:
            y = torch.bmm(rows.unsqueeze(1), weight[ids]).squeeze(1)
        else:
            y = torch.bmm(weight[ids], rows.unsqueeze(-1)).squeeze(-1)
        if bias is not None:
            y.add_(bias[ids])
        return y

    def body(self, gate, up):
        return F.silu(gate) * up

    def results(self, x, ids):
        rows = self.copies(x)
        gate, up = (
            self.linear(rows, w, b, ids) for w, b in ((self.w1, self.b1), (self.w3, self.b3))
        )
        return self.linear(self.body(gate, up), self.w2, self.b2, ids)

    def dispatch(self, x, ids, weights):
        y = self.results(x, ids.reshape(-1)) * weights.reshape(-1, 1)
        return y.view(x.shape[0], self.k, -1).sum(1)


class Einsum(Base):
    """Pairs in two dimensions, tokens in one."""

    def dispatch(self, x, ids, weights):
        gate, up = (torch.einsum("ti,tkhi->tkh", x, w[ids]) for w in (self.w1, self.w3))
        y = torch.einsum("tkh,tkoh->tko", F.silu(gate) * up, self.w2[ids])
        return torch.einsum("tko,tk->to", y, weights)


class Matmul(Base):
    """Broadcast batched products, ``W[ids] @ x``."""

    def dispatch(self, x, ids, weights):
        rows = x[:, None, :, None].expand(-1, self.k, -1, -1)
        gate, up = (torch.matmul(w[ids], rows) for w in (self.w1, self.w3))
        y = torch.matmul(self.w2[ids], F.gelu(gate) * up).squeeze(-1)
        return (y * weights.unsqueeze(-1)).sum(1)


COPIES = {
    "repeat_interleave": lambda x, k: x.repeat_interleave(k, 0),
    "expand": lambda x, k: x.unsqueeze(1).expand(-1, k, -1).reshape(-1, x.shape[1]),
    "view": lambda x, k: x[:, None].expand(x.shape[0], k, x.shape[1]).flatten(0, 1),
}


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_moe_gathered_batched(copies, turned, bias):
    model = Batched(turned=turned, bias=bias).double()
    model.copies = lambda x: COPIES[copies](x, 2)
    call, verdict = assert_rewritten(model, x(), spelling="batched_mm")
    assert verdict.pattern == "top 2 of 4" and verdict.shape == (7, 4, 2, 6, 5)
    assert len(call.args[4]) == 2 * bias


@pytest.mark.parametrize("family, spelling", [(Einsum, "einsum"), (Matmul, "matmul")])
def test_moe_gathered_pairs_in_two_dimensions(family, spelling):
    _, verdict = assert_rewritten(family().double(), x(), spelling=f"gathered {spelling}")
    assert verdict.pattern == "top 2 of 4"


def test_moe_gathered_pairs_counted_by_choice():
    class ByChoice(Batched):
        def copies(self, x):
            return x.repeat(self.k, 1)

        def dispatch(self, x, ids, weights):
            y = self.results(x, ids.t().reshape(-1)) * weights.t().reshape(-1, 1)
            return y.view(self.k, x.shape[0], -1).sum(0)

    assert_rewritten(ByChoice().double(), x())


def test_moe_gathered_weights_before_the_view_and_behind():
    class Late(Batched):
        def dispatch(self, x, ids, weights):
            y = self.results(x, ids.flatten()).view(-1, self.k, x.shape[1])
            return (y * weights[..., None]).sum(dim=-2)

    class Product(Batched):
        def dispatch(self, x, ids, weights):
            y = self.results(x, ids.flatten()).view(-1, self.k, x.shape[1])
            return torch.bmm(weights.unsqueeze(1), y).squeeze(1)

    class Unweighted(Batched):
        def dispatch(self, x, ids, weights):
            return self.results(x, ids.flatten()).view(-1, self.k, x.shape[1]).sum(1)

    for family in (Late, Product, Unweighted):
        assert_rewritten(family().double(), x())


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("family", [Batched, Einsum])
@pytest.mark.parametrize("k", [1, 4])
def test_moe_gathered_numbers_of_choices_and_tokens(family, tokens, k):
    assert_rewritten(family(k=k).double(), x(tokens))


def test_moe_gathered_one_choice_without_its_dimension():
    class Switch(Batched):
        def route(self, x):
            weights, ids = self.router(x).softmax(-1).max(-1)
            return ids, weights

        def dispatch(self, x, ids, weights):
            return self.results(x, ids) * weights.unsqueeze(-1)

    _, verdict = assert_rewritten(Switch(k=1).double(), x())
    assert verdict.pattern == "top 1 of 4"


def test_moe_gathered_negative_ids_count_from_the_end():
    class Given(Batched):
        def forward(self, x, ids):
            return self.dispatch(x, ids, torch.ones_like(ids).to(x.dtype))

    ids = torch.tensor([[0, -1], [-4, 3], [1, 2]])
    assert_rewritten(Given().double(), x(3), ids)


def test_moe_gathered_clamped_ids_with_masked_weights():
    class Parallel(Batched):
        def forward(self, x, ids):
            weights, flat = self.router(x).softmax(-1)[:, : self.k].reshape(-1), ids.reshape(-1)
            strange = flat >= self.experts
            y = self.results(x, flat.clamp(0, self.experts - 1))
            y = y * weights.masked_fill(strange, 0.0).unsqueeze(-1)
            return y.view(-1, self.k, x.shape[1]).sum(1)

    ids = torch.tensor([[0, 4], [4, 4], [3, 1]])
    assert_rewritten(Parallel(bias=True).double(), x(3), ids)


class Broken(Batched):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def dispatch(self, x, ids, weights):
        return self.step(self, x, ids, weights)


def other_experts(self, x, ids, weights):
    rows, flat = self.copies(x), ids.reshape(-1)
    h = F.silu(self.linear(rows, self.w1, None, flat))
    y = self.linear(h, self.w2, None, flat.flip(0)) * weights.reshape(-1, 1)
    return y.view(-1, self.k, x.shape[1]).sum(1)


def normed(self, x, ids, weights):
    y = F.layer_norm(self.results(x, ids.reshape(-1)), (6,)) * weights.reshape(-1, 1)
    return y.view(-1, self.k, x.shape[1]).sum(1)


def normed_hidden(self, x, ids, weights):
    self.body = lambda gate, up: F.layer_norm(gate, (5,)) * up
    return Batched.dispatch(self, x, ids, weights)


def not_summed(self, x, ids, weights):
    return self.results(x, ids.reshape(-1)).view(-1, self.k, x.shape[1])


def summed_over_tokens(self, x, ids, weights):
    y = self.results(x, ids.reshape(-1)) * weights.reshape(-1, 1)
    return y.view(-1, self.k, x.shape[1]).sum(0)


def weighted_twice(self, x, ids, weights):
    y = self.results(x, ids.reshape(-1)) * weights.reshape(-1, 1) * weights.reshape(-1, 1)
    return y.view(-1, self.k, x.shape[1]).sum(1)


def weighted_by_features(self, x, ids, weights):
    y = self.results(x, ids.reshape(-1)) * x[0]
    return y.view(-1, self.k, x.shape[1]).sum(1)


def one_layer(self, x, ids, weights):
    y = self.linear(self.copies(x), self.w1, None, ids.reshape(-1))
    return y.view(-1, self.k, 5).sum(1)


def used_twice(self, x, ids, weights):
    y = self.results(x, ids.reshape(-1))
    return (y * weights.reshape(-1, 1)).view(-1, self.k, x.shape[1]).sum(1) + y.sum()


@pytest.mark.parametrize(
    "step, sentence",
    [
        (other_experts, "the linear layers are not provably of the same experts"),
        (normed, "the experts' results go through layer_norm"),
        (normed_hidden, "layer_norm is not pointwise"),
        (not_summed, "are not summed over a token's choices"),
        (summed_over_tokens, "the experts' results go through sum"),
        (weighted_twice, "the experts' results are weighted twice"),
        (weighted_by_features, "not one weight for each pair"),
        (one_layer, "its results reach no second linear layer"),
        (used_twice, "used more than once before they are summed"),
    ],
)
def test_moe_gathered_is_refused_with_the_reason(step, sentence):
    reason = refusal(Broken(step).double(), x())
    assert sentence in reason, reason


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_moe_gathered_any_sizes(data):
    def pick(values):
        return data.draw(st.sampled_from(list(values)))

    family, experts = pick([Batched, Einsum, Matmul]), pick([1, 2, 5])
    options = {
        "experts": experts,
        "k": pick(range(1, experts + 1)),
        "dim": pick([2, 3, 6]),
        "hidden": pick([2, 5]),
    }
    if family is Batched:
        options |= {"turned": pick([False, True]), "bias": pick([False, True])}
    torch.manual_seed(data.draw(st.integers(0, 99)))
    assert_rewritten(family(**options).double(), x(pick([1, 2, 7]), options["dim"]))


def test_moe_gathered_blocks_of_keys_are_no_candidate():
    """Block-sparse attention picks from what it computed: nothing to report."""

    class Blocks(nn.Module):
        def forward(self, q, k, ids):
            scores = torch.bmm(q, k.index_select(0, ids).transpose(1, 2)).softmax(-1)
            return torch.bmm(scores, k[ids])

    q, k = torch.randn(5, 3, 4), torch.randn(6, 3, 4)
    gm, rewrites = rewrite(Blocks(), q, k, torch.randint(0, 6, (5,)))
    assert rewrites == [] and "edits" not in gm.meta


def test_moe_gathered_weights_written_to_through_a_view_are_left():
    class Written(Base):
        def dispatch(self, x, ids, weights):
            first = self.w1[ids]
            first[0] = 0.0
            h = F.silu(torch.einsum("td,tkhd->tkh", x, first))
            y = torch.einsum("tkh,tkoh->tko", h, self.w2[ids])
            return (y * weights[..., None]).sum(1)

    gm, rewrites = rewrite(Written().double(), x())
    assert not any(item.applied for item in rewrites) and "edits" not in gm.meta

"""Mixtures of experts in grouped products: every spelling of the dispatch, and what breaks one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.passes.moe_rewriting import allow_float64, assert_rewritten, refusal

pytest.importorskip("transformers.integrations.moe")

SORTS = {
    "sort": lambda ids: torch.sort(ids)[1],
    "stable sort": lambda ids: torch.sort(ids, stable=True)[1],
    "argsort": lambda ids: torch.argsort(ids),
    "stable argsort": lambda ids: torch.argsort(ids, stable=True),
    "of int32": lambda ids: torch.argsort(ids.int()),
}
COUNTS = {
    "histc": lambda ids, perm, e: torch.histc(ids.double(), bins=e, min=0, max=e - 1),
    "histc of sorted": lambda ids, perm, e: torch.histc(ids[perm].float(), e, 0, e - 1),
    "histc, one wider": lambda ids, perm, e: torch.histc(ids.float(), bins=e, min=0, max=e),
    "one hot": lambda ids, perm, e: F.one_hot(ids, e).sum(0),
}


def inverse(perm):
    back = torch.empty_like(perm)
    back[perm] = torch.arange(perm.shape[0])
    return back


def rows_in_order(y, perm):
    result = torch.empty_like(y)
    result[perm] = y
    return result


def summed(y, k, by_choice):
    return y.view(k, -1, y.shape[-1]).sum(0) if by_choice else y.view(-1, k, y.shape[-1]).sum(1)


class Grouped(nn.Module):
    """One mixture; every step can be written in several ways."""

    def __init__(
        self,
        experts=4,
        k=2,
        dim=6,
        hidden=5,
        sort="sort",
        count="histc",
        back="inverse",
        weights="after",
        bias=False,
        turned=False,
        by_choice=False,
        separate=False,
    ):
        super().__init__()
        self.experts, self.k, self.hidden = experts, k, hidden
        self.sort, self.count, self.back, self.weights = sort, count, back, weights
        self.turned, self.by_choice, self.separate = turned, by_choice, separate
        self.router = nn.Linear(dim, experts)
        up, down = (experts, 2 * hidden, dim), (experts, dim, hidden)
        if turned:
            up, down = (experts, dim, 2 * hidden), (experts, hidden, dim)
        self.up = nn.Parameter(torch.randn(up))
        self.down = nn.Parameter(torch.randn(down))
        self.up_bias = nn.Parameter(torch.randn(experts, 2 * hidden)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(experts, dim)) if bias else None

    def route(self, x):
        weights, ids = self.router(x).softmax(-1).topk(self.k, -1)
        return ids, weights / weights.sum(-1, keepdim=True)

    def product(self, rows, weight, ends):
        weight = weight if self.turned else weight.transpose(-2, -1)
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)

    def body(self, both):
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up

    def first(self, rows, ends, chosen):
        if self.separate:
            halves = self.up.chunk(2, 2 if self.turned else 1)
            gate, up = (self.product(rows, half, ends) for half in halves)
            return F.silu(gate) * up
        both = self.product(rows, self.up, ends)
        if self.up_bias is not None:
            both = both + self.up_bias[chosen]
        return self.body(both)

    def forward(self, x):
        ids, weights = self.route(x)
        return self.dispatch(x, ids, weights)

    def flat(self, table):
        return table.t().reshape(-1) if self.by_choice else table.reshape(-1)

    def tokens(self, x, perm):
        return perm % x.shape[0] if self.by_choice else perm // self.k

    def dispatch(self, x, ids, weights):
        flat, weights = self.flat(ids), self.flat(weights)
        perm = SORTS[self.sort](flat)
        chosen = flat[perm]
        ends = COUNTS[self.count](flat, perm, self.experts).cumsum(0).to(torch.int32)
        rows = x[self.tokens(x, perm)]
        mine = weights[perm].unsqueeze(-1)
        if self.weights == "input":
            rows = rows * mine
        h = self.first(rows, ends, chosen)
        if self.weights == "hidden":
            h = h * mine
        y = self.product(h, self.down, ends)
        if self.down_bias is not None:
            y.add_(self.down_bias[chosen])
        if self.weights == "after":
            y = y * mine
        return self.together(x, y, perm, weights)

    def together(self, x, y, perm, weights):
        late = weights.unsqueeze(-1) if self.weights == "late" else None
        if self.back == "index_add":
            return torch.zeros_like(x).index_add(0, self.tokens(x, perm), y)
        if self.back == "index_add_":
            out = torch.zeros_like(x)
            out.index_add_(0, self.tokens(x, perm), y)
            return out
        if self.back == "scatter_add":
            index = self.tokens(x, perm).reshape(-1, 1).expand(-1, x.shape[1])
            return x.new_zeros(x.shape).scatter_add(0, index, y)
        if self.back == "onto":
            return (0.5 * x).index_add(0, self.tokens(x, perm), y)
        if self.back == "written":
            y = rows_in_order(y, perm)
        else:
            y = y[inverse(perm) if self.back == "inverse" else torch.argsort(perm)]
        if late is not None:
            y = y * late
        return summed(y, self.k, self.by_choice)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    allow_float64(monkeypatch)
    torch.manual_seed(0)


def x(tokens=9, dim=6):
    return torch.randn(tokens, dim, dtype=torch.float64)


@pytest.mark.parametrize("count", COUNTS)
def test_moe_grouped_counts(count):
    assert_rewritten(Grouped(count=count).double(), x(), spelling="grouped_mm")


@pytest.mark.parametrize("sort", SORTS)
def test_moe_grouped_sorts(sort):
    assert_rewritten(Grouped(sort=sort).double(), x())


@pytest.mark.parametrize("by_choice", [False, True])
@pytest.mark.parametrize(
    "back", ["inverse", "argsort", "written", "index_add", "index_add_", "scatter_add", "onto"]
)
def test_moe_grouped_ways_back(back, by_choice):
    assert_rewritten(Grouped(back=back, by_choice=by_choice).double(), x())


@pytest.mark.parametrize("weights", ["after", "input", "hidden", "late"])
def test_moe_grouped_places_of_the_weights(weights):
    call, _ = assert_rewritten(Grouped(weights=weights).double(), x())
    assert call.args[-1] is (weights == "input")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_moe_grouped_stored_weights_are_views(turned, separate):
    call, verdict = assert_rewritten(Grouped(turned=turned, separate=separate).double(), x())
    copies = [node for node in call.graph.nodes if "contiguous" in str(node.target)]
    assert not copies and verdict.pattern == "top 2 of 4" and verdict.shape == (9, 4, 2, 6, 5)
    inner = call.args[3]
    assert len(inner) == 2 and all(tuple(w.meta["val"].shape) == (4, 5, 6) for w in inner)


def test_moe_grouped_biases_clamps_and_interleaved_parts():
    class Clamped(Grouped):
        def body(self, both):
            gate, up = both[..., ::2].clamp(max=1.5), both[..., 1::2].clamp(-1.5, 1.5)
            return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    call, _ = assert_rewritten(Clamped(bias=True, turned=True).double(), x())
    assert len(call.args[4]) == 2 and call.args[6] is not None


@pytest.mark.parametrize(
    "body",
    [
        lambda both: F.glu(both),
        lambda both: F.gelu(both[:, :5]) * both[:, 5:],
        lambda both: F.silu(both.view(-1, 2, 5)[:, 0]) * both.view(-1, 2, 5)[:, 1],
        lambda both: F.silu(both.view(-1, 5, 2).unbind(-1)[0]) + both.view(-1, 5, 2).unbind(-1)[1],
        lambda both: torch.relu(both.narrow(1, 2, 5)).square(),
    ],
)
def test_moe_grouped_parts_in_any_order(body):
    model = Grouped().double()
    model.body = body
    assert_rewritten(model, x())


def test_moe_grouped_in_training_keeps_the_parts():
    call, _ = assert_rewritten(Grouped().double(), x(), training=True)
    assert "moe_training" in str(call.target)


@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_moe_grouped_numbers_of_choices_and_tokens(k, tokens):
    assert_rewritten(Grouped(k=k).double(), x(tokens))


def test_moe_grouped_sentinels_are_dropped():
    """Expert parallelism: other ranks' experts have the id E, and no part in the result."""

    class Parallel(Grouped):
        def forward(self, x, ids):
            weights = self.router(x).softmax(-1)[:, : self.k]
            flat, weights = ids.reshape(-1), weights.reshape(-1)
            chosen, perm = torch.sort(flat)
            counts = torch.histc(chosen.float(), bins=self.experts, min=0, max=self.experts - 1)
            ends = counts.cumsum(0, dtype=torch.int32)
            strange = (chosen >= self.experts).unsqueeze(-1)
            chosen.clamp_(max=self.experts - 1)
            rows = x[perm // self.k]
            rows.masked_fill_(strange, 0.0)
            both = self.product(rows, self.up, ends) + self.up_bias[chosen]
            both = both.masked_fill(strange, 0.0)
            y = self.product(self.body(both), self.down, ends) + self.down_bias[chosen]
            y = y.masked_fill(strange, 0.0) * weights[perm].unsqueeze(-1)
            return y[inverse(perm)].view(-1, self.k, y.shape[1]).sum(1)

    ids = torch.tensor([[0, 4], [4, 4], [3, 1], [2, 4]])
    assert_rewritten(Parallel(bias=True).double(), x(4), ids)


class Broken(Grouped):
    """A dispatch that is no mixture of experts: one step is replaced."""

    def __init__(self, step, **options):
        super().__init__(**options)
        self.step = step

    def dispatch(self, x, ids, weights):
        return self.step(self, x, ids, weights)


def parts_of(self, x, ids, weights, perm=None, ends=None, tokens=None, mine=None, back=None):
    flat = ids.reshape(-1)
    perm = torch.argsort(flat) if perm is None else perm
    if ends is None:
        ends = COUNTS["histc"](flat, perm, self.experts).cumsum(0).to(torch.int32)
    rows = x[perm // self.k if tokens is None else tokens(perm)]
    y = self.product(self.body(self.product(rows, self.up, ends)), self.down, ends)
    y = y * (weights.reshape(-1)[perm].unsqueeze(-1) if mine is None else mine(perm))
    y = y[inverse(perm) if back is None else back(perm)]
    return y.view(-1, self.k, y.shape[1]).sum(1)


def other_ids(self, x, ids, weights):
    perm = torch.argsort(ids.flip(0).reshape(-1))
    ends = COUNTS["histc"](ids.reshape(-1), perm, self.experts).cumsum(0).to(torch.int32)
    return parts_of(self, x, ids, weights, perm=perm, ends=ends)


def descending(self, x, ids, weights):
    return parts_of(self, x, ids, weights, perm=torch.argsort(ids.reshape(-1), descending=True))


def counted_elsewhere(self, x, ids, weights):
    counts = COUNTS["histc"](ids.reshape(-1) % 2, None, self.experts)
    return parts_of(self, x, ids, weights, ends=counts.cumsum(0).to(torch.int32))


def no_running_sum(self, x, ids, weights):
    counts = COUNTS["histc"](ids.reshape(-1), None, self.experts)
    return parts_of(self, x, ids, weights, ends=(counts * 2).to(torch.int32))


def odd_bins(self, x, ids, weights):
    counts = torch.histc(ids.reshape(-1).float(), bins=self.experts, min=0, max=self.experts + 3)
    return parts_of(self, x, ids, weights, ends=counts.cumsum(0).to(torch.int32))


def other_tokens(self, x, ids, weights):
    return parts_of(self, x, ids, weights, tokens=lambda perm: (perm + 1) % x.shape[0])


def unsorted_weights(self, x, ids, weights):
    return parts_of(self, x, ids, weights, mine=lambda perm: weights.reshape(-1, 1))


def not_put_back(self, x, ids, weights):
    return parts_of(self, x, ids, weights, back=lambda perm: perm)


def weighted_features(self, x, ids, weights):
    return parts_of(self, x, ids, weights, mine=lambda perm: torch.ones_like(x[0]))


def normed(self, x, ids, weights):
    flat = ids.reshape(-1)
    perm = torch.argsort(flat)
    ends = COUNTS["histc"](flat, perm, self.experts).cumsum(0).to(torch.int32)
    y = self.product(self.first(x[perm // self.k], ends, None), self.down, ends)
    y = F.layer_norm(y, (y.shape[1],)) * weights.reshape(-1)[perm].unsqueeze(-1)
    return y[inverse(perm)].view(-1, self.k, y.shape[1]).sum(1)


def normed_hidden(self, x, ids, weights):
    self.body = lambda both: F.layer_norm(both[:, :5], (5,))
    return parts_of(self, x, ids, weights)


def not_summed(self, x, ids, weights):
    flat = ids.reshape(-1)
    perm = torch.argsort(flat)
    ends = COUNTS["histc"](flat, perm, self.experts).cumsum(0).to(torch.int32)
    y = self.product(self.first(x[perm // self.k], ends, None), self.down, ends)
    return y[inverse(perm)].view(-1, self.k, y.shape[1])


def changed_in_between(self, x, ids, weights):
    x = x * 1.0
    flat = ids.reshape(-1)
    perm = torch.argsort(flat)
    ends = COUNTS["histc"](flat, perm, self.experts).cumsum(0).to(torch.int32)
    h = self.first(x[perm // self.k], ends, None)
    x.mul_(2.0)
    y = self.product(h, self.down, ends) * weights.reshape(-1)[perm].unsqueeze(-1)
    return y[inverse(perm)].view(-1, self.k, y.shape[1]).sum(1)


def used_twice(self, x, ids, weights):
    flat = ids.reshape(-1)
    perm = torch.argsort(flat)
    ends = COUNTS["histc"](flat, perm, self.experts).cumsum(0).to(torch.int32)
    y = self.product(self.first(x[perm // self.k], ends, None), self.down, ends)
    total = y.sum()
    y = (y * weights.reshape(-1)[perm].unsqueeze(-1))[inverse(perm)]
    return y.view(-1, self.k, y.shape[1]).sum(1) + total


def one_layer(self, x, ids, weights):
    flat = ids.reshape(-1)
    perm = torch.argsort(flat)
    ends = COUNTS["histc"](flat, perm, self.experts).cumsum(0).to(torch.int32)
    return self.product(x[perm // self.k], self.up, ends)[inverse(perm)]


@pytest.mark.parametrize(
    "step, sentence",
    [
        (other_ids, "its offsets count other ids than those that are sorted"),
        (descending, "its rows are not provably tokens that sorted expert ids pick"),
        (counted_elsewhere, "its offsets count other ids"),
        (no_running_sum, "its offsets are no running sum of counts"),
        (odd_bins, "the bins of its histogram are not the 4 experts"),
        (other_tokens, "its rows are not provably tokens"),
        (unsorted_weights, "the weights of the sorted rows are not provably those of their pairs"),
        (not_put_back, "the order of the results is not provably that of the tokens"),
        (weighted_features, "not one weight for each pair"),
        (normed, "the experts' results go through layer_norm before they are summed"),
        (normed_hidden, "an expert is not pointwise: layer_norm is not pointwise"),
        (not_summed, "not summed over a token's choices"),
        (changed_in_between, "is written to in place before the experts are done"),
        (used_twice, "used more than once before they are summed"),
        (one_layer, "its rows reach no second grouped product"),
    ],
)
def test_moe_grouped_is_refused_with_the_reason(step, sentence):
    reason = refusal(Broken(step).double(), x(), training=False)
    assert sentence in reason, reason


def test_moe_grouped_dropout_in_training_is_refused():
    model = Grouped().double()
    model.body = lambda both: F.dropout(both[:, :5], 0.5, training=True)
    assert "dropout in training is random" in refusal(model, x(), training=True)


def test_moe_grouped_ids_that_a_wide_histogram_would_miscount_are_refused():
    class Given(Grouped):
        def forward(self, x, ids):
            return self.dispatch(x, ids, torch.ones_like(ids).to(x.dtype) * 0.5)

    ids = torch.randint(0, 4, (9, 2))
    model = Given(count="histc, one wider").double()
    assert "an id of 4 would be counted for the last expert" in refusal(model, x(), ids)
    assert_rewritten(Given().double(), x(), ids)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_moe_grouped_any_combination(data):
    def pick(values):
        return data.draw(st.sampled_from(list(values)))

    experts = pick([2, 3, 5])
    options = {
        "experts": experts,
        "k": pick(range(1, experts + 1)),
        "dim": pick([1, 3, 6]),
        "hidden": pick([1, 2, 5]),
        "sort": pick(SORTS),
        "count": pick(COUNTS),
        "back": pick(["inverse", "argsort", "written", "index_add", "index_add_", "scatter_add"]),
        "weights": pick(["after", "hidden"]),
        "turned": pick([False, True]),
        "by_choice": pick([False, True]),
        "separate": pick([False, True]),
    }
    options["bias"] = (
        not options["separate"] and options["weights"] == "after" and pick([False, True])
    )
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = Grouped(**options).double()
    assert_rewritten(model, x(pick([1, 2, 8]), options["dim"]))

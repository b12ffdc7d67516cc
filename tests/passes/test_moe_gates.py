"""Gates that are provably sparse: their ids and values make up the dense gates again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from sparse_compiler.canonical import canonicalize
from sparse_compiler.passes.moe.backgrounds import Backgrounds
from sparse_compiler.passes.moe.gates import SOFT, Routed, routed, routed_columns
from sparse_compiler.region import Builder, Region

aten = torch.ops.aten
E, K = 6, 2
Gates = Callable[[torch.Tensor], torch.Tensor]


class Router(nn.Module):
    def __init__(self, function: Gates) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return self.function(logits)


def graph_of(function: Gates, logits: torch.Tensor, dynamic: bool = False) -> fx.GraphModule:
    if not dynamic:
        return canonicalize(Router(function), logits)
    shapes = ({0: torch.export.Dim("T", min=2)},)
    return canonicalize(
        torch.export.export(Router(function), (logits,), dynamic_shapes=shapes, strict=False)
    )


def result_of(gm: fx.GraphModule) -> list[fx.Node]:
    (output,) = gm.graph.find_nodes(op="output")
    found = output.args[0]
    return list(found) if isinstance(found, (tuple, list)) else [found]


def end_of(gm: fx.GraphModule) -> fx.Node:
    (output,) = gm.graph.find_nodes(op="output")
    return output


def densified(gm: fx.GraphModule, found: Routed) -> fx.GraphModule:
    """The graph with ids and gates instead of the dense gates as its results."""
    (node,) = result_of(gm)
    (output,) = gm.graph.find_nodes(op="output")
    last = output.prev
    builder = Builder(gm, Region((last,), (last,), tuple(last.all_input_nodes)))
    with gm.graph.inserting_before(output):
        shape = [
            size if isinstance(size, int) else builder.call(aten.sym_size.int, node, dim)
            for dim, size in enumerate(node.meta["val"].shape)
        ]
        del shape[found.dim]
        ids = found.ids(builder, shape)
        values = found.at(builder, node, ids)
    output.args = ((ids, values, node),)
    gm.graph.set_codegen(fx.graph.CodeGen())
    gm.recompile()
    return gm


def check(function: Gates, logits: torch.Tensor, choices: int, dim: int = -1) -> Routed:
    """The dense gates are what the ids and their gates scatter to, each id counted once."""
    gm = graph_of(function, logits)
    (node,) = result_of(gm)
    dim %= node.meta["val"].dim()
    found = routed(Backgrounds(gm.graph), node, dim, node.meta["val"].shape[dim], end_of(gm))
    assert isinstance(found, Routed), found
    assert found.choices == choices
    ids, values, dense = densified(gm, found)(logits)
    assert ids.dtype is torch.int64
    assert ids.shape[dim] == choices
    kept = (ids >= 0) & (ids < dense.shape[dim])
    again = torch.zeros_like(dense).scatter_add(
        dim, ids.clamp(0, dense.shape[dim] - 1), torch.where(kept, values, 0).to(dense.dtype)
    )
    torch.testing.assert_close(again, dense, rtol=0, atol=0)
    return found


def top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = torch.topk(logits, K, dim=-1)
    return values, ids


def scattered(logits: torch.Tensor) -> torch.Tensor:
    values, ids = top(logits)
    return torch.zeros_like(logits).scatter(-1, ids, values.softmax(-1))


def scattered_in_place(logits: torch.Tensor) -> torch.Tensor:
    values, ids = top(logits.softmax(-1))
    gates = torch.zeros_like(logits)
    gates.scatter_(1, ids, values)
    return gates / gates.sum(-1, keepdim=True)


def softmax_of_kept(logits: torch.Tensor) -> torch.Tensor:
    values, ids = top(logits)
    kept = torch.full_like(logits, float("-inf")).scatter_(-1, ids, values)
    return F.softmax(kept, dim=-1, dtype=torch.float32).to(logits.dtype)


def sigmoid_of_kept(logits: torch.Tensor) -> torch.Tensor:
    values, ids = top(logits)
    return torch.full_like(logits, float("-inf")).scatter(1, ids, values).float().sigmoid()


def one_hot_top_one(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    return F.one_hot(p.argmax(-1), E) * p


def one_hot_summed(logits: torch.Tensor) -> torch.Tensor:
    values, ids = top(logits)
    return (F.one_hot(ids, E).to(logits.dtype) * values.softmax(-1).unsqueeze(-1)).sum(1)


def compared(logits: torch.Tensor) -> torch.Tensor:
    values, ids = top(logits)
    hit = ids.unsqueeze(-1) == torch.arange(E)
    return (hit * values.unsqueeze(-1)).sum(dim=1)


def masked(logits: torch.Tensor) -> torch.Tensor:
    ids = top(logits)[1]
    mask = torch.zeros_like(logits).scatter(1, ids, 1.0)
    p = logits.softmax(-1) * mask
    return p / (p.sum(-1, keepdim=True) + 1e-9)


def chosen(logits: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, top(logits)[1], True)
    return torch.where(mask, logits.sigmoid(), 0.0)


def filled(logits: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top(logits)[1], True)
    return logits.softmax(-1).masked_fill(~mask, 0.0) * 2.5


def filled_before(logits: torch.Tensor) -> torch.Tensor:
    mask = F.one_hot(top(logits)[1], E).sum(1)
    return logits.masked_fill(mask == 0, float("-inf")).softmax(-1)


def added_mask(logits: torch.Tensor) -> torch.Tensor:
    ids = top(logits)[1]
    return (logits + torch.full_like(logits, float("-inf")).scatter(1, ids, 0.0)).softmax(-1)


SPELLINGS: dict[str, tuple[Gates, int]] = {
    "scatter": (scattered, K),
    "scatter_ and / sum": (scattered_in_place, K),
    "softmax over -inf": (softmax_of_kept, K),
    "sigmoid over -inf": (sigmoid_of_kept, K),
    "one_hot(argmax)": (one_hot_top_one, 1),
    "one_hot(topk) summed": (one_hot_summed, K),
    "== arange": (compared, K),
    "p * mask": (masked, K),
    "where": (chosen, K),
    "masked_fill 0": (filled, K),
    "masked_fill -inf": (filled_before, K),
    "mask added": (added_mask, K),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_sparse_gates(name: str) -> None:
    function, choices = SPELLINGS[name]
    found = check(function, torch.randn(9, E, dtype=torch.float64), choices)
    assert found.distinct


@pytest.mark.parametrize("name", SPELLINGS)
def test_tied_scores(name: str) -> None:
    function, choices = SPELLINGS[name]
    check(function, torch.ones(5, E, dtype=torch.float64), choices)


@given(
    tokens=st.integers(1, 7),
    experts=st.integers(3, 9),
    choices=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None)
def test_any_sizes(tokens: int, experts: int, choices: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 3, (tokens, experts), generator=generator).double()

    def gates(x: torch.Tensor) -> torch.Tensor:
        values, ids = torch.topk(x, choices, dim=-1)
        return (F.one_hot(ids, experts) * values.softmax(-1)[..., None]).sum(-2)

    check(gates, logits, choices)


def test_views_keep_the_experts() -> None:
    def gates(logits: torch.Tensor) -> torch.Tensor:
        return scattered(logits.reshape(-1, E)).view(2, 3, E).permute(2, 0, 1).unsqueeze(1)

    found = check(gates, torch.randn(2, 3, E, dtype=torch.float64), K, dim=0)
    assert found.distinct


def test_ids_that_repeat_count_once() -> None:
    """Two argmaxes may agree: the second is then no choice of its own."""

    def gates(logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)
        first = F.one_hot(p.argmax(-1), E)
        second = F.one_hot((p * torch.linspace(1, 2, E, dtype=p.dtype)).argmax(-1), E)
        return p * (first + second)

    found = check(gates, torch.randn(40, E, dtype=torch.float64), 2)
    assert not found.distinct


def test_ids_out_of_range_are_no_experts() -> None:
    """``==`` takes any ids: those that are no expert's (padding) have no gate."""

    def gates(logits: torch.Tensor) -> torch.Tensor:
        values, ids = top(logits)
        return ((ids + 2).unsqueeze(-1) == torch.arange(E)).double().mul(values[..., None]).sum(1)

    check(gates, torch.randn(20, E, dtype=torch.float64), K)


def test_dynamic_number_of_tokens() -> None:
    for name in ("scatter", "one_hot(topk) summed", "p * mask", "== arange"):
        function, choices = SPELLINGS[name]
        gm = graph_of(function, torch.randn(8, E), dynamic=True)
        (node,) = result_of(gm)
        found = routed(Backgrounds(gm.graph), node, 1, E, end_of(gm))
        assert isinstance(found, Routed), name
        run = densified(gm, found)
        for tokens in (2, 5, 31):
            logits = torch.randn(tokens, E)
            ids, values, dense = run(logits)
            assert ids.shape == (tokens, choices)
            torch.testing.assert_close(torch.zeros_like(dense).scatter(1, ids, values), dense)


SOFT_GATES: dict[str, Gates] = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": lambda x: x.sigmoid(),
    "relu": lambda x: x.relu(),
    "softmax over a finite number": lambda x: (
        torch.full_like(x, -1e9).scatter(1, top(x)[1], top(x)[0]).softmax(-1)
    ),
    "softmax over the tokens": lambda x: (
        torch.full_like(x, float("-inf")).scatter(1, top(x)[1], top(x)[0]).softmax(0)
    ),
    "drawn at random": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "something else elsewhere": lambda x: torch.full_like(x, 0.5).scatter(1, top(x)[1], top(x)[0]),
    "a sum": lambda x: scattered(x) + 0.1 * x.softmax(-1),
    "scattered along the tokens": lambda x: torch.zeros_like(x).scatter(
        0, x.topk(2, dim=0)[1], 1.0
    ),
    "written to afterwards": lambda x: scattered(x).add_(0.25),
    "a part written to": lambda x: _with_first_column(scattered(x)),
    "numbers of experts, one of them written to": lambda x: _compared_with(x, torch.arange(E)),
    "or of numbers that are not 1": lambda x: _or_of(torch.full_like(x, 3.0)) - 3,
    "numbers of experts as bool": lambda x: (top(x)[1][..., None] == torch.arange(E).bool()).sum(1),
}


def _or_of(threes: torch.Tensor) -> torch.Tensor:
    threes = threes.scatter(1, threes.topk(K)[1], 7.0)
    return torch.logical_or(threes, threes).to(threes.dtype)


def _compared_with(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    numbers[0] = E - 1
    return (top(logits)[1][..., None] == numbers).sum(1)


def _with_first_column(gates: torch.Tensor) -> torch.Tensor:
    gates = gates.clone()
    gates[:, :1].fill_(1.0)
    return gates


@pytest.mark.parametrize("name", SOFT_GATES)
def test_soft_gates_are_refused(name: str) -> None:
    gm = graph_of(SOFT_GATES[name], torch.randn(9, E))
    (node,) = result_of(gm)
    assert routed(Backgrounds(gm.graph), node, 1, E, end_of(gm)) == SOFT


def test_a_threshold_is_refused_for_its_ties() -> None:
    def gates(logits: torch.Tensor) -> torch.Tensor:
        least = torch.topk(logits, K)[0][..., -1, None]
        return logits.masked_fill(logits < least, float("-inf")).softmax(-1)

    gm = graph_of(gates, torch.randn(9, E))
    found = routed(Backgrounds(gm.graph), result_of(gm)[0], 1, E, end_of(gm))
    assert isinstance(found, str)
    assert "threshold" in found
    assert "tied" in found


def test_every_expert_chosen_is_refused() -> None:
    gm = graph_of(lambda x: torch.zeros_like(x).scatter(1, x.topk(E)[1], x), torch.randn(4, E))
    found = routed(Backgrounds(gm.graph), result_of(gm)[0], 1, E, end_of(gm))
    assert found == f"as many as {E} of its {E} experts have a weight for each token"


class Columns(nn.Module):
    def __init__(self, shift: bool) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values, ids = torch.topk(logits, K, dim=-1)
        return tuple(
            ((ids == (e + 1 if self.shift and e == 3 else e)) * values).sum(-1) for e in range(E)
        )


def test_columns_of_comparisons() -> None:
    gm = canonicalize(Columns(False), torch.randn(7, E))
    columns = result_of(gm)
    found = routed_columns(Backgrounds(gm.graph), columns, [end_of(gm)] * E)
    assert isinstance(found, Routed)
    assert (found.choices, found.distinct, found.dim) == (K, True, 1)


def test_columns_of_the_wrong_expert_are_soft() -> None:
    gm = canonicalize(Columns(True), torch.randn(7, E))
    assert routed_columns(Backgrounds(gm.graph), result_of(gm), [end_of(gm)] * E) == SOFT

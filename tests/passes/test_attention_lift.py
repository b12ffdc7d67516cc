"""Values of nodes as expressions of (batch, head, query, key): what they say and what they read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparse_compiler.passes.attention.assemble import renumbered
from sparse_compiler.passes.attention.facts import GraphFacts
from sparse_compiler.passes.attention.indices import Indices
from sparse_compiler.passes.attention.lift import Lifter
from sparse_compiler.passes.attention.lift_views import aligned
from sparse_compiler.passes.pointwise import NotLiftable
from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import B, Expr, H, K, Q, to_text
from sparse_compiler.static import StaticValues

T = torch.Tensor
BATCH, HEADS, QUERIES, KEYS = 2, 3, 6, 8
SIZES = (BATCH, HEADS, QUERIES, KEYS)
LOWEST = torch.finfo(torch.float32).min


class Lifted:
    """What a function of tensors computes, lifted at (b, h, q, k) and checked everywhere."""

    def __init__(self, function: Callable[..., T], *inputs: T) -> None:
        trace = make_fx(function, pre_dispatch=True, tracing_mode="fake")
        self.gm: fx.GraphModule = trace(*inputs)
        facts = GraphFacts(self.gm, StaticValues(self.gm, training=False))
        extents = dict(zip((B, H, Q, K), map(sympy.Integer, SIZES), strict=True))
        output = self.gm.graph.output_node()
        self.lifter = Lifter(facts, Indices(facts.symbols, extents), output, output)
        (node,) = output.all_input_nodes
        lifted = self.lifter.value(node, aligned(node, (B, H, Q, K)))
        self.expr, self.leaves, _ = renumbered(lifted, self.lifter.leaves, [])
        self._check(function, inputs)

    def _check(self, function: Callable[..., T], inputs: Sequence[T]) -> None:
        want = function(*(x.clone() for x in inputs))
        values = self._values(inputs)
        leaves = [values[leaf.node] for leaf in self.leaves]
        got = evaluate(self.expr, torch.zeros(SIZES), leaves, [], *SIZES)
        self.values, self.wanted = got, want.expand(SIZES).to(got.dtype)
        assert torch.equal(self.values, self.wanted), to_text(self.expr)
        for load in self.expr.loads():
            self._check_range(load, leaves)

    def _check_range(self, load: Expr, leaves: Sequence[T]) -> None:
        """A load never leaves its tensor, whatever branch it is in."""
        for index, size in zip(load.operands, leaves[load.slot].shape, strict=True):
            places = evaluate(index, torch.zeros(SIZES), leaves, [], *SIZES)
            assert int(places.min()) >= 0 and int(places.max()) < size, to_text(load)

    def _values(self, inputs: Sequence[T]) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                values[n] = super().run_node(n)
                return values[n]

        Recorder(self.gm).run(*(x.clone() for x in inputs))
        return values

    @property
    def text(self) -> str:
        return to_text(self.expr)

    @property
    def reads(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors that the expression loads."""
        return [tuple(leaf.node.meta["val"].shape) for leaf in self.leaves]


def rows() -> T:
    return torch.arange(QUERIES)[:, None]


def columns() -> T:
    return torch.arange(KEYS)[None, :]


def ids() -> T:
    return torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 3, 3]])


def keep() -> T:
    return torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1]])


def ones() -> T:
    return torch.ones(QUERIES, KEYS, dtype=torch.bool)


# Masks that depend on nothing but positions.
def hf_scaffold() -> T:
    """What Hugging Face adds to find packed sequences in position ids, of an arange."""
    position = (torch.arange(KEYS) + 0).unsqueeze(0).expand(BATCH, -1)
    first = position[:, :1] - 1
    packed = (torch.diff(position, prepend=first, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(BATCH)[:, None, None, None]
    q, k = torch.arange(QUERIES)[None, None, :, None], torch.arange(KEYS)[None, None, None, :]
    same = packed[batch, q] == packed[batch, k]
    return k.new_ones((), dtype=torch.bool) & same & (position[batch, k] <= position[batch, q])


POSITIONS = {
    "tril": (lambda: ones().tril(), "(le k q)"),
    "tril of a diagonal": (lambda: ones().tril(2), "(ge (sub q k) -2)"),
    "triu is zero": (lambda: ones().float().triu(1) == 0, "(le k q)"),
    "not triu": (lambda: ~ones().triu(1), "(le k q)"),
    "logical_not": (lambda: ones().triu(1).logical_not(), "(le k q)"),
    "arange": (lambda: columns() <= rows(), "(le k q)"),
    "arange with an offset": (lambda: columns() <= rows() + 2, "(ge (sub q k) -2)"),
    "bottom right": (lambda: rows() - columns() >= QUERIES - KEYS, "(ge (sub q k) -2)"),
    "cumsum of ones": (
        lambda: torch.ones(KEYS, dtype=torch.long).cumsum(0) - 1 <= rows(),
        "(le k q)",
    ),
    "minus infinity": (
        lambda: torch.full((QUERIES, KEYS), -math.inf).triu(1),
        "(where (le k q) 0.0 -inf)",
    ),
    "where": (lambda: torch.where(ones().tril(), 0.0, LOWEST), f"(where (le k q) 0.0 {LOWEST!r})"),
    "one minus": (
        lambda: (1.0 - ones().tril().float()) * -10000.0,
        "(where (le k q) -0.0 -10000.0)",
    ),
    "masked_fill": (
        lambda: torch.zeros(QUERIES, KEYS).masked_fill(~ones().tril(), -1e9),
        "(where (le k q) 0.0 -1000000000.0)",
    ),
    "window": (
        lambda: (columns() <= rows()) & (columns() > rows() - 3),
        "(and (le k q) (le (sub q k) 2))",
    ),
    "window of triangles": (
        lambda: ones().tril().logical_xor(ones().tril(-3)),
        "(and (le k q) (le (sub q k) 2))",
    ),
    "symmetric window": (
        lambda: (rows() - columns()).abs() <= 2,
        "(and (le (sub q k) 2) (ge (sub q k) -2))",
    ),
    "band": (
        lambda: ones().triu(-2) & ones().tril(2),
        "(and (le (sub q k) 2) (ge (sub q k) -2))",
    ),
    "chunks": (lambda: columns() // 4 == rows() // 4, "(eq (floordiv q 4) (floordiv k 4))"),
    "dilated": (
        lambda: ((rows() - columns()) % 2 == 0) & (columns() <= rows()),
        "(and (eq (mod (sub q k) 2) 0) (le k q))",
    ),
    "prefix": (lambda: (columns() < 3) | (columns() <= rows()), "(or (le k 2) (le k q))"),
    "flipped": (lambda: torch.arange(KEYS).flip(0)[None] <= rows(), "(ge (add q k) 7)"),
    "meshgrid": (
        lambda: torch.meshgrid(torch.arange(QUERIES), torch.arange(KEYS), indexing="ij")[0] > 2,
        "(ge q 3)",
    ),
    "eye": (lambda: torch.eye(QUERIES, KEYS).bool(), "(eq q k)"),
    "one_hot": (lambda: F.one_hot(torch.arange(QUERIES), KEYS).bool(), "(eq q k)"),
    "gather": (lambda: torch.arange(KEYS).flip(0).gather(0, torch.arange(KEYS)) > 3, "(le k 3)"),
    "packed scaffold": (hf_scaffold, "(le k q)"),
    "everything": (lambda: torch.full((QUERIES, KEYS), True), "true"),
}  # fmt: skip


@pytest.mark.parametrize(("mask", "text"), POSITIONS.values(), ids=POSITIONS)
def test_masks_of_positions(mask: Callable[[], T], text: str) -> None:
    assert Lifted(mask).text == text


# Masks that read tensors: the function, its inputs, the text, and the shapes that are read.
def documents(ids: T) -> T:
    return (ids[:, None, :QUERIES, None] == ids[:, None, None, :]) & (columns() <= rows())


def padding(keep: T) -> T:
    return (columns() <= rows()) & keep.to(torch.bool)[:, None, None, :]


def padding_by_index(keep: T) -> T:
    batch = torch.arange(BATCH)[:, None, None, None]
    return keep.bool()[batch, torch.arange(KEYS)[None, None, None, :]]


def expanded_padding(keep: T) -> T:
    """As BERT used to: expanded to [batch, 1, queries, keys] before it is inverted."""
    wide = keep[:, None, None, :].expand(BATCH, 1, QUERIES, KEYS).to(torch.float32)
    inverted = 1.0 - wide
    return inverted.masked_fill(inverted.to(torch.bool), LOWEST)


def bias_of_padding(keep: T) -> T:
    return (1.0 - keep[:, None, None, :].float()) * LOWEST


def global_tokens(keep: T) -> T:
    chosen = keep[:, None, None, :] == 0
    return chosen | chosen[..., :QUERIES].transpose(-1, -2) | ((rows() - columns()).abs() <= 1)


def packed_positions(position: T) -> T:
    packed = (torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return packed[:, None, :QUERIES, None] == packed[:, None, None, :]


def prefix_of_each(length: T) -> T:
    return (columns() < length[:, None, None, None]) | (columns() <= rows())


def slopes(keep: T) -> T:
    """BLOOM's: slopes times positions that depend on the padding."""
    base = torch.pow(torch.tensor(0.25), torch.arange(1, HEADS + 1, dtype=torch.int32))
    position = ((keep.cumsum(-1) - 1) * keep)[:, None, :]
    return (base[:, None] * position)[:, :, None, :]


READS = {
    "documents": (
        documents, (ids,),
        "(and (eq (load 0 i64 b q) (load 0 i64 b k)) (le k q))", [(BATCH, KEYS)],
    ),
    "padding": (padding, (keep,), "(and (le k q) (load 0 bool b k))", [(BATCH, KEYS)]),
    "padding by index": (padding_by_index, (keep,), "(load 0 bool b k)", [(BATCH, KEYS)]),
    "expanded padding": (expanded_padding, (keep,), None, [(BATCH, KEYS)]),
    "bias of padding": (
        bias_of_padding, (keep,), "(load 0 f32 b 0 0 k)", [(BATCH, 1, 1, KEYS)],
    ),
    "global tokens": (
        global_tokens, (keep,),
        "(or (or (load 0 bool b 0 0 k) (load 0 bool b 0 0 q)) "
        "(and (le (sub q k) 1) (ge (sub q k) -1)))",
        [(BATCH, 1, 1, KEYS)],
    ),
    "packed positions": (packed_positions, (ids,), None, [(BATCH, KEYS)]),
    "prefix of each": (
        prefix_of_each, (lambda: torch.tensor([2, 5]),),
        "(or (load 0 bool b 0 0 k) (le k q))", [(BATCH, 1, 1, KEYS)],
    ),
    "slopes": (slopes, (keep,), "(load 0 f32 b h k)", [(BATCH, HEADS, KEYS)]),
}  # fmt: skip


@pytest.mark.parametrize(("mask", "inputs", "text", "reads"), READS.values(), ids=READS)
def test_masks_that_read(
    mask: Callable[..., T],
    inputs: tuple[Callable[[], T], ...],
    text: str | None,
    reads: list[tuple[int, ...]],
) -> None:
    lifted = Lifted(mask, *(make() for make in inputs))
    assert lifted.reads == reads, lifted.text
    assert text is None or lifted.text == text


def test_what_only_combines_tensors_is_read_as_one() -> None:
    bias, other = torch.randn(HEADS, QUERIES, KEYS), torch.randn(1, QUERIES, KEYS)
    lifted = Lifted(lambda x, y: (x * 2 + y).exp(), bias, other)
    assert lifted.text == "(load 0 f32 h q k)"


def test_a_bias_for_all_batches_stays_small() -> None:
    """Adding a padding mask to it would make a tensor of every batch, query and key."""

    def mask(bias: T, keep: T) -> T:
        return bias + torch.where(keep.bool()[:, None, None, :], 0.0, LOWEST)

    lifted = Lifted(mask, torch.randn(1, HEADS, QUERIES, KEYS), keep())
    assert lifted.reads == [(1, HEADS, QUERIES, KEYS), (BATCH, KEYS)]


def test_keys_of_a_square_leaf_come_last() -> None:
    lifted = Lifted(lambda x: x.permute(2, 0, 1).contiguous(), torch.randn(QUERIES, KEYS, HEADS))
    assert lifted.text == "(load 0 f32 h q k)"


def test_positions_that_a_tensor_holds_are_left_to_the_graph() -> None:
    """It checks them: a kernel that did not would read what is not there."""
    table = torch.randn(5, HEADS)
    bucket = torch.randint(0, 5, (QUERIES, KEYS))
    lifted = Lifted(lambda t, b: t[b].permute(2, 0, 1), table, bucket)
    assert lifted.text == "(load 0 f32 h q k)" and lifted.reads == [(HEADS, QUERIES, KEYS)]
    with pytest.raises(IndexError):
        Lifted(lambda t, b: t[b].permute(2, 0, 1), table, bucket + 4)


def test_positions_that_are_computed_are_read_from_the_table() -> None:
    table = torch.randn(QUERIES + KEYS, HEADS)
    place = lambda: columns() - rows() + QUERIES - 1  # noqa: E731
    lifted = Lifted(lambda t: F.embedding(place(), t).permute(2, 0, 1), table)
    assert lifted.text == "(load 0 f32 (add (sub k q) 5) h)"


def test_negative_positions_count_from_the_end() -> None:
    table = torch.randn(16)
    lifted = Lifted(lambda t: t[columns() - rows()], table)
    assert lifted.reads == [(QUERIES, KEYS)]  # where they count from is not known here
    assert Lifted(lambda t: t[columns() - 8], table).reads == [(16,)]


def test_branches_that_are_not_taken_read_inside_too() -> None:
    left, right = torch.randn(QUERIES, 3), torch.randn(QUERIES, KEYS - 3)
    lifted = Lifted(lambda x, y: torch.cat([x, y], 1), left, right)
    assert sorted(lifted.reads) == [(QUERIES, 3), (QUERIES, KEYS - 3)]
    padded = Lifted(lambda x: F.pad(x, (2, 1), value=1.5), right)
    assert padded.reads == [(QUERIES, KEYS - 3)]


def test_buckets_of_logarithms_are_computed_by_the_graph() -> None:
    """A kernel's logarithm may round to the other side of a bucket's edge."""

    def bucket() -> T:
        distance = (rows() - columns()).abs()
        far = 2 + (torch.log(distance.float() / 2) / math.log(4) * 2).to(torch.int64)
        return torch.where(distance < 2, distance, far.clamp(max=3)) == 2

    assert Lifted(bucket).reads == [(QUERIES, KEYS)]


def test_bfloat16_rounds_where_the_graph_does() -> None:
    rounded = Lifted(lambda: (columns() * 0.3).to(torch.bfloat16) + 0.001)
    assert rounded.expr.op == "load"
    exact = Lifted(lambda: torch.where(columns() <= rows(), 0.0, -1e9).to(torch.bfloat16))
    assert exact.text == f"(where (le k q) 0.0 {float(torch.tensor(-1e9).bfloat16())!r})"


def test_in_place_operators() -> None:
    def mask(keep: T) -> T:
        bias = torch.zeros(BATCH, 1, QUERIES, KEYS)
        bias = bias.masked_fill_(columns() > rows(), LOWEST)
        return bias.masked_fill_(keep[:, None, None, :] == 0, LOWEST)

    lifted = Lifted(mask, keep())
    assert lifted.reads == [(BATCH, 1, 1, KEYS)]


def test_what_is_written_to_later_is_read_afterwards() -> None:
    def mask() -> T:
        result = torch.zeros(QUERIES, KEYS)
        result[2:, :3] = 1.0
        return result + 1

    lifted = Lifted(mask)
    assert lifted.expr.op == "load"


def test_what_is_written_to_after_it_was_used() -> None:
    def mask(x: T) -> T:
        result = x + columns()
        x.add_(1.0)
        return result

    lifted = Lifted(mask, torch.zeros(QUERIES, 1))
    assert lifted.expr.op == "load" and lifted.reads == [(QUERIES, KEYS)]


def test_what_cannot_be_read() -> None:
    with pytest.raises(NotLiftable, match="complex64"):
        Lifted(lambda x: x, torch.zeros(QUERIES, KEYS, dtype=torch.complex64))


# Views: any sequence of them shows the elements of 8 * q + k in another order.
@st.composite
def view_chains(draw: st.DrawFn) -> list[Callable[[T], T]]:
    def a_view() -> Callable[[T], T]:
        kind = draw(st.integers(0, 11))
        a, b = draw(st.integers(0, 5)), draw(st.integers(0, 5))
        shapes = [(48,), (6, 8), (8, 6), (2, 24), (3, 2, 8), (2, 3, 4, 2), (1, 6, 2, 4), (4, 12)]

        def apply(x: T) -> T:
            i, j = a % x.dim(), b % x.dim()
            size = x.shape[i]
            if kind == 0:
                return x.transpose(i, j)
            if kind == 1:
                return x.reshape(shapes[(a + 2 * b) % len(shapes)])
            if kind == 2:
                return x.flip(i)
            if kind == 3:
                return x.roll(b - 2, i)
            if kind == 4:
                return x.unsqueeze(i).squeeze(j)
            if kind == 5:
                cut = b % (size + 1)
                return torch.cat([x.narrow(i, cut, size - cut), x.narrow(i, 0, cut)], i)
            if kind == 6:
                return torch.stack(x.unbind(i)[::-1], i)
            if kind == 7:
                return x.unsqueeze(i).expand(*x.shape[:i], 3, *x.shape[i:]).select(i, b % 3)
            if kind == 8:
                return F.pad(x, (2, 1)).narrow(-1, 2, x.shape[-1])
            if kind == 9:
                return x.repeat_interleave(2, i).unflatten(i, (size, 2)).select(i + 1, b % 2)
            if kind == 10:
                return x.index_select(i, torch.arange(size).flip(0))
            parts = x.chunk(2, i)
            return torch.cat(parts[::-1], i)

        return apply

    return [a_view() for _ in range(draw(st.integers(1, 6)))]


@settings(max_examples=60)
@given(view_chains())
def test_views(chain: list[Callable[[T], T]]) -> None:
    def moved(x: T) -> T:
        for view in chain:
            x = view(x)
        return x.reshape(QUERIES, KEYS)

    for lifted in (
        Lifted(lambda: moved(torch.arange(48).view(6, 8))),
        Lifted(moved, torch.randn(6, 8)),
    ):
        assert torch.equal(lifted.values, lifted.wanted)


# Arithmetic: any expression of positions and of what tensors hold.
@st.composite
def formulas(draw: st.DrawFn) -> Callable[[T, T], T]:
    def number(depth: int) -> Callable[..., T]:
        kind = draw(st.integers(0, 10)) if depth else draw(st.integers(0, 3))
        c = draw(st.integers(1, 5))
        if kind < 4:
            return [
                lambda ids, keep: rows(),
                lambda ids, keep: columns(),
                lambda ids, keep: ids[:, None, None, :],
                lambda ids, keep: ids[:, None, :QUERIES, None] - c,
            ][kind]
        x, y = number(depth - 1), number(depth - 1)
        if kind == 10:
            test = truth(depth - 1)
            return lambda *given: torch.where(test(*given), x(*given), y(*given))
        return {
            4: lambda *given: x(*given) + y(*given),
            5: lambda *given: c * x(*given) - y(*given),
            6: lambda *given: x(*given) // c,
            7: lambda *given: x(*given) % c,
            8: lambda *given: (x(*given) - c).abs().clamp(max=c + 3),
            9: lambda *given: torch.maximum(x(*given), y(*given)),
        }[kind]

    def truth(depth: int) -> Callable[..., T]:
        kind = draw(st.integers(0, 7)) if depth else draw(st.integers(0, 3))
        if kind == 0:
            return lambda ids, keep: keep.bool()[:, None, None, :]
        if kind < 4:
            x, y = number(max(depth - 1, 0)), number(max(depth - 1, 0))
            compare = (torch.le, torch.ne, torch.gt)[kind - 1]
            return lambda *given: compare(x(*given), y(*given))
        x, y = truth(depth - 1), truth(depth - 1)
        if kind == 7:
            return lambda *given: ~x(*given)
        join = (torch.logical_and, torch.logical_or, torch.bitwise_xor)[kind - 4]
        return lambda *given: join(x(*given), y(*given))

    return truth(4) if draw(st.booleans()) else number(4)


@settings(max_examples=60)
@given(formulas())
def test_formulas(formula: Callable[[T, T], T]) -> None:
    def expanded(ids: T, keep: T) -> T:
        return formula(ids, keep).expand(SIZES[0], 1, *SIZES[2:])

    lifted = Lifted(expanded, ids(), keep())
    assert torch.equal(lifted.values, lifted.wanted)

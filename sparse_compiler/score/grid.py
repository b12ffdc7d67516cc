"""Interval arithmetic over all tiles of the score matrix at once.

What depends on at most one of query and key is evaluated exactly, at every position, and pooled
over each tile; so is a tensor that both index, one of them each dimension. The rest follows by
interval rules: for differences and comparisons of a query part and a key part these are exact, too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from sparse_compiler.score import bounds
from sparse_compiler.score.affine import Affine, Comparison
from sparse_compiler.score.bounds import EITHER, Interval, Truth, disjoin, join
from sparse_compiler.score.evaluate import DIMENSIONS, Evaluator, Line, Value
from sparse_compiler.score.intervals import S_BOUND, Intervals, Part, Ranges, split
from sparse_compiler.score.node import Expr

BLOCK_Q = 64
BLOCK_K = 64

_BLOCKS = {"q": BLOCK_Q, "k": BLOCK_K}


class Grid(Intervals):
    """Intervals and truths that broadcast to [B, H, tiles of queries, tiles of keys].

    Args:
        leaves: what ``load`` reads, by slot.
        ints: the runtime integers.
        ranges: b, h, q and k; q and k begin at a tile.
        static: what holds for any leaves.
        measured: what holds anywhere for these leaves.
        known: a grid over other queries, whose findings that depend on no query are taken over.
        device: where tensors are made.
    """

    def __init__(
        self,
        leaves: Sequence[torch.Tensor],
        ints: Sequence[int],
        ranges: Sequence[range],
        static: Ranges,
        measured: Ranges,
        known: Grid | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._leaves = leaves
        self._ints = ints
        self._spans = ranges
        self._device = device
        self._exact = Evaluator(leaves, ints, ranges, device=device)
        self.static = static
        self.measured = measured
        if known is not None:
            self._intervals = _without_q(known._intervals)
            self._truths = _without_q(known._truths)

    def leaf(self, expr: Expr) -> Interval | None:
        if expr.depends_on("s"):
            return (-S_BOUND, S_BOUND) if expr.op == "s" else None
        if (expr.depends_on("q") and expr.depends_on("k")) or _is_inexact(expr):
            return self._loaded(expr) if expr.op == "load" else None
        line = Line.of(expr) if expr.type == "int" else None
        if line is not None and line.letter in _BLOCKS:
            return self._line(line)
        return self._bounds_of(expr, _pooled(self._exact(expr)))

    def leaf_truth(self, expr: Expr) -> Truth | None:
        if expr.depends_on("s"):
            return None
        if (expr.depends_on("q") and expr.depends_on("k")) or _is_inexact(expr):
            if expr.op != "load":
                return None
            found = self._tiles_of(expr)
            return EITHER if found is None else _all_or_none(found)
        return _all_or_none(_pooled(self._exact(expr)))

    def careful(self, expr: Expr) -> bool:
        (a, b), (c, d) = (self.static.ends(item) for item in expr.operands)
        if expr.op == "mul":
            return not all(math.isfinite(end) for end in (a, b, c, d))
        return not ((a > -math.inf or d < math.inf) and (b < math.inf or c > -math.inf))

    def compared(self, expr: Expr) -> Truth:
        found = Comparison.of(expr)
        if found is None:
            return super().compared(expr)
        # The query part against the key part: no tensor of all tiles but the result.
        left_parts, right_parts = _sides(found.terms)
        left, (low, high) = self.total(left_parts), self.total(right_parts)
        if found.bound:
            low, high = low + found.bound, high + found.bound
        if found.op == "le":
            return left[1] <= low, left[0] > high
        if found.op == "ge":
            return left[0] >= high, left[1] < low
        same = join(left[0] == high, left[1] == low)
        apart = disjoin(left[0] > high, left[1] < low)
        return (same, apart) if found.op == "eq" else (apart, same)

    def _line(self, line: Line) -> Interval:
        """A multiple of q or k plus a number: its ends are at a tile's ends."""
        span = self._spans[DIMENSIONS[line.letter]]
        block = _BLOCKS[line.letter]
        first = torch.arange(span.start, span.stop, block, dtype=torch.float64, device=self._device)
        if line.letter == "q":
            first = first.unsqueeze(1)
        ends: Interval = first, (first + (block - 1)).clamp_(max=span.stop - 1)
        if line.factor != 1:
            ends = bounds.scaled(ends, float(line.factor))
        offset = float(line.start(self._ints))
        return (ends[0] + offset, ends[1] + offset) if offset else ends

    def _bounds_of(self, expr: Expr, ends: tuple[Value, Value]) -> Interval:
        low, high = (
            (end if expr.type == "float" else end.double())
            if isinstance(end, torch.Tensor)
            else float(end)
            for end in ends
        )
        return (low, high) if expr.type == "float" else bounds.limited((low, high))

    def _loaded(self, expr: Expr) -> Interval:
        ends = self._tiles_of(expr)
        return self.measured.interval(expr) if ends is None else self._bounds_of(expr, ends)

    def _tiles_of(self, expr: Expr) -> tuple[Value, Value] | None:
        """The ends of a loaded value in each tile; None if an index is not known that well."""
        if any(index.depends_on("q") and index.depends_on("k") for index in expr.operands):
            return None
        if _is_inexact(expr):
            return None
        steps = [_step(expr, "q", BLOCK_Q), _step(expr, "k", BLOCK_K)]
        spans = list(self._spans)
        spans[2:] = (range(r.start, r.stop, n) for r, n in zip(spans[2:], steps, strict=True))
        exact = Evaluator(self._leaves, self._ints, spans, device=self._device)
        return _pooled(exact(expr), BLOCK_Q // steps[0], BLOCK_K // steps[1])


@functools.lru_cache(maxsize=4096)
def _sides(terms: tuple[tuple[Expr, int], ...]) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of a sum that depend on q, and minus those that do not."""
    right = [(term, -factor) for term, factor in terms if not term.depends_on("q")]
    left = [(term, factor) for term, factor in terms if term.depends_on("q")]
    return split(tuple(left)), split(tuple(right))


def _without_q(found: dict[Expr, tuple]) -> dict[Expr, tuple]:
    return {expr: value for expr, value in found.items() if not expr.depends_on("q")}


@functools.lru_cache(maxsize=4096)
def _is_inexact(expr: Expr) -> bool:
    """Whether kernels may round the value in another way than PyTorch."""
    functions = ("exp", "log", "tanh", "erf", "sigmoid", "pow")
    divisions = ("floordiv", "mod")
    return any(
        node.op in functions or (node.op in divisions and node.type == "float")
        for node in expr.walk()
    )


@functools.lru_cache(maxsize=1024)
def _step(expr: Expr, letter: str, block: int) -> int:
    """A divisor n of ``block`` such that the value is constant over aligned runs of n positions."""
    if not expr.depends_on(letter):
        return block
    if expr.op == "floordiv" and expr.operands[1].op == "const":
        sum_ = Affine.of(expr.operands[0])
        if len(sum_.terms) == 1 and sum_.terms[0][1] == 1 and sum_.terms[0][0].op == letter:
            return math.gcd(block, expr.operands[1].value, sum_.constant)
    return min((_step(item, letter, block) for item in expr.operands), default=1)


def _pooled(value: Value, rows: int = BLOCK_Q, columns: int = BLOCK_K) -> tuple[Value, Value]:
    """The least and greatest of every ``rows`` queries and ``columns`` keys."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value, value
    low = high = value
    for dim, block in ((3, columns), (2, rows)):
        if value.shape[dim] == 1 or block == 1:
            continue
        first = _cut(low, dim, block)
        if low is high and not low.is_floating_point():
            low, high = torch.aminmax(first, dim=dim + 1)
        else:  # faster of floats
            last = first if low is high else _cut(high, dim, block)
            low, high = first.amin(dim + 1), last.amax(dim + 1)
    return low, high


def _cut(x: torch.Tensor, dim: int, block: int) -> torch.Tensor:
    """The dimension as blocks; the last one is filled up with its last value."""
    rest = x.shape[dim] % block
    if rest:
        shape = [-1] * 4
        shape[dim] = block - rest
        x = torch.cat([x, x.narrow(dim, x.shape[dim] - 1, 1).expand(shape)], dim)
    return x.unflatten(dim, (-1, block))


def _all_or_none(ends: tuple[Value, Value]) -> Truth:
    """The truth of a bool of which the least and greatest are known."""
    low, high = ends
    if isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor):
        return low, ~high
    return bool(low), not high

"""Proofs that something is a causal mask: a triangle of ones, a comparison of positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.indices import Dims, Index, NotMultilinear, same
from sparse_compiler.passes.linear_attention.network import Causal, leaf
from sparse_compiler.passes.linear_attention.views import CASTS, MOVES, VIEWS, view_of
from sparse_compiler.static import StaticExpression, arguments

aten = torch.ops.aten

_COUNTS = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_SUMS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)


@dataclasses.dataclass(frozen=True)
class Fact:
    """A buffer was found to hold a causal mask, and the rewrite depends on it.

    Attributes:
        expression: whose value it is.
        triangle: ``"tril"`` or ``"triu"``, which of the two is ones.
        diagonal: as ``torch.tril`` takes it.
    """

    expression: StaticExpression
    triangle: str
    diagonal: int

    def holds(self, value: torch.Tensor) -> bool:
        """Whether the buffer still holds it."""
        return triangle_of(value) == (self.triangle, self.diagonal)


@dataclasses.dataclass(frozen=True)
class Position:
    """An integer tensor: a constant plus multiples of the indices of its dimensions."""

    dims: Dims
    factors: Mapping[Index, int]
    constant: int


def below(row: Index, column: Index, diagonal: Any) -> Causal:
    """The condition ``column <= row + diagonal``.

    Raises:
        NotMultilinear: it compares different numbers of positions, or allows for later ones.
    """
    if not same(row.size, column.size):
        raise NotMultilinear("a causal mask is not square")
    if diagonal not in (0, -1):
        raise NotMultilinear(f"a mask keeps up to diagonal {diagonal}, not 0 or -1")
    return Causal(row, column, strict=diagonal == -1)


def band(node: fx.Node, dims: Dims) -> Causal:
    """What a ``tril`` or ``triu`` keeps of a tensor with these dimensions.

    Raises:
        NotMultilinear: the tensor is not square, or the diagonal is another one.
    """
    if len(dims) < 2 or len(dims[-1]) != 1 or len(dims[-2]) != 1:
        raise NotMultilinear("a triangle of merged dimensions is taken")
    (row,), (column,) = dims[-2:]
    diagonal = arguments(node)["diagonal"]
    if "tril" in str(node.target):
        return below(row, column, diagonal)
    return below(column, row, -diagonal)


def complement(condition: Causal) -> Causal:
    """The condition that holds where this one does not."""
    return Causal(condition.column, condition.row, not condition.strict)


def triangle_of(value: torch.Tensor | None) -> tuple[str, int] | None:
    """The triangle of ones that a tensor [1, ..., n, n] holds, if it does: name and diagonal."""
    if value is None or value.dim() < 2 or value.numel() != value.shape[-1] ** 2:
        return None
    matrix = value.reshape(value.shape[-2:])
    ones = matrix != 0
    if matrix.dtype is not torch.bool and not torch.equal(ones.to(matrix.dtype), matrix):
        return None
    every = torch.ones_like(ones)
    for name, diagonal in (("tril", 0), ("tril", -1), ("triu", 1), ("triu", 0)):
        if torch.equal(ones, getattr(torch, name)(every, diagonal)):
            return name, diagonal
    return None


def comparison(
    name: str, left: Any, right: Any, written: Collection[fx.Node]
) -> tuple[Dims, Causal]:
    """``left <= right`` and the like, of positions: its dimensions, and the condition it is.

    Raises:
        NotMultilinear: something else is compared.
    """
    total = _total(_position(left, written), _position(right, written), -1)
    up = [index for index, factor in total.factors.items() if factor == 1]
    down = [index for index, factor in total.factors.items() if factor == -1]
    if len(up) != 1 or len(down) != 1 or len(total.factors) != 2:
        raise NotMultilinear("something else than two positions is compared")
    column, row, constant = up[0], down[0], total.constant
    if name in ("ge", "gt"):
        column, row, constant = row, column, -constant
    # Now: column - row + constant <= 0, or < 0.
    return total.dims, below(row, column, -constant - (name in ("lt", "gt")))


def _position(value: Any, written: Collection[fx.Node]) -> Position:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
        return Position((), {}, int(value))
    if not isinstance(value, fx.Node) or value.op != "call_function" or value in written:
        raise NotMultilinear("something else than positions is compared")
    if value.target in _COUNTS:
        given = arguments(value)
        start = given.get("start", 0)
        if not isinstance(start, int) or given.get("step", 1) != 1:
            raise NotMultilinear("positions are not counted one by one")
        dims = leaf(value).dims
        return Position(dims, dict.fromkeys(dims[0], 1), start)
    if value.target in VIEWS:
        source = _position(value.args[0], written)
        dims, names = view_of(value, source.dims)
        if any(len(names.get(index, (index,))) != 1 for index in source.factors):
            raise NotMultilinear("positions are split")
        factors = {names.get(index, (index,))[0]: f for index, f in source.factors.items()}
        return Position(dims, factors, source.constant)
    if value.target in MOVES or value.target in CASTS:
        return _position(value.args[0], written)
    if value.target in _SUMS and value.kwargs.get("alpha", 1) == 1:
        sign = 1 if "add" in str(value.target) else -1
        left, right = (_position(operand, written) for operand in value.args[:2])
        return _total(left, right, sign)
    raise NotMultilinear("something else than positions is compared")


def _total(left: Position, right: Position, sign: int) -> Position:
    """The sum (or difference) of positions that do not share a dimension."""
    rank = max(len(left.dims), len(right.dims))
    one, other = (((),) * (rank - len(x.dims)) + x.dims for x in (left, right))
    if any(a and b for a, b in zip(one, other, strict=True)):
        raise NotMultilinear("positions of one dimension are compared")
    dims = tuple(a or b for a, b in zip(one, other, strict=True))
    factors = {**left.factors, **{index: sign * f for index, f in right.factors.items()}}
    return Position(dims, factors, left.constant + sign * right.constant)

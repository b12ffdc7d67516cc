"""Operators that make tensors, put them together, or pick from them by index, as expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import Index
from sparse_compiler.passes.attention.symbols import sizes_of, symbolic
from sparse_compiler.passes.pointwise import Given, NotLiftable
from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import Expr
from sparse_compiler.score.node import ZERO

if TYPE_CHECKING:
    from sparse_compiler.passes.attention.lift import Lifter

Rule = Callable[["Lifter", fx.Node, Given, Index], Expr]


def _arange(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    start, step = (lift.operand(given.get(n, v), ()) for n, v in (("start", 0), ("step", 1)))
    whole = (symbolic(v.value) for v in (start, step) if v.op == "const")
    if not all(number == int(number) for number in whole):
        raise NotLiftable("it counts in fractions")
    return e.add(e.to_int(start), e.mul(index[0], e.to_int(step)))


def _filled(value: Any) -> Rule:
    def rule(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
        return lift.operand(given[value] if isinstance(value, str) else value, ())

    return rule


def _eye(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    return e.eq(*index)


def _triangle(lower: bool) -> Rule:
    def rule(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
        diagonal = lift.operand(given["diagonal"], ())
        row, column = index[-2:]
        compare = e.le if lower else e.ge
        kept = compare(column, e.add(row, diagonal))
        return e.where(kept, lift.value(given["self"], index), 0)

    return rule


def _cat(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    pieces = given["tensors"]
    dim = given["dim"] % len(index)
    starts, total = [], symbolic(0)
    for piece in pieces:
        starts.append(total)
        total = total + sizes_of(piece)[dim]
    return _chosen(lift, pieces, starts, index, dim)


def _chosen(
    lift: Lifter, pieces: Sequence[fx.Node], starts: Sequence[Any], index: Index, dim: int
) -> Expr:
    """The element of the piece that ``index[dim]`` falls into; pieces begin at ``starts``."""
    at = index[dim]
    found: Expr | None = None
    for place in reversed(range(len(pieces))):
        start = lift.indices.size(starts[place])
        if lift.indices.less(at, starts[place]):
            continue
        value = lift.value(pieces[place], (*index[:dim], e.sub(at, start), *index[dim + 1 :]))
        end = starts[place + 1] if place + 1 < len(starts) else None
        if found is None:
            found = value
        else:
            assert end is not None
            found = e.where(e.lt(at, lift.indices.size(end)), value, found)
        if lift.indices.not_negative(e.sub(at, start)):
            break
    assert found is not None
    return found


def _stack(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    pieces = given["tensors"]
    dim = given["dim"] % len(index)
    inner = (*index[:dim], *index[dim + 1 :])
    if index[dim].op == "const":
        return lift.value(pieces[index[dim].value], inner)
    found = lift.value(pieces[-1], inner)
    for place in reversed(range(len(pieces) - 1)):
        found = e.where(e.le(index[dim], place), lift.value(pieces[place], inner), found)
    return found


def _pad(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    if given.get("mode", "constant") != "constant":
        raise NotLiftable("it pads with more than a constant")
    x, amounts = given["self"], [lift.operand(n, ()) for n in given["pad"]]
    inside, moved = e.TRUE, list(index)
    for place in range(len(amounts) // 2):
        dim = len(index) - 1 - place
        at = moved[dim] = e.sub(index[dim], amounts[2 * place])
        size = sizes_of(x)[dim]
        if not lift.indices.not_negative(at):
            inside = e.and_(inside, e.ge(at, 0))
        if not lift.indices.less(at, size):
            inside = e.and_(inside, e.lt(at, lift.indices.size(size)))
    value = 0 if given.get("value") is None else given["value"]
    return e.where(inside, lift.value(x, tuple(moved)), lift.operand(value, ()))


def _diff(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    if given["n"] != 1 or given["self"].meta["val"].dtype is torch.bool:
        raise NotLiftable("it differs more than once, or bools")
    dim = given["dim"] % len(index)
    pieces = [given[n] for n in ("prepend", "self", "append") if given.get(n) is not None]
    starts, total = [], symbolic(0)
    for piece in pieces:
        starts.append(total)
        total = total + sizes_of(piece)[dim]
    after = (*index[:dim], e.add(index[dim], 1), *index[dim + 1 :])
    left, right = (_chosen(lift, pieces, starts, at, dim) for at in (index, after))
    return e.sub(right, left)


def _cumsum(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    x = given["self"]
    dim = given["dim"] % len(index)
    value = lift.along(x, index, dim)
    if value.type == "float":
        raise NotLiftable("it adds up floats")
    return e.mul(value, e.add(index[dim], 1))


def _picked(lift: Lifter, table: fx.Node, at: Expr, dim: int, wraps: bool = True) -> Expr:
    """A position of ``table`` along ``dim``, computed from indices alone and known to be one.

    What is picked at positions that are read from a tensor stays an operator of the graph, which
    checks them.
    """
    size = sizes_of(table)[dim]
    if at.depends_on("load") or at.type != "int":
        raise NotLiftable("it picks elements at positions that a tensor holds")
    if wraps and not lift.indices.not_negative(at):
        from_end = e.add(at, lift.indices.size(size))
        at = from_end if lift.indices.less(at, 0) else e.where(e.lt(at, 0), from_end, at)
    if not lift.indices.below(at, size):
        raise NotLiftable("it picks elements at positions whose range is not known")
    return at


def _index(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    table = given["self"]
    picks = list(given["indices"])
    rank = table.meta["val"].dim()
    picks += [None] * (rank - len(picks))
    used = [place for place, pick in enumerate(picks) if pick is not None]
    tensors = [pick for pick in picks if pick is not None]
    if any(pick.meta["val"].dtype in (torch.bool, torch.uint8) for pick in tensors):
        raise NotLiftable("it picks elements where a mask holds")
    width = max(pick.meta["val"].dim() for pick in tensors)
    # Where the picked dimensions go: to the first of them, or in front if others lie between.
    together = used == list(range(used[0], used[-1] + 1))
    front = used[0] if together else 0
    where = index[front : front + width]
    rest = iter((*index[:front], *index[front + width :]))
    inner = []
    for dim, pick in enumerate(picks):
        if pick is None:
            inner.append(next(rest))
        else:
            inner.append(_picked(lift, table, lift.operand(pick, where), dim))
    return lift.value(table, tuple(inner))


def _index_select(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    table = given["self"]
    dim = given["dim"] % len(index)
    at = _picked(lift, table, lift.value(given["index"], (index[dim],)), dim, wraps=False)
    return lift.value(table, (*index[:dim], at, *index[dim + 1 :]))


def _gather(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    table = given["self"]
    dim = given["dim"] % len(index)
    at = _picked(lift, table, lift.value(given["index"], index), dim, wraps=False)
    return lift.value(table, (*index[:dim], at, *index[dim + 1 :]))


def _take_along(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    if given["dim"] is None:
        raise NotLiftable("it picks from a flattened tensor")
    table = given["self"]
    dim = given["dim"] % len(index)
    at = _picked(lift, table, lift.operand(given["indices"], index), dim, wraps=False)
    shape = sizes_of(table)
    inner = [ZERO if size == 1 else i for size, i in zip(shape, index, strict=True)]
    inner[dim] = at
    return lift.value(table, tuple(inner))


def _embedding(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    table = given["weight"]
    at = _picked(lift, table, lift.value(given["indices"], index[:-1]), 0, wraps=False)
    return lift.value(table, (at, index[-1]))


def _one_hot(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    if given["num_classes"] == -1:
        raise NotLiftable("it has as many classes as a tensor says")
    return e.eq(lift.value(given["self"], index[:-1]), index[-1])


def _scalar(lift: Lifter, node: fx.Node, given: Given, index: Index) -> Expr:
    return lift.operand(given["s"], ())


MAKERS: dict[str, Rule] = {
    "arange": _arange,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), _filled(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("full", "full_like", "new_full"), _filled("fill_value")),
    "fill": _filled("value"),
    "scalar_tensor": _scalar,
    "eye": _eye,
}
RULES: dict[str, Rule] = {
    **MAKERS,
    "tril": _triangle(lower=True),
    "triu": _triangle(lower=False),
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "stack": _stack,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "diff": _diff,
    "cumsum": _cumsum,
    "index": _index,
    "index_select": _index_select,
    "gather": _gather,
    "take_along_dim": _take_along,
    "embedding": _embedding,
    "one_hot": _one_hot,
}

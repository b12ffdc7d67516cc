"""Index maps: where in its input an operator that only moves elements finds each of them.

``transpose``, ``view``, ``expand``, ``slice``, ``flip``, ``roll``, ``repeat_interleave`` and their
like. Read from shapes where shapes say it all, so that spellings of one view need one rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.attention.indices import Indices
from sparse_compiler.passes.attention.symbols import sizes_of, symbolic
from sparse_compiler.passes.pointwise import NotLiftable
from sparse_compiler.score.expr import Expr, add, const, mul, sub
from sparse_compiler.score.node import ZERO
from sparse_compiler.static import arguments

Index = tuple[Expr, ...]
Place = tuple[fx.Node, Index]
Rule = Callable[[Indices, fx.Node, dict[str, Any], Index], Place]


def schema_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload; ``add_`` is ``add``."""
    if node.target is operator.getitem:
        return "getitem"
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = str(node.target._schema.name).removeprefix("aten::")
    return name if name.endswith("__") else name.removesuffix("_")


def source(indices: Indices, node: fx.Node, index: Index) -> Place | None:
    """The input and the index in it of the element of ``node`` at ``index``.

    Returns:
        None if the operator does more than to move elements.

    Raises:
        NotLiftable: it moves them to places that no expression tells.
    """
    name = schema_name(node)
    if name == "getitem":
        return _part(indices, node, index)
    rule = _RULES.get(name)
    return None if rule is None else rule(indices, node, arguments(node), index)


def is_whole_view(node: fx.Node) -> bool:
    """Whether each element of the input is one of the result, and the other way round."""
    return schema_name(node) in (*_SAME_ORDER, *_TURNS)


def _same_order(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    have, want = sizes_of(node), sizes_of(first)
    if have == want:
        return first, index
    # Leading and trailing dimensions that stay are kept out of the arithmetic.
    lead = _alike(have, want)
    tail = _alike(have[lead:][::-1], want[lead:][::-1])
    middle = slice(lead, len(have) - tail)
    whole = indices.join(index[middle], have[middle])
    inner = indices.split(whole, want[lead : len(want) - tail])
    return first, (*index[:lead], *inner, *index[len(index) - tail :])


def _alike(left: list[Any], right: list[Any]) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def _turned(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    rank = first.meta["val"].dim()
    # Sizes that tell the dimensions apart: the result's shape is the permutation.
    tagged = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    moved = node.target(tagged, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    at = dict(zip((size - 2 for size in moved.shape), index, strict=True))
    return first, tuple(at[dim] for dim in range(rank))


def aligned(node: fx.Node, index: Index) -> Index:
    """The index of a broadcast operand at an index of the result."""
    shape = sizes_of(node)
    last = index[len(index) - len(shape) :]
    return tuple(ZERO if size == 1 else i for size, i in zip(shape, last, strict=True))


def _expand(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first, aligned(first, index)


def _dim(given: dict[str, Any], rank: int, name: str = "dim") -> int:
    dim: int = given[name]
    return dim % rank


def _at(index: Index, dim: int, value: Expr) -> Index:
    return (*index[:dim], value, *index[dim + 1 :])


def _offset(indices: Indices, value: Any, size: Any) -> Expr:
    """A position along a dimension, counted from its end if negative."""
    if value is None:
        return ZERO
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    number = symbolic(value)
    if number.is_Integer:
        if number < 0:
            number = max(number + size, 0) if size.is_Integer else number + size
        elif size.is_Integer:
            number = min(number, size)
    elif number.is_nonnegative is not True:
        raise NotLiftable(f"a slice begins at {number}, which may be negative")
    return indices.size(number)


def _slice(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    x = given["self"]
    shape = sizes_of(x)
    dim = _dim(given, len(shape))
    if sizes_of(node)[dim] == shape[dim]:
        return x, index
    start = _offset(indices, given["start"], shape[dim])
    step = given.get("step", 1)
    place = add(mul(index[dim], step), start)
    place = indices.part_of(index[dim], sizes_of(node)[dim], place, shape[dim])
    return x, _at(index, dim, place)


def _select(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    x = given["self"]
    shape = sizes_of(x)
    dim = _dim(given, len(shape))
    place = _offset(indices, given["index"], shape[dim])
    return x, (*index[:dim], place, *index[dim:])


def _narrow(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    return _slice(indices, node, given, index)


def _flip(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    shape = sizes_of(node)
    for dim in given["dims"]:
        last = indices.size(shape[dim] - 1)
        index = _at(index, dim % len(shape), sub(last, index[dim]))
    return given["self"], index


def _roll(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    shape = sizes_of(node)
    dims = given["dims"] or ([0] if len(shape) == 1 else None)
    if dims is None or any(isinstance(shift, fx.Node) for shift in given["shifts"]):
        raise NotLiftable("it rolls by an amount that is not known")
    for dim, shift in zip(dims, given["shifts"], strict=True):
        dim %= len(shape)
        moved = add(sub(index[dim], const(shift)), indices.size(shape[dim]))
        if not shape[dim].is_Integer:
            raise NotLiftable("it rolls a dimension of dynamic size")
        index = _at(index, dim, indices.divide(moved, shape[dim])[1])
    return given["self"], index


def _repeat(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    x = given["self"]
    shape = sizes_of(x)
    inner = index[len(index) - len(shape) :]
    pairs = zip(inner, shape, strict=True)
    return x, tuple(indices.divide(i, size)[1] for i, size in pairs)


def _repeat_interleave(
    indices: Indices, node: fx.Node, given: dict[str, Any], index: Index
) -> Place:
    x, repeats = given["self"], given["repeats"]
    if not isinstance(repeats, int) or given["dim"] is None:
        raise NotLiftable("it repeats elements a number of times that is not known")
    dim = _dim(given, x.meta["val"].dim())
    return x, _at(index, dim, indices.divide(index[dim], symbolic(repeats))[0])


def _unfold(indices: Indices, node: fx.Node, given: dict[str, Any], index: Index) -> Place:
    x = given["self"]
    dim = _dim(given, x.meta["val"].dim(), "dimension")
    return x, _at(index[:-1], dim, add(mul(index[dim], given["step"]), index[-1]))


def _part(indices: Indices, node: fx.Node, index: Index) -> Place | None:
    """One of the pieces that ``split``, ``chunk`` or ``unbind`` makes."""
    whole, place = node.args
    assert isinstance(whole, fx.Node) and isinstance(place, int)
    name = schema_name(whole)
    if name not in ("split", "chunk", "unbind", "split_with_sizes", "tensor_split"):
        return None
    given = arguments(whole)
    x = given["self"]
    dim = _dim(given, x.meta["val"].dim())
    if name == "unbind":
        return x, (*index[:dim], const(place % len(whole.meta["val"])), *index[dim:])
    before = (piece.shape[dim] for piece in whole.meta["val"][:place])
    start = sum((symbolic(size) for size in before), start=symbolic(0))
    at = add(index[dim], indices.size(start))
    return x, _at(
        index, dim, indices.part_of(index[dim], sizes_of(node)[dim], at, sizes_of(x)[dim])
    )


_SAME_ORDER = (
    "view", "reshape", "_unsafe_view", "_reshape_alias", "view_as", "reshape_as", "flatten",
    "unflatten", "ravel", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "detach",
    "lift_fresh", "lift_fresh_copy",
)  # fmt: skip
_TURNS = (
    "transpose", "permute", "t", "numpy_T", "mT", "adjoint", "swapaxes", "swapdims", "movedim",
    "moveaxis",
)  # fmt: skip
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME_ORDER, _same_order),
    **dict.fromkeys(_TURNS, _turned),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "slice": _slice,
    "select": _select,
    "narrow": _narrow,
    "flip": _flip,
    "roll": _roll,
    "repeat": _repeat,
    "tile": _repeat,
    "repeat_interleave": _repeat_interleave,
    "unfold": _unfold,
}

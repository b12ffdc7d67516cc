"""What the dimensions of a tensor stand for: pairs of a token and an expert, and features.

A dimension is a product of *axes* in row-major order, so that views are followed by regrouping:
``[T * K, 2 * I]`` is ``[(tokens, choices), (features,)]``; viewing it as ``[T, K, 2, I]`` splits
dimensions at axes, and the features, of which sizes are known, anywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.attention.symbols import symbolic
from sparse_compiler.static import arguments

aten = torch.ops.aten

FEATURES = "features"

# One dimension: its axes, outermost first; none for a dimension of size 1.
Dim = tuple["Axis", ...]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range of something.

    Attributes:
        name: of what; ``FEATURES`` for features, of which a part may be picked.
        size: how many.
        stride: of features, steps between two that follow each other.
    """

    name: str
    size: sympy.Expr
    stride: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tensor's dimensions; its first feature is at ``offset`` among all."""

    dims: tuple[Dim, ...]
    offset: int = 0

    def axes(self) -> list[Axis]:
        """All axes, outermost first."""
        return [axis for dim in self.dims for axis in dim]

    def features(self) -> Axis | None:
        """The axis of the features, if they are one dimension of their own."""
        found = [axis for axis in self.axes() if axis.name == FEATURES]
        alone = len(found) == 1 and any(dim == (found[0],) for dim in self.dims)
        return found[0] if alone else None

    def names(self) -> list[list[str]]:
        """What each dimension stands for; one of size 1 stands for nothing."""
        return [[axis.name for axis in dim if axis.size != 1] for dim in self.dims]

    def place(self, name: str) -> int | None:
        """The dimension that is exactly this axis."""
        found = [i for i, dim in enumerate(self.dims) if [axis.name for axis in dim] == [name]]
        return found[0] if found else None


# The elements of the input, in its order.
REGROUPED = (
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as",
    "reshape_as",
)  # fmt: skip
SAME = ("contiguous", "clone", "alias", "to", "_to_copy", "type_as")
_PARTS = ("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
_TURNED = ("transpose", "permute", "t", "swapaxes", "movedim")
_PICKED = ("slice", "narrow", "select")


def viewed(node: fx.Node) -> fx.Node | None:
    """What ``node`` only shows in another form, or None for what does more."""
    name = schema_name(node)
    if name == "getitem":
        parent = node.args[0]
        if isinstance(parent, fx.Node) and schema_name(parent) in (*_PARTS, "unbind"):
            return _node(parent.args[0])
        return None
    if name == "dropout":
        given = arguments(node)
        return None if given["train"] and given["p"] else _node(given["input"])
    if name in ("to", "_to_copy", "type_as") and not _is_float(node):
        return None
    if name == "expand":
        source = _node(node.args[0])
        return source if source is not None and _shape(source) == _shape(node) else None
    known = (*REGROUPED, *SAME, *_TURNED, *_PICKED)
    return _node(node.args[0]) if name in known else None


def _is_float(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)


def _node(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _shape(node: fx.Node) -> list[sympy.Expr]:
    return [symbolic(size) for size in node.meta["val"].shape]


def follow(layout: Layout, node: fx.Node) -> Layout | None:
    """The layout of a node of which ``viewed`` has this one; None if it cannot be told."""
    name = schema_name(node)
    if name == "getitem":
        return _part(layout, node)
    if name in REGROUPED:
        dims = regroup(layout.axes(), _shape(node))
        return None if dims is None else Layout(dims, layout.offset)
    if name in _TURNED:
        return _turned(layout, node)
    if name in _PICKED:
        return _picked(layout, node)
    return layout


def regroup(axes: list[Axis], shape: list[sympy.Expr]) -> tuple[Dim, ...] | None:
    """The axes as dimensions of these sizes; None if an axis would be cut that has no parts."""
    waiting = list(axes)
    dims: list[Dim] = []
    for size in shape:
        dim: list[Axis] = []
        have = sympy.Integer(1)
        while have != size:
            if not waiting:
                return None
            axis = waiting.pop(0)
            total = sympy.expand(have * axis.size)
            if _divides(total, size):
                dim.append(axis)
                have = total
                continue
            # Only the head of this axis is in the dimension.
            cut = _cut(axis, size, have)
            if cut is None:
                return None
            head, tail = cut
            dim.append(head)
            waiting.insert(0, tail)
            have = size
        while size == 1 and waiting and waiting[0].size == 1 and not dim:
            dim.append(waiting.pop(0))
        dims.append(tuple(dim))
    # What is left has size 1, and stands for nothing.
    return tuple(dims) if all(axis.size == 1 for axis in waiting) else None


def _divides(total: sympy.Expr, size: sympy.Expr) -> bool:
    if total == size:
        return True
    if total.is_Integer and size.is_Integer:
        return bool(size % total == 0)
    quotient = sympy.cancel(size / total)
    return bool(quotient.is_polynomial() and not quotient.is_Integer) or (
        bool(quotient.is_Integer) and bool(quotient >= 1)
    )


def _cut(axis: Axis, size: sympy.Expr, have: sympy.Expr) -> tuple[Axis, Axis] | None:
    if axis.name != FEATURES or not size.is_Integer or not have.is_Integer:
        return None
    if size % have or not axis.size.is_Integer:
        return None
    count = size // have
    if count == 0 or axis.size % count:
        return None
    rest = axis.size // count
    return (
        Axis(axis.name, count, axis.stride * int(rest)),
        Axis(axis.name, rest, axis.stride),
    )


def _turned(layout: Layout, node: fx.Node) -> Layout | None:
    name, given = schema_name(node), arguments(node)
    count = len(layout.dims)
    order = list(range(count))
    if name == "permute":
        order = [dim % count for dim in given["dims"]]
    elif name == "movedim":
        return None
    elif count >= 2:
        names = ("axis0", "axis1") if name == "swapaxes" else ("dim0", "dim1")
        first, second = (0, 1) if name == "t" else (given[n] % count for n in names)
        order[first], order[second] = order[second], order[first]
    return Layout(tuple(layout.dims[dim] for dim in order), layout.offset)


def _picked(layout: Layout, node: fx.Node) -> Layout | None:
    given = arguments(node)
    dim = given.get("dim", 0) % len(layout.dims)
    before, after = _shape_of(layout), _shape(node)
    if before == after:
        return layout
    axes = layout.dims[dim]
    if schema_name(node) == "select":
        index = given["index"]
        if not axes:
            return _replaced(layout, dim, None, 0)
        if len(axes) != 1 or axes[0].name != FEATURES or not isinstance(index, int):
            return None
        start = index % int(axes[0].size)
        return _replaced(layout, dim, None, start * axes[0].stride)
    if len(axes) != 1 or axes[0].name != FEATURES or not after[dim].is_Integer:
        return None
    start, step = given.get("start") or 0, given.get("step", 1)
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    size = int(axes[0].size)
    start = min(start % size if start < 0 else start, size)
    picked = Axis(FEATURES, after[dim], axes[0].stride * step)
    return _replaced(layout, dim, picked, start * axes[0].stride)


def _part(layout: Layout, node: fx.Node) -> Layout | None:
    parent, at = node.args
    assert isinstance(parent, fx.Node) and isinstance(at, int)
    dim = arguments(parent).get("dim", 0) % len(layout.dims)
    axes = layout.dims[dim]
    if len(axes) != 1 or axes[0].name != FEATURES:
        return None
    parts = parent.meta["val"]
    if schema_name(parent) == "unbind":
        return _replaced(layout, dim, None, at * axes[0].stride)
    sizes = [symbolic(part.shape[dim]) for part in parts]
    if not all(size.is_Integer for size in sizes):
        return None
    picked = Axis(FEATURES, sizes[at], axes[0].stride)
    return _replaced(layout, dim, picked, int(sum(sizes[:at])) * axes[0].stride)


def _replaced(layout: Layout, dim: int, axis: Axis | None, further: int) -> Layout:
    new: tuple[Dim, ...] = () if axis is None else ((axis,),)
    dims = (*layout.dims[:dim], *new, *layout.dims[dim + 1 :])
    return Layout(dims, layout.offset + further)


def _shape_of(layout: Layout) -> list[sympy.Expr]:
    return [sympy.expand(sympy.Mul(*(axis.size for axis in dim))) for dim in layout.dims]

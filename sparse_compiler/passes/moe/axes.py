"""Names for the dimensions of tensors: which of a view's dimensions is which of its source's.

A *layout* has one tuple of axes for each dimension: none for one of size 1, several where they are
merged, outermost first. Axes stay the same through views; a view that splits a dimension splits its
axis, and two axes that turn out to be the same are linked. So it can be read off the result of
whatever reshapes and transposes a model does, which of its dimensions are the tokens'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparse_compiler.region import Builder
from sparse_compiler.static import arguments

aten = torch.ops.aten
Layout = tuple[tuple["Axis", ...], ...]


class Axis:
    """One index of a tensor.

    Attributes:
        size: its size, which may be symbolic.
        repeated: whether values do not depend on it: it comes from ``expand`` or ``repeat``.
        source: the node and dimension that have this size, if there are such.
    """

    def __init__(
        self, size: Any, *, repeated: bool = False, source: tuple[fx.Node, int] | None = None
    ) -> None:
        self.size, self.repeated, self.source = size, repeated, source
        self._parts: tuple[Axis, ...] | None = None
        self._link: Axis | None = None

    def leaves(self) -> tuple[Axis, ...]:
        """The axes that it was split into, outermost first; itself if it was not."""
        if self._link is not None:
            return self._link.leaves()
        if self._parts is None:
            return (self,)
        return tuple(leaf for part in self._parts for leaf in part.leaves())

    def split(self, inner: Any, outer: Any) -> None:
        """Split a leaf into an outer axis and an inner one, of these sizes."""
        parts = (Axis(size, repeated=self.repeated) for size in (outer, inner))
        self._parts = tuple(parts)

    def become(self, parts: Sequence[Axis]) -> None:
        """From now on this leaf is these axes, outermost first."""
        self._parts = tuple(parts)

    def link(self, other: Axis) -> None:
        """From now on this leaf is the axis ``other``."""
        self._link = other


def same_size(left: Any, right: Any) -> bool:
    """Whether two sizes are known to be equal, for all values of symbols."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return bool(statically_known_true(left == right))


def same_shape(left: fx.Node, right: fx.Node) -> bool:
    """Whether two tensors are known to have one shape."""
    shapes = [node.meta["val"].shape for node in (left, right)]
    return len(shapes[0]) == len(shapes[1]) and all(map(same_size, *shapes))


def _divided(size: Any, by: Any) -> Any:
    """The quotient of two sizes; None where it is not known to be whole."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    if isinstance(by, int) and by == 1:
        return size
    quotient = size // by
    if not isinstance(quotient, int):
        number = quotient.node.maybe_as_int()
        quotient = quotient if number is None else number
    return quotient if same_size(quotient * by, size) else None


def fresh(node: fx.Node) -> Layout:
    """A new axis for each dimension of a node that is not 1."""
    shape = node.meta["val"].shape
    return tuple(
        () if same_size(size, 1) else (Axis(size, source=(node, dim)),)
        for dim, size in enumerate(shape)
    )


def leaves(layout: Layout) -> Layout:
    """The layout in axes that are not split or linked."""
    return tuple(tuple(leaf for axis in dim for leaf in axis.leaves()) for dim in layout)


def unify(left: Sequence[Axis], right: Sequence[Axis]) -> bool:
    """Whether two dimensions are the same index; links the axes of ``right`` to ``left``'s."""
    first, second = list(leaves((tuple(left),))[0]), list(leaves((tuple(right),))[0])
    while first and second:
        a, b = first.pop(), second.pop()  # innermost first
        if a is b:
            continue
        if same_size(a.size, b.size):
            b.link(a)
            a.repeated = a.repeated and b.repeated
            continue
        if _merged(a, b, second) or _merged(b, a, first):
            continue
        if not (isinstance(a.size, int) and isinstance(b.size, int)):
            return False
        small, large, waiting = (a, b, second) if a.size < b.size else (b, a, first)
        if not small.size or large.size % small.size:
            return False
        large.split(small.size, large.size // small.size)
        outer, inner = large.leaves()
        (second if small is b else first).append(small)
        waiting.extend((outer, inner))
    return not first and not second


def aligned(layout: Layout, other: Layout) -> bool:
    """Whether what is broadcast to a tensor has its axes; links them to the tensor's."""
    if len(other) > len(layout):
        return False
    pairs = zip(layout[len(layout) - len(other) :], other, strict=True)
    return all(not theirs or unify(mine, theirs) for mine, theirs in pairs)


def _merged(whole: Axis, inner: Axis, outer: list[Axis]) -> bool:
    """Whether one axis is several of another dimension, ``inner`` and the last of ``outer``."""
    size = inner.size
    for count, axis in enumerate(reversed(outer), 1):
        size = size * axis.size
        if same_size(whole.size, size):
            whole.become([*outer[len(outer) - count :], inner])
            del outer[len(outer) - count :]
            return True
    return False


_SAME = {
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
    aten.lift_fresh_copy.default,
}  # fmt: skip
_RESHAPED = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default,
}  # fmt: skip
_EXPANDED = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}
_TURNED = {
    aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default,
    aten.movedim.int, aten.numpy_T.default, aten.swapaxes.default, aten.swapdims.default,
}  # fmt: skip
_REPEATED = {aten.repeat.default, aten.repeat_interleave.self_int}
_VIEWS = frozenset(_SAME | _RESHAPED | _EXPANDED | _TURNED | _REPEATED)


def is_view(node: fx.Node) -> bool:
    """Whether a node is another shape of its input, whole."""
    return node.target in _VIEWS or _is_whole_slice(node)


def keeps_shape(node: fx.Node) -> bool:
    """Whether a node is a view or a copy of the very same dimensions."""
    return node.target in _SAME or _is_whole_slice(node)


def _is_whole_slice(node: fx.Node) -> bool:
    """Whether a node is a slice that leaves nothing out: ``x[:]``."""
    if node.target is not aten.slice.Tensor or arguments(node)["step"] != 1:
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    return all(map(same_size, before, after))


def order(node: fx.Node) -> list[int]:
    """The dimensions of its input that a transposing node's dimensions are."""
    given = arguments(node)
    dims = list(range(node.args[0].meta["val"].dim()))  # type: ignore[union-attr]
    count = len(dims)
    if node.target is aten.permute.default:
        return [dim % count for dim in given["dims"]]
    if node.target in (aten.t.default, aten.numpy_T.default):
        return dims[::-1]
    if node.target is aten.movedim.int:
        moved = dims.pop(given["source"] % count)
        dims.insert(given["destination"] % count, moved)
        return dims
    first, second = (given.get(f"dim{i}", given.get(f"axis{i}", i - 2)) for i in (0, 1))
    a, b = first % count, second % count
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def through(node: fx.Node, layout: Layout) -> Layout | None:
    """The layout of a view, given that of its input; None for what is no view, or a strange one."""
    shape = node.meta["val"].shape
    if keeps_shape(node):
        return layout
    if node.target in _TURNED:
        return tuple(layout[dim] for dim in order(node))
    if node.target in _RESHAPED:
        return regroup(layout, shape)
    if node.target in _EXPANDED:
        return expanded(layout, shape)
    if node.target is aten.repeat.default:
        old = ((),) * (len(shape) - len(layout)) + layout
        pairs = zip(arguments(node)["repeats"], old, strict=True)
        return tuple(dim if times == 1 else (_repeat(times), *dim) for times, dim in pairs)
    if node.target is aten.repeat_interleave.self_int:
        given = arguments(node)
        if given["dim"] is None:
            return None
        place = given["dim"] % len(layout)
        repeated = (*layout[place], _repeat(given["repeats"]))
        return (*layout[:place], repeated, *layout[place + 1 :])
    return None


def _repeat(times: Any) -> Axis:
    size = times.meta["val"] if isinstance(times, fx.Node) else times
    return Axis(size, repeated=True)


def expanded(layout: Layout, shape: Sequence[Any]) -> Layout:
    """The layout of a tensor that is expanded to a shape."""
    old = ((),) * (len(shape) - len(layout)) + layout
    pairs = zip(shape, old, strict=True)
    return tuple(
        dim if dim or same_size(size, 1) else (Axis(size, repeated=True),) for size, dim in pairs
    )


def regroup(layout: Layout, shape: Sequence[Any]) -> Layout | None:
    """The axes dealt out to the dimensions of another shape, from the innermost."""
    waiting = [axis for dim in leaves(layout) for axis in dim]
    found: list[tuple[Axis, ...]] = []
    wide = [dim for dim, size in enumerate(shape) if not same_size(size, 1)]
    for place in reversed(range(len(shape))):
        if place not in wide:
            found.append(())
            continue
        if place == wide[0]:  # whatever is left: the sizes' product is the same
            found.append(tuple(waiting))
            waiting = []
            continue
        group: list[Axis] = []
        while not same_size(math.prod(axis.size for axis in group), shape[place]):
            if not waiting:
                return None
            axis = waiting.pop()
            have = math.prod(item.size for item in group)
            group.insert(0, axis)
            inner = _divided(shape[place], have)
            if inner is None or same_size(axis.size, inner):
                continue
            outside = _divided(axis.size, inner)
            if outside is not None:
                axis.split(inner, outside)
                outer, group[0] = axis.leaves()
                waiting.append(outer)
            elif isinstance(axis.size, int) and isinstance(inner, int) and axis.size > inner:
                return None
        found.append(tuple(group))
    return None if waiting else tuple(reversed(found))


def source_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a node is a view of, and the views in between, the first one first."""
    chain: list[fx.Node] = []
    while is_view(node) or is_cast_to_itself(node):
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, chain[::-1]


_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
    aten._to_copy.default,
}  # fmt: skip


def is_cast(node: fx.Node) -> bool:
    """Whether a node converts its input to another type, or to its own."""
    return node.target in _CASTS


def is_cast_to_itself(node: fx.Node) -> bool:
    """Whether a node is a conversion that changes nothing."""
    if not is_cast(node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return bool(before.dtype == after.dtype and before.device == after.device)


def forward(chain: Sequence[fx.Node], layout: Layout | None) -> Layout | None:
    """The layout behind a chain of views (and conversions), given that before it."""
    for node in chain:
        if layout is None:
            return None
        layout = layout if is_cast(node) else through(node, layout)
    return layout


def follow(node: fx.Node) -> tuple[fx.Node, Layout, Layout | None]:
    """What a node is a view of, new axes of that, and the node's layout in these axes."""
    base, chain = source_of(node)
    layout = fresh(base)
    return base, layout, forward(chain, layout)


def size_of(builder: Builder, axis: Axis) -> Any:
    """An axis's size: a number, or a node."""
    if isinstance(axis.size, int):
        return axis.size
    assert axis.source is not None
    return builder.call(aten.sym_size.int, *axis.source)


def arrange(
    builder: Builder, node: fx.Node, layout: Layout, wanted: Sequence[Axis], shape: list[Any]
) -> fx.Node:
    """A tensor with its axes in another order, expanded along those it lacks, as ``shape``.

    Args:
        builder: makes the nodes.
        node: the tensor.
        layout: its layout; every axis of it has to be wanted.
        wanted: the axes, in the order they are to have.
        shape: of the result, with at most one -1.
    """
    have = [axis for dim in leaves(layout) for axis in dim]
    if any(len(dim) != 1 for dim in leaves(layout)):
        node = builder.call(aten.reshape.default, node, _sizes(builder, have))
    present = [axis for axis in wanted if axis in have]
    turn = [have.index(axis) for axis in present]
    if turn != sorted(turn):
        node = builder.call(aten.permute.default, node, turn)
    if len(present) < len(wanted):
        for place, axis in enumerate(wanted):
            if axis not in have:
                node = builder.call(aten.unsqueeze.default, node, place)
        sizes = [-1 if axis in have else size_of(builder, axis) for axis in wanted]
        node = builder.call(aten.expand.default, node, sizes)
    if _shape_is(node, shape):
        return node
    return builder.call(aten.reshape.default, node, shape)


def _sizes(builder: Builder, axes: Sequence[Axis]) -> list[Any]:
    """Sizes for a reshape: one that has no number is what is left."""
    dynamic = [axis for axis in axes if not isinstance(axis.size, int)]
    if len(dynamic) == 1:
        return [axis.size if isinstance(axis.size, int) else -1 for axis in axes]
    return [size_of(builder, axis) for axis in axes]


def _shape_is(node: fx.Node, shape: Sequence[Any]) -> bool:
    have = node.meta["val"].shape
    if len(have) != len(shape):
        return False
    return all(
        want == -1 or (isinstance(want, int) and same_size(want, size))
        for want, size in zip(shape, have, strict=True)
    )

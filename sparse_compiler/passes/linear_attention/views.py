"""What views do to the dimensions of a sum of products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.indices import (
    Dims,
    Index,
    NotMultilinear,
    Renaming,
    same,
    viewed,
)
from sparse_compiler.static import arguments

aten = torch.ops.aten


def view_of(node: fx.Node, dims: Dims) -> tuple[Dims, Renaming]:
    """The dimensions of a view, from those of its input, and the renaming that it takes.

    Raises:
        NotMultilinear: dimensions are merged or split in a way that has no form.
    """
    return VIEWS[node.target](node, dims)


def _reshape(node: fx.Node, dims: Dims) -> tuple[Dims, Renaming]:
    return viewed(dims, node.meta["val"].shape)


def _permute(node: fx.Node, dims: Dims) -> tuple[Dims, Renaming]:
    # The operator itself tells where each dimension goes, whatever it is called.
    probe = torch.empty(list(range(2, len(dims) + 2)), device="meta")
    turned: Any = node.target
    moved = turned(probe, *node.args[1:], **node.kwargs).shape
    return tuple(dims[size - 2] for size in moved), {}


def _unsqueeze(node: fx.Node, dims: Dims) -> tuple[Dims, Renaming]:
    place = int(arguments(node)["dim"]) % (len(dims) + 1)
    return (*dims[:place], (), *dims[place:]), {}


def _squeeze(node: fx.Node, dims: Dims) -> tuple[Dims, Renaming]:
    given = arguments(node).get("dim", range(len(dims)))
    places = {place % max(len(dims), 1) for place in ([given] if isinstance(given, int) else given)}
    kept = tuple(dim for place, dim in enumerate(dims) if dim or place not in places)
    if len(kept) != node.meta["val"].dim():
        raise NotMultilinear("a dynamic dimension is squeezed")
    return kept, {}


def _expand(node: fx.Node, dims: Dims) -> tuple[Dims, Renaming]:
    shape = node.meta["val"].shape
    dims = ((),) * (len(shape) - len(dims)) + dims
    return tuple(
        dim if dim or same(size, 1) else (Index(size),)
        for dim, size in zip(dims, shape, strict=True)
    ), {}


def _same(node: fx.Node, dims: Dims) -> tuple[Dims, Renaming]:
    return dims, {}


VIEWS: dict[Any, Callable[[fx.Node, Dims], tuple[Dims, Renaming]]] = {
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.view_as.default: _reshape,
    aten.reshape_as.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.swapaxes.default: _permute,
    aten.swapdims.default: _permute,
    aten.movedim.int: _permute,
    aten.movedim.intlist: _permute,
    aten.t.default: _permute,
    aten.mT.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.alias.default: _same,
}

# Views that may merge and split dimensions.
RESHAPES = frozenset(target for target, rule in VIEWS.items() if rule is _reshape)

# Operators that change neither dimensions nor values, and those that change the dtype alone.
MOVES = (
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.to.device,
    aten.lift_fresh_copy.default,
)
CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
)

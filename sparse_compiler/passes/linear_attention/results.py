"""A plan's result in the place of the node that the model computed it with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.chunks import chunked
from sparse_compiler.passes.linear_attention.emit import Emitter, Value
from sparse_compiler.passes.linear_attention.indices import Dims, Index, hint, same
from sparse_compiler.passes.linear_attention.network import Network
from sparse_compiler.passes.linear_attention.plan import Chunked, Product, TermPlan, kept, own_sums

aten = torch.ops.aten


def build(emit: Emitter, network: Network, plans: Sequence[TermPlan], like: fx.Node) -> fx.Node:
    """The network's value, with the dimensions, dtype and strides of ``like``."""
    order = tuple(index for dim in network.dims for index in dim)
    made = [(_term(emit, item, order), item.scale) for item in plans]
    total, *others = [node for node, _ in made if node is not None]
    for other in others:
        total = emit.call(aten.add.Tensor, total, other)
    number = sum(scale for node, scale in made if node is None)
    if number:
        total = emit.call(aten.add.Tensor, total, number)
    return _like(emit, _merged(emit, total, network.dims), like)


def _term(emit: Emitter, item: TermPlan, order: tuple[Index, ...]) -> fx.Node | None:
    """A term with a dimension, maybe of size 1, for each index; None if it is a mere number."""
    total: fx.Node | None = None
    if isinstance(item.core, Chunked):
        total = emit.aligned(chunked(emit, item.core), order)
    elif item.core.operands:
        total = emit.aligned(_product(emit, item.core), order)
    for factor in item.outer:
        total = emit.applied(total, factor, order)
    if total is None or item.scale == 1:
        return total
    return emit.call(aten.mul.Tensor, total, item.scale)


def _product(emit: Emitter, core: Product) -> Value:
    values = []
    for group, own in zip(core.operands, own_sums(core), strict=True):
        value = emit.operand(group)
        if own:
            dims = [value.order.index(index) for index in own]
            rest = tuple(index for index in value.order if index not in own)
            value = Value(emit.call(aten.sum.dim_IntList, value.node, dims), rest)
        values.append(value)
    live = dict(enumerate(values))
    for one, other in core.steps:
        left, right = live.pop(one), live.pop(other)
        left, right = (left, right) if len(left.order) >= len(right.order) else (right, left)
        union = (*left.order, *right.order)
        wanted = kept(union, (value.order for value in live.values()), core.bound)
        made = emit.contracted(left, right, _natural(left, right, wanted))
        values.append(made)
        live[len(values) - 1] = made
    return values[-1]


def _natural(left: Value, right: Value, wanted: frozenset[Index]) -> tuple[Index, ...]:
    """The order in which a batched matrix product gives its result: batch, left, right."""
    both = [index for index in left.order if index in right.order]
    one = [index for index in left.order if index not in right.order]
    other = [index for index in right.order if index not in left.order]
    return tuple(index for index in (*both, *one, *other) if index in wanted)


def _merged(emit: Emitter, node: fx.Node, dims: Dims) -> fx.Node:
    """From one dimension an index to the dimensions of the result."""
    place = sum(len(dim) for dim in dims)
    for dim in reversed(dims):
        place -= len(dim)
        if not dim:
            node = emit.call(aten.unsqueeze.default, node, place)
        elif len(dim) > 1:
            node = emit.call(aten.flatten.using_ints, node, place, place + len(dim) - 1)
    return node


def _like(emit: Emitter, node: fx.Node, like: fx.Node) -> fx.Node:
    """What follows may view the result with the strides that the model's operator gave it."""
    want = like.meta["val"]
    if node.meta["val"].dtype is not want.dtype:
        node = emit.call(aten.to.dtype, node, want.dtype)
    strides = zip(node.meta["val"].stride(), want.stride(), strict=True)
    if all(same(have, wanted) for have, wanted in strides):
        return node
    order = sorted(range(want.dim()), key=lambda dim: -hint(want.stride(dim)))
    if order == list(range(want.dim())):
        return emit.call(aten.contiguous.default, node)
    node = emit.call(aten.permute.default, node, order)
    node = emit.call(aten.contiguous.default, node)
    return emit.call(aten.permute.default, node, [order.index(d) for d in range(len(order))])

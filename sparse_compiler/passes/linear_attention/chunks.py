"""The causal product in chunks, as nodes; see ``plan`` for the algorithm.

The states before each chunk are running sums of the chunks' own. They are taken as products with a
strictly lower triangle of ones, for many chunks in two levels: groups of chunks, then the groups'
totals. A running sum by ``cumsum`` costs as much as all the matrix products together.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.emit import Emitter, Value
from sparse_compiler.passes.linear_attention.indices import Index, hint
from sparse_compiler.passes.linear_attention.plan import (
    CHUNK,
    Chunked,
    Group,
    indices_of,
    signature,
)

aten = torch.ops.aten

# Chunks, or groups of them, that one product with a triangle sums up.
_MOST_AT_ONCE = 48
_GROUP = 16


def chunked(emit: Emitter, core: Chunked) -> Value:
    """The nodes of a causal product; its indices are the free ones."""
    return _Chunks(emit, core).build()


def chunk_size(positions: Any) -> int:
    """Positions of a chunk: all if they are few, a divisor of their number if there is one."""
    if not isinstance(positions, int):
        return CHUNK
    if positions <= CHUNK:
        return positions
    near = sorted(range(CHUNK - 16, CHUNK + 33, 8), key=lambda size: abs(size - CHUNK))
    return next((size for size in near if positions % size == 0), CHUNK)


class _Chunks:
    def __init__(self, emit: Emitter, core: Chunked) -> None:
        self.emit = emit
        self.core = core
        self.positions = core.causal.row.size
        self.size = chunk_size(self.positions)
        self.single = isinstance(self.positions, int) and self.positions == self.size
        self.chunk = Index(None)
        self.row, self.column = Index(self.size), Index(self.size)
        summed = {core.causal.row, core.causal.column, *core.features}
        every = indices_of((*core.queries, *core.keys, *core.values))
        shared = indices_of((*core.queries, *core.keys))
        self.own = tuple(i for i in indices_of(core.values) if i not in shared)
        self.batch = tuple(i for i in every if i not in summed and i not in self.own)

    def build(self) -> Value:
        core, emit = self.core, self.emit
        queries = self.operand("queries", core.causal.row, self.row, core.features)
        keys = self.operand("keys", core.causal.column, self.column, core.features)
        scores = self.scores(queries, keys)
        if core.values:
            values = self.operand("values", core.causal.column, self.column, self.own)
            total = emit.contracted(scores, values, self.order(scores, values, self.own))
            if not self.single:
                states = emit.contracted(
                    keys,
                    values,
                    (*self.shared(keys, values), self.chunk, *core.features, *self.own),
                )
                states = self.before(states)
                earlier = emit.contracted(queries, states, self.order(queries, states, self.own))
                total = Value(emit.call(aten.add.Tensor, earlier.node, total.node), total.order)
        else:
            total = Value(emit.call(aten.sum.dim_IntList, scores.node, [-1]), scores.order[:-1])
            if not self.single:
                sums = self.normaliser(queries, keys, total.order)
                total = Value(emit.call(aten.add.Tensor, sums, total.node), total.order)
        return self.unchunked(total)

    def shared(self, *values: Value) -> tuple[Index, ...]:
        """The batch indices that any of the values has."""
        return tuple(i for i in self.batch if any(i in value.order for value in values))

    def order(self, left: Value, right: Value, last: Sequence[Index]) -> tuple[Index, ...]:
        chunk = () if self.single else (self.chunk,)
        return (*self.shared(left, right), *chunk, self.row, *last)

    def scores(self, queries: Value, keys: Value) -> Value:
        """The scores inside the chunks, later keys masked."""
        order = (*self.order(queries, keys, ()), self.column)
        key = ("scores", signature(self.core))
        if key not in self.emit.shared:
            made = self.emit.contracted(queries, keys, order)
            diagonal = -1 if self.core.causal.strict else 0
            self.emit.shared[key] = self.emit.call(aten.tril.default, made.node, diagonal)
        return Value(self.emit.shared[key], order)

    def normaliser(self, queries: Value, keys: Value, order: tuple[Index, ...]) -> fx.Node:
        """Queries times the sum of all keys of the chunks before."""
        emit, features = self.emit, self.core.features
        rest = tuple(index for index in keys.order if index is not self.column)
        dims = [keys.order.index(self.column)]
        sums = self.before(Value(emit.call(aten.sum.dim_IntList, keys.node, dims), rest))
        wanted = (*order, *features)
        product = emit.call(
            aten.mul.Tensor, emit.aligned(queries, wanted), emit.aligned(sums, wanted)
        )
        places = list(range(len(order), len(wanted)))
        return emit.call(aten.sum.dim_IntList, product, places)

    def operand(self, name: str, position: Index, inner: Index, last: tuple[Index, ...]) -> Value:
        """Queries, keys or values as [batch..., chunk, position in the chunk, ...], contiguous."""
        group: Group = getattr(self.core, name)
        batch = tuple(index for index in self.batch if index in indices_of(group))
        chunk = () if self.single else (self.chunk,)
        key = (name, signature(self.core))
        node = self.emit.shared.get(key)
        if node is None:
            node = self.emit.permuted(self.emit.operand(group), (*batch, position, *last)).node
            if not self.single:
                node = self.split(node, len(batch), len(last))
            elif not node.meta["val"].is_contiguous():
                node = self.emit.call(aten.contiguous.default, node)
            if name != "values":  # of which there is one set only
                self.emit.shared[key] = node
        return Value(node, (*batch, *chunk, inner, *last))

    def split(self, node: fx.Node, place: int, behind: int) -> fx.Node:
        """Dimension ``place`` in chunks, padded with zeros where it does not come out even."""
        if isinstance(self.positions, int):
            padding: Any = -self.positions % self.size
        else:
            length = self.emit.call(aten.sym_size.int, node, place)
            count = self.emit.call(operator.add, length, self.size - 1)
            count = self.emit.call(operator.floordiv, count, self.size)
            count = self.emit.call(operator.mul, count, self.size)
            padding = self.emit.call(operator.sub, count, length)
        if not isinstance(padding, int) or padding:
            pad = [0] * (2 * behind) + [0, padding]
            node = self.emit.call(aten.constant_pad_nd.default, node, pad, 0.0)
        elif not node.meta["val"].is_contiguous():
            node = self.emit.call(aten.contiguous.default, node)
        return self.emit.call(aten.unflatten.int, node, place, [-1, self.size])

    def before(self, states: Value) -> Value:
        """For each chunk the sum of the states of all chunks before it."""
        place = states.order.index(self.chunk)
        rest = states.order[place + 1 :]
        node = states.node
        if len(rest) > 1:
            node = self.emit.call(aten.flatten.using_ints, node, place + 1, place + len(rest))
        node = _exclusive_sum(self.emit, node)
        if len(rest) > 1:
            sizes = [index.size if isinstance(index.size, int) else -1 for index in rest]
            node = self.emit.call(aten.unflatten.int, node, place + 1, sizes)
        return Value(node, states.order)

    def unchunked(self, value: Value) -> Value:
        """The result by position again, without the padding."""
        row = self.core.causal.row
        place = value.order.index(self.row)
        if self.single:
            return Value(value.node, (*value.order[:place], row, *value.order[place + 1 :]))
        node = self.emit.call(aten.flatten.using_ints, value.node, place - 1, place)
        if not isinstance(self.positions, int):
            query = self.core.queries[0]
            at = next(p for p, dim in enumerate(query.dims) if dim == (row,))
            length: Any = self.emit.call(aten.sym_size.int, self.emit.source(query), at)
        else:
            length = self.positions
        if not isinstance(self.positions, int) or self.positions % self.size:
            node = self.emit.call(aten.slice.Tensor, node, place - 1, 0, length)
        return Value(node, (*value.order[: place - 1], row, *value.order[place + 1 :]))


def _exclusive_sum(emit: Emitter, node: fx.Node) -> fx.Node:
    """[..., T, m]: for each of T the sum of those before it."""
    size = node.meta["val"].shape[-2]
    if hint(size) <= _MOST_AT_ONCE:
        return _triangle_times(emit, node)
    group = _GROUP
    length: Any = size
    padding: Any = 0
    if isinstance(size, int):
        near = sorted(range(_GROUP // 2, 2 * _GROUP + 1), key=lambda g: abs(g - _GROUP))
        group = next((g for g in near if size % g == 0), _GROUP)
        padding = -size % group
    else:
        length = emit.call(aten.sym_size.int, node, -2)
        count = emit.call(operator.add, length, group - 1)
        count = emit.call(operator.floordiv, count, group)
        count = emit.call(operator.mul, count, group)
        padding = emit.call(operator.sub, count, length)
    if not isinstance(padding, int) or padding:
        node = emit.call(aten.constant_pad_nd.default, node, [0, 0, 0, padding], 0.0)
    groups = emit.call(aten.unflatten.int, node, -2, [-1, group])
    inside = _triangle_times(emit, groups)
    totals = emit.call(aten.sum.dim_IntList, groups, [-2])
    before = emit.call(aten.unsqueeze.default, _exclusive_sum(emit, totals), -2)
    total = emit.call(aten.add.Tensor, inside, before)
    total = emit.call(aten.flatten.using_ints, total, -3, -2)
    if not isinstance(padding, int) or padding:
        total = emit.call(aten.slice.Tensor, total, -2, 0, length)
    return total


def _triangle_times(emit: Emitter, node: fx.Node) -> fx.Node:
    """The strictly lower triangle of ones, times ``node`` [..., T, m]."""
    value = node.meta["val"]
    size: Any = value.shape[-2]
    if not isinstance(size, int):
        size = emit.call(aten.sym_size.int, node, -2)
    ones = emit.call(aten.ones.default, [size, size], dtype=value.dtype, device=value.device)
    return emit.call(aten.matmul.default, emit.call(aten.tril.default, ones, -1), node)

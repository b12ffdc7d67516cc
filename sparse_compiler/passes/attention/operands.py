"""Queries, keys and values as [batch, heads, positions, channels], wherever a model has them.

An operand of the contraction is followed back through views to the tensor that shows these four
dimensions with the fewest heads: keys and values that a model repeats for each query head are read
before they are repeated. Factors (``q * scale``) that are met on the way go into the score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.attention import lift_views
from sparse_compiler.passes.attention.facts import GraphFacts
from sparse_compiler.passes.attention.indices import Indices
from sparse_compiler.passes.attention.leaves import in_order
from sparse_compiler.passes.attention.lift_views import Index, schema_name
from sparse_compiler.passes.attention.symbols import sizes_of
from sparse_compiler.passes.pointwise import NotLiftable
from sparse_compiler.region import Builder
from sparse_compiler.score.expr import B, Expr, H
from sparse_compiler.score.node import ZERO

aten = torch.ops.aten

_NAMES = ("batch", "heads", "positions", "channels")


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor to be seen as [B, H or fewer, L, C].

    Attributes:
        node: the tensor.
        places: which of its dimensions is which; a dimension it lacks has size 1, or, of the
            batch, is to be expanded.
        flat: the dimensions that are batch and heads together, in order, if they are not one each.
        heads: how many heads it has.
        scale: what the operand of the contraction is a multiple of it by.
        factors: operators, each with a number of run time, that it is to be scaled with.
    """

    node: fx.Node
    places: dict[str, int]
    flat: tuple[int, ...]
    heads: Any
    scale: float = 1.0
    factors: tuple[tuple[Any, fx.Node], ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype

    def build(self, builder: Builder, batch: Any, heads: Any = None) -> fx.Node:
        """The view, as nodes.

        Args:
            builder: makes the nodes.
            batch: the number of batches, for operands that all batches share.
            heads: how many heads to show, if not as few as there are.
        """
        if self.flat:
            node = self._unflattened(builder)
        else:
            node = in_order(builder, self.node, self.places, _NAMES)
        shape = node.meta["val"].shape
        wanted = [-1, -1 if heads is None else heads, -1, -1]
        if "batch" not in self.places and not self.flat:
            wanted[0] = batch
        if wanted != [-1] * 4:
            have = [-1 if want == -1 else size for size, want in zip(shape, wanted, strict=True)]
            if have != wanted:
                node = builder.call(aten.expand.default, node, wanted)
        for scale, number in self.factors:
            node = builder.call(scale, node, number)
        return node

    def _unflattened(self, builder: Builder) -> fx.Node:
        order = [*self.flat, self.places["positions"], self.places["channels"]]
        node = self.node
        if order != list(range(len(order))):
            node = builder.call(aten.permute.default, node, order)
        length, channels = (sized(builder, node, dim) for dim in (-2, -1))
        return builder.call(aten.reshape.default, node, [-1, self.heads, length, channels])


def sized(builder: Builder, node: fx.Node, dim: int) -> Any:
    """One size of a node: a number, or a node if it is dynamic."""
    shape = node.meta["val"].shape
    size = shape[dim]
    return (
        size if isinstance(size, int) else builder.call(aten.sym_size.int, node, dim % len(shape))
    )


def candidates(
    indices: Indices,
    facts: GraphFacts,
    node: fx.Node,
    index: Index,
    position: Expr,
    channel: Expr,
    end: fx.Node,
) -> Iterator[Operand]:
    """The ways to see an operand, the nearest first.

    Args:
        indices: of the attention; ``channel`` counts the operand's channels in them.
        facts: of the graph.
        node: the operand.
        index: where the contraction reads it.
        position: what counts queries (or keys) in ``index``.
        channel: what counts channels.
        end: the last node of the region.
    """
    for source, at, scale in _sources(indices, facts, node, index, end):
        found = _read(indices, source, at, position, channel)
        if found is not None:
            yield dataclasses.replace(found, scale=scale)


def _sources(
    indices: Indices, facts: GraphFacts, node: fx.Node, index: Index, end: fx.Node
) -> Iterator[tuple[fx.Node, Index, float]]:
    """What an operand is a view or a multiple of, and where."""
    scale = 1.0
    while not facts.written_after(node, end):
        yield node, index, scale
        try:
            moved = lift_views.source(indices, node, index)
        except NotLiftable:
            return
        if moved is not None:
            node, index = moved
            continue
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or not _keeps_values(first, node):
            return
        name = schema_name(node)
        if name in ("mul", "div"):
            number = node.args[1]
            if not isinstance(number, (int, float)) or isinstance(number, bool) or number == 0:
                return
            scale = scale * number if name == "mul" else scale / number
        elif name not in ("to", "_to_copy", "type_as"):
            return
        if sizes_of(first) != sizes_of(node):
            return
        node = first


def _keeps_values(before: fx.Node, after: fx.Node) -> bool:
    """Whether a conversion of one to the other rounds nothing."""
    old, new = before.meta.get("val"), after.meta["val"]
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return False
    wide = (torch.float32, torch.float64)
    return old.dtype == new.dtype or (old.dtype is torch.bfloat16 and new.dtype in wide)


def _read(
    indices: Indices, node: fx.Node, index: Index, position: Expr, channel: Expr
) -> Operand | None:
    """The dimensions of a tensor by what counts them; None if they are no attention's."""
    names = {B: "batch", H: "heads", position: "positions", channel: "channels"}
    places: dict[str, int] = {}
    heads: sympy.Expr = sympy.Integer(1)
    shape = sizes_of(node)
    lead: list[int] = []
    for dim, (at, size) in enumerate(zip(index, shape, strict=True)):
        if size == 1:
            continue
        name = names.get(at, "")
        if at.op == "floordiv" and at.operands[0] is H and at.operands[1].op == "const":
            total = indices.extents[H]
            name = "heads" if total == size * at.operands[1].value else ""
        if name in places or at is ZERO:
            return None
        if name:
            places[name] = dim
        if name == "heads":
            heads = size
        if name not in ("positions", "channels"):
            lead.append(dim)
    needed = [n for n, x in (("positions", position), ("channels", channel)) if n not in places]
    for name in needed:
        if indices.extents[position if name == "positions" else channel] != 1:
            return None
    if all(dim in places.values() for dim in lead):
        return Operand(node, places, (), _plain(heads, node, places.get("heads")))
    return _flattened(indices, node, index, lead, places)


def _flattened(
    indices: Indices, node: fx.Node, index: Index, lead: Sequence[int], places: dict[str, int]
) -> Operand | None:
    """A tensor whose batch and heads are one dimension, or more than two."""
    extents = indices.extents
    both = indices.join((indices.atom(B), indices.atom(H)), (extents[B], extents[H]))
    shape = sizes_of(node)
    inside = {name: dim for name, dim in places.items() if name in ("positions", "channels")}
    whole = indices.join([index[dim] for dim in lead], [shape[dim] for dim in lead])
    if whole is not both or len(inside) < 2 or len(lead) + 2 != len(shape):
        return None
    if not extents[H].is_Integer:
        return None
    return Operand(node, inside, tuple(lead), int(extents[H]))


def _plain(size: sympy.Expr, node: fx.Node, dim: int | None) -> Any:
    return int(size) if size.is_Integer or dim is None else node.meta["val"].shape[dim]

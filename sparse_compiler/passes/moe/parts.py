"""The results of the first linear layers, and which of their columns are which part of the body.

One product often computes two parts, side by side or interleaved: ``gate, up = both.chunk(2, -1)``.
A part is a range of a product's columns with a step; its weight is the same range of the weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.moe.body import part
from sparse_compiler.passes.moe.layout import FEATURES, Layout, follow, viewed
from sparse_compiler.passes.moe.routing import Routing
from sparse_compiler.passes.moe.site import Make, Refused
from sparse_compiler.region import Builder
from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import Expr
from sparse_compiler.static import arguments

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Columns:
    """Some columns of what one product computes.

    Attributes:
        product: the node that computes all of them.
        layout: of these; its offset is the first one.
        bias: [E, all columns], added to the product, or None.
    """

    product: fx.Node
    layout: Layout
    bias: fx.Node | None = None

    def picked(self, builder: Builder, node: fx.Node, dim: int) -> fx.Node:
        """These of a tensor that has all columns as its dimension ``dim``."""
        axis = self.layout.features()
        assert axis is not None
        start, count, step = self.layout.offset, int(axis.size), axis.stride
        if count == node.meta["val"].shape[dim]:
            return node
        stop = start + (count - 1) * step + 1
        return builder.call(aten.slice.Tensor, node, dim, start, stop, step)


class Parts:
    """Numbers the parts as the body is read.

    Args:
        routing: of the graph.
        starts: the layout of a node that is a first linear layer's product, None for others.
        bias_of: the biases [E, columns] if a node is the bias of each row's expert.
        masks: whether a boolean node says which rows are of no expert.

    Attributes:
        found: the parts, by number.
    """

    def __init__(
        self,
        routing: Routing,
        starts: Callable[[fx.Node], Layout | None],
        bias_of: Callable[[fx.Node, Layout], fx.Node | None],
        masks: Callable[[fx.Node], bool],
    ) -> None:
        self.found: list[Columns] = []
        self._routing = routing
        self._starts = starts
        self._bias_of = bias_of
        self._masks = masks
        self._known: dict[fx.Node, Columns | None] = {}

    def leaf(self, node: fx.Node) -> Expr | None:
        """The expression of a node that is a part, for ``read_body``.

        Raises:
            Refused: parts of different forms.
        """
        if schema_name(node) == "glu":
            return self._glu(node)
        columns = self.columns(node)
        if columns is None or columns.layout.features() is None:
            return None
        return self._numbered(columns)

    def _numbered(self, columns: Columns) -> Expr:
        if self.found:
            first = self.found[0].layout
            one, other = first.features(), columns.layout.features()
            assert one is not None and other is not None
            if first.names() != columns.layout.names() or one.size != other.size:
                raise Refused("the parts of an expert's hidden features are of different shapes")
        if columns not in self.found:
            self.found.append(columns)
        return part(self.found.index(columns))

    def _glu(self, node: fx.Node) -> Expr | None:
        source, given = self._routing.operand(node, "self"), arguments(node)
        columns = self.columns(source) if isinstance(source, fx.Node) else None
        axis = columns.layout.features() if columns is not None else None
        if columns is None or axis is None or not axis.size.is_Integer:
            return None
        place = columns.layout.place(FEATURES)
        if given["dim"] % len(columns.layout.dims) != place or axis.size % 2:
            return None
        half = dataclasses.replace(axis, size=axis.size // 2)
        both = []
        for further in (0, int(half.size) * axis.stride):
            dims = tuple((half,) if dim == (axis,) else dim for dim in columns.layout.dims)
            layout = Layout(dims, columns.layout.offset + further)
            both.append(self._numbered(dataclasses.replace(columns, layout=layout)))
        return e.mul(both[0], e.sigmoid(both[1]))

    def columns(self, node: fx.Node) -> Columns | None:
        """What a node has of a product's columns, or None."""
        if node not in self._known:
            self._known[node] = None
            self._known[node] = self._columns(node)
        return self._known[node]

    def _columns(self, node: fx.Node) -> Columns | None:
        start = self._starts(node)
        if start is not None:
            return Columns(node, start)
        source = viewed(node)
        if source is not None:
            reader = node
            if schema_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
                reader = node.args[0]
            before = self.columns(self._routing.writes.now(source, reader))
            layout = None if before is None else follow(before.layout, node)
            if before is None or layout is None:
                return None
            return dataclasses.replace(before, layout=layout)
        name = schema_name(node)
        if name == "masked_fill":
            mask, filled = (self._routing.operand(node, key) for key in ("mask", "self"))
            before = self.columns(filled)  # first: it tells whose rows they are
            return before if self._masks(mask) else None
        return self._biased(node) if name in ("add", "__iadd__") else None

    def _biased(self, node: fx.Node) -> Columns | None:
        given = (self._routing.operand(node, name) for name in ("self", "other"))
        left, right = given
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        if arguments(node).get("alpha", 1) != 1:
            return None
        for one, other in ((left, right), (right, left)):
            columns = self.columns(one)
            if columns is None or columns.bias is not None:
                continue
            bias = self._bias_of(other, columns.layout)
            if bias is not None:
                return dataclasses.replace(columns, bias=bias)
        return None


def weight_of(columns: Columns, weight: fx.Node, turned: bool) -> Make:
    """The weight [E, I, D] of a part.

    Args:
        columns: the part.
        weight: [E, D, all columns], or [E, all columns, D].
        turned: whether it is the former.
    """

    def make(builder: Builder) -> fx.Node:
        stacked = builder.call(aten.transpose.int, weight, 1, 2) if turned else weight
        return columns.picked(builder, stacked, 1)

    return make


def bias_of(columns: Columns) -> Make:
    """The bias [E, I] of a part."""
    bias = columns.bias
    assert bias is not None
    return lambda builder: columns.picked(builder, bias, 1)

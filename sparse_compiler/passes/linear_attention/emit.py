"""Plans as nodes of plain ATen operators, which Inductor fuses like the user's own."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.indices import Index
from sparse_compiler.passes.linear_attention.network import Factor
from sparse_compiler.passes.linear_attention.plan import Group
from sparse_compiler.region import Builder

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Value:
    """A node with one dimension for each index."""

    node: fx.Node
    order: tuple[Index, ...]


class Emitter:
    """Makes the nodes of the plans of one rewrite.

    Several results of it (numerator and normaliser) share what is common to them; each edit of the
    graph has a builder of its own.

    Args:
        dtype: what is computed in.
        replaced: what now stands for nodes that earlier rewrites have replaced.
    """

    builder: Builder

    def __init__(self, dtype: torch.dtype, replaced: Mapping[fx.Node, fx.Node]) -> None:
        self.dtype = dtype
        self.replaced = replaced
        self.shared: dict[Hashable, fx.Node] = {}

    def operand(self, group: Group) -> Value:
        """The product of the factors of one operand."""
        order = tuple(dict.fromkeys(index for factor in group for index in factor.indices))
        node: fx.Node | None = None
        for factor in group:
            node = self.applied(node, factor, order)
        assert node is not None
        return Value(node, order)

    def applied(self, node: fx.Node | None, factor: Factor, order: tuple[Index, ...]) -> fx.Node:
        """``node``, or 1 if there is none, times or over a factor, or masked by it."""
        if not isinstance(factor.node.meta["val"], torch.Tensor):
            other = self.source(factor)
        else:
            other = self.aligned(self._spread(factor), order)
        if node is None:
            if factor.use == "times":
                return other
            node = self.call(aten.ones.default, [], dtype=self.dtype, device=_device(other))
        if factor.use == "times":
            return self.call(aten.mul.Tensor, node, other)
        if factor.use == "over":
            return self.call(aten.div.Tensor, node, other)
        if factor.use == "drop":
            other = self.call(aten.logical_not.default, other)
        return self.call(aten.where.ScalarOther, other, node, 0)

    def source(self, factor: Factor) -> fx.Node:
        """The node that holds a factor now."""
        return self.replaced.get(factor.node, factor.node)

    def _spread(self, factor: Factor) -> Value:
        """A factor with one dimension for each of its indices, in the dtype of the result."""
        node = self.source(factor)
        if factor.use in ("times", "over") and node.meta["val"].dtype is not self.dtype:
            node = self.call(aten.to.dtype, node, self.dtype)
        for place, dim in reversed(list(enumerate(factor.dims))):
            if not dim:
                node = self.call(aten.squeeze.dim, node, place)
            elif len(dim) > 1:
                node = self.call(aten.unflatten.int, node, place, _sizes(dim))
        return Value(node, factor.indices)

    def aligned(self, value: Value, order: Sequence[Index]) -> fx.Node:
        """A view with a dimension for each index of ``order``, of size 1 for those it lacks."""
        present = [index for index in order if index in value.order]
        node = self.permuted(value, present).node
        for place, index in enumerate(order):
            if index not in value.order:
                node = self.call(aten.unsqueeze.default, node, place)
        return node

    def permuted(self, value: Value, order: Sequence[Index]) -> Value:
        """The value with its dimensions in this order."""
        if tuple(order) == value.order:
            return value
        places = [value.order.index(index) for index in order]
        return Value(self.call(aten.permute.default, value.node, places), tuple(order))

    def contracted(self, left: Value, right: Value, order: Sequence[Index]) -> Value:
        """The product of two values, summed over all but the indices of ``order``."""
        every = dict.fromkeys((*left.order, *right.order))
        letters = dict(zip(every, string.ascii_letters, strict=False))
        texts = ["".join(letters[index] for index in x) for x in (left.order, right.order, order)]
        text = f"{texts[0]},{texts[1]}->{texts[2]}"
        node = self.call(aten.einsum.default, text, [left.node, right.node])
        return Value(node, tuple(order))

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """See ``Builder.call``."""
        return self.builder.call(target, *args, **kwargs)


def _sizes(dim: Sequence[Index]) -> list[int]:
    """Sizes for a view, of which one may be left open."""
    return [index.size if isinstance(index.size, int) else -1 for index in dim]


def _device(node: fx.Node) -> torch.device:
    value = node.meta["val"]
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")

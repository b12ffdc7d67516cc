"""How [batch, heads, queries, channels] becomes what the model goes on with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.attention import lift_views
from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.attention.operands import sized
from sparse_compiler.passes.attention.symbols import symbolic
from sparse_compiler.region import Builder

aten = torch.ops.aten

# Views that not every layout can have.
_STRICT = ("view", "view_as", "_unsafe_view", "as_strided", "view_as_real", "view_as_complex")
_PIECES = ("getitem", "split", "chunk", "unbind", "expand", "slice", "select")


@dataclasses.dataclass(frozen=True)
class Output:
    """The last node of a region.

    Attributes:
        node: the node that the result stands for.
        lead: sizes of its dimensions that are batch and heads; a dynamic one is None.
        is_pair: whether these are the batch and the heads, one dimension each.
        order: its dimensions, as places in [*lead, queries, channels].
    """

    node: fx.Node
    lead: tuple[int | None, ...]
    is_pair: bool
    order: tuple[int, ...]

    def build(self, builder: Builder, result: fx.Node) -> fx.Node:
        """The output, given the attention's result [B, H, M, DV]."""
        if not self.is_pair:
            sizes = [-1 if size is None else size for size in self.lead]
            length, channels = (sized(builder, result, dim) for dim in (2, 3))
            result = builder.call(aten.reshape.default, result, [*sizes, length, channels])
        if self.order != tuple(range(len(self.order))):
            result = builder.call(aten.permute.default, result, list(self.order))
        if _strides(result) != _strides(self.node) and _has_strict_view(self.node):
            result = builder.call(aten.contiguous.default, result)
        return result


def _strides(node: fx.Node) -> list[Any]:
    value = node.meta["val"]
    pairs = zip(value.shape, value.stride(), strict=True)
    return [symbolic(stride) for size, stride in pairs if symbolic(size) != 1]


def _has_strict_view(node: fx.Node) -> bool:
    """Whether a node behind ``node`` views it in a way that depends on its strides."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            name = schema_name(user)
            if name in _STRICT:
                return True
            moves = lift_views.is_whole_view(user) and name not in ("contiguous", "clone")
            if user not in seen and (moves or name in _PIECES):
                seen.add(user)
                waiting.append(user)
    return False

"""Tensors that a score reads element by element."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from sparse_compiler.region import Builder
from sparse_compiler.score.expr import B, Expr, H, K, Q
from sparse_compiler.score.node import ZERO

aten = torch.ops.aten

LOADS = {
    torch.bool: "bool",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A node whose elements an expression loads.

    Attributes:
        node: the tensor; or a number that is known at run time only.
        kind: ``"runtime"``; ``"static"``: parameters and buffers decide its value;
            ``"constant"``: nothing does, ``GraphFacts.constant`` has it if it is small;
            ``"learned"``: a gradient may flow into it.
        order: of a learned leaf, its index in b, h, q, k: the leaf is then what ``build`` makes
            of the node, a [B or 1, H or 1, M or 1, N or 1] tensor, so that its gradient is a sum
            of the scores' gradient. None for any other leaf.
    """

    node: fx.Node
    kind: str
    order: tuple[Expr, ...] | None = None

    @property
    def dtype(self) -> str:
        """The name of its dtype in a ``load``."""
        value = self.node.meta["val"]
        return LOADS[value.dtype] if isinstance(value, torch.Tensor) else "f64"

    def build(self, builder: Builder, names: tuple[Expr, ...] = (B, H, Q, K)) -> fx.Node:
        """The tensor that is loaded, as a node; with ``order``, one dimension a name."""
        value = self.node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return builder.call(aten.scalar_tensor.default, self.node, dtype=torch.float64)
        if self.order is None:
            return self.node
        places = {index: dim for dim, index in enumerate(self.order) if index is not ZERO}
        return in_order(builder, self.node, places, names)


def is_plain(index: tuple[Expr, ...]) -> bool:
    """Whether each dimension is one of b, h, q, k, no two the same, or has one element."""
    given = [item for item in index if item is not ZERO]
    return len(set(given)) == len(given) and all(item in (B, H, Q, K) for item in given)


def in_order(
    builder: Builder, node: fx.Node, places: dict[Any, int], names: tuple[Any, ...]
) -> fx.Node:
    """A view of ``node`` with one dimension a name, in order; those it lacks have size 1.

    Args:
        builder: makes the nodes.
        node: a tensor; its dimensions that are not in ``places`` have size 1.
        places: the dimension of each name that it has.
        names: the dimensions of the result.
    """
    spare = [dim for dim in range(node.meta["val"].dim()) if dim not in places.values()]
    for dim in reversed(spare):
        node = builder.call(aten.squeeze.dim, node, dim)
    ranks = sorted(places.values())
    order = [ranks.index(places[name]) for name in names if name in places]
    if order != sorted(order):
        node = builder.call(aten.permute.default, node, order)
    for place, name in enumerate(names):
        if name not in places:
            node = builder.call(aten.unsqueeze.default, node, place)
    return node

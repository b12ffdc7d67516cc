"""Whether a tensor may hold an infinity that the user put there."""

from __future__ import annotations

import torch
from torch import fx

from sparse_compiler.passes.dead_channels.dims import KINDS, operator_name
from sparse_compiler.static import StaticValues

_KEEP_FINITE = ("matmul", "bmm", "mm", "einsum", "stack", "cat", "arange", "where", "full")
_KINDS = ("pointwise", "structure", "view", "join", "pieces", "piece", "repeat", "product")


def may_be_infinite(node: fx.Node, static: StaticValues) -> bool:
    """Whether a tensor may hold an infinity or NaN, overflow apart.

    Rotary embeddings are the case that matters: cosines of positions, which are integers.
    """
    seen: dict[fx.Node, bool] = {}

    def visit(current: fx.Node) -> bool:
        if current not in seen:
            seen[current] = decide(current)
        return seen[current]

    def decide(current: fx.Node) -> bool:
        value = current.meta.get("val")
        if not isinstance(value, (torch.Tensor, list, tuple)):
            return False
        if isinstance(value, torch.Tensor) and not (
            value.is_floating_point() or value.is_complex()
        ):
            return False
        if static.is_static(current):
            known = static.value(current)
            return known is None or not bool(torch.isfinite(known).all())
        if current.op != "call_function":
            return True
        if KINDS.get(current.target) not in _KINDS and (operator_name(current) not in _KEEP_FINITE):
            return True
        return any(visit(operand) for operand in current.all_input_nodes)

    return visit(node)

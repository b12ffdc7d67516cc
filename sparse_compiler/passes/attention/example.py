"""Values of this call for what a score reads at run time, so that a decision can be made about it.

The values decide what is measured, never what is computed: the next call may bring others.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.attention.leaves import Leaf
from sparse_compiler.score.expr import B, H, K, Q
from sparse_compiler.score.node import ZERO
from sparse_compiler.static import StaticValues, with_aliases, writes_to

# A mask is made by a few operators from an input; what takes more is not evaluated here.
_MOST_NODES = 64
_MOST_ELEMENTS = 2**26


def hint(size: Any) -> int:
    """A size of this call: itself, or the hint behind a symbol."""
    return int(size) if isinstance(size, int) else int(size.node.hint)


def example_tensor(
    leaf: Leaf, static: StaticValues, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The value of a leaf in this call: all true or zero where it is not known.

    Args:
        leaf: what a score loads.
        static: the graph's static values.
        inputs: the graph's inputs in this call, by name.
    """
    value = leaf.node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return torch.tensor(float(value.node.hint if hasattr(value, "node") else value)).double()
    found = _evaluate(leaf.node, static, inputs)
    if found is None:
        shape = [hint(size) for size in value.shape]
        found = (
            torch.ones(shape, dtype=torch.bool)
            if value.dtype is torch.bool
            else torch.zeros(shape, dtype=value.dtype)
        )
    if leaf.order is None:
        return found
    names = [index for index in leaf.order if index is not ZERO]
    found = found.reshape(
        [n for n, at in zip(found.shape, leaf.order, strict=True) if at is not ZERO]
    )
    found = found.permute([names.index(index) for index in (B, H, Q, K) if index in names])
    for place, index in enumerate((B, H, Q, K)):
        if index not in names:
            found = found.unsqueeze(place)
    return found


def _evaluate(
    node: fx.Node, static: StaticValues, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    needed: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in needed:
            continue
        needed.add(current)
        if len(needed) > _MOST_NODES or not _is_cheap(current):
            return None
        waiting.extend(current.all_input_nodes)
        waiting.extend(writer for writer in _writers(current) if writer < node)
    writes = any(writes_to(current) for current in needed)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for current in sorted(needed):
            value: Any = inputs.get(current.name) if current.op == "placeholder" else None
            if current.op == "call_function":
                args = fx.node.map_arg(current.args, values.__getitem__)
                kwargs = fx.node.map_arg(current.kwargs, values.__getitem__)
                value = current.target(*args, **kwargs)  # type: ignore[operator]
            elif value is None:
                value = static.leaf(current)
            if value is None and not isinstance(current.meta.get("val"), torch.Tensor):
                value = hint(current.meta["val"])
            if value is None:
                return None
            if writes and current.op != "call_function" and isinstance(value, torch.Tensor):
                value = value.detach().clone()  # the call's own tensors stay as they are
            values[current] = value
    result = values[node]
    return result if isinstance(result, torch.Tensor) else None


def _writers(node: fx.Node) -> list[fx.Node]:
    """What writes to a node's storage, before or after it."""
    aliases = with_aliases([node])
    return [user for alias in aliases for user in alias.users if alias in writes_to(user)]


def _is_cheap(node: fx.Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr")
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        elements = 1
        for size in value.shape:
            elements *= hint(size)
        if elements > _MOST_ELEMENTS:
            return False
    if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
        return True
    return torch.Tag.nondeterministic_seeded not in node.target.tags

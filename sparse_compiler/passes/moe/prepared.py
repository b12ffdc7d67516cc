"""Experts that ``prepare`` has routed already: they are reported."""

from __future__ import annotations

import torch
from torch import fx

from sparse_compiler.passes.attention.example import hint
from sparse_compiler.passes.base import Rewrite, module_path

ops = torch.ops.sparse_compiler


def prepared(gm: fx.GraphModule) -> list[Rewrite]:
    """A verdict for each operator ``moe`` of the model's own graph."""
    targets = (ops.moe.default, ops.moe_training.default)
    return [_verdict(node) for node in gm.graph.nodes if node.target in targets]


def _verdict(node: fx.Node) -> Rewrite:
    x, ids, inner, outer = (node.args[place] for place in (0, 1, 3, 5))
    assert isinstance(x, fx.Node) and isinstance(ids, fx.Node)
    assert isinstance(inner, (list, tuple)) and isinstance(outer, (list, tuple))
    first = inner[0]
    assert isinstance(first, fx.Node) and isinstance(node.args[8], int)
    tokens, features = map(hint, x.meta["val"].shape)
    choices, experts = hint(ids.meta["val"].shape[1]), node.args[8]
    return Rewrite(
        "moe",
        module_path(node, node.name),
        shape=(tokens, experts, choices, features, hint(first.meta["val"].shape[-2])),
        rows=(tokens,),
        dtype=str(x.meta["val"].dtype).removeprefix("torch."),
        pattern=f"top {choices} of {experts}",
        spelling="prepared",
        format="routed",
        applied=True,
        reason=f"{tokens * choices} of {tokens * choices} pairs are computed; "
        "sc.prepare put it in the place of the model's own loop, which no graph holds",
    )

"""Passes by hand, without ``torch.compile``: on an exported program and on a plain module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import sparse_compiler as sc
from sparse_compiler.pruning import prune_


def main(argv: Sequence[str] | None = None) -> bool:
    """Applies the linear pass to both and compares outputs; returns whether it changed them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval()
    model.requires_grad_(False)
    prune_(model, pattern="unstructured", sparsity=0.9)
    x = torch.randn(16, 256)

    modified = True
    for name, graph in (
        ("torch.export", sc.canonicalize(torch.export.export(model, (x,)), x)),
        ("nn.Module", sc.canonicalize(model, x)),
    ):
        before = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        expected = graph(x)
        result = sc.passes.SparseLinear()(graph)
        after = [
            str(node.target)
            for node in result.graph_module.graph.nodes
            if node.op == "call_function"
        ]
        torch.testing.assert_close(result.graph_module(x), expected, rtol=1e-4, atol=1e-5)
        print(f"{name}: modified={result.modified}, same output")
        print(f"  before: {', '.join(before)}")
        print(f"  after:  {', '.join(after)}")
        modified = modified and result.modified
    return modified


if __name__ == "__main__":
    main()

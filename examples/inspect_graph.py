"""What the compiler saw and did: graphs before and after, and a verdict on every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparse_compiler as sc
from sparse_compiler.pruning import prune_


class GatedMLP(nn.Module):
    """The feed-forward block of Llama-like models."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def main(argv: Sequence[str] | None = None) -> Any:
    """Prints the report and both graphs; returns the report."""
    torch.manual_seed(0)
    model = GatedMLP(512, 1536).eval().requires_grad_(False)
    # One layer of each kind: N:M, blocks, and one that keeps too many weights to be worth it.
    prune_(model, pattern="2:4", include="gate")
    prune_(model, pattern="16x16", sparsity=0.8, include="up")
    prune_(model, pattern="unstructured", sparsity=0.1, include="down")

    report = sc.explain(model, torch.randn(4, 512))
    print(report)
    for rewrite in report.rewrites:
        verdict = "applied" if rewrite.applied else "left dense"
        print(f"{rewrite.target}: {verdict}: {rewrite.reason}")
    for graph in report.graphs:
        print("\nbefore")
        print(graph.before.graph)
        print("\nafter")
        print(graph.after.graph)
    print(f"\ngraph breaks: {len(report.graph_breaks)}")
    return report


if __name__ == "__main__":
    main()

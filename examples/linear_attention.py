"""Causal linear attention in an unmodified model, as papers write it: an [n, n] matrix and a mask.

It is found, and computed in chunks: no [n, n] matrix is left, and nothing in the model changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from _common import interleaved_medians
from torch import Tensor, nn

import sparse_compiler as sc


class Block(nn.Module):
    """One layer of causal attention with the feature map elu + 1 instead of a softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, 0.0)
        y = scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, width))


def main(argv: Sequence[str] | None = None) -> float:
    """Prints times and the report; returns how many times faster sparse is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args(argv)
    torch.manual_seed(0)

    model = Block(options.width, options.width // 64).eval()
    x = torch.randn(1, options.length, options.width)
    with torch.no_grad():
        dense = torch.compile(model)
        sparse = torch.compile(model, backend="sparse")
        torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)
        seconds = interleaved_medians(
            {"Inductor": lambda: dense(x), "sparse": lambda: sparse(x)}, 5, "measure"
        )
        for name, value in seconds.items():
            print(f"{name:9} {value * 1e3:7.1f} ms")
        print()
        print(sc.explain(model, x))
    return seconds["Inductor"] / seconds["sparse"]


if __name__ == "__main__":
    main()

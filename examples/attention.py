"""Sliding-window attention in an unmodified model: the mask is found, its empty tiles are skipped.

The model is written the way models are: a mask of comparisons, ``scaled_dot_product_attention``.
Nothing in it knows of this package.
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
    """One layer of attention over the last ``window`` tokens."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query = torch.arange(length)[:, None]
        key = torch.arange(length)[None, :]
        mask = (key <= query) & (query - key < self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, width))


def main(argv: Sequence[str] | None = None) -> float:
    """Prints times and the report; returns how many times faster sparse is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args(argv)
    torch.manual_seed(0)

    model = Block(options.width, options.width // 64, options.window).eval()
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

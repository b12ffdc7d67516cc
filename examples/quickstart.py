"""The shortest way in: prune a model, compile it with ``backend="sparse"``, see what it gained."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from _common import interleaved_medians
from torch import nn

import sparse_compiler as sc
from sparse_compiler.pruning import prune_


def main(argv: Sequence[str] | None = None) -> float:
    """Prints dense and sparse time and the report; returns how many times faster sparse is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args(argv)
    torch.manual_seed(0)

    width = options.width
    model = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    model.eval().requires_grad_(False)
    prune_(model, pattern="unstructured", sparsity=options.sparsity)
    x = torch.randn(16, width)

    # The same model twice: Inductor multiplies the zeros, sparse skips them.
    dense = torch.compile(model)
    sparse = torch.compile(model, backend="sparse")
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)

    seconds = interleaved_medians(
        {"Inductor": lambda: dense(x), "sparse": lambda: sparse(x)}, 21, "measure"
    )
    for name, value in seconds.items():
        print(f"{name:9} {value * 1e3:7.3f} ms")
    print()
    print(sc.explain(model, x))
    return seconds["Inductor"] / seconds["sparse"]


if __name__ == "__main__":
    main()

"""The weights of each pair's expert gathered, and one batched product for each linear layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from sparse_compiler.passes.moe.site import Refusal, Site
from sparse_compiler.static import StaticValues


def find(gm: fx.GraphModule, static: StaticValues) -> Iterator[Site | Refusal]:
    """Every mixture whose weights are gathered."""
    return iter(())

"""Zero rows and columns of weights, looked for without reading a weight that has none."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

# A slice that has a weight among its first elements is not looked at further.
_HEAD = 32


class Values(dict[fx.Node, torch.Tensor]):
    """Values of static nodes, and the largest magnitudes in them, which are worked out once."""

    def __init__(self, values: Iterable[tuple[fx.Node, torch.Tensor]] = ()) -> None:
        super().__init__(values)
        self._peaks: dict[tuple[fx.Node, int], torch.Tensor] = {}

    def peaks(self, node: fx.Node, dim: int) -> torch.Tensor:
        """Of each slice along ``dim``: 0 if it is all zero, not finite if any element is not."""
        if (node, dim) not in self._peaks:
            self._peaks[node, dim] = peaks(self[node], dim)
        return self._peaks[node, dim]


def peaks(value: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest magnitude in each slice along ``dim``."""
    others = [d for d in range(value.dim()) if d != dim]
    if value.numel() == 0 or not others:
        return value.abs().cpu() if not others else torch.zeros(value.shape[dim])
    return torch.linalg.vector_norm(value, float("inf"), dim=others).cpu()


def along(value: torch.Tensor, dim: int) -> torch.Tensor:
    """A weight as a matrix whose rows are its slices along ``dim``."""
    return value.movedim(dim, 0).reshape(value.shape[dim], -1)


def zero_slices(value: torch.Tensor, dim: int) -> torch.Tensor:
    """Which slices along ``dim`` are all zero; -0.0 is zero, NaN is not."""
    if value.numel() == 0:
        return torch.zeros(value.shape[dim], dtype=torch.bool)
    matrix = along(value, dim)
    zero = ~(matrix[:, :_HEAD] != 0).any(dim=1)
    suspects = zero.nonzero().flatten()
    zero[suspects] = ~(matrix[suspects] != 0).any(dim=1)
    return zero.cpu()

"""Patterns: which weights may be removed together.

A pattern sees a layer as scores [out_features, in_features]. It sums them over its units (single
weights, blocks, rows, columns) and turns a choice of units back into a mask over weights. N:M is
the exception: it fixes the choice by itself, in every group of M consecutive inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compiler.errors import nearest
from sparse_compiler.pruning.errors import PruningError


@dataclass(frozen=True)
class NM:
    """N:M: of each M consecutive weights along the input dimension, at most N stay.

    This is the meaning of PyTorch and NVIDIA (2:4 keeps two of four); Zhou et al., "Learning N:M
    fine-grained structured sparse neural networks from scratch", arXiv:2102.04010.
    """

    n: int
    m: int

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Why a weight [out_features, in_features] cannot have this pattern, or None."""
        if shape[1] % self.m:
            return f"its in_features {shape[1]} is not divisible by {self.m}"
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Mask [out, in] with exactly N kept in each group; of equal scores the first is kept."""
        groups = scores.reshape(scores.shape[0], -1, self.m)
        # The rank of each member by comparing it with the others: M is small, and for M = 4 this is
        # several times faster than sorting millions of groups of four.
        mask = torch.empty(groups.shape, dtype=torch.bool, device=scores.device)
        for i in range(self.m):
            mine = groups[..., i : i + 1]
            ahead = (groups[..., :i] >= mine).sum(-1) + (groups[..., i + 1 :] > mine).sum(-1)
            mask[..., i] = ahead < self.n
        return mask.reshape(scores.shape)


@dataclass(frozen=True)
class Units:
    """Units of ``rows`` × ``columns`` weights that live or die together; None spans the layer."""

    name: str
    rows: int | None
    columns: int | None

    def refusal(self, shape: tuple[int, int]) -> str | None:
        """Why a weight [out_features, in_features] cannot have this pattern, or None."""
        for size, unit, what in zip(
            shape, (self.rows, self.columns), ("out_features", "in_features"), strict=True
        ):
            if unit is not None and size % unit:
                return f"its {what} {size} is not divisible by {unit}"
        return None

    def _sizes(self, shape: torch.Size) -> tuple[int, int]:
        return self.rows or shape[0], self.columns or shape[1]

    def sum(self, scores: Tensor) -> Tensor:
        """Scores [out, in] summed over each unit: [out / rows, in / columns]."""
        rows, columns = self._sizes(scores.shape)
        if rows == columns == 1:
            return scores
        return scores.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum((1, 3))

    def expand(self, units: Tensor, shape: torch.Size) -> Tensor:
        """A value for each unit as a value for each weight [out, in]."""
        rows, columns = self._sizes(shape)
        return units.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


Pattern = NM | Units

_NAMED = {
    "unstructured": Units("unstructured", 1, 1),
    "rows": Units("rows", 1, None),
    "columns": Units("columns", None, 1),
}


def parse_pattern(text: str) -> Pattern:
    """The pattern named by ``"2:4"``, ``"16x16"``, ``"unstructured"``, ``"rows"`` or ``"columns"``.

    Raises:
        PruningError: the text names no pattern; the message says what to write.
    """
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m:
            raise PruningError(
                f"pattern {text!r} keeps {n} of {m}: N:M needs 0 < N < M, as in '2:4'."
            )
        return NM(n, m)
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        rows, columns = int(found[1]), int(found[2])
        if not rows or not columns:
            raise PruningError(f"pattern {text!r} has an empty block; write e.g. '16x16'.")
        return Units(text, rows, columns)
    if text in _NAMED:
        return _NAMED[text]
    raise PruningError(
        f"unknown pattern {text!r}.{nearest(text, [*_NAMED, '2:4', '16x16'])} "
        "Write N:M ('2:4' keeps 2 of 4), rows × columns of a block ('16x16'), "
        "'unstructured', 'rows' or 'columns'."
    )


def keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Mask of the largest scores along the last dimension; round(sparsity · size) are dropped.

    Of equal scores the first are dropped, so that the number is exact and the choice the same in
    every run.
    """
    mask = torch.ones_like(scores, dtype=torch.bool)
    drop = round(sparsity * scores.shape[-1])
    if drop:
        order = scores.argsort(dim=-1, stable=True)
        mask.scatter_(-1, order[..., :drop], False)
    return mask

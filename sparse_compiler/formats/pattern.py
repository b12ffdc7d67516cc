"""What the zeros of a weight look like: sparsity, N:M, blocks, dead channels, and near misses.

Patterns are found, never declared: a 2:4 weight is recognised by its zeros whoever pruned it.
-0.0 counts as zero. A near miss (99.6 % of the groups are 2:4) is reported, because the user who
meant 2:4 wants to know.
"""

from __future__ import annotations

import dataclasses
import math

import torch

_GROUP_SIZES = (4, 8, 16, 32)
_BLOCK_SIDES = (2, 4, 8, 16, 32, 64)
# A block may hold a zero or two by chance and still be a block.
_BLOCK_FILL = 0.9
_NEAR_MISS = 0.95


@dataclasses.dataclass(frozen=True)
class Pattern:
    """The zeros of a weight [out_features, in_features].

    Attributes:
        shape: out_features, in_features.
        nonzeros: number of stored weights.
        n_of_m: ``(n, m)`` if at most n of each m consecutive inputs are kept, and about n are.
        block: ``(rows, columns)`` of the largest blocks that are all zero or kept, or None.
        zero_rows: number of outputs whose weights are all zero.
        zero_columns: number of inputs whose weights are all zero.
        near_misses: sentences about patterns that a few weights break.
    """

    shape: tuple[int, int]
    nonzeros: int
    n_of_m: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    zero_rows: int = 0
    zero_columns: int = 0
    near_misses: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        total = self.shape[0] * self.shape[1]
        return 1 - self.nonzeros / total if total else 0.0

    @property
    def density(self) -> float:
        return 1 - self.sparsity

    @property
    def name(self) -> str:
        """The pattern's name in reports: ``2:4``, ``block 16x16``, ``unstructured``, ``dense``."""
        if self.nonzeros == self.shape[0] * self.shape[1]:
            return "dense"
        if not self.nonzeros:
            return "all zero"
        if self.n_of_m:
            return f"{self.n_of_m[0]}:{self.n_of_m[1]}"
        if self.block:
            return f"block {self.block[0]}x{self.block[1]}"
        return "unstructured"


def find_pattern(weight: torch.Tensor) -> Pattern:
    """Look at a weight's zeros.

    Args:
        weight: [out_features, in_features], any floating dtype.
    """
    shape = (weight.shape[0], weight.shape[1])
    kept = weight != 0  # -0.0 == 0
    nonzeros = int(torch.count_nonzero(kept))  # three times as fast as a sum
    total = shape[0] * shape[1]
    if nonzeros in (0, total) or total == 0:
        dead = total if nonzeros == 0 else 0
        return Pattern(shape, nonzeros, None, None, *(shape if dead else (0, 0)))
    # A maximum of bytes is several times faster than any().
    zero_rows = shape[0] - int(kept.view(torch.uint8).amax(dim=1).sum())
    zero_columns = shape[1] - int(kept.view(torch.uint8).amax(dim=0).sum())
    near: list[str] = []
    density = nonzeros / total
    # A nearly dense weight is not worth the search.
    n_of_m = _find_n_of_m(kept, density, near) if density < 0.97 else None
    block = None if n_of_m or density >= 0.97 else _find_block(kept, nonzeros)
    return Pattern(shape, nonzeros, n_of_m, block, zero_rows, zero_columns, tuple(near))


def count_kept(kept: torch.Tensor) -> torch.Tensor:
    """How many of each row are true: contiguous bools [rows, columns] to int32 [rows]."""
    rows, columns = kept.shape
    chunk = math.gcd(columns, 1024)
    if chunk < 8 or not rows:
        return kept.sum(dim=1, dtype=torch.int32)
    # Eight bools are one int64 of bytes, and at most 128 of those add up without a carry between
    # bytes: several times faster than a sum over bools, which converts each of them first.
    bytes_ = kept.view(-1).view(torch.int64).view(rows, -1, chunk // 8).sum(dim=2)
    low = 0x00FF00FF00FF00FF
    sums = (bytes_ & low) + (bytes_ >> 8 & low)
    return (sums * 0x0001000100010001 >> 48).sum(dim=1, dtype=torch.int32)


def _find_n_of_m(kept: torch.Tensor, density: float, near: list[str]) -> tuple[int, int] | None:
    in_features = kept.shape[1]
    for m in _GROUP_SIZES:
        if in_features % m:
            continue
        counts = _group_counts(kept, m)
        most = int(counts.max())
        # "3:4" says nothing about a weight that keeps one in ten.
        if most < m and density >= 0.9 * most / m:
            return most, m
        meant = round(density * m)
        if 0 < meant < m and most > meant and abs(density - meant / m) < 0.02:
            share = float((counts <= meant).float().mean())
            if share >= _NEAR_MISS and not near:
                near.append(f"{min(share, 0.9999):.2%} of its groups are {meant}:{m}")
    return None


def _group_counts(kept: torch.Tensor, m: int) -> torch.Tensor:
    """How many of each m consecutive columns are kept, as a flat int tensor."""
    # Four bools are one int32 whose bytes a multiplication adds up, which is several times
    # faster than a sum over a dimension of length four.
    words = kept.contiguous().view(torch.int32)
    fours = (words * 0x01010101) >> 24
    return fours.reshape(-1, m // 4).sum(dim=1) if m > 4 else fours.reshape(-1)


def _find_block(kept: torch.Tensor, nonzeros: int) -> tuple[int, int] | None:
    """The largest r x c such that the blocks with anything in them are (nearly) full."""
    rows, tiles = _grow(kept, 0, nonzeros, 1)
    columns, _ = _grow(tiles, 1, nonzeros, rows)
    return None if rows == columns == 1 else (rows, columns)


def _grow(tiles: torch.Tensor, dim: int, nonzeros: int, side: int) -> tuple[int, torch.Tensor]:
    """Double the blocks along one dimension for as long as they stay full."""
    found = 1, tiles
    for size in _BLOCK_SIDES:
        if tiles.shape[dim] % 2:
            break
        even, odd = (tiles[0::2], tiles[1::2]) if dim == 0 else (tiles[:, 0::2], tiles[:, 1::2])
        tiles = even | odd
        if nonzeros < _BLOCK_FILL * int(tiles.sum()) * size * side:
            break
        found = size, tiles
    return found

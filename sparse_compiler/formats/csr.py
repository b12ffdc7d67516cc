"""Blocked CSR: the kept weights in the order the CPU kernels read them.

Rows come in groups of ``group`` rows that share one list of columns (1: unstructured; 4, 8, 16:
block-sparse). A weight is cut into n-blocks of 64 or 128 rows and k-blocks of ``k_block`` units; a
unit is 32 bits: one float32, or two neighbouring bfloat16. What one group keeps in one k-block is a
segment; segments lie in memory by n-block, k-block and descending length, so that the kernel reads
one forward stream and its inner loops keep their trip counts.
"""

from __future__ import annotations

import dataclasses

import torch

from sparse_compiler.formats import blocking
from sparse_compiler.formats.pattern import Pattern, count_kept

GROUPS = (16, 8, 4)
# The vector kernels may read this many units past the end.
_TAIL = 64


@dataclasses.dataclass(frozen=True)
class CsrLayout:
    """Where the kept weights of a [out_features, in_features] matrix lie.

    Attributes:
        columns: int16 (read as unsigned) [units + 64], unit column of each stored unit.
        segments: int32 [n-blocks, k-blocks, rows of an n-block / group, 2]: start, and count |
            place of the group in its n-block << 16.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    group: int
    k_block: int
    columns: torch.Tensor
    segments: torch.Tensor

    @property
    def units(self) -> int:
        """Stored unit columns, the tail not counted."""
        return self.columns.numel() - _TAIL

    def element_index(self) -> torch.Tensor:
        """See the function of the same name."""
        return element_index(
            self.columns,
            self.segments,
            out_features=self.out_features,
            in_features=self.in_features,
            group=self.group,
            per_unit=4 // self.dtype.itemsize,
        )

    @property
    def nbytes(self) -> int:
        stored = self.columns.numel() * (4 * self.group + 2)
        return stored + self.segments.numel() * 4


def group_of(name: str, pattern: Pattern) -> int:
    """Rows that share a column list in the format ``name``: 1, or what divides the blocks."""
    if name != "block" or pattern.block is None:
        return 1
    return next(group for group in GROUPS if pattern.block[0] % group == 0)


def pack(
    weight: torch.Tensor,
    *,
    group: int = 1,
    rows: int | None = None,
    k_block: int | None = None,
) -> tuple[CsrLayout, torch.Tensor]:
    """Pack a weight.

    Args:
        weight: [out_features, in_features], float32 or bfloat16, in_features up to 65535 units.
        group: rows that share a column list: 1, 4, 8 or 16.
        rows: rows of the input it will be used with, None if any; decides the k-blocks.
        k_block: units of a k-block, where it is to be that of an earlier layout.

    Returns:
        The layout, and the values [(units + 64) * group * elements per unit] in its order.
    """
    out_features, in_features = weight.shape
    per_unit = 4 // weight.dtype.itemsize
    units = -(-in_features // per_unit)
    if k_block is None:
        share = int(torch.count_nonzero(weight)) / max(1, weight.numel())
        stored = share if group > 1 else 1 - (1 - share) ** per_unit
        k_block = blocking.k_block(stored, units, group=group, rows=rows)
    n_block = blocking.n_block(out_features)
    blocks_k, blocks_n = max(1, -(-units // k_block)), max(1, -(-out_features // n_block))
    groups = n_block // group
    padded = weight.detach()
    missing = (blocks_k * k_block * per_unit - in_features, blocks_n * n_block - out_features)
    if any(missing):
        padded = torch.nn.functional.pad(padded, (0, missing[0], 0, missing[1]))
    padded = padded.contiguous()
    bits = padded.view(torch.int32)
    kept = padded != 0  # -0.0 == 0
    if per_unit == 2:
        kept = kept.view(torch.int16) != 0
    if group > 1:
        kept = kept.view(blocks_n * groups, group, -1).any(dim=1)
    kept = kept.reshape(-1, k_block)  # [n-blocks * groups * k-blocks, k_block]
    counts = count_kept(kept).view(blocks_n, groups, blocks_k).transpose(1, 2)
    order = counts.argsort(dim=2, descending=True, stable=True)
    counts = counts.gather(2, order).flatten()
    block = torch.arange(blocks_n)[:, None, None]
    k = torch.arange(blocks_k)[:, None]
    # Rows of [.., k_block] views of `kept` and of `bits`, in the order of the segments.
    segment = ((block * groups + order) * blocks_k + k).flatten()
    first = ((block * groups + order) * group * blocks_k + k).flatten()
    # Where each stored unit is, in units of [segments, k_block].
    at = blocking.flat_nonzero(kept.index_select(0, segment))
    number = torch.arange(counts.numel())

    def moved(row_of_segment: torch.Tensor) -> torch.Tensor:
        offset = (row_of_segment - number) * k_block
        return at + offset.repeat_interleave(counts, output_size=at.numel())

    columns = moved(number // groups % blocks_k).to(torch.int16)
    place = moved(first)
    if group > 1:
        place = (place[:, None] + torch.arange(group) * (blocks_k * k_block)).flatten()
    values = bits.view(-1)[place]
    starts = (counts.cumsum(0) - counts).to(torch.int32)
    table = torch.stack([starts, counts | (order.flatten().int() << 16)], dim=1)
    layout = CsrLayout(
        out_features,
        in_features,
        weight.dtype,
        group,
        k_block,
        torch.cat([columns, columns.new_zeros(_TAIL)]),
        table.view(blocks_n, blocks_k, groups, 2).contiguous(),
    )
    values = torch.cat([values, values.new_zeros(_TAIL * group)])
    return layout, values.view(weight.dtype)


def element_index(
    columns: torch.Tensor,
    segments: torch.Tensor,
    *,
    out_features: int,
    in_features: int,
    group: int,
    per_unit: int,
) -> torch.Tensor:
    """Which weight each stored value is: flat index into [out_features, in_features].

    Returns:
        int64, one per stored value, the tail included. Padding gets ``out_features *
        in_features``, one past the last weight.
    """
    outside = out_features * in_features
    table = segments.reshape(-1, 2)
    counts = (table[:, 1] & 0xFFFF).long()
    groups = segments.shape[2]
    per_n_block = segments.shape[1] * groups
    block = torch.arange(table.shape[0], device=table.device) // per_n_block
    first_row = block * (groups * group) + (table[:, 1] >> 16).long() * group
    total = columns.numel() - _TAIL
    row = torch.repeat_interleave(first_row, counts, output_size=total)
    unit = columns[:total].long() & 0xFFFF
    row = row[:, None, None] + torch.arange(group, device=row.device)[:, None]
    column = unit[:, None, None] * per_unit + torch.arange(per_unit, device=row.device)
    inside = (row < out_features) & (column < in_features)
    index = torch.where(inside, row * in_features + column, outside).flatten()
    return torch.cat([index, index.new_full((_TAIL * group * per_unit,), outside)])


def unpack(
    values: torch.Tensor,
    columns: torch.Tensor,
    segments: torch.Tensor,
    *,
    out_features: int,
    in_features: int,
    group: int,
) -> torch.Tensor:
    """The weight [out_features, in_features] again."""
    index = element_index(
        columns,
        segments,
        out_features=out_features,
        in_features=in_features,
        group=group,
        per_unit=4 // values.dtype.itemsize,
    )
    dense = values.new_zeros(out_features * in_features + 1)
    dense = dense.index_put([index], values)
    return dense[:-1].reshape(out_features, in_features)

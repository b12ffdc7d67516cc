"""Blocked CSR: the kept weights in the order the CPU kernels read them.

Rows come in groups of ``group`` rows that share one list of columns (1: unstructured; 4, 8, 16:
block-sparse). A weight is cut into n-blocks of 64 rows and k-blocks of ``k_block`` units; a unit is
32 bits: one float32, or two neighbouring bfloat16. What one group keeps in one k-block is a
segment; segments lie in memory by n-block, k-block and descending length, so that the kernel reads
one forward stream and its inner loops keep their trip counts.
"""

from __future__ import annotations

import dataclasses

import torch

from sparse_compiler.formats.pattern import Pattern

N_BLOCK = 64
MAX_UNITS = 65535
GROUPS = (16, 8, 4)
# The vector kernels may read this many units past the end.
_TAIL = 64


@dataclasses.dataclass(frozen=True)
class CsrLayout:
    """Where the kept weights of a [out_features, in_features] matrix lie.

    Attributes:
        columns: int16 (read as unsigned) [units + 64], unit column of each stored unit.
        segments: int32 [n-blocks, k-blocks, 64 / group, 2]: start, and count | group << 16.
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
        rows: rows of the input it will be used with; decides the size of the k-blocks.
        k_block: units of a k-block, where it is to be that of an earlier layout.

    Returns:
        The layout, and the values [(units + 64) * group * elements per unit] in its order.
    """
    out_features, in_features = weight.shape
    per_unit = 4 // weight.dtype.itemsize
    units = -(-in_features // per_unit)
    zero = 0x7FFF7FFF if per_unit == 2 else 0x7FFFFFFF  # all bits but the signs
    if k_block is None:
        share = float((weight != 0).sum()) / max(1, weight.numel())
        k_block = _k_block(1 - (1 - share) ** per_unit, units, group, rows)
    blocks_k, blocks_n = max(1, -(-units // k_block)), max(1, -(-out_features // N_BLOCK))
    groups = N_BLOCK // group
    padded = weight.detach()
    missing = (blocks_k * k_block * per_unit - in_features, blocks_n * N_BLOCK - out_features)
    if any(missing):
        padded = torch.nn.functional.pad(padded, (0, missing[0], 0, missing[1]))
    bits = padded.contiguous().view(torch.int32)
    bits = bits.view(blocks_n, groups, group, blocks_k, k_block)
    kept = (bits & zero) != 0
    kept = kept[:, :, 0] if group == 1 else kept.any(dim=2)
    counts = kept.transpose(1, 2).sum(dim=3, dtype=torch.int32)  # [n-block, k-block, group]
    order = counts.argsort(dim=2, descending=True, stable=True)
    counts = counts.gather(2, order).flatten()
    n_block = torch.arange(blocks_n)[:, None, None]
    k = torch.arange(blocks_k)[:, None]
    # Row of the [.., k_block] view at which each segment's first row of weights begins.
    first = ((n_block * groups + order) * group * blocks_k + k).flatten()
    rows_of = (first[:, None] + torch.arange(group) * blocks_k).flatten()
    segment_bits = bits.view(-1, k_block).index_select(0, rows_of).view(-1, group, k_block)
    stored = ((segment_bits & zero) != 0).any(dim=1)
    if group == 1:
        values = segment_bits[:, 0].masked_select(stored)
    else:
        values = segment_bits.transpose(1, 2)[stored].flatten()
    number = torch.arange(counts.numel()) // groups % blocks_k
    columns = (number * k_block).to(torch.int16)[:, None] + torch.arange(k_block).to(torch.int16)
    columns = columns.masked_select(stored)
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


def _k_block(density: float, units: int, group: int, rows: int | None) -> int:
    """Units of a k-block: short enough that a panel of x stays in L1, long enough to fill."""
    if rows == 1:
        wanted = MAX_UNITS
    elif group > 1:
        wanted = 128
    else:
        steps = ((0.4, 64), (0.15, 128), (0.07, 256))
        wanted = next((size for least, size in steps if density >= least), MAX_UNITS)
    return max(1, min(wanted, units))


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
    n_block = torch.arange(table.shape[0], device=table.device) // per_n_block
    first_row = n_block * N_BLOCK + (table[:, 1] >> 16).long() * group
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

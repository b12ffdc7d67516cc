"""Bitmap: one bit per weight and the kept weights, row by row.

At half density it moves 0.53 of the dense bytes, and vector units expand it in registers: the
format for decoding, for N:M patterns, and for anything up to about 70 % zeros.
"""

from __future__ import annotations

import dataclasses

import torch

_WORD = 64
# The vector kernels may read this many bytes past the end.
_TAIL_BYTES = 64


@dataclasses.dataclass(frozen=True)
class BitmapLayout:
    """Which weights of a [out_features, in_features] matrix are kept.

    Attributes:
        bits: int64 [out_features, ceil(in_features / 64)]; bit j of word i is column 64 i + j.
        row_starts: int32 [out_features + 1], index of each row's first value.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    bits: torch.Tensor
    row_starts: torch.Tensor

    @property
    def nbytes(self) -> int:
        kept = int(self.row_starts[-1]) * self.dtype.itemsize + _TAIL_BYTES
        return kept + self.bits.numel() * 8 + self.row_starts.numel() * 4


def pack(weight: torch.Tensor) -> tuple[BitmapLayout, torch.Tensor]:
    """Pack a weight [out_features, in_features] of fewer than 2**31 kept weights.

    Returns:
        The layout, and the kept weights row by row (with a tail of zeros).
    """
    out_features, in_features = weight.shape
    weight = weight.detach()
    kept = weight != 0
    words = -(-in_features // _WORD)
    padded = torch.nn.functional.pad(kept, (0, words * _WORD - in_features))
    starts = torch.zeros(out_features + 1, dtype=torch.int32)
    starts[1:] = kept.sum(dim=1).cumsum(0)
    values = weight.masked_select(kept)
    tail = values.new_zeros(_TAIL_BYTES // weight.dtype.itemsize)
    layout = BitmapLayout(
        out_features, in_features, weight.dtype, _pack_bits(padded), starts
    )
    return layout, torch.cat([values, tail])


def _pack_bits(kept: torch.Tensor) -> torch.Tensor:
    """Bools [rows, words * 64] as int64 [rows, words]."""
    rows, columns = kept.shape
    # Eight bools are one int64 of bytes 0 or 1; one multiplication gathers their lowest bits.
    eights = kept.contiguous().view(torch.int64)
    gathered = (eights * 0x0102040810204080) >> 56
    return gathered.to(torch.uint8).view(torch.int64).view(rows, columns // _WORD)


def unpack(
    values: torch.Tensor,
    bits: torch.Tensor,
    *,
    out_features: int,
    in_features: int,
) -> torch.Tensor:
    """The weight [out_features, in_features] again."""
    shifts = torch.arange(_WORD, device=bits.device)
    kept = ((bits[:, :, None] >> shifts) & 1).bool().reshape(out_features, -1)[:, :in_features]
    return values.new_zeros(out_features, in_features).masked_scatter(kept, values)

"""Bitmap: one bit per weight and the kept weights, in the order the CPU kernels read them.

At half density it moves 0.53 of the dense bytes, and vector units expand it in registers: the
format for decoding, for N:M patterns, and for anything up to about 70 % zeros.

A weight is cut into n-blocks of 64 or 128 rows and k-blocks of 64 units; a unit is 32 bits: one
float32, or two neighbouring bfloat16. Bits and values lie in memory by n-block, k-block, row and
column, so that a kernel reads one forward stream and meets x of a k-block once for many rows.
"""

from __future__ import annotations

import dataclasses

import torch

from sparse_compiler.formats import blocking
from sparse_compiler.formats.pattern import count_kept

_WORD = 64
# The vector kernels may read this many bytes past the end.
_TAIL_BYTES = 64


@dataclasses.dataclass(frozen=True)
class BitmapLayout:
    """Which weights of a [out_features, in_features] matrix are kept.

    Attributes:
        bits: int64 [n-blocks, k-blocks, rows of an n-block, words]; bit j of word i is element
            64 i + j of the row's stretch of that k-block. A k-block has one word in float32, two
            in bfloat16.
        starts: int32 [n-blocks + 1], index of each n-block's first value.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    bits: torch.Tensor
    starts: torch.Tensor

    @property
    def nbytes(self) -> int:
        kept = int(self.starts[-1]) * self.dtype.itemsize + _TAIL_BYTES
        return kept + self.bits.numel() * 8 + self.starts.numel() * 4


def pack(weight: torch.Tensor) -> tuple[BitmapLayout, torch.Tensor]:
    """Pack a weight [out_features, in_features] of fewer than 2**31 kept weights.

    Returns:
        The layout, and the kept weights in its order (with a tail of zeros).
    """
    out_features, in_features = weight.shape
    words = 4 // weight.dtype.itemsize
    k_block = _WORD * words
    n_block = blocking.n_block(out_features)
    blocks_n, blocks_k = -(-out_features // n_block), -(-in_features // k_block)
    missing = (0, blocks_k * k_block - in_features, 0, blocks_n * n_block - out_features)
    weight = weight.detach()
    if any(missing):
        weight = torch.nn.functional.pad(weight, missing)
    ordered = weight.reshape(blocks_n, n_block, blocks_k, k_block).transpose(1, 2).contiguous()
    kept = ordered != 0
    starts = torch.zeros(blocks_n + 1, dtype=torch.int32)
    starts[1:] = count_kept(kept.flatten(1)).cumsum(0)
    values = ordered.view(-1)[blocking.flat_nonzero(kept)]
    tail = values.new_zeros(_TAIL_BYTES // weight.dtype.itemsize)
    layout = BitmapLayout(
        out_features,
        in_features,
        weight.dtype,
        _pack_bits(kept).view(blocks_n, blocks_k, n_block, words),
        starts,
    )
    return layout, torch.cat([values, tail])


def _pack_bits(kept: torch.Tensor) -> torch.Tensor:
    """Contiguous bools, a multiple of 64 of them, as a flat int64 tensor."""
    # Eight bools are one int64 of bytes 0 or 1; one multiplication gathers their lowest bits.
    eights = kept.view(-1).view(torch.int64)
    gathered = (eights * 0x0102040810204080) >> 56
    return gathered.to(torch.uint8).view(torch.int64)


def unpack(
    values: torch.Tensor,
    bits: torch.Tensor,
    *,
    out_features: int,
    in_features: int,
) -> torch.Tensor:
    """The weight [out_features, in_features] again."""
    blocks_n, blocks_k, rows, words = bits.shape
    shifts = torch.arange(_WORD, device=bits.device)
    kept = ((bits[..., None] >> shifts) & 1).bool()
    ordered = values.new_zeros(kept.shape).masked_scatter(kept, values)
    padded = ordered.transpose(1, 2).reshape(blocks_n * rows, blocks_k * words * _WORD)
    return padded[:out_features, :in_features]

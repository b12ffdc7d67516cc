"""Bitmap: what is packed comes back, in the order the kernels read it."""

import time

import pytest
import torch
from helpers import pruned
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.formats import bitmap, blocking

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 129]), st.integers(0, 150))


def unpacked(layout: bitmap.BitmapLayout, values: torch.Tensor) -> torch.Tensor:
    return bitmap.unpack(
        values, layout.bits, out_features=layout.out_features, in_features=layout.in_features
    )


@given(
    rows=SIZES,
    columns=SIZES,
    dtype=DTYPES,
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_round_trip(rows, columns, dtype, density, seed):
    weight = pruned(rows, columns, density, dtype, seed=seed)
    layout, values = bitmap.pack(weight)
    assert torch.equal(unpacked(layout, values), weight)


@given(rows=st.integers(1, 140), columns=st.integers(1, 300), dtype=DTYPES, seed=st.integers(0, 99))
def test_the_layout_is_what_the_kernels_were_promised(rows, columns, dtype, seed):
    """LAYOUT.md, spelled out weight by weight for a sample of them."""
    weight = pruned(rows, columns, 0.5, dtype, seed=seed)
    layout, values = bitmap.pack(weight)
    words = 4 // dtype.itemsize
    width = 64 * words
    high = blocking.n_block(rows)
    assert layout.bits.shape == (-(-rows // high), -(-columns // width), high, words)
    order = []
    for n0 in range(0, rows, high):
        assert layout.starts[n0 // high] == len(order)
        for k0 in range(0, columns, width):
            block = weight[n0 : n0 + high, k0 : k0 + width]
            order += block[block != 0].tolist()
    assert int(layout.starts[-1]) == len(order)
    assert values[: len(order)].tolist() == order
    assert values[len(order) :].nbytes == 64 and not values[len(order) :].any()
    n, k = (rows - 1) // 2, (columns - 1) // 2
    word = int(layout.bits[n // high, k // width, n % high, k % width // 64])
    assert (word >> (k % 64) & 1) == int(weight[n, k] != 0)


@pytest.mark.parametrize("rows", [1023, 1024, 1100])
def test_large_weights_have_wider_n_blocks(rows):
    weight = pruned(rows, 70, 0.3)
    layout, values = bitmap.pack(weight)
    assert layout.bits.shape[2] == blocking.n_block(rows)
    assert torch.equal(unpacked(layout, values), weight)


def test_negative_zero_is_not_stored():
    weight = torch.full((3, 70), -0.0)
    weight[2, 69] = 1.0
    layout, values = bitmap.pack(weight)
    assert int(layout.starts[-1]) == 1
    assert not unpacked(layout, values).signbit().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_infinity_and_denormals_are_stored(dtype):
    weight = torch.zeros(16, 133, dtype=dtype)
    weight[0, 0], weight[3, 132] = float("nan"), float("inf")
    weight[9, 131] = torch.finfo(dtype).tiny / 2
    again = unpacked(*bitmap.pack(weight))
    assert torch.equal(again.nan_to_num(7.0), weight.nan_to_num(7.0))
    assert bool(again[0, 0].isnan())


def test_bytes_are_one_bit_a_weight_and_the_values():
    for dtype in (torch.float32, torch.bfloat16):
        weight = pruned(256, 1024, 0.5, dtype)
        layout, values = bitmap.pack(weight)
        stored = values.nbytes + layout.bits.nbytes + layout.starts.nbytes
        assert layout.nbytes == stored
        kept = int((weight != 0).sum())
        assert stored < kept * dtype.itemsize + weight.numel() / 8 + 200


@pytest.mark.slow
def test_packing_is_fast():
    """80 M weights a second and core, where nothing else runs; a tenth of it is asserted."""
    weight = pruned(4096, 4096, 0.5)
    bitmap.pack(weight)
    started = time.process_time()
    bitmap.pack(weight)
    assert weight.numel() / (time.process_time() - started) > 8e6

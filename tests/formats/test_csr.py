"""Blocked CSR: what is packed comes back, in the order the kernels read it."""

import time

import pytest
import torch
from helpers import pruned
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.formats import blocking, csr
from sparse_compiler.formats.pattern import Pattern

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SIZES = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128]), st.integers(0, 150))


def unpacked(layout: csr.CsrLayout, values: torch.Tensor) -> torch.Tensor:
    return csr.unpack(
        values,
        layout.columns,
        layout.segments,
        out_features=layout.out_features,
        in_features=layout.in_features,
        group=layout.group,
    )


@given(
    rows=SIZES,
    columns=SIZES,
    dtype=DTYPES,
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    group=st.sampled_from([1, 4, 8, 16]),
    k_block=st.sampled_from([None, 1, 7, 64]),
    seed=st.integers(0, 1000),
)
def test_round_trip(rows, columns, dtype, density, group, k_block, seed):
    weight = pruned(rows, columns, density, dtype, seed=seed)
    layout, values = csr.pack(weight, group=group, k_block=k_block)
    assert torch.equal(unpacked(layout, values), weight)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 150),
    dtype=DTYPES,
    group=st.sampled_from([1, 4, 8, 16]),
    seed=st.integers(0, 1000),
)
def test_the_layout_is_what_the_kernels_were_promised(rows, columns, dtype, group, seed):
    """LAYOUT.md: segments by n-block, k-block and descending count, every group exactly once."""
    weight = pruned(rows, columns, 0.3, dtype, seed=seed)
    layout, values = csr.pack(weight, group=group, k_block=32)
    starts, packed = layout.segments.reshape(-1, 2).unbind(1)
    counts, groups = packed & 0xFFFF, packed >> 16
    assert torch.equal(starts, (counts.cumsum(0) - counts).int())
    assert int(counts.sum()) == layout.units
    blocks_n, blocks_k, size, _ = layout.segments.shape
    assert (blocks_n - 1) * size * group < rows <= blocks_n * size * group
    per_block = counts.view(-1, size)
    assert bool((per_block.diff(dim=1) <= 0).all())
    every = torch.arange(size, dtype=torch.int32).expand_as(per_block)
    assert torch.equal(groups.view(-1, size).sort(dim=1).values, every)
    blocks = torch.arange(len(counts)) // size % blocks_k
    of_unit = (layout.columns[: layout.units].long() & 0xFFFF) // 32
    assert torch.equal(of_unit, blocks.repeat_interleave(counts))
    # Past the end: 64 units of zeros, which vector kernels may read.
    tail = 64 * group * (4 // dtype.itemsize)
    assert values.numel() == layout.units * tail // 64 + tail
    assert not values[-tail:].any() and not layout.columns[-64:].any()


def test_negative_zero_is_not_stored():
    weight = torch.zeros(4, 8)
    weight[1, 2] = -0.0
    weight[2, 3] = 1.0
    layout, values = csr.pack(weight)
    assert layout.units == 1
    assert not unpacked(layout, values).signbit().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 8])
def test_nan_infinity_and_denormals_are_stored(dtype, group):
    weight = torch.zeros(16, 33, dtype=dtype)
    weight[0, 0], weight[3, 32] = float("nan"), float("inf")
    weight[5, 7], weight[9, 31] = -float("inf"), torch.finfo(dtype).tiny / 2
    layout, values = csr.pack(weight, group=group)
    again = unpacked(layout, values)
    assert torch.equal(again.nan_to_num(7.0), weight.nan_to_num(7.0))
    assert bool(again[0, 0].isnan())


def test_a_transposed_weight_is_packed_like_its_copy():
    weight = pruned(40, 70, 0.3)
    of_view, values = csr.pack(weight.t())
    of_copy, copied = csr.pack(weight.t().contiguous())
    assert torch.equal(values, copied) and torch.equal(of_view.columns, of_copy.columns)


@given(dtype=DTYPES, group=st.sampled_from([1, 4]), seed=st.integers(0, 100))
def test_element_index_names_every_kept_weight_once(dtype, group, seed):
    weight = pruned(37, 45, 0.4, dtype, seed=seed)
    layout, values = csr.pack(weight, group=group)
    index = layout.element_index()
    inside = index < weight.numel()
    assert index[inside].unique().numel() == int(inside.sum())
    assert torch.equal(weight.flatten()[index[inside]], values[inside])
    assert not values[~inside].any()
    assert set(weight.flatten().nonzero().flatten().tolist()) <= set(index.tolist())


def test_bytes_are_two_for_the_column_and_the_value():
    weight = pruned(256, 1024, 0.1)
    layout, values = csr.pack(weight)
    kept = int((weight != 0).sum())
    stored = values.nbytes + layout.columns.nbytes + layout.segments.nbytes
    assert layout.nbytes == stored
    assert kept * 6 <= stored < kept * 6 * 1.2
    blocks, values = csr.pack(pruned(256, 1024, 0.1, block=(16, 1)), group=16)
    assert blocks.nbytes == values.nbytes + blocks.columns.nbytes + blocks.segments.nbytes
    assert blocks.nbytes < blocks.units * 16 * 4.4


def test_k_blocks_fit_the_use():
    def units(density, rows, group=1):
        return blocking.k_block(density, 3000, group=group, rows=rows)

    assert units(0.5, None) <= units(0.02, None)
    assert units(0.5, 8) <= units(0.2, 8) <= units(0.02, 8)
    assert units(0.5, 1) == 3000  # a single row of x needs no panel
    assert all(units(d, r) % 64 == 0 for d in (0.02, 0.2, 0.5) for r in (None, 8, 512))
    assert blocking.k_block(0.5, 7, group=1, rows=None) == 7
    assert blocking.k_block(0.5, 0, group=1, rows=None) == 1


@pytest.mark.parametrize("rows", [1023, 1024, 1100])
@pytest.mark.parametrize("group", [1, 16])
def test_large_weights_have_wider_n_blocks(rows, group):
    weight = pruned(rows, 40, 0.3)
    layout, values = csr.pack(weight, group=group)
    assert layout.segments.shape[2] * group == blocking.n_block(rows)
    assert torch.equal(unpacked(layout, values), weight)


@pytest.mark.parametrize(
    ("block", "group"), [((16, 4), 16), ((32, 1), 16), ((8, 8), 8), ((4, 1), 4), (None, 1)]
)
def test_the_group_divides_the_blocks(block, group):
    assert csr.group_of("block", Pattern((64, 64), 10, block=block)) == group
    assert csr.group_of("csr", Pattern((64, 64), 10, block=block)) == 1


@pytest.mark.slow
def test_packing_is_fast():
    """60 M weights a second and core, where nothing else runs; a tenth of it is asserted."""
    weight = pruned(4096, 4096, 0.1)
    csr.pack(weight)
    started = time.process_time()
    csr.pack(weight)
    assert weight.numel() / (time.process_time() - started) > 6e6

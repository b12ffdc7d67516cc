"""Patterns are found from the zeros alone."""

import pytest
import torch
from helpers import pruned
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.formats.pattern import Pattern, count_kept, find_pattern


def n_of_m(rows: int, columns: int, n: int, m: int) -> torch.Tensor:
    scores = torch.rand(rows, columns // m, m)
    keep = scores.argsort(dim=2).argsort(dim=2) < n
    return torch.randn(rows, columns) * keep.view(rows, columns)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (1, 16), (8, 32)])
def test_n_of_m(n, m):
    # 4:8 is weaker than 2:4; what is found is the smallest group that describes the zeros.
    pattern = find_pattern(n_of_m(64, 128, n, m))
    assert pattern.n_of_m == (n, m)
    assert pattern.name == f"{n}:{m}"
    assert pattern.sparsity == pytest.approx(1 - n / m)
    assert pattern.block is None and not pattern.near_misses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_and_negative_zeros(dtype):
    weight = n_of_m(64, 64, 2, 4).to(dtype)
    assert find_pattern(-weight).name == "2:4"


def test_a_near_miss_is_reported():
    weight = n_of_m(128, 256, 2, 4)
    weight[:3, :4] = 1.0
    pattern = find_pattern(weight)
    assert pattern.n_of_m is None
    assert pattern.near_misses == ("99.96% of its groups are 2:4",)
    assert find_pattern(pruned(128, 256, 0.5)).near_misses == ()


@pytest.mark.parametrize(
    "block", [(4, 1), (8, 1), (16, 1), (4, 4), (16, 16), (32, 32), (64, 64), (1, 4), (8, 32)]
)
def test_blocks(block):
    pattern = find_pattern(pruned(256, 256, 0.3, block=block, seed=3))
    assert pattern.block is not None
    # Blocks that happen to lie side by side everywhere are a larger block: none here is.
    assert pattern.block == block
    assert pattern.name == f"block {block[0]}x{block[1]}"


def test_a_zero_inside_a_block_leaves_it_a_block():
    weight = pruned(256, 256, 0.3, block=(16, 16))
    weight[weight.abs() < 0.01] = 0
    assert find_pattern(weight).block == (16, 16)


@given(rows=st.integers(0, 9), columns=st.integers(0, 9), density=st.sampled_from([0, 0.5, 1]))
def test_any_shape(rows, columns, density):
    weight = pruned(rows, columns, density)
    pattern = find_pattern(weight)
    assert pattern.nonzeros == int((weight != 0).sum())
    assert pattern.shape == (rows, columns)
    assert 0 <= pattern.sparsity <= 1
    assert pattern.zero_rows == int((weight == 0).all(dim=1).sum()) or 0 in (rows, columns)


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (torch.ones(4, 4), "dense"),
        (torch.zeros(4, 4), "all zero"),
        (pruned(60, 63, 0.4), "unstructured"),
    ],
)
def test_names(weight, name):
    assert find_pattern(weight).name == name


def test_dead_channels_are_counted():
    weight = pruned(64, 64, 0.5)
    weight[:5] = 0
    weight[:, :7] = 0
    pattern = find_pattern(weight)
    assert (pattern.zero_rows, pattern.zero_columns) == (5, 7)
    assert find_pattern(torch.zeros(3, 5)) == Pattern((3, 5), 0, None, None, 3, 5)


@pytest.mark.parametrize("columns", [1, 7, 8, 24, 133, 1024, 2048, 5000])
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_count_kept(columns, density):
    kept = torch.rand(5, columns) < density
    assert torch.equal(count_kept(kept), kept.sum(dim=1, dtype=torch.int32))
    assert count_kept(kept[:0]).shape == (0,)

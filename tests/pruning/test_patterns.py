"""Patterns keep the best choice there is, and exactly as many weights as asked."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler.pruning.errors import PruningError
from sparse_compiler.pruning.patterns import NM, Units, keep_largest, parse_pattern


def integers(shape: tuple[int, ...], seed: int, high: int = 6) -> torch.Tensor:
    """Few distinct values, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator).double()


@given(
    m=st.integers(2, 8),
    data=st.data(),
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_n_m_keeps_the_best_n_of_every_group(m, data, rows, groups, seed):
    n = data.draw(st.integers(1, m - 1))
    scores = integers((rows, groups * m), seed)
    mask = NM(n, m).keep(scores)
    for group, kept in zip(scores.view(-1, m), mask.view(-1, m), strict=True):
        assert kept.sum() == n
        best = max(sum(group[i] for i in chosen) for chosen in combinations(range(m), n))
        assert group[kept].sum() == best


def test_n_m_keeps_the_first_of_equal_scores():
    assert NM(2, 4).keep(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


@given(
    rows=st.integers(0, 5),
    size=st.integers(1, 40),
    sparsity=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_keep_largest_drops_exactly_the_asked_number(rows, size, sparsity, seed):
    scores = integers((rows, size), seed)
    mask = keep_largest(scores, sparsity)
    drop = round(sparsity * size)
    assert (~mask).sum(1).tolist() == [drop] * rows
    for row, kept in zip(scores, mask, strict=True):
        assert row[kept].sum() == row.sort(descending=True).values[: size - drop].sum()


@given(r=st.integers(1, 4), c=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_blocks_sum_and_expand_agree(r, c, rows, columns):
    scores = integers((r * rows, c * columns), r + 7 * c)
    blocks = Units("block", r, c)
    sums = blocks.sum(scores)
    assert sums.shape == (rows, columns)
    for i in range(rows):
        for j in range(columns):
            assert sums[i, j] == scores[i * r : (i + 1) * r, j * c : (j + 1) * c].sum()
    expanded = blocks.expand(sums, scores.shape)
    assert expanded.shape == scores.shape
    assert (blocks.sum(expanded) == sums * r * c).all()


def test_rows_and_columns_span_the_layer():
    scores = torch.arange(6.0).view(2, 3)
    assert parse_pattern("rows").sum(scores).tolist() == [[3.0], [12.0]]
    assert parse_pattern("columns").sum(scores).tolist() == [[3.0, 5.0, 7.0]]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("1:16", NM(1, 16)),
        ("4x1", Units("4x1", 4, 1)),
        ("unstructured", Units("unstructured", 1, 1)),
    ],
)
def test_parse_pattern(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("4:2", "keeps 4 of 2: N:M needs 0 < N < M"),
        ("4:4", "N:M needs 0 < N < M"),
        ("0:4", "N:M needs 0 < N < M"),
        ("0x4", "empty block; write e.g. '16x16'"),
        ("unstructered", "Did you mean 'unstructured'?"),
        ("checkerboard", "'2:4' keeps 2 of 4"),
    ],
)
def test_a_bad_pattern_is_refused_with_what_to_write(text, sentence):
    with pytest.raises(PruningError) as error:
        parse_pattern(text)
    assert sentence in str(error.value)

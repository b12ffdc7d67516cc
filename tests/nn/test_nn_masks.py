"""Every mask against its definition, pair by pair."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compiler import nn as sn

lengths = st.integers(0, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 16)))
small = st.integers(1, 6)


def brute(shape, allowed):
    """The mask as a loop over all pairs; ``allowed(q, k)`` with positions among the keys."""
    queries, keys = shape
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for row in range(queries):
        for key in range(keys):
            mask[row, key] = allowed(row + keys - queries, key)
    return mask


@given(lengths)
def test_causal(shape):
    assert torch.equal(sn.causal(*shape), brute(shape, lambda q, k: k <= q))


@given(lengths, small)
def test_sliding_window(shape, window):
    expected = brute(shape, lambda q, k: q - window < k <= q)
    assert torch.equal(sn.sliding_window(*shape, window=window), expected)


@given(lengths, st.integers(0, 6))
def test_local(shape, radius):
    expected = brute(shape, lambda q, k: q - radius <= k <= q + radius)
    assert torch.equal(sn.local(*shape, radius=radius), expected)


@given(lengths, st.integers(0, 4), small)
def test_dilated(shape, radius, dilation):
    steps = [i * dilation for i in range(-radius, radius + 1)]
    expected = brute(shape, lambda q, k: k - q in steps)
    assert torch.equal(sn.dilated(*shape, radius=radius, dilation=dilation), expected)


@given(lengths, small)
def test_strided(shape, stride):
    expected = brute(shape, lambda q, k: abs(q - k) in range(0, 99, stride))
    assert torch.equal(sn.strided(*shape, stride=stride), expected)


@given(lengths, st.integers(0, 6), st.integers(0, 6))
def test_global_local(shape, radius, count):
    expected = brute(shape, lambda q, k: abs(q - k) <= radius or k < count or q < count)
    assert torch.equal(sn.global_local(*shape, radius=radius, count=count), expected)


@given(lengths, small)
def test_chunked(shape, chunk):
    expected = brute(shape, lambda q, k: q // chunk == k // chunk)
    assert torch.equal(sn.chunked(*shape, chunk=chunk), expected)


@given(lengths, st.integers(0, 8))
def test_prefix(shape, length):
    expected = brute(shape, lambda q, k: k < length or k <= q)
    assert torch.equal(sn.prefix(*shape, length=length), expected)
    batched = sn.prefix(*shape, length=torch.tensor([length, 0]))
    assert batched.shape == (2, 1, *shape)
    assert torch.equal(batched[0, 0], expected)
    assert torch.equal(batched[1, 0], sn.causal(*shape))


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_masks_from_tensors(rows):
    ids = torch.tensor(rows)
    same, marked, valid = sn.documents(ids), sn.global_tokens(ids == 0), sn.padding(ids > 1)
    assert same.shape == marked.shape == (len(rows), 1, 6, 6)
    for b, row in enumerate(rows):
        assert torch.equal(same[b, 0], brute((6, 6), lambda q, k, r=row: r[q] == r[k]))
        expected = brute((6, 6), lambda q, k, r=row: r[q] == 0 or r[k] == 0)
        assert torch.equal(marked[b, 0], expected)
        assert torch.equal(valid[b, 0, 0], torch.tensor([item > 1 for item in row]))


def test_documents_of_keys_that_are_not_the_queries():
    same = sn.documents(torch.tensor([[1, 2]]), torch.tensor([[1, 1, 2]]))
    assert same[0, 0].tolist() == [[True, True, False], [False, False, True]]


@given(lengths, st.integers(0, 4), st.integers(1, 4), st.integers(0, 3))
def test_random(shape, count, block, seed):
    queries, keys = shape
    columns = -(-keys // block)
    if count > columns:
        with pytest.raises(ValueError, match=f"write count={columns}"):
            sn.random(*shape, count=count, block=block, seed=seed)
        return
    mask = sn.random(*shape, count=count, block=block, seed=seed)
    assert torch.equal(mask, sn.random(*shape, count=count, block=block, seed=seed))
    for row in range(queries):
        touched = {key // block for key in mask[row].nonzero().flatten().tolist()}
        assert len(touched) == count
        # Whole blocks, the same in all rows of a block.
        assert torch.equal(mask[row], mask[row - row % block])
        assert all((key // block in touched) == bool(mask[row, key]) for key in range(keys))


def test_random_depends_on_the_seed():
    masks = [sn.random(64, count=4, seed=seed) for seed in range(3)]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_combinations_cost_what_the_docs_say():
    n, window, stride = 256, 16, 16
    assert int(sn.sliding_window(n, window=window).sum()) == n * window - window * (window - 1) // 2
    sparse_transformer = sn.causal(n) & (
        sn.sliding_window(n, window=window) | sn.strided(n, stride=stride)
    )
    assert int(sparse_transformer.sum()) < 2 * n * stride
    longformer = sn.local(n, radius=8) | sn.global_tokens(torch.arange(n)[None] == 3)
    assert int(longformer.sum()) <= n * 17 + 2 * n
    assert int(sn.strided(n, stride=stride).sum()) == n * n // stride


def test_masks_follow_the_device():
    for mask in (sn.causal(3, device="meta"), sn.prefix(3, length=1, device="meta")):
        assert mask.device.type == "meta"
    assert sn.random(3, count=1, seed=0, device="meta").device.type == "meta"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sn.causal(torch.zeros(2, 3)), r"write causal\(x.shape\[1\]\)"),
        (lambda: sn.causal(4, 3), "keys >= queries"),
        (lambda: sn.sliding_window(4, window=0), r"at least 1, not 0: write sliding_window"),
        (lambda: sn.sliding_window(4, window=2.0), "must be an int"),
        (lambda: sn.local(4, radius=-1), "at least 0"),
        (lambda: sn.dilated(4, radius=1, dilation=0), "dilation must be at least 1"),
        (lambda: sn.strided(4, stride=True), "stride must be an int"),
        (lambda: sn.chunked(4, chunk=0), r"write chunked\(n, chunk=1024\)"),
        (lambda: sn.global_local(4, radius=1, count=-2), "count must be at least 0"),
        (lambda: sn.random(4, count=9, seed=0), "write count=4"),
        (lambda: sn.prefix(4, length=torch.zeros(2)), r"float32 \[2\]: write prefix"),
        (lambda: sn.documents(torch.zeros(2, 4)), "integer ids"),
        (lambda: sn.documents(torch.zeros(4, dtype=torch.int64)), r"int64 \[4\]"),
        (lambda: sn.padding(torch.ones(2, 4)), "must be bool or integer"),
        (lambda: sn.padding([1, 1, 0]), r"write padding\(batch"),
        (lambda: sn.global_tokens(torch.ones(4, dtype=torch.bool)), r"bool \[4\]"),
    ],
)
def test_errors_say_what_to_write(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()

"""The masked attention module against attention computed one query at a time."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compiler import nn as sn

CASES = {
    "none": None,
    "causal": sn.causal,
    "window": functools.partial(sn.sliding_window, window=3),
    "dilated": functools.partial(sn.dilated, radius=2, dilation=2),
    "global": functools.partial(sn.global_local, radius=1, count=2),
    "buffer": sn.random(16, count=3, seed=0) | sn.local(16, radius=0),
}


def by_hand(q, k, v, allowed, bias=None, scale=None):
    """Attention in float64, one query at a time; a query without keys gives zeros."""
    batch, heads, queries, d = q.shape
    groups = heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                keys = [j for j in range(k.shape[2]) if allowed is None or allowed[b, h, i, j]]
                if not keys:
                    continue
                scores = (k[b, h // groups, keys].double() @ q[b, h, i].double()) * (
                    1 / math.sqrt(d) if scale is None else scale
                )
                if bias is not None:
                    scores = scores + bias[h, i, keys].double()
                out[b, h, i] = scores.softmax(0) @ v[b, h // groups, keys].double()
    return out


@settings(max_examples=30)
@given(
    st.sampled_from(["sdpa", "matmul", "einsum"]),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.integers(1, 6),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_attend(spelling, heads, queries, keys, biased, seed):
    torch.manual_seed(seed)
    q = torch.randn(2, heads[0], queries, 8, dtype=torch.float64)
    k, v = (torch.randn(2, heads[1], keys, 8, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 1, queries, keys) < 0.6
    mask[..., 0] = True
    bias = torch.randn(heads[0], queries, keys, dtype=torch.float64) if biased else None
    allowed = mask.expand(2, heads[0], queries, keys)
    for scale in (None, 0.3):
        y = sn.attend(q, k, v, mask, bias=bias, scale=scale, spelling=spelling)
        torch.testing.assert_close(y, by_hand(q, k, v, allowed, bias, scale))


def test_a_query_without_keys():
    q, k, v = (torch.randn(1, 1, 2, 4) for _ in range(3))
    mask = torch.tensor([[True, True], [False, False]])
    assert (sn.attend(q, k, v, mask)[0, 0, 1] == 0).all()
    assert sn.attend(q, k, v, mask, spelling="matmul")[0, 0, 1].isnan().all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("use_alibi", [False, True])
def test_spellings_agree_with_gradients(name, use_alibi):
    x = torch.randn(2, 11, 32, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(2, 11, dtype=torch.int64)
    valid[1, 8:] = 0
    # Every query may look at itself: a row without keys is NaN in the written-out spellings.
    extra = sn.padding(valid) | torch.eye(11, dtype=torch.bool)
    results = []
    for spelling in ("sdpa", "matmul", "einsum"):
        torch.manual_seed(1)
        model = sn.MaskedAttention(
            32, 4, kv_heads=2, mask=CASES[name], use_alibi=use_alibi, bias=True, spelling=spelling
        ).double()
        y = model(x, extra)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, *model.parameters()])])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(theirs, ours)


def test_the_module_does_what_it_says():
    model = sn.MaskedAttention(32, 4, mask=CASES["window"], use_alibi=True).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    q, k, v = (
        layer(x).view(2, 7, 4, 8).transpose(1, 2) for layer in (model.query, model.key, model.value)
    )
    allowed = sn.sliding_window(7, window=3).expand(2, 4, 7, 7)
    y = by_hand(q, k, v, allowed, sn.alibi(4, 7))
    expected = model.output(y.transpose(1, 2).reshape(2, 7, 32))
    torch.testing.assert_close(model(x), expected)


def test_gradcheck():
    model = sn.MaskedAttention(8, 2, mask=sn.causal).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)


def test_nothing_comes_from_masked_keys():
    model = sn.MaskedAttention(16, 2, mask=functools.partial(sn.sliding_window, window=2))
    x = torch.randn(1, 6, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0, 4].sum(), x)
    assert [bool(row.any()) for row in gradient[0]] == [False, False, False, True, True, False]


def test_dropout_only_in_training():
    model = sn.MaskedAttention(16, 2, mask=sn.causal, dropout=0.5)
    x = torch.randn(1, 6, 16)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_alibi():
    # The slopes that the paper gives for 8 heads, and those of its code for 12.
    assert sn.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = sn.alibi_slopes(12).tolist()
    assert twelve[:8] == [2.0**-i for i in range(1, 9)]
    assert twelve[8:] == pytest.approx([2.0 ** -(i + 0.5) for i in range(4)])
    bias = sn.alibi(2, 3, 5)
    assert bias.shape == (2, 3, 5)
    # Two heads have slopes 1/16 and 1/256; the first of three queries is the third of five keys.
    assert bias[0, 0].tolist() == [-2 / 16, -1 / 16, 0, -1 / 16, -2 / 16]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sn.MaskedAttention(10, 4), r"write MaskedAttention\(512, 8, kv_heads=2\)"),
        (lambda: sn.MaskedAttention(16, 4, kv_heads=3), "kv_heads must divide heads"),
        (lambda: sn.MaskedAttention(16, 4, spelling="flash"), "write one of"),
        (lambda: sn.MaskedAttention(16, 4, mask=torch.ones(4, 4)), r"write mask.bool\(\)"),
        (
            lambda: sn.MaskedAttention(16, 4, mask=sn.causal(4))(torch.zeros(1, 5, 16)),
            "build the mask for 5 tokens",
        ),
        (lambda: sn.attend(*torch.zeros(3, 1, 1, 2, 2), torch.ones(2, 2)), r"mask.bool\(\)"),
        (
            lambda: sn.attend(
                torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
            ),
            "multiple",
        ),
        (lambda: sn.attend(*torch.zeros(3, 1, 1, 2, 2), spelling="x"), "unknown"),
        (lambda: sn.alibi(2, 5, 3), "more than 3 keys"),
        (lambda: sn.alibi_slopes(0), r"write alibi_slopes\(8\)"),
    ],
)
def test_errors_say_what_to_write(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Constant tensors are recognised as functions of their indices, exactly or not at all."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import (
    FALSE,
    TRUE,
    Expr,
    H,
    K,
    Q,
    abs_,
    add,
    and_,
    const,
    eq,
    floordiv,
    ge,
    integer,
    le,
    mod,
    mul,
    neg,
    or_,
    sub,
    to_float,
    where,
)
from sparse_compiler.score.fit import factored, fit

N = 200
LOWEST = torch.finfo(torch.float32).min
i = torch.arange(N)[:, None]
j = torch.arange(N)[None, :]
ones = torch.ones(N, N, dtype=torch.bool)
BAND = and_(ge(sub(Q, K), -16), le(sub(Q, K), 16))

# A matrix, and what it is at (q, k).
MATRICES = {
    "ones": (ones, TRUE),
    "zeros": (~ones, FALSE),
    "nanoGPT": (torch.tril(torch.ones(N, N)), where(le(K, Q), 1.0, 0.0)),
    "GPT-Neo": (
        torch.bitwise_xor(ones.tril(), ones.tril(-64)),
        and_(le(K, Q), le(sub(Q, K), 63)),
    ),
    "additive": (torch.full((N, N), -math.inf).triu(1), where(le(K, Q), 0.0, -math.inf)),
    "additive finite": (torch.where(i >= j, 0.0, LOWEST), where(le(K, Q), 0.0, LOWEST)),
    "upper": (ones.triu(1), ge(sub(K, Q), 1)),
    "band": ((i - j).abs() <= 16, BAND),
    "outside a band": ((i - j).abs() > 16, None),
    "dilated": (
        ((i - j) % 4 == 0) & ((i - j).abs() <= 16),
        and_(eq(mod(sub(Q, K), 4), 0), BAND),
    ),
    "strided": (((i - j) % 16 == 0) & (j <= i), and_(eq(mod(sub(Q, K), 16), 0), le(K, Q))),
    "local and strided": ((((i - j) % 16 == 0) | (i - j < 16)) & (j <= i), None),
    "Longformer": (((i - j).abs() <= 16) | (i < 4) | (j < 4), or_(BAND, le(Q, 3), le(K, 3))),
    "prefix": ((j <= i) | (j < 30), or_(le(K, Q), le(K, 29))),
    "chunks": (i // 64 == j // 64, eq(floordiv(Q, 64), floordiv(K, 64))),
    "causal chunks": (
        (i // 64 == j // 64) & (j <= i),
        and_(eq(floordiv(Q, 64), floordiv(K, 64)), le(K, Q)),
    ),
    "keys": (ones & (j < 100), le(K, 99)),
    "queries": (ones & (i >= 100), ge(Q, 100)),
    "causal keys": ((j <= i) & (j < 100), and_(le(K, Q), le(K, 99))),
    "distance": (i - j, sub(Q, K)),
    "absolute distance": ((i - j).abs().float(), to_float(abs_(sub(Q, K)))),
    "clamped distance": ((i - j).clamp(-8, 8) + 8, None),
    "negative distance": (-(i - j).abs(), None),
    "cut": (ones[:100].tril(100), le(K, add(Q, 100))),
}


def values_of(expr: Expr, shape: tuple[int, ...], ints: tuple[int, ...] = ()) -> torch.Tensor:
    s = torch.zeros(1, 1, *shape)
    return evaluate(expr, s, [], ints, *s.shape)[0, 0]


@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name):
    values, expected = MATRICES[name]
    found = fit(values[None, None], [const(0), const(0), Q, K])
    assert found is not None
    assert torch.equal(values_of(found, tuple(values.shape)), values)
    assert expected is None or found is expected, f"{found}, not {expected}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32])
def test_dtypes(dtype):
    found = fit(torch.ones(N, N).tril().to(dtype), [Q, K])
    kind = 1.0 if dtype.is_floating_point else 1
    assert found is where(le(K, Q), kind, kind * 0)


LINES = {
    "positions": (torch.arange(N), K),
    "float positions": (torch.arange(N).float(), to_float(K)),
    "shifted": (torch.arange(N) - N + 1, sub(K, N - 1)),
    "halves": (torch.arange(N) * 0.5, mul(to_float(K), 0.5)),
    "segments": (torch.arange(N) // 64, floordiv(K, 64)),
    "places in segments": (torch.arange(N) % 7, mod(K, 7)),
    "first few": (torch.arange(N) < 5, le(K, 4)),
    "one of seven": (torch.arange(N) % 7 == 3, eq(mod(sub(K, 3), 7), 0)),
    "constant": (torch.full((N,), 2.5), const(2.5)),
}


@pytest.mark.parametrize("name", LINES)
def test_lines(name):
    values, expected = LINES[name]
    assert fit(values, [K]) is expected


def test_indices_may_be_any_expression():
    """GPT-Neo reads rows from ``keys - queries`` on."""
    found = fit(ones.tril(), [add(Q, integer(0)), K])
    assert torch.equal(values_of(found, (50, N), (150,)), ones.tril()[150:])
    with pytest.raises(ValueError, match="2 dimensions, but 1 indices"):
        fit(ones, [K])


def test_what_is_not_a_function_of_the_indices():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(N, N, generator=generator)
    for values in (noise, noise < 0.5, torch.where(noise < 0.5, 0.0, -math.inf)):
        assert fit(values, [Q, K]) is None
    assert fit(torch.full((3, 3), math.nan), [Q, K]) is None
    assert fit(torch.zeros(0, 3), [Q, K]) is None
    assert fit(noise.view(20, 10, N).log(), [H, Q, K]) is None


@settings(max_examples=60)
@given(st.sampled_from(sorted(MATRICES)), st.integers(0, N * N - 1))
def test_one_wrong_element_is_noticed(name, place):
    """Whatever is found has the wrong element, too."""
    values = MATRICES[name][0].clone()
    flat = values.view(-1)
    place %= len(flat)
    flat[place] = ~flat[place] if values.dtype == torch.bool else flat[place] + 1
    found = fit(values, [Q, K])
    assert found is None or torch.equal(values_of(found, tuple(values.shape)), values)


def test_alibi_is_slopes_times_a_distance():
    slopes = 2.0 ** -torch.arange(1, 9)
    odd = torch.tensor([0.3, 0.7, 1.1])
    cases = [
        (slopes[:, None, None] * (j - i), [H, Q, K], slopes, sub(K, Q)),
        (odd[:, None, None] * -(i - j).abs(), [H, Q, K], odd, neg(abs_(sub(Q, K)))),
        (slopes[None, :, None] * j[None], [const(0), H, K], slopes, K),
        (odd[None, :, None] * (j - N + 1), [const(0), H, K], odd, sub(K, N - 1)),
    ]
    for values, indices, vector, distance in cases:
        found = factored(values, indices)
        assert found is not None
        assert torch.equal(found[0], vector) and found[1] is to_float(distance)
    generator = torch.Generator().manual_seed(0)
    assert factored(torch.randn(8, N, N, generator=generator), [H, Q, K]) is None
    assert factored((slopes[:, None, None] * (j - i)).int(), [H, Q, K]) is None

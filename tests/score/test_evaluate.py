"""Values and derivatives of score expressions, against PyTorch written by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_scores import BATCH, HEADS, INTS, rebuilt, scores, tensors

from sparse_compiler.score.derivative import derivative
from sparse_compiler.score.evaluate import Evaluator, evaluate
from sparse_compiler.score.expr import (
    B,
    H,
    K,
    Q,
    S,
    abs_,
    add,
    and_,
    const,
    div,
    eq,
    erf,
    exp,
    floordiv,
    integer,
    le,
    load,
    log,
    lt,
    max_,
    min_,
    mod,
    mul,
    neg,
    or_,
    parse,
    pow_,
    reciprocal,
    relu,
    sigmoid,
    sqrt,
    sub,
    tanh,
    to_float,
    to_int,
    where,
    xor,
)

M, N = 5, 7
b = torch.arange(BATCH).view(-1, 1, 1, 1)
h = torch.arange(HEADS).view(1, -1, 1, 1)
q = torch.arange(M).view(1, 1, -1, 1)
k = torch.arange(N).view(1, 1, 1, -1)
shape = (BATCH, HEADS, M, N)
s = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
table = torch.arange(40.0).view(4, 10) * 0.1
ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
keep = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
LEAVES = [table, ids, keep]

# An expression, and its value written in PyTorch.
VALUES = {
    "scale": (mul(S, 0.125), s * 0.125),
    "indices": (add(mul(Q, 3), sub(K, add(B, H))), q * 3 + k - b - h),
    "integers": (add(sub(Q, integer(1)), mul(K, integer(0))), q - 70 + k * 5),
    "floor": (floordiv(sub(K, Q), 3), torch.div(k - q, 3, rounding_mode="floor")),
    "floor of negative": (floordiv(sub(K, Q), -2), torch.div(k - q, -2, rounding_mode="floor")),
    "remainder": (mod(sub(K, Q), 3), (k - q) % 3),
    "remainder of negative": (mod(sub(K, Q), -3), torch.remainder(k - q, -3)),
    "floor of floats": (floordiv(S, 0.3), torch.floor_divide(s, 0.3)),
    "remainder of floats": (mod(S, 0.3), torch.remainder(s, 0.3)),
    "extremes": (min_(max_(sub(Q, K), -2), 2), (q - k).clamp(-2, 2)),
    "logic": (
        or_(and_(le(K, Q), lt(K, 3)), xor(eq(K, 4), le(Q, 1))),
        ((k <= q) & (k < 3)) | ((k == 4) ^ (q <= 1)),
    ),
    "causal": (where(le(K, Q), S, -math.inf), s.masked_fill(k > q, -math.inf)),
    "padding": (load(2, "bool", B, K), keep[:, None, None, :]),
    "documents": (
        eq(load(1, "i64", B, Q), load(1, "i64", B, K)),
        ids[:, None, :M, None] == ids[:, None, None, :],
    ),
    "bias": (add(S, load(0, "f32", H, K)), s + table[:2, :7].double()[None, :, None, :]),
    "transposed": (load(0, "f32", Q, K), None),
    "shifted": (load(0, "f32", H, add(K, 2)), table[:2, 2:9].double()[None, :, None, :]),
    "gathered": (
        load(0, "f32", H, abs_(sub(Q, K))),
        table.double()[h, (q - k).abs()],
    ),
    "gathered twice": (load(0, "f32", load(1, "i64", B, K), K), table.double()[ids[b, k], k]),
    "scalar": (mul(S, load(3, "f32")), s * 0.5),
    "functions": (
        sigmoid(tanh(erf(mul(exp(mul(S, 0.1)), 2.0)))),
        torch.sigmoid(torch.tanh(torch.erf((s * 0.1).exp() * 2))),
    ),
    "roots": (
        sub(sqrt(abs_(S)), reciprocal(add(pow_(abs_(S), 1.5), 1.0))),
        s.abs().sqrt() - 1 / (s.abs() ** 1.5 + 1),
    ),
    "logarithm": (log(add(relu(S), 1.0)), torch.log(s.relu() + 1)),
    "casts": (add(to_float(to_int(mul(S, 3.0))), to_float(Q)), (s * 3).trunc() + q),
    "no s": (to_float(sub(K, Q)), (k - q).double()),
    "constant": (const(2.5), torch.tensor(2.5, dtype=torch.float64)),
}
LEAVES.append(torch.tensor(0.5))
SQUARE = torch.arange(40.0).view(5, 8)


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    expr, expected = VALUES[name]
    leaves = LEAVES
    if expected is None:  # a leaf in another layout
        leaves, expected = [SQUARE.t().contiguous().t()], SQUARE[:, :7].double()
    found = evaluate(expr, s, leaves, INTS, *shape)
    assert found.shape == shape
    torch.testing.assert_close(found, expected.expand(shape), rtol=1e-12, atol=1e-12)


def test_dtypes():
    assert evaluate(S, s.bfloat16(), (), (), *shape).dtype == torch.bfloat16
    assert evaluate(mul(S, 0.1), s.float(), (), (), *shape).dtype == torch.float32
    assert evaluate(Q, s, (), (), *shape).dtype == torch.int64
    assert evaluate(le(K, Q), s, (), (), *shape).dtype == torch.bool


def test_indices_that_are_not_reached_are_clamped():
    expr = where(le(Q, K), load(0, "i64", sub(K, Q)), -1)
    found = evaluate(expr, s, [torch.arange(N)], (), *shape)
    assert torch.equal(found, torch.where(q <= k, k - q, -1).expand(shape))


def test_gradients_flow_through_gathers():
    """A bias by distance sums the gradients of all pairs at that distance."""
    bias = torch.randn(HEADS, 8, dtype=torch.float64).requires_grad_()
    found = evaluate(add(S, load(0, "f64", H, abs_(sub(Q, K)))), s, [bias], (), *shape)
    (grad,) = torch.autograd.grad(found.sum(), bias)
    counts = torch.bincount((q - k).abs().flatten(), minlength=8) * BATCH
    torch.testing.assert_close(grad, counts.double().expand(HEADS, -1))


def test_ranges_of_indices():
    ranges = [range(1, 2), range(2), range(2, 4), range(1, 7, 3)]
    found = Evaluator(LEAVES, INTS, ranges)(load(2, "bool", B, K))
    assert torch.equal(found, keep[1:2, None, None, 1:7:3])
    assert torch.equal(Evaluator((), (), ranges)(sub(Q, K)), q[:, :, 2:4] - k[..., 1:7:3])
    with pytest.raises(ValueError, match="depends on s"):
        Evaluator((), (), ranges)(mul(S, 2.0))


@settings(max_examples=60)
@given(scores(), st.integers(0, 5))
def test_derivatives_are_those_of_autograd(text, seed):
    score = rebuilt(parse(text))
    leaves = [leaf.double() if leaf.is_floating_point() else leaf for leaf in tensors(seed, 20, 30)]
    variables = [node for node in score.loads() if node.type == "float"]
    size = (BATCH, HEADS, 20, 30)
    product = (torch.randn(size, dtype=torch.float64) * 8).requires_grad_()
    # Each read of a leaf is a variable of its own.
    places = {node: load(100 + i, "f64", B, H, Q, K) for i, node in enumerate(variables)}
    apart = score.substitute(places)
    values = {
        100 + i: evaluate(node, product.detach(), leaves, INTS, *size)
        for i, node in enumerate(variables)
    }
    # Nothing is equal by accident: the derivative of an extreme would be that of either.
    noise = torch.randn(size, dtype=torch.float64) * 1e-3
    values = {i: (value + i * noise).requires_grad_() for i, value in values.items()}
    everything = [*leaves, *[torch.empty(0)] * (100 - len(leaves)), *values.values()]
    result = evaluate(apart, product, everything, INTS, *size)
    if not result.requires_grad:
        return
    inputs = {S: product, **{places[node]: values[100 + i] for i, node in enumerate(variables)}}
    grads = torch.autograd.grad(result.sum(), list(inputs.values()), allow_unused=True)
    for variable, grad in zip(inputs, grads, strict=True):
        slope = evaluate(derivative(apart, variable), product.detach(), everything, INTS, *size)
        expected = torch.zeros(size, dtype=torch.float64) if grad is None else grad
        # Where two fills are equal, or a score is not a number, there is no one right answer.
        usable = expected.isfinite() & slope.isfinite() & (result.detach().abs() < 1e30)
        torch.testing.assert_close(slope[usable].detach(), expected[usable])


# Functions with known derivatives where random scores seldom go.
SLOPES = [
    neg(S),
    div(S, add(S, 3.0)),
    div(2.0, add(mul(S, S), 1.0)),
    log(add(exp(S), 1.0)),
    sqrt(add(mul(S, S), 0.5)),
    reciprocal(add(mul(S, S), 0.5)),
    pow_(add(abs_(S), 0.5), 2.5),
    relu(S),
    sigmoid(S),
    abs_(S),
    min_(S, mul(S, S)),
    max_(S, mul(S, S)),
    mod(S, 0.7),
    where(lt(S, 0.0), mul(S, S), tanh(S)),
]


@pytest.mark.parametrize("expr", SLOPES, ids=str)
def test_derivatives_of_each_function(expr):
    product = s.clone().requires_grad_()
    (expected,) = torch.autograd.grad(evaluate(expr, product, (), (), *shape).sum(), product)
    slope = evaluate(derivative(expr, S), s, (), (), *shape)
    torch.testing.assert_close(slope, expected)


def test_derivatives_are_simple_where_scores_are():
    assert derivative(mul(S, 0.125), S) is const(0.125)
    masked = where(le(K, Q), mul(S, 0.125), -math.inf)
    assert derivative(masked, S) is where(le(K, Q), 0.125, 0.0)
    bias = load(0, "f32", H, Q, K)
    assert derivative(add(mul(S, 0.125), bias), bias) is const(1.0)
    assert derivative(mul(S, 0.125), bias) is const(0.0)

"""Linear attention: all spellings, feature maps against their kernels, causality."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compiler import nn as sn
from sparse_compiler.nn.linear import SPELLINGS

FEATURES = {
    "elu": sn.EluFeatures,
    "relu": sn.ReluFeatures,
    "positive": lambda: sn.PositiveFeatures(8, 16),
    "fourier": lambda: sn.FourierFeatures(8, 32),
    "taylor": sn.TaylorFeatures,
    "softmax": sn.SoftmaxFeatures,
}


def by_hand(q, k, v, causal, normalize, epsilon):
    """One query and one key at a time."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for i in range(q.shape[2]):
        total = torch.zeros(q.shape[:2], dtype=q.dtype)
        for j in range(i + 1 if causal else k.shape[2]):
            weight = (q[:, :, i] * k[:, :, j]).sum(-1)
            out[:, :, i] += weight[..., None] * v[:, :, j]
            total += weight
        if normalize:
            out[:, :, i] /= (total + epsilon)[..., None]
    return out


@settings(max_examples=30)
@given(st.booleans(), st.booleans(), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**20))
def test_spellings(causal, normalize, n, features, seed):
    torch.manual_seed(seed)
    q, k = (torch.rand(2, 2, n, features, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 2, n, 3, dtype=torch.float64)
    for spelling in SPELLINGS[causal]:
        y = sn.linear_attention(
            q, k, v, causal=causal, normalize=normalize, epsilon=0.01, spelling=spelling
        )
        torch.testing.assert_close(y, by_hand(q, k, v, causal, normalize, 0.01))


def test_cross_attention():
    q, k, v = (torch.rand(1, 2, n, 4, dtype=torch.float64) for n in (3, 5, 5))
    for spelling in SPELLINGS[False]:
        y = sn.linear_attention(q, k, v, spelling=spelling)
        torch.testing.assert_close(y, by_hand(q, k, v, False, True, 1e-6))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("causal", [False, True])
def test_modules_agree_in_all_spellings_with_gradients(name, causal):
    if causal and name == "softmax":
        pytest.skip("has no causal form")
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    results = []
    for spelling in SPELLINGS[causal]:
        torch.manual_seed(1)
        model = sn.LinearAttention(
            32, 4, features=FEATURES[name](), causal=causal, spelling=spelling
        ).double()
        y = model(x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, *model.parameters()])])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("spelling", SPELLINGS[True])
@pytest.mark.parametrize("name", ["elu", "relu", "fourier", "taylor"])
def test_causal_sees_no_future(name, spelling):
    model = sn.LinearAttention(32, 4, features=FEATURES[name](), causal=True, spelling=spelling)
    x = torch.randn(1, 6, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x)[0, 3].sum(), x)
    assert gradient[0, :4].abs().amax(-1).min() > 0
    assert (gradient[0, 4:] == 0).all()


@pytest.mark.parametrize("name", FEATURES)
def test_padding_has_no_weight(name):
    model = sn.LinearAttention(32, 4, features=FEATURES[name]()).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    y = model(x, valid)
    torch.testing.assert_close(y[:1], model(x[:1]))
    # Positive features subtract the largest exponent of all keys, padding included, and then add
    # epsilon: equal up to that.
    close = {"rtol": 1e-2, "atol": 1e-3} if name == "positive" else {}
    torch.testing.assert_close(y[1:, :6], model(x[1:, :6]), **close)


def test_gradcheck():
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    for name in ("elu", "taylor", "softmax"):
        assert torch.autograd.gradcheck(
            sn.LinearAttention(8, 2, features=FEATURES[name]()).double(), x
        )


def kernel(features, q, k):
    """φ(q)·φ(k) for all pairs, each row divided by its sum."""
    weights = features(q) @ features(k, keys=True).transpose(-2, -1)
    return weights / weights.sum(-1, keepdim=True)


def test_elu_and_relu():
    x = torch.tensor([-2.0, 0.0, 3.0])
    expected = torch.tensor([math.exp(-2), 1, 4])
    torch.testing.assert_close(sn.EluFeatures()(x), expected)
    assert sn.ReluFeatures(epsilon=0.5)(x).tolist() == [0.5, 0.5, 3.5]


def test_taylor_is_the_second_order_of_exp():
    q, k = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(2))
    features = sn.TaylorFeatures()
    assert features(q).shape == (2, 3, 5, 1 + 8 + 64)
    scores = q @ k.transpose(-2, -1) / math.sqrt(8)
    weights = features(q) @ features(k, keys=True).transpose(-2, -1)
    torch.testing.assert_close(weights, 1 + scores + scores**2 / 2)


def test_positive_features_approach_softmax():
    # The variance grows with exp(|q + k|²), so the vectors are short.
    q, k = (0.5 * torch.randn(1, 1, 6, 8, dtype=torch.float64) for _ in range(2))
    exact = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(-1)
    errors = []
    for count in (64, 16384):
        weights = kernel(sn.PositiveFeatures(8, count, epsilon=0.0), q, k)
        assert (weights > 0).all()
        errors.append(float((weights - exact).abs().max()))
    assert errors[1] < 0.03 and errors[1] < errors[0]


def test_positive_features_stay_in_range():
    x = 100 * torch.randn(2, 5, 16)
    assert sn.LinearAttention(16, 2, features=sn.PositiveFeatures(8, 16))(x).isfinite().all()


def test_fourier_features_approach_a_gaussian():
    q, k = (torch.randn(1, 1, 6, 8, dtype=torch.float64) for _ in range(2))
    unit = [torch.nn.functional.normalize(t, dim=-1) for t in (q, k)]
    for sigma in (0.7, 1.0):
        features = sn.FourierFeatures(8, 32768, sigma=sigma)
        weights = features(q) @ features(k, keys=True).transpose(-2, -1)
        exact = torch.exp(-torch.cdist(*unit).square() / (2 * sigma**2))
        assert float((weights - exact).abs().max()) < 0.03


def test_softmax_features_sum_to_one():
    q, k = (torch.randn(1, 2, 6, 8) for _ in range(2))
    features = sn.SoftmaxFeatures()
    weights = features(q) @ features(k, keys=True).transpose(-2, -1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 6))


def test_projections_are_orthogonal_seeded_and_saved():
    features = sn.PositiveFeatures(8, 20, seed=3)
    rows = torch.nn.functional.normalize(features.projection, dim=1)
    torch.testing.assert_close(rows[:8] @ rows[:8].T, torch.eye(8), atol=1e-5, rtol=0)
    assert "projection" in features.state_dict()
    assert torch.equal(features.projection, sn.PositiveFeatures(8, 20, seed=3).projection)
    assert not torch.equal(features.projection, sn.PositiveFeatures(8, 20, seed=4).projection)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sn.LinearAttention(10, 4), r"write LinearAttention\(512, 8\)"),
        (lambda: sn.LinearAttention(8, 2, spelling="cumsum"), "no non-causal form"),
        (lambda: sn.LinearAttention(8, 2, causal=True, spelling="matmul"), "no causal form"),
        (
            lambda: sn.LinearAttention(8, 2, causal=True, features=sn.SoftmaxFeatures()),
            "write causal=False",
        ),
        (lambda: sn.linear_attention(*torch.zeros(3, 1, 1, 2, 2), spelling="tril"), "write one of"),
        (
            lambda: sn.linear_attention(
                torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 3)
            ),
            "do not fit",
        ),
        (
            lambda: sn.linear_attention(
                torch.zeros(1, 1, 2, 3), *torch.zeros(2, 1, 1, 4, 3), causal=True
            ),
            "write causal=False",
        ),
        (lambda: sn.FourierFeatures(8, 15), "write features=16"),
        (lambda: sn.PositiveFeatures(0), "head_dim must be a positive int"),
        (lambda: sn.PositiveFeatures(8, 1.5), "features must be a positive int"),
    ],
)
def test_errors_say_what_to_write(make, message):
    with pytest.raises(ValueError, match=message):
        make()

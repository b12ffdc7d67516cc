"""The mixture-of-experts kernels against the operators' float64 meaning: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compiler.codegen import inductor, moe
from sparse_compiler.ops import moe as operators
from sparse_compiler.score.expr import K, add, erf, load, max_, min_, mul, sigmoid, to_text

UP, GATE = load(0, "f32", K), load(1, "f32", K)
GELU = to_text(mul(mul(UP, 0.5), add(erf(mul(UP, 0.5**0.5)), 1.0)))
SWIGLU = to_text(mul(mul(UP, sigmoid(UP)), GATE))


def gpt_oss(limit: float) -> str:
    gate = min_(UP, limit)
    up = add(max_(min_(GATE, limit), -limit), 1.0)
    return to_text(mul(up, mul(gate, sigmoid(mul(gate, 1.702)))))


# In bfloat16 a part next to the limit may be rounded to its other side, where the slope is another.
GPT_OSS = {torch.float32: gpt_oss(2.0), torch.bfloat16: gpt_oss(16.0)}
# Relative to the largest number of each result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def case(
    tokens: int,
    choices: int,
    experts: int,
    sizes: tuple[int, int, int],
    *,
    body: str = SWIGLU,
    dtype: torch.dtype = torch.float32,
    weights: str = "stacked",
    bias: bool = False,
    gates_on_input: bool = False,
    passthrough: int = 0,
    ids: torch.Tensor | None = None,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Arguments of the operator; some pairs have no expert, unless ``ids`` are given."""
    generator = torch.Generator().manual_seed(seed)
    features, hidden, out_features = sizes
    parts = 1 if body == GELU else 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def weight(n: int, k: int) -> torch.Tensor:
        scale = k**-0.5
        if weights == "turned":
            return (random(experts, k, n) * scale).to(dtype).transpose(1, 2)
        return (random(experts, n, k) * scale).to(dtype)

    if weights == "interleaved":
        both = (random(experts, features, parts * hidden) * features**-0.5).to(dtype)
        inner = [both[..., part::parts].transpose(1, 2) for part in range(parts)]
    else:
        both = weight(parts * hidden, features)
        inner = [both[:, part * hidden : (part + 1) * hidden] for part in range(parts)]
    outer = [weight(out_features, hidden)]
    if weights == "listed":
        inner = [one for stacked in inner for one in stacked.unbind(0)]
        outer = list(outer[0].unbind(0))
    if ids is None:
        ids = torch.randint(-1, experts + passthrough + 1, (tokens, choices), generator=generator)
    return (
        random(tokens, features).to(dtype),
        ids,
        torch.rand(tokens, choices, generator=generator),
        inner,
        [random(experts, hidden).to(dtype) for _ in range(parts)] if bias else [],
        outer,
        random(experts, out_features).to(dtype) if bias else None,
        body,
        experts,
        passthrough,
        gates_on_input,
    )


def double(value: Any) -> Any:
    if isinstance(value, list):
        return [double(item) for item in value]
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def check(call: tuple[Any, ...]) -> None:
    """Both forward kernels and the backward kernel."""
    exact = tuple(map(double, call))
    want, want_parts = operators.moe_training(*exact)
    got, parts = moe._moe_training(*call)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(got.dtype)
    wanted = operators.moe_backward(grad.double(), want_parts, *exact)
    found = moe._moe_backward(grad, parts, *call)
    like = torch.ops.sparse_compiler.moe_backward
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = like(*(mode.from_tensor(t) for t in (grad, parts)), *call)
    assert [(t.shape, t.stride(), t.dtype) for t in found] == [
        (t.shape, t.stride(), t.dtype) for t in fakes
    ]
    assert torch.equal(got, moe._moe(*call))
    pairs = [(got, want), (parts, want_parts), *zip(found, wanted, strict=True)]
    for one, other in pairs:
        assert one.shape == other.shape
        if one.numel():
            bound = TOLERANCE[call[0].dtype] * max(float(other.abs().max()), 1e-6)
            assert float((one.double() - other).abs().max()) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bias": True},
        {"weights": "turned", "bias": True},
        {"weights": "interleaved", "bias": True},
        {"weights": "listed", "gates_on_input": True},
        {"passthrough": 2},
    ],
    ids=["plain", "bias", "turned", "interleaved", "listed", "passthrough"],
)
def test_agrees_with_float64(how, dtype):
    sizes = (64, 49, 64) if "passthrough" in how else (70, 49, 35)
    check(case(40, 3, 4, sizes, dtype=dtype, **how))


@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
def test_few_tokens(tokens):
    check(case(tokens, 2, 8, (65, 130, 65)))


def test_deep_and_wide():
    check(case(300, 2, 2, (2200, 100, 70)))
    check(case(9, 1, 2, (1100, 130, 70), weights="turned"))


def test_one_expert_takes_all_and_others_none():
    check(case(200, 2, 5, (33, 50, 21), ids=torch.full((200, 2), 3)))


def test_no_pair_has_an_expert():
    check(case(7, 2, 3, (33, 50, 21), ids=torch.full((7, 2), 99)))


def test_more_pairs_than_a_chunk():
    check(case(9000, 2, 3, (17, 16, 5)))


def test_threads_do_not_change_the_result(monkeypatch):
    call = case(90, 3, 4, (70, 49, 35), bias=True)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(inductor, "num_threads", lambda threads=threads: threads)
        out, parts = moe._moe_training(*call)
        found.append([out, *moe._moe_backward(out, parts, *call)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_other_dtypes_run_the_reference():
    call = tuple(map(double, case(5, 2, 3, (8, 9, 7))))
    assert torch.equal(moe._moe(*call), operators.moe(*call))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    choices=st.integers(1, 4),
    experts=st.integers(1, 6),
    sizes=st.tuples(*[st.integers(1, 90)] * 3),
    weights=st.sampled_from(["stacked", "turned", "interleaved", "listed"]),
    bias=st.booleans(),
    gates_on_input=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_random_calls(tokens, choices, experts, sizes, dtype, **how):
    check(case(tokens, choices, experts, sizes, dtype=dtype, **how))


@pytest.mark.slow
@pytest.mark.parametrize("isa", [256, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", [SWIGLU, GELU, "gpt_oss"], ids=["swiglu", "gelu", "gpt_oss"])
def test_narrower_vectors(isa, dtype, body, monkeypatch):
    monkeypatch.setattr(inductor, "vector_isa", lambda: isa)
    body = GPT_OSS[dtype] if body == "gpt_oss" else body
    for weights in ("stacked", "turned", "interleaved"):
        check(case(40, 3, 4, (70, 49, 35), dtype=dtype, body=body, weights=weights, bias=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("body", [GELU, "gpt_oss"], ids=["gelu", "gpt_oss"])
def test_bodies(dtype, body):
    body = GPT_OSS[dtype] if body == "gpt_oss" else body
    check(case(40, 3, 4, (70, 49, 35), dtype=dtype, body=body, bias=True))

"""Models of every way to write attention: same outputs and gradients, no further graphs.

What each site has to become is in `attention_models.MODELS`; what the variants of a stage are, and
what "same" means, in `attention_check`. Most of it runs what the passes made of a graph uncompiled,
where the operators' reference bodies stand for the kernels; `test_compiled` goes all the way.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch

from sparse_compiler.passes import Rewrite

pytest.importorskip("transformers", minversion="5.0")
import attention_check as judge
from attention_models import MODELS, Subject

from tests.models.attention_expected import PREPARED

# What `make test` runs; the rest is slow.
FAST = (
    "mistral-sdpa-forward",
    "gpt_oss-eager-forward",
    "gemma2-eager-decode",
    "modernbert-sdpa-train",
    "nanogpt-own-train",
)
FAST_COMPILED = ("nanogpt-own-train",)
# Their graphs are the same in every stage but for a mask, and compiling takes minutes.
UNCOMPILED_STAGES = ("cache",)
# Longformer without global tokens asks for them in Python: one graph more, which is Longformer's.
HAND_SPARSE = ("longformer_global", "bigbird")


def stages(fast: tuple[str, ...], compiled: bool = False) -> list[Any]:
    """Every model, implementation and stage; of compiled ones, one implementation."""
    found = []
    for name, subject in MODELS.items():
        for implementation in subject.implementations[-1:] if compiled else subject.implementations:
            for stage in subject.stages:
                key = f"{name}-{implementation}-{stage}"
                if compiled and stage in UNCOMPILED_STAGES:
                    continue
                marks = () if key in fast else (pytest.mark.slow,)
                found.append(pytest.param(name, implementation, stage, marks=marks, id=key))
    return found


def installed(name: str) -> Subject:
    subject = MODELS[name]
    if not judge.available(subject):
        pytest.skip(f"the package {subject.package} is not installed")
    return subject


def judged(name: str, implementation: str, stage: str, **how: Any) -> list[judge.Outcome]:
    subject = installed(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = judge.check(subject, implementation, stage, **how)
    excuses = [outcome.excuse for outcome in outcomes if outcome.excuse]
    if len(excuses) == len(outcomes) and "prepare" not in how:
        pytest.skip(excuses[0])
    return outcomes


@pytest.mark.parametrize(("name", "implementation", "stage"), stages(FAST))
def test_rewritten(name, implementation, stage):
    assert not judge.complaints(MODELS[name], judged(name, implementation, stage))


@pytest.mark.parametrize(("name", "implementation", "stage"), stages(FAST_COMPILED, compiled=True))
def test_compiled(name, implementation, stage):
    outcomes = judged(name, implementation, stage, way="sparse")
    assert not judge.complaints(MODELS[name], outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["forward", "train"])
@pytest.mark.parametrize("name", HAND_SPARSE)
def test_prepared_models_are_one_graph(name, stage):
    preparing = pytest.importorskip("sparse_compiler.prepare")

    def prepare(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.nn.Module:
        prepared = preparing.prepare(model, **inputs)
        assert not prepared.refused
        return prepared.model

    outcomes = judged(name, "eager", stage, prepare=prepare)
    subject = dataclasses.replace(MODELS[name], expected=PREPARED[name])
    assert not judge.complaints(subject, outcomes)
    assert all(outcome.graphs <= 1 for outcome in outcomes)
    assert outcomes[0].graphs == 1


def test_the_reference_is_float64_where_the_model_asks_for_float32():
    x = torch.randn(3, 50, dtype=torch.float64)
    with judge._float64():
        found = torch.nn.functional.softmax(x.float(), dim=-1, dtype=torch.float32).to(x.dtype)
        assert x.to(torch.float32).dtype == torch.float64
        assert torch.zeros(()).dtype == torch.float64
    assert torch.equal(found, torch.softmax(x, -1))
    assert torch.zeros(()).dtype == torch.float32


def outcome_of(got: torch.Tensor, name: str = "output") -> judge.Outcome:
    exact = torch.linspace(1, 2, 64, dtype=torch.float64)
    outcome = judge.Outcome("eager none")
    judge._compare(outcome, {name: got}, {name: exact.float()}, {name: exact})
    return outcome


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x + 1e-3,
        lambda x: x.index_fill(0, torch.tensor([5]), math.nan),
        lambda x: x.index_fill(0, torch.tensor([5]), math.inf),
        lambda x: x[:-1],
        lambda x: x.double(),
    ],
    ids=["off", "nan", "infinite", "shape", "dtype"],
)
def test_a_wrong_result_is_noticed(spoil):
    right = torch.linspace(1, 2, 64)
    assert not outcome_of(right).wrong
    assert outcome_of(spoil(right)).wrong
    assert outcome_of(right, "grad weight").wrong == []


def test_missing_gradients_are_noticed():
    outcome = judge.Outcome("eager train")
    one = {"grad a": torch.ones(3), "grad b": torch.ones(3)}
    judge._compare(outcome, {"grad a": torch.ones(3)}, one, {k: v.double() for k, v in one.items()})
    assert outcome.wrong


@pytest.mark.parametrize(
    ("rewrites", "sentence"),
    [
        ([("causal & sliding window 32", True), ("", False)], None),
        ([("causal", True), ("", False)], "site 0 should be sliding window, is causal, applied"),
        ([("sliding window", True), ("causal", True)], "site 1 should be left"),
        ([("sliding window", False), ("", False)], "is sliding window, not applied"),
        ([("sliding window", True)], "1 verdicts on 2 sites"),
    ],
)
def test_what_is_expected_is_asserted(rewrites, sentence):
    subject = dataclasses.replace(MODELS["llama"], expected={"none": ("sliding window", None)})
    verdicts = [Rewrite("attention", "x", pattern=p, applied=a) for p, a in rewrites]
    outcome = judge.Outcome("sdpa none", graphs=1, dynamo_graphs=1, rewrites=verdicts)
    found = judge.complaints(subject, [outcome])
    assert found == [] if sentence is None else sentence in found[0]


@pytest.mark.parametrize("name", MODELS)
def test_something_is_expected_of_every_model(name):
    subject = MODELS[name]
    expected = PREPARED[name] if name == "longformer_global" else subject.expected
    assert expected
    # Dynamo alone changes what BigBird computes in training.
    stages = subject.stages if name != "bigbird" else ("forward",)
    assert all(judge.STAGES[stage][0] in expected for stage in stages)


def test_further_graphs_are_noticed():
    outcomes = [judge.Outcome("sdpa none", graphs=2, dynamo_graphs=1)]
    subject = dataclasses.replace(MODELS["llama"], expected=None)
    assert judge.complaints(subject, outcomes) == ["2 graphs were compiled, Inductor compiles 1"]

"""Dense or sparse: by measurement, by the roofline, and what is remembered."""

import dataclasses
import json

import pytest
import torch
from helpers import pruned

from sparse_compiler.codegen import selection
from sparse_compiler.formats.cost import AlwaysSelector, LinearProblem, ModelSelector, candidates
from sparse_compiler.formats.pattern import Pattern, find_pattern


def problem_for(weight: torch.Tensor, rows=(1,), **changes) -> LinearProblem:
    out_features, in_features = weight.shape
    dtype = weight.dtype
    pattern = find_pattern(weight)
    return LinearProblem(out_features, in_features, rows, dtype, pattern, threads=2, **changes)


class Measured(list):
    """What was asked for, and what is answered: (dense, sparse) for a format."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict = {}
        self.seconds = 0.0


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measurements by decree, in a cache of their own; a list of what was asked for."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    asked = Measured()

    def measure(problem, name, rows, weight):
        asked.append((name, rows))
        return asked.times.get((name, rows), asked.times.get(name, (1.0, 2.0))), asked.seconds

    monkeypatch.setattr(selection, "_measure", measure)
    return asked


def choose(problem, weight, min_speedup=1.05, budget=100.0):
    return selection.MeasuringSelector(min_speedup, budget).choose(problem, weight)


WEIGHT = pruned(64, 64, 0.1)


def test_the_fastest_format_wins(measured):
    weight = pruned(64, 64, 0.3)
    problem = problem_for(weight, (4,))
    assert set(candidates(problem)) == {"bitmap", "csr"}
    measured.times = {"bitmap": (3.0, 2.0), "csr": (3.0, 1.0)}
    decision = choose(problem, weight)
    assert (decision.format, decision.speedup) == ("csr", 3.0)
    assert (decision.baseline_ms, decision.sparse_ms) == (3.0, 1.0)
    assert decision.reason == "measured 3.00x at 4 rows"


def test_what_loses_stays_dense_and_says_so(measured):
    measured.times = {"csr": (1.02, 1.0)}
    decision = choose(problem_for(WEIGHT), WEIGHT)
    assert decision.format is None and decision.speedup == 1.02
    assert decision.reason == (
        "dense is faster or as fast: csr measured 1.02x at 1 row, 1.05x is wanted"
    )
    assert choose(problem_for(WEIGHT), WEIGHT, min_speedup=1.0).format == "csr"


def test_with_dynamic_rows_the_worst_counts(measured):
    measured.times = {("csr", 1): (4.0, 1.0), ("csr", 512): (0.9, 1.0)}
    decision = choose(problem_for(WEIGHT, (1, 512), dynamic=True), WEIGHT)
    assert decision.format is None
    assert "at 512 rows" in decision.reason and "the worst one counts" in decision.reason


def test_equal_layers_are_measured_once(measured):
    measured.times = {"csr": (2.0, 1.0)}
    for seed in range(4):
        weight = pruned(64, 64, 0.1, seed=seed)
        # A few weights more or less do not make another layer.
        problem = dataclasses.replace(problem_for(weight), pattern=Pattern((64, 64), 410 + seed))
        choose(problem, weight)
    assert measured == [("csr", 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"rows": (2,)},
        {"dtype": torch.bfloat16},
        {"threads": 7},
        {"dynamic": True},
        {"out_features": 65},
        {"pattern": Pattern((64, 64), 800)},
    ],
)
def test_what_makes_another_layer(measured, change):
    problem = problem_for(WEIGHT)
    choose(problem, WEIGHT)
    choose(dataclasses.replace(problem, **change), WEIGHT)
    assert len(measured) == 2


def test_measurements_are_on_disk(measured, tmp_path, monkeypatch):
    measured.times = {"csr": (2.0, 1.0)}
    choose(problem_for(WEIGHT), WEIGHT)
    monkeypatch.setattr(selection, "_caches", {})  # as in another process
    assert choose(problem_for(WEIGHT), WEIGHT).speedup == 2.0
    assert len(measured) == 1
    (path,) = (tmp_path / "sparse_compiler").glob("*.json")
    assert len(json.loads(path.read_text())) == 1
    for broken in ("", "{", "[]"):
        path.write_text(broken)
        monkeypatch.setattr(selection, "_caches", {})
        assert choose(problem_for(WEIGHT), WEIGHT).speedup == 2.0


def test_other_kernels_are_measured_anew(measured, monkeypatch):
    choose(problem_for(WEIGHT), WEIGHT)
    monkeypatch.setattr(selection.cpp, "digest", lambda: "another")
    choose(problem_for(WEIGHT), WEIGHT)
    assert len(measured) == 2


def test_without_time_layers_stay_dense_and_say_what_to_write(measured):
    decision = choose(problem_for(WEIGHT), WEIGHT, budget=0)
    assert measured == [] and decision.format is None and decision.speedup is None
    assert decision.reason == (
        "no time was left to measure it: raise options['selection_budget'], or write "
        "selection='model' to decide by bytes and flops"
    )


def test_the_budget_is_for_one_compilation(measured):
    measured.times, measured.seconds = {"csr": (2.0, 1.0)}, 3.0
    selector = selection.MeasuringSelector(1.05, 5.0)
    formats = [
        selector.choose(problem_for(pruned(64, 64, d)), WEIGHT).format for d in (0.05, 0.1, 0.2)
    ]
    assert formats == ["csr", "csr", None] and len(measured) == 2
    # What was measured before costs nothing.
    assert selector.choose(problem_for(pruned(64, 64, 0.1)), WEIGHT).format == "csr"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_a_real_measurement(monkeypatch, tmp_path, training, density):
    monkeypatch.setattr(selection, "_ROUNDS", 1)
    monkeypatch.setattr(selection, "_MOST_COPIES", 2)
    weight = pruned(64, 64, density)
    problem = problem_for(weight, (3,), training=training)
    for name in candidates(problem):
        (dense, sparse), seconds = selection._measure(problem, name, 3, weight)
        assert dense > 0 and sparse > 0 and seconds > 0


def test_the_roofline():
    selector = ModelSelector(1.05)
    sparse = selector.choose(problem_for(pruned(512, 512, 0.05)), WEIGHT)
    assert sparse.format == "csr" and sparse.speedup > 2
    dense = selector.choose(problem_for(pruned(512, 512, 0.68), (2048,)), WEIGHT)
    assert dense.format is None and dense.reason.startswith("not faster: the roofline model")


def test_always():
    decision = AlwaysSelector().choose(problem_for(WEIGHT), WEIGHT)
    assert (decision.format, decision.reason) == ("csr", 'selection="always" measures nothing')


@pytest.mark.parametrize(
    ("weight", "changes", "expected"),
    [
        (pruned(64, 64, 0.5), {}, ["bitmap", "csr"]),
        (pruned(64, 64, 0.5), {"rows": (64,)}, ["csr", "bitmap"]),
        (pruned(64, 64, 0.1), {}, ["csr"]),
        (pruned(64, 64, 0.2, block=(16, 16)), {}, ["block", "csr"]),
        (pruned(64, 64, 0.2, block=(2, 2)), {}, ["csr"]),
        (pruned(64, 64, 0.5), {"training": True}, ["csr"]),
        (pruned(64, 64, 0.3, block=(8, 1)), {"training": True}, ["block"]),
        (pruned(64, 64, 0.9), {}, ["gemv"]),
    ],
)
def test_candidates(weight, changes, expected):
    assert candidates(problem_for(weight, **changes)) == expected


def compare(before, after, budget=100.0):
    problems = [
        LinearProblem(*shape, (3,), torch.float32, Pattern(shape, shape[0] * shape[1]))
        for shape in (before, after)
    ]
    return selection.MeasuringSelector(1.05, budget).compare(*problems)


def test_smaller_dense_layers_are_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(selection, "_ROUNDS", 1)
    monkeypatch.setattr(selection, "_MOST_COPIES", 2)
    found = compare((64, 64), (16, 64))
    assert found.measured and found.before_ms > 0 and found.after_ms > 0
    assert compare((64, 64), (16, 64), budget=0) == found
    assert compare((64, 64), (32, 64), budget=0).unknown.startswith("no time was left")

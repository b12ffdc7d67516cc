"""Mixtures of experts from PyPI: mixture-of-experts, with Top2Gating and its safe_one_hot."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparse_compiler.prepare import prepare
from sparse_compiler.prepare.moe_one_hot import bounded_one_hot
from sparse_compiler.prepare.swap import always_replaced

package = pytest.importorskip("mixture_of_experts")


def flat():
    return package.MoE(32, num_experts=4, hidden_dim=48)


def nested():
    return package.HeirarchicalMoE(32, num_experts=(2, 2), hidden_dim=48)


def both(model, x):
    """Outputs and gradients, with the same noise each time."""
    torch.manual_seed(3)
    y, loss = model(x)
    total = y.square().sum() + loss
    return y, loss, torch.autograd.grad(total, [x, *model.parameters()], materialize_grads=True)


@pytest.mark.parametrize(("make", "routers"), [(flat, 1), (nested, 2)])
@pytest.mark.parametrize("training", [False, True])
def test_prepared_and_equal(make, routers, training):
    model = make()
    x = torch.randn(2, 24, 32, requires_grad=True)
    prepared = prepare(model, x.detach())
    assert len(prepared.swapped) == routers and not prepared.refused, str(prepared)
    model.train(training)
    expected = both(model, x)
    with always_replaced():
        torch.testing.assert_close(both(model, x), expected)


def test_one_graph():
    model = flat().eval()
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(torch.randn(2, 24, 32)).graph_break_count > 0
    prepare(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in (24, 40):
        x = torch.randn(2, length, 32)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(compiled(x), expected)


def test_copies_pickles_and_undo():
    model = flat()
    prepared = prepare(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.gate.forward.args[0] is twin.gate
    prepared.undo()
    assert "forward" not in vars(model.gate)


def test_numbers_beyond_the_length():
    rows = bounded_one_hot(torch.tensor([0, 2, 3, 7]), 3)
    assert rows.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]


def shifted_one_hot(indexes, length):
    return nn.functional.one_hot(indexes + 1, max(int(indexes.max()) + 2, length))[..., :length]


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)

    def forward(self, x):
        return shifted_one_hot(self.gate(x).argmax(-1), 4)


def test_another_one_hot_is_refused():
    (refused,) = prepare(Shifted()).refused
    assert refused.reason == "its shifted_one_hot is not one_hot cut to a length"

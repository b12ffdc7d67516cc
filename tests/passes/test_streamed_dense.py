"""Layers without zeros in a graph with sparse ones: streamed at few rows, else left alone."""

import pytest
import torch
from helpers import compiled, listening, pruned
from torch import nn

from sparse_compiler.canonical import canonicalize
from sparse_compiler.formats.cost import AlwaysSelector, Decision, candidates
from sparse_compiler.options import Options
from sparse_compiler.passes import PassContext, SparseLinear


class Model(nn.Module):
    """A pruned layer and a full one, whose weight may be stored transposed."""

    def __init__(self, *, zeros: bool, transposed: bool = False, dtype=torch.float32) -> None:
        super().__init__()
        self.pruned = nn.Linear(48, 64, dtype=dtype)
        if zeros:
            self.pruned.weight.data = pruned(64, 48, 0.3, dtype)
        self.head = nn.Parameter(torch.randn((64, 33) if transposed else (33, 64)).to(dtype))
        self.transposed = transposed

    def forward(self, x):
        hidden = torch.relu(self.pruned(x))
        return hidden @ self.head if self.transposed else nn.functional.linear(hidden, self.head)


def formats(model, x):
    torch._dynamo.reset()
    with listening() as records, torch.no_grad():
        found = compiled(model)(x)
    exact = model.double()(x.double())
    bound = 1e-5 if x.dtype is torch.float32 else 0.02
    assert float((found.double() - exact).abs().max() / exact.abs().max()) < bound
    return [r.format for r in records[0].rewrites if r.kind == "linear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_full_layer_is_streamed(rows, dtype):
    model = Model(zeros=True, dtype=dtype)
    assert formats(model, torch.randn(rows, 48, dtype=dtype))[-1] == "gemv"


@pytest.mark.parametrize(
    ("rows", "zeros", "transposed"), [(5, True, False), (1, False, False), (1, True, True)]
)
def test_otherwise_it_stays_as_it_is(rows, zeros, transposed):
    model = Model(zeros=zeros, transposed=transposed)
    assert formats(model, torch.randn(rows, 48))[-1] != "gemv"


def test_in_training_every_parameter_gets_its_gradient():
    torch._dynamo.reset()
    model = Model(zeros=True)
    model.pruned.requires_grad_(False)
    x = torch.randn(2, 48, requires_grad=True)
    with listening() as records:
        found = torch.autograd.grad(compiled(model)(x).square().sum(), [model.head, x])
    expected = torch.autograd.grad(model(x).square().sum(), [model.head, x])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    formats = [r.format for r in records[0].rewrites if r.kind == "linear"]
    assert formats == ["csr", "dense"]


def test_full_layers_in_a_row():
    torch._dynamo.reset()
    first = nn.Linear(48, 64)
    first.weight.data = pruned(64, 48, 0.3)
    model = nn.Sequential(first, nn.Linear(64, 8), nn.Linear(8, 32), nn.Linear(32, 5))
    x = torch.randn(2, 48)
    with listening() as records, torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    formats = [r.format for r in records[0].rewrites if r.kind == "linear"]
    assert formats == ["bitmap", "gemv", "gemv", "gemv"]


def test_what_was_measured_slower_says_so():
    class Loses(AlwaysSelector):
        def choose(self, problem, weight):
            if candidates(problem) == ["gemv"]:
                return Decision(None, "dense is faster", 0.5, 1.0, 2.0)
            return super().choose(problem, weight)

    context = PassContext(Options(on_error="raise"), False, Loses())
    with torch.no_grad():
        SparseLinear(context)(canonicalize(Model(zeros=True), torch.randn(1, 48)))
    last = context.rewrites[-1]
    assert last.reason == "the weight has no zeros; dense is faster"
    assert (last.applied, last.speedup, last.baseline_ms) == (False, 0.5, 1.0)

"""Layers without zeros in a graph with sparse ones: streamed at few rows, else left alone."""

import pytest
import torch
from helpers import compiled, listening, pruned
from torch import nn


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

"""Compiled training of masked weights: outputs and gradients are those of dense autograd."""

import copy

import pytest
import torch
from helpers import compiled, listening
from torch import nn
from torch.nn.utils import prune


class Mlp(nn.Module):
    def __init__(self, block: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(48, 64, dtype=dtype)
        self.down = nn.Linear(64, 48, bias=False, dtype=dtype)
        for layer in (self.up, self.down):
            keep = torch.rand(layer.out_features // block, layer.in_features) < 0.3
            prune.custom_from_mask(layer, "weight", keep.repeat_interleave(block, 0))

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def gradients(function, model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), x.grad, *(p.grad.clone() for p in trained)]


@pytest.mark.parametrize(
    ("dtype", "block", "dynamic"),
    [
        (torch.float32, 1, False),
        (torch.float32, 1, True),
        (torch.float32, 8, False),
        (torch.bfloat16, 1, False),
    ],
)
def test_masked_training(dtype, block, dynamic):
    torch._dynamo.reset()
    model = Mlp(block, dtype)
    with listening() as records:
        function = compiled(model)
        for rows in (5, 33) if dynamic else (33,):
            x = torch.randn(rows, 48, dtype=dtype)
            if dynamic:
                torch._dynamo.mark_dynamic(x, 0)
            found = gradients(function, model, x)
            for layer in (model.up, model.down):
                vars(layer).pop("weight", None)
            exact = copy.deepcopy(model).double()
            expected = gradients(exact, exact, x.double())
            bound = 1e-5 if dtype is torch.float32 else 0.05
            for a, b in zip(found, expected, strict=True):
                scale = b.double().abs().max()
                assert float((a.double() - b.double()).abs().max() / scale) < bound
    kinds = [r.format for r in records[0].rewrites if r.kind == "linear" and r.applied]
    assert kinds == ["block" if block > 1 else "csr"] * 2


def test_training_steps_agree_with_dense_training():
    torch._dynamo.reset()
    sparse = Mlp(1, torch.float32)
    for layer in (sparse.up, sparse.down):
        vars(layer).pop("weight", None)
    dense = copy.deepcopy(sparse)
    function = compiled(sparse)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (sparse, dense)]
    for step in range(5):
        x = torch.randn(8, 48, generator=torch.Generator().manual_seed(step))
        losses = [f(x).square().mean() for f in (function, dense)]
        torch.testing.assert_close(*losses)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_gradients_through_frozen_sparse_layers(density):
    torch._dynamo.reset()
    frozen = nn.Linear(48, 64)
    frozen.weight.data *= torch.rand(64, 48) < density
    frozen.requires_grad_(False)
    model = nn.Sequential(nn.Linear(48, 48), frozen)
    x = torch.randn(9, 48)
    with listening() as records:
        found = gradients(compiled(model), model, x)[:4]
    exact = copy.deepcopy(model).double()
    expected = gradients(exact, exact, x.double())[:4]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    assert [r.format for r in records[0].rewrites if r.kind == "linear"] == ["dense", "csr"]
    targets = {str(node.target) for node in records[0].after.graph.nodes}
    assert "sparse_compiler.masked_linear_csr.default" in targets

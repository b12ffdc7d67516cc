"""One compilation with a dynamic batch, then every number of rows, against float64."""

import pytest
import torch
from helpers import assert_product, compiled, listening, pruned
from torch import nn

WEIGHTS = {
    "csr": lambda dtype: pruned(130, 95, 0.15, dtype),
    "bitmap": lambda dtype: pruned(130, 95, 0.5, dtype),
    "block": lambda dtype: pruned(128, 95, 0.3, dtype, block=(16, 1)),
}
ROWS = [*range(2, 20), 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 81, 96, 127, 128, 129, 200, 300]


def sweep(name, dtype, bias, rows):
    """Compares every number of rows; returns the formats of each graph that was compiled."""
    torch._dynamo.reset()
    weight = WEIGHTS[name](dtype)
    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=bias, dtype=dtype))
    with torch.no_grad(), listening() as records:
        model[0].weight.copy_(weight)
        function = compiled(model)
        for m in rows:
            x = torch.randn(m, weight.shape[1]).to(dtype)
            torch._dynamo.mark_dynamic(x, 0)
            assert_product(function(x), x, weight, model[0].bias)
    return [[r.format for r in g.rewrites if r.kind == "linear"] for g in records]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_number_of_rows(name, dtype):
    # In bfloat16 the bias is added to the unrounded sum: one rounding, as the bound wants.
    assert sweep(name, dtype, True, ROWS) == [[name]]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("bias", [True, False])
def test_really_every_number_of_rows(name, dtype, bias):
    assert sweep(name, dtype, bias, range(2, 420)) == [[name]]


@pytest.mark.parametrize("name", ["csr", "bitmap"])
def test_training_with_a_dynamic_batch(name):
    """A frozen weight: the gradient for x is a sparse product, too."""
    torch._dynamo.reset()
    weight = WEIGHTS[name](torch.float32)
    model = nn.Sequential(nn.Linear(*weight.shape[::-1]))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    model.requires_grad_(False)
    function = compiled(model)
    for m in (5, 9, 33):
        x = torch.randn(m, weight.shape[1])
        torch._dynamo.mark_dynamic(x, 0)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch._dynamo.mark_dynamic(a, 0)
        function(a).square().sum().backward()
        model(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-4)

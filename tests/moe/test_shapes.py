"""Every shape runs as written, at any number of tokens, with gradients."""

import pytest
import torch
from shapes import SHAPES


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_runs(name):
    shape = SHAPES[name]
    dtype = torch.float64 if shape.float64 else torch.float32
    model = shape.make().to(dtype)
    for tokens in (10, 16):
        x, *rest = shape.inputs(tokens, dtype=dtype)
        x.requires_grad_()
        result = model(x, *rest)
        y = result[0] if isinstance(result, tuple) else result
        assert y.shape == x.shape and bool(torch.isfinite(y).all())
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert gradient.abs().max() > 1e-3

"""What follows a sparse layer is computed inside its kernel: read from the emitted code."""

import pytest
import torch
from helpers import ALWAYS, prune_layers, pruned
from torch import nn
from torch._inductor.utils import run_and_get_code

F = torch.nn.functional


class Gelu(nn.Module):
    """Bias, activation and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x):
        return x + F.gelu(self.up(x))


class Gated(nn.Module):
    """Llama's feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(64, 128, bias=False) for _ in range(2))
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Both(nn.Module):
    """The product itself is wanted as well as what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)

    def forward(self, x):
        y = self.up(x)
        return y, y.relu() * 2


class Heads(nn.Module):
    """The result is viewed as heads and turned."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(64, 128)

    def forward(self, x):
        return (self.query(x).view(4, 6, 8, 16) * 0.5).transpose(1, 2)


class Reduced(nn.Module):
    """A norm needs whole rows: it is no epilogue."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(64, 128), nn.LayerNorm(128)

    def forward(self, x):
        return self.norm(self.up(x))


def emitted(model, x, **options):
    """The compiled model's result, and the code Inductor emitted for it."""
    function = torch.compile(model, backend="sparse", options={**ALWAYS, **options})
    with torch.no_grad():
        y, (code,) = run_and_get_code(function, x)
    return y, code


def kernels(code: str) -> int:
    return code.count("async_compile.cpp_pybinding(")


CASES = {
    # model, kernels, of which hold a sparse product
    "bias, gelu, residual": (Gelu, 1, 1),
    "gate times up": (Gated, 3, 3),
    "product used twice": (Both, 1, 1),
    "heads": (Heads, 1, 1),
    "layer norm": (Reduced, 2, 1),
}


@pytest.mark.parametrize("density", [0.1, 0.5], ids=["csr", "bitmap"])
@pytest.mark.parametrize("name", CASES)
def test_epilogues_are_fused(name, density):
    make, wanted, sparse = CASES[name]
    model = prune_layers(make(), density)
    if make is Reduced:
        model.norm.reset_parameters()
    x = torch.randn(4, 6, 64) if make is Heads else torch.randn(6, 64)
    y, code = emitted(model, x, passes=["sparse_linear"])
    torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)
    assert kernels(code) == wanted
    assert code.count("sc::linear_csr<") + code.count("sc::linear_bitmap<") >= sparse
    assert "extern_kernels.addmm" not in code and "extern_kernels.mm" not in code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_and_bfloat16(dtype):
    model = Gelu()
    with torch.no_grad():
        model.up.weight.copy_(pruned(64, 64, 0.3, block=(16, 1)))
    model.to(dtype)
    x = torch.randn(6, 64, dtype=dtype)
    y, code = emitted(model, x)
    assert kernels(code) == 1
    bound = 1e-4 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(y, model(x), atol=bound, rtol=bound)


def test_the_kernel_carries_its_sources():
    """Emitted code depends on no file of this package."""
    _, code = emitted(prune_layers(Gelu(), 0.1), torch.randn(6, 64))
    assert "namespace sc" in code and "sparse_compiler/" not in code.replace("\\\\", "/")

"""Attention compiled with ``backend="sparse"``: kernels, gradients, changes at run time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import compiled, listening

HEADS, DIM = 4, 32


class Layer(nn.Module):
    """A layer of grouped-query attention with a padding mask, written as models write it."""

    def __init__(self, window: int = 80, dropout: float = 0.0) -> None:
        super().__init__()
        self.window, self.dropout = window, dropout
        width = HEADS * DIM
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, width // 2), nn.Linear(width, width // 2)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        batch, n, width = x.shape
        q = self.q(x).view(batch, n, HEADS, DIM).transpose(1, 2)
        k = self.k(x).view(batch, n, HEADS // 2, DIM).transpose(1, 2)
        v = self.v(x).view(batch, n, HEADS // 2, DIM).transpose(1, 2)
        k, v = (
            t[:, :, None].expand(batch, HEADS // 2, 2, n, DIM).reshape(batch, HEADS, n, DIM)
            for t in (k, v)
        )
        i, j = torch.arange(n, device=x.device)[:, None], torch.arange(n, device=x.device)
        mask = (j <= i) & (i - j < self.window) & pad[:, None, None, :]
        mask = torch.zeros((), dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        weights = q @ k.transpose(2, 3) * DIM**-0.5 + mask
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = F.softmax(weights, dim=-1, dtype=wide).to(q.dtype)
        weights = F.dropout(weights, self.dropout, self.training)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, n, width))


class NanoGPT(nn.Module):
    def __init__(self, block: int = 256) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :n, :n] == 0, float("-inf"))
        return F.softmax(att, dim=-1) @ v


def padding(*lengths: int, n: int) -> Tensor:
    return torch.arange(n)[None] < torch.tensor(lengths)[:, None]


def assert_same(model: nn.Module, fast: Any, x: Tensor, pad: Tensor, factor: float = 16.0) -> None:
    """Values and gradients are as near to float64 as eager's are, up to ``factor``."""
    exact = type(model)(model.window).double()  # type: ignore[arg-type]
    exact.load_state_dict(model.state_dict())
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)

    def run(call: Any, module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        y = call(x, pad)
        leaves = [x, *module.parameters()]
        return [y, *torch.autograd.grad(y, leaves, grad)]

    want = run(exact, exact, x.double(), grad.double())
    eager, found = run(model, model, x, grad), run(fast, model, x, grad)
    for right, mine, theirs in zip(want, found, eager, strict=True):
        bound = factor * (theirs - right).abs().max() + 1e-6 * right.abs().max()
        assert (mine - right).abs().max() <= bound


@pytest.fixture(scope="module")
def layer() -> tuple[Layer, Any]:
    torch.manual_seed(0)
    model = Layer()
    return model, compiled(model)


def test_training(layer):
    model, fast = layer
    x = torch.randn(2, 200, HEADS * DIM)
    with listening() as records:
        assert_same(model, fast, x, padding(200, 130, n=200))
    (record,) = records
    assert [item.applied for item in record.rewrites if item.kind == "attention"] == [True]
    assert "attention_training" in str(record.after.graph)


@pytest.mark.parametrize("lengths", [(200, 200), (1, 64), (0, 200)])
def test_other_paddings_of_the_same_graph(layer, lengths):
    model, fast = layer
    assert_same(model, fast, torch.randn(2, 200, HEADS * DIM), padding(*lengths, n=200))


def test_left_padding_makes_rows_that_are_masked_all_over(layer):
    model, fast = layer
    pad = padding(200, 130, n=200).flip(1)
    assert_same(model, fast, torch.randn(2, 200, HEADS * DIM), pad)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_what_it_reaches_in_eager(layer, value):
    model, fast = layer
    x = torch.randn(2, 200, HEADS * DIM)
    x[0, 150] = value  # behind the padding
    pad = padding(130, 200, n=200)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, pad), model(x, pad), equal_nan=True)


def test_dynamic_lengths_compile_once():
    model = Layer().eval()
    with listening() as records, torch.no_grad():
        fast = torch.compile(model, backend="sparse", dynamic=True, options={"selection": "always"})
        for n in (150, 65, 300, 64, 129):
            x, pad = torch.randn(2, n, HEADS * DIM), padding(n, n // 2, n=n)
            torch.testing.assert_close(fast(x, pad), model(x, pad), rtol=1e-4, atol=1e-5)
    assert len(records) == 1


def test_bfloat16():
    model = Layer().bfloat16().eval()
    x, pad = torch.randn(2, 200, HEADS * DIM), padding(200, 90, n=200)
    with torch.no_grad():
        want = model.float()(x, pad)
        y = compiled(model.bfloat16())(x.bfloat16(), pad)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.02)


def test_dropout_draws_about_as_many_weights_and_repeats_with_the_seed():
    model = Layer(dropout=0.5)
    fast = compiled(model)
    x, pad = torch.randn(2, 128, HEADS * DIM), padding(128, 128, n=128)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(fast(x, pad))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    torch.manual_seed(0)
    mean = torch.stack([fast(x, pad).detach() for _ in range(300)]).mean(0)
    model.eval()
    with torch.no_grad():
        assert (mean - model(x, pad)).abs().mean() < 0.05


def test_a_mask_that_is_a_buffer_may_change():
    model = NanoGPT()
    q, k, v = (torch.randn(1, 2, 200, 32) for _ in range(3))
    with torch.no_grad():
        fast = compiled(model)
        torch.testing.assert_close(fast(q, k, v), model(q, k, v), rtol=1e-4, atol=1e-5)
        model.mask[..., 7] = 0
        torch.testing.assert_close(fast(q, k, v), model(q, k, v), rtol=1e-4, atol=1e-5)
        model.mask.copy_(torch.tril(torch.ones(256, 256)))
        torch.testing.assert_close(fast(q, k, v), model(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 3, 8])
def test_decoding_reads_a_cache(queries):
    def step(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        at = position + torch.arange(q.shape[2])
        key = torch.arange(k.shape[2])
        mask = (key[None, :] <= at[:, None]) & (key[None, :] > at[:, None] - 100)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    q = torch.randn(2, 4, queries, 64)
    k, v = torch.randn(2, 4, 700, 64), torch.randn(2, 4, 700, 64)
    with torch.no_grad():
        fast = compiled(step)
        for position in (0, 63, 350, 690):
            args = (q, k, v, torch.tensor(position))
            torch.testing.assert_close(fast(*args), step(*args), rtol=1e-4, atol=1e-5)

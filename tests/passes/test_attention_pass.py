"""The attention pass on graphs: what it rewrites, what it shares, what it refuses and why."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_compiler.canonical import canonicalize
from sparse_compiler.errors import UnsupportedError
from sparse_compiler.formats.cost import AlwaysSelector, ModelSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import Attention, PassContext, Rewrite
from tests.helpers import count

N = 192


class Masked(nn.Module):
    """Attention of a given spelling; ``tril`` is nanoGPT's buffer."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.register_buffer("tril", torch.tril(torch.ones(N, N)).view(1, 1, N, N))
        self.bias = nn.Parameter(torch.randn(1, 4, N, N))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None) -> Any:
        n = q.shape[2]
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        causal, window = j <= i, (j <= i) & (i - j < 64)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        least = torch.finfo(q.dtype).min
        match self.spelling:
            case "bool mask":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=window)
            case "float mask":
                mask = torch.zeros(n, n).masked_fill(~window, -math.inf)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            case "padding":
                mask = window & pad[:, None, None, :]
                first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                return first + F.scaled_dot_product_attention(k, q, v, attn_mask=mask)
            case "nanoGPT":
                scores = scores.masked_fill(self.tril[:, :, :n, :n] == 0, -math.inf)
            case "finfo.min":
                scores = scores + torch.where(window, 0.0, least)
            case "where":
                scores = torch.where(causal, scores, torch.tensor(-1e9))
            case "bias":
                scores = torch.where(causal, scores + self.bias, torch.full((), least))
            case "swin":
                scores = scores + torch.where(window, 0.0, -100.0)
            case "none":
                return F.scaled_dot_product_attention(q, k, v)
            case "is_causal":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "dilated":
                scores = scores.masked_fill((i - j) % 2 != 0, -math.inf)
            case "returned":
                weights = F.softmax(scores.masked_fill(~causal, -math.inf), -1)
                return weights @ v, weights
        return F.softmax(scores, -1) @ v


def inputs(dtype: torch.dtype = torch.float32, dim: int = 32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 4, N, dim, generator=generator).to(dtype) for _ in range(3))


def rewritten(
    model: nn.Module, *args: Any, selector: Any = None, **options: Any
) -> tuple[torch.fx.GraphModule, list[Rewrite]]:
    """The canonical graph with the pass applied, every rewrite verified."""
    parsed = Options.parse({"verify": True, "on_error": "raise", **options})
    context = PassContext(parsed, False, selector or AlwaysSelector())
    with torch.no_grad():
        return Attention(context)(canonicalize(model.eval(), *args)).graph_module, context.rewrites


@pytest.mark.parametrize(
    "spelling", ["bool mask", "float mask", "nanoGPT", "finfo.min", "where", "bias"]
)
def test_masks_are_found_however_they_are_spelled(spelling):
    model, args = Masked(spelling), inputs()
    graph, rewrites = rewritten(model, *args)
    (rewrite,) = rewrites
    assert rewrite.applied and rewrite.format == "tiles" and rewrite.kind == "attention"
    assert rewrite.sparsity > 0.3 and rewrite.shape == (2, 4, N, N, 32) and rewrite.spelling
    assert count(graph, "softmax") == count(graph, "scaled_dot_product") == 0
    with torch.no_grad():
        torch.testing.assert_close(graph(*args), model(*args), rtol=1e-4, atol=1e-5)


def test_the_mask_itself_is_gone():
    graph, _ = rewritten(Masked("bool mask"), *inputs())
    assert count(graph, "arange") == count(graph, "le.") == 0


def test_a_runtime_mask_is_mapped_once():
    args = (*inputs(), torch.arange(N)[None] < torch.tensor([[N], [70]]))
    model = Masked("padding")
    graph, rewrites = rewritten(model, *args)
    assert [rewrite.applied for rewrite in rewrites] == [True, True]
    assert count(graph, "tile_kinds") == 1 and count(graph, "sparse_compiler.attention") == 2
    torch.testing.assert_close(graph(*args), model(*args), rtol=1e-4, atol=1e-5)
    other = (*args[:3], torch.arange(N)[None] >= torch.tensor([[0], [100]]))
    torch.testing.assert_close(graph(*other), model(*other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spelling", "sentence"),
    [
        ("swin", "masked scores are -100 and not -inf"),
        ("none", "nothing is masked"),
        ("is_causal", "PyTorch's own kernel skips"),
        ("dilated", "no tile of 64 queries and 64 keys is empty"),
        ("returned", "its weights are needed elsewhere"),
    ],
)
def test_refusals_say_why(spelling, sentence):
    _, rewrites = rewritten(Masked(spelling), *inputs())
    (rewrite,) = rewrites
    assert not rewrite.applied and sentence in rewrite.reason, rewrite.reason


@pytest.mark.parametrize(
    ("args", "sentence"),
    [(inputs(torch.float64), "float64"), (inputs(dim=300), "300 channels")],
)
def test_what_the_kernels_cannot_take(args, sentence):
    _, rewrites = rewritten(Masked("bool mask"), *args)
    assert not rewrites[0].applied and sentence in rewrites[0].reason


def test_the_model_decides_without_measuring():
    _, rewrites = rewritten(Masked("bool mask"), *inputs(), selector=ModelSelector())
    assert rewrites[0].applied and "roofline" in rewrites[0].reason
    _, rewrites = rewritten(
        Masked("bool mask"), *inputs(), selector=ModelSelector(min_speedup=50.0)
    )
    assert not rewrites[0].applied and "not faster" in rewrites[0].reason


def test_fuel():
    args = (*inputs(), torch.ones(2, N, dtype=torch.bool))
    _, rewrites = rewritten(Masked("padding"), *args, fuel=1)
    assert [rewrite.applied for rewrite in rewrites] == [True, False]
    assert "fuel" in rewrites[1].reason


@pytest.mark.parametrize("spelling", ["bool mask", "finfo.min"])
def test_a_graph_that_was_made_for_inference_has_gradients(spelling):
    model, args = Masked(spelling), inputs(torch.float32)
    graph, _ = rewritten(model, *args)
    leaves = [[x.clone().requires_grad_() for x in args] for _ in range(2)]
    want, got = model(*leaves[0]), graph(*leaves[1])
    direction = torch.randn_like(want)
    wanted = torch.autograd.grad(want, leaves[0], direction)
    found = torch.autograd.grad(got, leaves[1], direction)
    for right, mine in zip(wanted, found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_a_learned_bias_asks_for_a_graph_made_for_training():
    model, args = Masked("bias"), inputs()
    graph, _ = rewritten(model, *args)
    with pytest.raises(UnsupportedError, match="training=True"):
        graph(*args).sum().backward()

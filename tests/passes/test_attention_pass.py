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


def given_rewritten(model: nn.Module, *args: Tensor) -> tuple[Any, list[Rewrite]]:
    """The same with a pass that may look at the inputs."""
    context = PassContext(Options.parse({"on_error": "raise"}), False, AlwaysSelector())
    with torch.no_grad():
        graph = canonicalize(model.eval(), *args)
        names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        graph.meta["example_inputs"] = dict(zip(names, args, strict=True))
        return Attention(context)(graph).graph_module, context.rewrites


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


class Biased(nn.Module):
    """A bias for each head, from outside."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_is_no_mask_unless_it_masks(masked):
    bias = torch.randn(1, 4, N, N)
    if masked:
        bias = bias.masked_fill(torch.ones(N, N).triu(1) > 0, -math.inf)
    args = (*inputs(), bias)
    graph, (rewrite,) = given_rewritten(Biased(), *args)
    assert rewrite.applied is masked
    assert masked or rewrite.reason == "no tile of 64 queries and 64 keys is empty"
    torch.testing.assert_close(graph(*args), Biased()(*args), rtol=1e-4, atol=1e-5)


class WrittenInPlace(nn.Module):
    """A padding mask as Longformer makes it: a float mask of which an alias is written to."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        bias = torch.where(pad != 0, 0.0, -math.inf)[:, None, None, :]
        bias[:, 0, 0, :].masked_fill_(pad == 2, 0.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(bias == 0) & (pad != 2).all())


def test_the_map_is_estimated_from_a_mask_that_is_written_to():
    pad = (torch.arange(N)[None] < torch.tensor([[N], [64]])).long()
    model, args = WrittenInPlace(), (*inputs(), pad)
    before = pad.clone()
    graph, (rewrite,) = given_rewritten(model, *args)
    assert rewrite.applied and rewrite.sparsity == pytest.approx(1 / 3), rewrite.reason
    assert torch.equal(pad, before)
    torch.testing.assert_close(graph(*args), model(*args), rtol=1e-4, atol=1e-5)


class OneQuery(nn.Module):
    """A step of decoding: ``position`` is a tensor, a window and padding may come on top of it."""

    def __init__(self, masks: str) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, pad: Tensor) -> Tensor:
        i, j = (position + torch.arange(q.shape[2]))[:, None], torch.arange(N)[None, :]
        keep = (j <= i)[None, None]
        if "window" in self.masks:
            keep = keep & (i - j < 64)
        if "padding" in self.masks:
            keep = keep & pad[:, None, None, :]
        bias = torch.where(keep, 0.0, torch.finfo(q.dtype).min)
        return F.softmax(q @ k.transpose(-2, -1) + bias, -1) @ v


@pytest.mark.parametrize(
    ("queries", "masks", "pattern"),
    [
        (1, "", "keys up to a position"),
        (1, "padding", "keys up to a position & padding"),
        (1, "window", "sliding window 64 up to a position"),
        (1, "window padding", "sliding window 64 up to a position & padding"),
        (96, "", "causal with an offset"),
        (96, "window padding", "causal with an offset & sliding window 64 & padding"),
    ],
)
def test_a_mask_that_is_read_as_one_tensor_is_named_for_what_is_in_it(queries, masks, pattern):
    q, k, v = inputs()
    pad = torch.ones(2, N, dtype=torch.bool)
    model, args = OneQuery(masks), (q[:, :, :queries], k, v, torch.tensor(90), pad)
    graph, (rewrite,) = rewritten(model, *args)
    assert rewrite.applied and rewrite.pattern == pattern
    torch.testing.assert_close(graph(*args), model(*args), rtol=1e-4, atol=1e-5)


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

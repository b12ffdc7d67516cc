"""Attention without softmax in every spelling, and the pass applied to it."""

import torch
import torch.nn.functional as F
from torch import nn

from sparse_compiler.canonical import canonicalize
from sparse_compiler.codegen.selection import MeasuringSelector
from sparse_compiler.formats.cost import AlwaysSelector, ModelSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import PassContext
from sparse_compiler.passes.linear_attention import LinearAttention

CHUNK = 64


class Model(nn.Module):
    """A function of tensors as a module, with its buffers."""

    def __init__(self, function, **buffers):
        super().__init__()
        self.function = function
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, *args):
        return self.function(*args, **dict(self.named_buffers()))


_SELECTORS = {
    "always": lambda options: AlwaysSelector(),
    "model": lambda options: ModelSelector(options.min_speedup),
    "measure": lambda options: MeasuringSelector(options.min_speedup, options.selection_budget),
}


def linearized(function, *args, dynamic=None, **options):
    """The graph with the pass applied, and the verdicts; every rewrite is verified."""
    model = function if isinstance(function, nn.Module) else Model(function)
    if dynamic is not None:
        program = torch.export.export(model, args, dynamic_shapes=dynamic, strict=False)
        graph = canonicalize(program)
    else:
        graph = canonicalize(model, *args)
    wanted = {"selection": "always", "on_error": "raise", "verify": True, **options}
    parsed = Options.parse(wanted)
    context = PassContext(parsed, False, _SELECTORS[parsed.selection](parsed))
    result = LinearAttention(context)(graph)
    assert result.modified == any(rewrite.applied for rewrite in context.rewrites)
    return result.graph_module, context.rewrites


def the_only(rewrites):
    assert len(rewrites) == 1, [rewrite.reason for rewrite in rewrites]
    return rewrites[0]


def inputs(n, d=8, e=12, *, batch=2, heads=3, keys=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((n, d), (keys or n, d), (keys or n, e))
    return [torch.randn(batch, heads, *s, generator=generator).to(dtype) for s in sizes]


def assert_same(graph, function, args, bound=1e-11):
    """Values and gradients, relative to the largest of each."""
    leaves = [[x.clone().requires_grad_() for x in args] for _ in range(2)]
    want, got = function(*leaves[0]), graph(*leaves[1])
    assert got.shape == want.shape and got.dtype == want.dtype
    direction = torch.randn_like(want)
    wanted = torch.autograd.grad(want, leaves[0], direction)
    gotten = torch.autograd.grad(got, leaves[1], direction)
    for x, y in zip((want, *wanted), (got, *gotten), strict=True):
        scale = float(x.detach().abs().max())
        assert (x - y).abs().max() <= bound * max(scale, 1e-3)


# ---- feature maps: whatever the model computes before the products


def elu(x):
    return F.elu(x) + 1


def relu(x):
    return F.relu(x) + 1e-3


def random_features(x):
    projection = torch.linspace(-1, 1, 20 * x.shape[-1], dtype=x.dtype).sin().view(20, -1)
    return torch.exp(x @ projection.mT - x.square().sum(-1, keepdim=True) / 2) + 1e-4


def taylor(x):
    square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / 2**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


def softmaxed(x):
    return x.softmax(-1)


FEATURES = [elu, relu, random_features, taylor, softmaxed]


# ---- spellings over all keys


def matmul(q, k, v):
    return (q @ k.transpose(-2, -1)) @ v


def matmul_scaled(q, k, v):
    return (q * 0.5) @ k.mT * 0.25 @ v / 3


def bmm_views(q, k, v):
    b, h, n, _ = q.shape
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(b, h, n, -1)
    return torch.bmm(scores.reshape(b * h, n, -1), v.flatten(0, 1)).view(b, h, n, -1)


def baddbmm(q, k, v):
    b, h, _, d = q.shape
    flat = [x.reshape(b * h, x.shape[2], -1) for x in (q, k, v)]
    scores = torch.baddbmm(flat[0].new_empty(1), flat[0], flat[1].mT, beta=0, alpha=d**-0.5)
    return (scores @ flat[2]).unflatten(0, (b, h))


def einsum_normalised(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    weights = scores / (scores.sum(-1, keepdim=True) + 1e-6)
    return torch.einsum("bhij,bhje->bhie", weights, v)


def divided_after(q, k, v):
    scores = torch.einsum("...id,...jd->...ij", q, k)
    total = scores.sum(dim=-1).clamp(min=1e-6)
    return (scores @ v) / total[..., None]


def normaliser_of_sums(q, k, v):
    total = torch.einsum("bhnd,bhd->bhn", q, k.sum(2)) + 1e-6
    return (q @ k.mT) @ v / total.unsqueeze(-1)


def one_einsum(q, k, v):
    return torch.einsum("bhid,bhjd,bhje->bhie", q, k, v)


def positions_first(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("blhd,bshd->bhls", q, k)
    return torch.einsum("bhls,bshe->blhe", scores, v).transpose(1, 2)


def plus_one(q, k, v):
    scores = 1 + q @ k.mT
    return scores @ v / scores.sum(-1, keepdim=True)


def masked_keys(q, k, v):
    valid = torch.arange(k.shape[2]) < k.shape[2] - 2
    scores = (q @ k.mT).masked_fill(~valid, 0.0)
    return scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)


def columns_normalised(q, k, v):
    scores = q @ k.mT
    return (scores / (scores.sum(-2, keepdim=True) + 1e-6)) @ v


ALL_KEYS = [
    matmul,
    matmul_scaled,
    bmm_views,
    baddbmm,
    einsum_normalised,
    divided_after,
    normaliser_of_sums,
    one_einsum,
    positions_first,
    plus_one,
    masked_keys,
    columns_normalised,
]


# ---- causal spellings


def tril(q, k, v):
    return torch.tril(q @ k.mT) @ v


def tril_strict(q, k, v):
    return torch.einsum("bhij,bhje->bhie", torch.einsum("bhid,bhjd->bhij", q, k).tril(-1), v)


def mask_multiplied(q, k, v):
    n = q.shape[-2]
    scores = (q @ k.mT) * torch.tril(torch.ones(n, n, dtype=q.dtype))
    return scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)


def mask_filled(q, k, v):
    n = q.shape[-2]
    mask = torch.triu(torch.ones(n, n), diagonal=1).bool()
    scores = (q @ k.mT).masked_fill(mask, 0)
    return (scores / (scores.sum(-1, keepdim=True) + 1e-6)) @ v


def positions_compared(q, k, v):
    position = torch.arange(q.shape[-2])
    scores = torch.where(position[:, None] >= position[None, :], q @ k.mT / 8, 0.0)
    return (scores / scores.sum(-1, keepdim=True).clamp(min=1e-6)) @ v


def padded_and_causal(q, k, v):
    n = q.shape[-2]
    valid = (torch.arange(n) != 1)[None, None, None, :]
    mask = torch.ones(n, n, dtype=torch.bool).tril() & valid
    scores = (q @ k.mT).masked_fill(~mask, 0.0)
    return scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)


def running_sums(q, k, v):
    states = torch.einsum("...nd,...ne->...nde", k, v).cumsum(-3)
    total = torch.einsum("...nd,...nd->...n", q, k.cumsum(-2) + 1e-6)
    return torch.einsum("...nde,...nd,...n->...ne", states, q, 1.0 / total)


def running_sums_multiplied(q, k, v):
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(dim=2)
    total = (q * k.cumsum(dim=2)).sum(-1, keepdim=True)
    return torch.einsum("bntd,bntdh->bnth", q, states) / (total + 1e-6)


def running_sums_matmul(q, k, v):
    states = torch.cumsum(k[..., :, None] @ v[..., None, :], dim=2)
    total = (q.unsqueeze(-2) @ k.cumsum(2).unsqueeze(-1)).squeeze(-1)
    return (q.unsqueeze(-2) @ states).squeeze(-2) / (total + 1e-6)


def running_sums_summed(q, k, v):
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2)
    return (q.unsqueeze(-1) * states).sum(-2)


def running_sums_before(q, k, v):
    states = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    states = F.pad(states, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    return torch.einsum("bhnd,bhnde->bhne", q, states)


def buckets_of_one(q, k, v):
    # As linear-attention-transformer does with its default blind spot.
    q, k, v = (x.reshape(*x.shape[:2], -1, 1, x.shape[-1]) for x in (q, k, v))
    sums = k.sum(dim=-2).cumsum(dim=-2)
    context = torch.einsum("bhund,bhune->bhude", k, v).cumsum(dim=-3)
    inverse = 1.0 / torch.einsum("bhud,bhund->bhun", sums, q).clamp(min=1e-3)
    return torch.einsum("bhund,bhude,bhun->bhune", q, context, inverse).flatten(2, 3)


CAUSAL = [
    tril,
    tril_strict,
    mask_multiplied,
    mask_filled,
    positions_compared,
    padded_and_causal,
    running_sums,
    running_sums_multiplied,
    running_sums_matmul,
    running_sums_summed,
    running_sums_before,
    buckets_of_one,
]


def featured(spelling, features):
    def function(q, k, v):
        return spelling(features(q), features(k), v)

    function.__name__ = f"{spelling.__name__}_{features.__name__}"
    return function

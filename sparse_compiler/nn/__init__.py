"""Attention patterns and mixtures of experts in plain PyTorch.

Nothing here knows the compiler, and nothing here is needed to use it. These are the patterns that
``torch.compile(model, backend="sparse")`` recognises, written the way models write them: a bool
mask for ``scaled_dot_product_attention``, an explicit softmax, a feature map and two contractions,
experts that run on all tokens. Run as they are, they do all the work of dense layers; compiled,
they skip what is masked or weighted with 0. docs/nn.md has the list with formulas and costs.
"""

from __future__ import annotations

from sparse_compiler.nn.alibi import alibi, alibi_slopes
from sparse_compiler.nn.attention import MaskedAttention, attend
from sparse_compiler.nn.features import (
    EluFeatures,
    FourierFeatures,
    PositiveFeatures,
    ReluFeatures,
    SoftmaxFeatures,
    TaylorFeatures,
)
from sparse_compiler.nn.linear import LinearAttention, linear_attention
from sparse_compiler.nn.masks import (
    causal,
    chunked,
    dilated,
    documents,
    global_local,
    global_tokens,
    local,
    padding,
    prefix,
    random,
    sliding_window,
    strided,
)
from sparse_compiler.nn.moe import MoE, active_parameter_count, parameter_count
from sparse_compiler.nn.router import (
    Routing,
    TopKRouter,
    expert_fractions,
    load_balancing_loss,
    router_z_loss,
)

__all__ = [
    "EluFeatures",
    "FourierFeatures",
    "LinearAttention",
    "MaskedAttention",
    "MoE",
    "PositiveFeatures",
    "ReluFeatures",
    "Routing",
    "SoftmaxFeatures",
    "TaylorFeatures",
    "TopKRouter",
    "active_parameter_count",
    "alibi",
    "alibi_slopes",
    "attend",
    "causal",
    "chunked",
    "dilated",
    "documents",
    "expert_fractions",
    "global_local",
    "global_tokens",
    "linear_attention",
    "load_balancing_loss",
    "local",
    "padding",
    "parameter_count",
    "prefix",
    "random",
    "router_z_loss",
    "sliding_window",
    "strided",
]

"""Attention patterns in plain PyTorch: masks, a masked attention, linear attention.

Nothing here knows the compiler, and nothing here is needed to use it. These are the patterns that
``torch.compile(model, backend="sparse")`` recognises, written the way models write them: a bool
mask for ``scaled_dot_product_attention``, an explicit softmax, a feature map and two contractions.
Run as they are, the masked modules do all the work of dense attention; compiled, they skip what is
masked. docs/nn.md has the list with formulas and costs.
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

__all__ = [
    "EluFeatures",
    "FourierFeatures",
    "LinearAttention",
    "MaskedAttention",
    "PositiveFeatures",
    "ReluFeatures",
    "SoftmaxFeatures",
    "TaylorFeatures",
    "alibi",
    "alibi_slopes",
    "attend",
    "causal",
    "chunked",
    "dilated",
    "documents",
    "global_local",
    "global_tokens",
    "linear_attention",
    "local",
    "padding",
    "prefix",
    "random",
    "sliding_window",
    "strided",
]

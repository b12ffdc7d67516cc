"""Softmax attention with a mask, in the spellings that models use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_compiler.nn.alibi import alibi

Spelling = Literal["sdpa", "matmul", "einsum"]
SPELLINGS: tuple[Spelling, ...] = ("sdpa", "matmul", "einsum")

# Called with (queries, keys, device=...), as every builder in ``masks`` can be.
MaskBuilder = Callable[..., Tensor]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    spelling: Spelling = "sdpa",
) -> Tensor:
    """``softmax(scale · q kᵀ + bias, where mask) v``. n²·d work as written.

    A query that may look at nothing gets zeros from ``"sdpa"`` and NaN from the other spellings,
    as PyTorch has it.

    Source: Attention Is All You Need (Vaswani et al., 2017); grouped queries: Ainslie et al., 2023.

    Args:
        q: [batch, heads, queries, d].
        k: [batch, kv_heads, keys, d]; ``heads`` is a multiple of ``kv_heads``.
        v: [batch, kv_heads, keys, e].
        mask: bool, broadcastable to [batch, heads, queries, keys]; True may be looked at.
        bias: float, broadcastable likewise, added to the scores.
        scale: 1/√d if left out.
        dropout: probability with which a weight is dropped.
        spelling: ``"sdpa"`` calls ``scaled_dot_product_attention``, the others write it out.

    Returns:
        [batch, heads, queries, e].

    Raises:
        ValueError: a mask that is not bool, heads that do not divide, an unknown spelling.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(
            f"the mask is {mask.dtype}, which softmax would add: write mask.bool() "
            "(True where a query may look at a key), or pass it as bias."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: "
            "the first must be a multiple of the second."
        )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if spelling == "sdpa":
        grouped = q.shape[1] != k.shape[1]
        if bias is not None:
            bias = bias.to(q.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )
    if q.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if spelling == "matmul":
        scores = (q @ k.transpose(-2, -1)) * scale
    elif spelling == "einsum":
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    else:
        raise ValueError(f"spelling={spelling!r} is unknown: write one of {SPELLINGS}.")
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = F.dropout(scores.softmax(-1), dropout)
    return weights @ v if spelling == "matmul" else torch.einsum("bhqk,bhkd->bhqd", weights, v)


class MaskedAttention(nn.Module):
    """Self-attention in which every layer call looks through the same mask.

        MaskedAttention(512, 8, mask=functools.partial(sliding_window, window=128))
        MaskedAttention(512, 8, kv_heads=2, mask=causal, use_alibi=True)
        MaskedAttention(512, 8, mask=random(1024, count=3, block=64, seed=0))

    The cost is n²·d as written, and (pairs left by the mask)·d compiled with ``backend="sparse"``.

    Args:
        width: size of a token.
        heads: number of query heads.
        kv_heads: number of key and value heads, a divisor of ``heads``; ``heads`` if left out.
        mask: a builder from ``masks``, called with ``(queries, keys, device=...)`` in every
            ``forward``; or a bool mask [..., n, n] that is kept as a buffer and cut to length; or
            None.
        use_alibi: adds ALiBi's bias to the scores.
        bias: whether the projections have biases.
        dropout: probability with which an attention weight is dropped in training.
        spelling: see ``attend``.

    Raises:
        ValueError: heads that do not divide, a mask that is not bool, an unknown spelling.
    """

    mask: Tensor | None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        mask: MaskBuilder | Tensor | None = None,
        use_alibi: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        spelling: Spelling = "sdpa",
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if width % heads or heads % kv_heads:
            raise ValueError(
                f"width={width}, heads={heads}, kv_heads={kv_heads}: heads must divide width and "
                "kv_heads must divide heads; write MaskedAttention(512, 8, kv_heads=2)."
            )
        if spelling not in SPELLINGS:
            raise ValueError(f"spelling={spelling!r} is unknown: write one of {SPELLINGS}.")
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise ValueError(f"the mask is {mask.dtype}: write mask.bool().")
        self.head_dim = width // heads
        self.heads, self.kv_heads = heads, kv_heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.build_mask = None if isinstance(mask, Tensor) else mask
        self.register_buffer("mask", mask if isinstance(mask, Tensor) else None, persistent=False)
        self.use_alibi = use_alibi
        self.dropout = dropout
        self.spelling: Spelling = spelling

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of a sequence to itself.

        Args:
            x: [batch, n, width].
            mask: one more bool mask, such as ``padding(...)`` or ``documents(...)``; a pair has to
                be allowed by both.

        Returns:
            [batch, n, width].
        """
        batch, n, width = x.shape
        q = self.query(x).view(batch, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.key(x).view(batch, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.value(x).view(batch, n, self.kv_heads, self.head_dim).transpose(1, 2)
        own = self._mask(n, x.device)
        if own is not None:
            mask = own if mask is None else own & mask
        y = attend(
            q,
            k,
            v,
            mask,
            bias=alibi(self.heads, n, device=x.device) if self.use_alibi else None,
            dropout=self.dropout if self.training else 0.0,
            spelling=self.spelling,
        )
        return self.output(y.transpose(1, 2).reshape(batch, n, width))

    def _mask(self, n: int, device: torch.device) -> Tensor | None:
        if self.build_mask is not None:
            return self.build_mask(n, n, device=device)
        if self.mask is not None and n > self.mask.shape[-1]:
            raise ValueError(
                f"the sequence has {n} tokens and the mask {self.mask.shape[-1]}: build the mask "
                f"for {n} tokens, or pass a builder such as causal."
            )
        return None if self.mask is None else self.mask[..., :n, :n]

"""Linear attention: no softmax between the two products, so they may be taken in another order.

``(φ(Q) φ(K)ᵀ) V`` costs n²·d; ``φ(Q) (φ(K)ᵀ V)`` costs n·f·e for f features and values of size e.
The causal form keeps a running sum of φ(k) vᵀ instead of one sum over all keys.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sparse_compiler.nn.features import EluFeatures, SoftmaxFeatures

Spelling = Literal["einsum", "matmul", "quadratic", "tril", "cumsum"]
SPELLINGS: dict[bool, tuple[Spelling, ...]] = {
    False: ("einsum", "matmul", "quadratic"),
    True: ("cumsum", "quadratic", "tril"),
}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    normalize: bool = True,
    epsilon: float = 1e-6,
    spelling: Spelling | None = None,
) -> Tensor:
    """``y_q = Σ_k (φq·φk) v_k / (Σ_k φq·φk + epsilon)``, over k <= q if causal.

    All spellings compute the same numbers at different costs, n being the length:

    =============  ========  =====================================  ==============================
    spelling       causal    how                                    work and memory as written
    =============  ========  =====================================  ==============================
    ``einsum``     no        Σ_k φk vᵀ as one einsum, then φq       n·f·e, memory f·e
    ``matmul``     no        ``q @ (k.mT @ v)``                     n·f·e, memory f·e
    ``quadratic``  both      ``(q @ k.mT) @ v``, zeros by a mask    n²·(f + e), memory n²
    ``tril``       yes       the same with ``torch.tril``           n²·(f + e), memory n²
    ``cumsum``     yes       running sum of φk vᵀ                   n·f·e, memory n·f·e
    =============  ========  =====================================  ==============================

    Compiled with ``backend="sparse"`` each costs n·f·e in memory that does not grow with n².

    Source: Transformers are RNNs (Katharopoulos et al., 2020); Efficient Attention (Shen et al.,
    2021).

    Args:
        q: features of the queries, [batch, heads, n, f].
        k: features of the keys, [batch, heads, n, f].
        v: values, [batch, heads, n, e].
        causal: whether a query sees only keys up to its own position.
        normalize: whether to divide by the sum of the weights.
        epsilon: added to that sum.
        spelling: see above; the first that fits if left out.

    Returns:
        [batch, heads, n, e].

    Raises:
        ValueError: shapes that do not fit, or a spelling that has no such form.
    """
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not fit: "
            "write [batch, heads, n, f], [batch, heads, m, f] and [batch, heads, m, e]."
        )
    if causal and q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"{q.shape[-2]} queries and {k.shape[-2]} keys: causal=True needs as many keys as "
            "queries; write causal=False for cross-attention."
        )
    spelling = SPELLINGS[causal][0] if spelling is None else spelling
    if spelling not in SPELLINGS[causal]:
        raise ValueError(
            f"spelling={spelling!r} has no {'causal' if causal else 'non-causal'} form: "
            f"write one of {SPELLINGS[causal]}."
        )
    if spelling in ("quadratic", "tril"):
        return _quadratic(q, k, v, causal, normalize, epsilon, spelling)
    if spelling == "cumsum":
        states = torch.einsum("bhnf,bhne->bhnfe", k, v).cumsum(2)
        y = torch.einsum("bhnf,bhnfe->bhne", q, states)
        total = torch.einsum("bhnf,bhnf->bhn", q, k.cumsum(2))
    elif spelling == "einsum":
        state = torch.einsum("bhnf,bhne->bhfe", k, v)
        y = torch.einsum("bhnf,bhfe->bhne", q, state)
        total = torch.einsum("bhnf,bhf->bhn", q, k.sum(2))
    else:
        y = q @ (k.transpose(-2, -1) @ v)
        total = (q @ k.sum(-2).unsqueeze(-1)).squeeze(-1)
    return y / (total + epsilon).unsqueeze(-1) if normalize else y


def _quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    normalize: bool,
    epsilon: float,
    spelling: Spelling,
) -> Tensor:
    weights = q @ k.transpose(-2, -1)
    if causal and spelling == "tril":
        weights = torch.tril(weights)
    elif causal:
        position = torch.arange(q.shape[-2], device=q.device)
        weights = weights.masked_fill(position[None, :] > position[:, None], 0.0)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + epsilon)
    return weights @ v


class LinearAttention(nn.Module):
    """Self-attention with a feature map where softmax was. n·f·e work per head.

        LinearAttention(512, 8)                                             # elu + 1
        LinearAttention(512, 8, features=PositiveFeatures(64, 256), causal=True)  # Performer
        LinearAttention(512, 8, features=SoftmaxFeatures())                 # Efficient Attention

    Args:
        width: size of a token.
        heads: number of heads, a divisor of ``width``.
        features: the feature map, from ``features`` or of your own; ``EluFeatures()`` if left out.
            It is called as ``features(q)`` and ``features(k, keys=True)``.
        causal: whether a query sees only keys up to its own position.
        spelling: see ``linear_attention``.
        bias: whether the projections have biases.

    Raises:
        ValueError: heads that do not divide, a spelling or a feature map without causal form.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        features: nn.Module | None = None,
        causal: bool = False,
        spelling: Spelling | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width={width} is not a multiple of heads={heads}: write LinearAttention(512, 8)."
            )
        if spelling is not None and spelling not in SPELLINGS[causal]:
            raise ValueError(
                f"spelling={spelling!r} has no {'causal' if causal else 'non-causal'} form: "
                f"write one of {SPELLINGS[causal]}."
            )
        if causal and isinstance(features, SoftmaxFeatures):
            raise ValueError(
                "SoftmaxFeatures looks at all keys, so it has no causal form: write "
                "causal=False, or another feature map such as EluFeatures()."
            )
        self.heads, self.head_dim = heads, width // heads
        self.features = EluFeatures() if features is None else features
        self.causal = causal
        self.spelling: Spelling | None = spelling
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Linear attention of a sequence to itself.

        Args:
            x: [batch, n, width].
            valid: bool [batch, n], False at padding, which then has no weight.

        Returns:
            [batch, n, width].
        """
        batch, n, width = x.shape
        shape = (batch, n, self.heads, self.head_dim)
        q, k, v = (
            layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        normalized = bool(getattr(self.features, "normalized", False))
        if valid is not None and normalized:
            # The softmax over keys must not see padding, so it goes in front of the feature map.
            k = k.masked_fill(~valid[:, None, :, None], -torch.inf)
        q, k = self.features(q), self.features(k, keys=True)
        if valid is not None and not normalized:
            k = k.masked_fill(~valid[:, None, :, None], 0.0)
        y = linear_attention(
            q, k, v, causal=self.causal, normalize=not normalized, spelling=self.spelling
        )
        return self.output(y.transpose(1, 2).reshape(batch, n, width))

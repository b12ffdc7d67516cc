"""What attention costs, dense and by tiles: the decision to be made, and a roofline for it."""

from __future__ import annotations

import dataclasses

import torch

# Multiply-adds a second and core, of a current server core; only ratios matter.
_GFLOPS = 70.0
# A tile is computed about as fast by the sparse kernel as by a dense one.
_TILE = 1.05


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """softmax(score(q k^T)) v, to be decided.

    Attributes:
        batch, heads, kv_heads, queries, keys, head_dim, value_dim: sizes, as in this call.
        dtype: of q, k and v.
        score: the score's text.
        kinds: the map of its tiles in this call.
        leaves: tensors that the score reads, with values of this call.
        integers: its runtime integers in this call.
        empty_row: ``"zero"`` or ``"nan"``.
        sink: whether there is one more logit a row.
        dropout: probability.
        repeats: whether the model copies keys and values for each query head.
        fused: whether the model calls ``scaled_dot_product_attention``.
        training: whether gradients are computed as well.
        threads: threads that run it.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    score: str
    kinds: torch.Tensor
    leaves: tuple[torch.Tensor, ...] = ()
    integers: tuple[int, ...] = ()
    empty_row: str = "zero"
    sink: bool = False
    dropout: float = 0.0
    repeats: bool = False
    fused: bool = True
    training: bool = False
    threads: int = 1

    @property
    def density(self) -> float:
        """The fraction of tiles that have to be computed."""
        return float((self.kinds != 0).float().mean()) if self.kinds.numel() else 1.0

    @property
    def partial(self) -> float:
        """The fraction of tiles whose score has to be evaluated pair by pair."""
        return float((self.kinds % 2 == 1).float().mean()) if self.kinds.numel() else 1.0


def dense_ms(problem: AttentionProblem) -> float:
    """Roofline of dense attention."""
    pairs = problem.batch * problem.heads * problem.queries * problem.keys
    passes = 3.5 if problem.training else 1.0
    work = 2 * pairs * (problem.head_dim + problem.value_dim) * passes
    return work / (_GFLOPS * problem.threads) * 1e-6


def sparse_ms(problem: AttentionProblem) -> float:
    """Roofline of attention over the tiles that are not empty."""
    return dense_ms(problem) * problem.density * _TILE

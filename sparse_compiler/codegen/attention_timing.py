"""Contestants for attention: what Inductor runs today against the kernel over tiles.

Dense attention is timed as what it comes down to in Inductor's code: PyTorch's fused kernel with
the mask it is given, or two batched products with a softmax between them that reads its scores as
few times as it can. Of long sequences a slice of the queries is run and the time scaled up, because
dense attention costs the same for every query.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sparse_compiler.codegen import attention as kernels
from sparse_compiler.score.cost import AttentionProblem, sparse_ms

Run = Callable[[], None]
# Scores that one dense run may compute.
_MOST_PAIRS = 2**25
# Above this many milliseconds one head is timed for all of them.
_LONG_MS = 300.0


def contestants(problem: AttentionProblem) -> tuple[Run, Run, float, float]:
    """Dense and sparse, and what each one's time has to be multiplied by."""
    kernels.register_all()
    heads = 1
    if sparse_ms(problem) > _LONG_MS:
        heads = problem.batch * problem.kv_heads
        problem = dataclasses.replace(
            problem,
            batch=1,
            heads=problem.heads // problem.kv_heads,
            kv_heads=1,
            kinds=problem.kinds[:1, : problem.heads // problem.kv_heads].contiguous(),
        )
    p = problem
    q = torch.randn(p.batch, p.queries, p.heads, p.head_dim).to(p.dtype).transpose(1, 2)
    k = torch.randn(p.batch, p.keys, p.kv_heads, p.head_dim).to(p.dtype).transpose(1, 2)
    v = torch.randn(p.batch, p.keys, p.kv_heads, p.value_dim).to(p.dtype).transpose(1, 2)
    fits = max(1, _MOST_PAIRS // max(p.batch * p.heads * p.keys, 1))
    rows = min(p.queries, max(64, fits))
    mask = torch.zeros(1, 1, rows, p.keys, dtype=p.dtype)
    dense = _fused if p.fused else _decomposed
    return (
        _step(p, functools.partial(dense, p, mask), (q[:, :, :rows], k, v)),
        _step(p, functools.partial(_tiles, p), (q, k, v)),
        heads * p.queries / rows,
        heads,
    )


def _step(
    problem: AttentionProblem,
    forward: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> Run:
    if not problem.training:
        return lambda: (forward(*inputs), None)[1]
    leaves = [t.detach().requires_grad_() for t in inputs]
    grad = torch.ones((), dtype=problem.dtype)

    def step() -> None:
        with torch.enable_grad():
            out = forward(*leaves)
            torch.autograd.grad(out, leaves, grad.expand(out.shape).contiguous())

    return step


def _repeated(problem: AttentionProblem, tensor: torch.Tensor) -> torch.Tensor:
    group = problem.heads // max(problem.kv_heads, 1)
    if group == 1:
        return tensor
    if problem.repeats:
        return tensor.repeat_interleave(group, 1)
    shape = (problem.batch, problem.kv_heads, group, *tensor.shape[2:])
    return tensor.unsqueeze(2).expand(shape).flatten(1, 2)


def _fused(
    problem: AttentionProblem,
    mask: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    if problem.repeats:
        k, v = _repeated(problem, k), _repeated(problem, v)
    return F.scaled_dot_product_attention(
        q, k, v, mask, problem.dropout, enable_gqa=k.shape[1] != q.shape[1]
    )


def _decomposed(
    problem: AttentionProblem,
    mask: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    scores = q @ _repeated(problem, k).transpose(-1, -2)
    weights = (
        torch.softmax(scores, -1) if problem.training else torch.softmax(scores.add_(mask), -1)
    )
    return weights @ _repeated(problem, v)


def _tiles(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    sink = q.new_zeros(q.shape[1], 1) if problem.sink else None
    seed = torch.zeros((), dtype=torch.int64) if problem.dropout else None
    call = (
        q, k, v, problem.kinds, list(problem.leaves), list(problem.integers), sink, seed,
        problem.score, problem.empty_row, problem.dropout,
    )  # fmt: skip
    if problem.training:
        result: torch.Tensor = torch.ops.sparse_compiler.attention_training(*call, -1)[0]
        return result
    result = torch.ops.sparse_compiler.attention(*call)
    return result

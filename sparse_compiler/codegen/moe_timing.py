"""Contestants for a mixture of experts: what the model's own form comes down to, and the operator.

The model's form is timed as the products that Inductor calls for it: one for each expert with the
tokens in groups, one for each pair where weights are gathered, all experts on all tokens, or slots
of a capacity with the one-hot products around them. Of many experts a few are run, and of many
tokens a part, and the time is scaled up: both forms cost the same for each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from sparse_compiler.codegen import moe as kernels
from sparse_compiler.dispatch import MoeProblem

Run = Callable[[], None]
# Bytes of weights to make, and routed pairs to run.
_MOST_BYTES = 2**29
_MOST_PAIRS = 2**11


def contestants(problem: MoeProblem) -> tuple[Run, Run, float]:
    """The model's form and the routed one, and what their times have to be multiplied by."""
    kernels.register_all()
    p = problem
    each = p.weights * p.dtype.itemsize
    experts = min(p.experts, max(p.choices, _MOST_BYTES // max(each, 1), 1))
    tokens = max(1, math.ceil(p.tokens * experts / p.experts))
    if tokens * p.choices > _MOST_PAIRS:
        tokens = max(1, _MOST_PAIRS // p.choices)
    first = [torch.randn(experts, p.hidden, p.features) for _ in range(p.parts)]
    second = torch.randn(experts, p.out_features, p.hidden)
    inner = [_stored(weight * p.features**-0.5, p) for weight in first]
    outer = _stored(second * p.hidden**-0.5, p)
    x = torch.randn(tokens, p.features).to(p.dtype)
    ids = torch.rand(tokens, experts).topk(p.choices, dim=1).indices
    gates = torch.rand(tokens, p.choices).to(p.dtype)
    weights = [x, gates, *inner, outer]
    written = functools.partial(_FORMS[p.form], p, ids)
    return (
        _step(p, written, weights),
        _step(p, functools.partial(_routed, p, ids), weights),
        p.tokens / tokens,
    )


def _stored(weight: torch.Tensor, problem: MoeProblem) -> torch.Tensor:
    weight = weight.to(problem.dtype)
    if problem.turned:
        return weight.transpose(1, 2).contiguous().transpose(1, 2)
    return weight


def _step(
    problem: MoeProblem, forward: Callable[..., torch.Tensor], tensors: list[torch.Tensor]
) -> Run:
    if not problem.training:
        return lambda: (forward(*tensors), None)[1]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    grad = torch.randn(tensors[0].shape[0], problem.out_features).to(problem.dtype)

    def step() -> None:
        with torch.enable_grad():
            torch.autograd.grad(forward(*leaves), leaves, grad)

    return step


def _body(parts: list[torch.Tensor]) -> torch.Tensor:
    """One pass over the hidden units, as which Inductor fuses whatever is between the layers."""
    return parts[0].relu() if len(parts) == 1 else parts[0] * parts[1]


def _routed(
    problem: MoeProblem,
    ids: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    *weights: torch.Tensor,
) -> torch.Tensor:
    *inner, outer = weights
    call: tuple[Any, ...] = (
        x,
        ids,
        gates,
        inner,
        [],
        [outer],
        None,
        problem.body,
        len(outer),
        0,
        False,
    )
    operators = torch.ops.sparse_compiler
    result: torch.Tensor = (
        operators.moe_training(*call)[0] if problem.training else operators.moe(*call)
    )
    return result


def _grouped(
    problem: MoeProblem,
    ids: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    *weights: torch.Tensor,
) -> torch.Tensor:
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=len(weights[0])).tolist()
    groups = x[order // problem.choices].split(counts)
    *inner, outer = (weight.unbind(0) for weight in weights)
    found = []
    for expert, rows in enumerate(groups):
        if len(rows):
            parts = [rows @ part[expert].t() for part in inner]
            found.append(_body(parts) @ outer[expert].t())
    results = torch.cat(found) * gates.flatten()[order].unsqueeze(1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return results[back].view(*ids.shape, -1).sum(1)


def _gathered(
    problem: MoeProblem,
    ids: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    *weights: torch.Tensor,
) -> torch.Tensor:
    # Inductor reads a gathered weight where it lies: one product of a vector for each pair.
    *inner, outer = (weight.unbind(0) for weight in weights)
    found = []
    for pair, expert in enumerate(ids.flatten().tolist()):
        row = x[pair // problem.choices]
        parts = [part[expert] @ row for part in inner]
        found.append(outer[expert] @ _body(parts))
    return (torch.stack(found) * gates.flatten().unsqueeze(1)).view(*ids.shape, -1).sum(1)


def _dense(
    problem: MoeProblem,
    ids: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    *weights: torch.Tensor,
) -> torch.Tensor:
    experts = len(weights[0])
    everywhere = gates.new_zeros(len(x), experts).scatter(1, ids, gates)
    *inner, outer = (weight.unbind(0) for weight in weights)
    out: torch.Tensor | None = None
    for expert in range(experts):
        parts = [x @ part[expert].t() for part in inner]
        one = (_body(parts) @ outer[expert].t()) * everywhere[:, expert : expert + 1]
        out = one if out is None else out + one
    assert out is not None
    return out


def _capacity(
    problem: MoeProblem,
    ids: torch.Tensor,
    x: torch.Tensor,
    gates: torch.Tensor,
    *weights: torch.Tensor,
) -> torch.Tensor:
    tokens, experts = len(x), len(weights[0])
    slots = max(1, problem.slots * tokens // max(problem.tokens, 1))
    chosen = torch.rand(tokens, experts * slots).to(x.dtype)
    inputs = (chosen.t() @ x).view(experts, slots, -1)
    *inner, outer = weights
    parts = [inputs @ part.transpose(1, 2) for part in inner]
    results = _body(parts) @ outer.transpose(1, 2)
    return chosen @ results.reshape(experts * slots, -1) * gates.sum()


_FORMS = {"grouped": _grouped, "gathered": _gathered, "dense": _dense, "capacity": _capacity}

"""The mixture-of-experts operators: each token through the experts it is routed to, weighted sum.

For token t and its k-th choice e = ids[t, k] with gate g = gates[t, k]::

    parts  a_p = inner_p[e] x_t + inner_bias_p[e]          p = 0 (up), or 0 and 1 (gate and up)
    hidden h   = body(a_0, a_1)
    y_t       += g * (outer[e] h + outer_bias[e])          or, with gates_on_input, x_t is g * x_t

- x [T, D], ids int64 [T, K], gates [T, K] floating point; the result is [T, O] in x's dtype.
- ``inner``: a tensor [E, I, D] for each part, or E tensors [I, D] for each part, part by part;
  ``outer``: one [E, O, I], or E times [O, I]. With any strides: a weight stored the other way
  round, or a part of a larger one, is a view, and no copy of it is made.
- ``inner_bias``: nothing, or [E, I] for each part; ``outer_bias``: [E, O].
- ``body``: the text of an expression (``sparse_compiler.score``) in ``load(p, "f32", K)``, the
  parts, evaluated in float32.
- ``ids`` from E to E + ``passthrough`` - 1 are experts that return the token itself (then O = D);
  any other id outside of [0, E) is no expert: dropped by a capacity, padding.

Sums are in float32 and in the order of k, so results do not depend on the number of threads.
``moe_training`` also returns the parts [P, T * K, I], row t * K + k; those of no expert are 0.
The bodies here are the operators' meaning and their oracle; CPUs run the kernels of ``codegen``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparse_compiler.ops.attention import LIBRARY
from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import parse

_CALL = (
    "Tensor x, Tensor ids, Tensor gates, Tensor[] inner, Tensor[] inner_bias, Tensor[] outer, "
    "Tensor? outer_bias, str body, int experts, int passthrough, bool gates_on_input"
)
LIBRARY.define(f"moe({_CALL}, *, str digest='') -> Tensor")
LIBRARY.define(f"moe_training({_CALL}, *, str digest='') -> (Tensor, Tensor)")
LIBRARY.define(f"moe_backward(Tensor grad, Tensor parts, {_CALL}, *, str digest='') -> Tensor[]")


def _weights(tensors: Sequence[torch.Tensor], experts: int) -> list[list[torch.Tensor]]:
    """Each part's weights, one matrix an expert."""
    if tensors[0].dim() == 3:
        return [list(tensor.unbind(0)) for tensor in tensors]
    return [list(tensors[i : i + experts]) for i in range(0, len(tensors), experts)]


def _run(
    x: torch.Tensor,
    ids: torch.Tensor,
    gates: torch.Tensor,
    inner: list[torch.Tensor],
    inner_bias: list[torch.Tensor],
    outer: list[torch.Tensor],
    outer_bias: torch.Tensor | None,
    body: str,
    experts: int,
    passthrough: int,
    gates_on_input: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    tokens, choices = ids.shape
    first, (second,) = _weights(inner, experts), _weights(outer, experts)
    rows = x.to(wide).repeat_interleave(choices, 0)
    scale = gates.to(wide).reshape(-1, 1)
    if gates_on_input:
        rows, scale = rows * scale, torch.ones_like(scale)
    chosen = ids.reshape(-1)
    parts = x.new_zeros(len(first), len(rows), first[0][0].shape[0])
    out = x.new_zeros(len(rows), second[0].shape[0], dtype=wide)
    expression = parse(body)
    for expert in range(experts):
        (pairs,) = torch.where(chosen == expert)
        if not len(pairs):
            continue
        inputs = rows[pairs]
        values = [inputs @ weight[expert].to(wide).t() for weight in first]
        if inner_bias:
            values = [v + b[expert].to(wide) for v, b in zip(values, inner_bias, strict=True)]
        stacked = torch.stack(values)
        parts = parts.index_copy(1, pairs, stacked.to(x.dtype))
        size = (1, 1, 1, stacked[0].numel())
        hidden = evaluate(
            expression, torch.zeros(size, dtype=wide), [v.reshape(-1) for v in values], [], *size
        )
        result = hidden.reshape(values[0].shape) @ second[expert].to(wide).t()
        if outer_bias is not None:
            result = result + outer_bias[expert].to(wide)
        out = out.index_copy(0, pairs, result)
    if passthrough:
        kept = (chosen >= experts) & (chosen < experts + passthrough)
        out = torch.where(kept.unsqueeze(-1), rows, out)
    valid = ((chosen >= 0) & (chosen < experts + passthrough)).unsqueeze(-1)
    # Not a product with 0: a gate that nobody uses may be anything.
    weighted = torch.where(valid, out * scale, 0)
    return weighted.view(tokens, choices, weighted.shape[1]).sum(1).to(x.dtype), parts


def moe(*args: Any, digest: str = "") -> torch.Tensor:
    """The body of the operator ``moe``."""
    return _run(*args)[0]


def moe_training(*args: Any, digest: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """The body of the operator ``moe_training``."""
    return _run(*args)


def moe_backward(
    grad: torch.Tensor, parts: torch.Tensor, *call: Any, digest: str = ""
) -> list[torch.Tensor]:
    """The body of ``moe_backward``.

    Returns:
        Gradients of x, the gates, each inner weight, each inner bias, each outer weight and, if
        there is one, the outer bias, in this order; each as its tensor, weights as ``grad_like``.
    """
    _, ids, _, inner, inner_bias, outer, outer_bias, *literals = call
    wanted = _learned(call)
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in wanted]
        ends = [2, 2 + len(inner), 2 + len(inner) + len(inner_bias)]
        again = (
            leaves[0], ids, leaves[1], leaves[2 : ends[1]], leaves[ends[1] : ends[2]],
            leaves[ends[2] : ends[2] + len(outer)], leaves[-1] if outer_bias is not None else None,
        )  # fmt: skip
        out, _ = _run(*again, *literals)
        # Without any routed pair nothing depends on anything.
        if out.requires_grad:
            found = torch.autograd.grad(out, leaves, grad, materialize_grads=True)
        else:
            found = tuple(map(torch.zeros_like, leaves))
    return [grad_like(leaf).copy_(value) for leaf, value in zip(wanted, found, strict=True)]


def _learned(call: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors of a call that get gradients, in the order of their gradients."""
    x, _, gates, inner, inner_bias, outer, outer_bias, *_ = call
    return [x, gates, *inner, *inner_bias, *outer, *([] if outer_bias is None else [outer_bias])]


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last dimension contiguous, copied if need be."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def grad_like(tensor: torch.Tensor) -> torch.Tensor:
    """An empty gradient, dense, with its dimensions stored in the tensor's order."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    shape = [tensor.shape[dim] for dim in order]
    back = [order.index(dim) for dim in range(tensor.dim())]
    return tensor.new_empty(shape).permute(back)


_BODIES = {"moe": moe, "moe_training": moe_training, "moe_backward": moe_backward}
for _name, _body in _BODIES.items():
    LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")


def _result(x: torch.Tensor, outer: list[torch.Tensor]) -> torch.Tensor:
    return x.new_empty(x.shape[0], outer[0].shape[-2])


@torch.library.register_fake("sparse_compiler::moe")
def _fake_moe(*call: Any, digest: str = "") -> torch.Tensor:
    return _result(call[0], call[5])


@torch.library.register_fake("sparse_compiler::moe_training")
def _fake_moe_training(*call: Any, digest: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    x, ids, _, inner, _, outer, _, _, experts, *_ = call
    number = len(inner) if inner[0].dim() == 3 else len(inner) // experts
    kept = x.new_empty(number, ids.shape[0] * ids.shape[1], inner[0].shape[-2])
    return _result(x, outer), kept


@torch.library.register_fake("sparse_compiler::moe_backward")
def _fake_moe_backward(
    grad: torch.Tensor, parts: torch.Tensor, *call: Any, digest: str = ""
) -> list[torch.Tensor]:
    return [grad_like(tensor) for tensor in _learned(call)]


def _save(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, str],
    output: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
) -> None:
    x, ids, gates, inner, inner_bias, outer, outer_bias, *literals = inputs
    parts = None
    if not isinstance(output, torch.Tensor):
        parts = output[1]
        ctx.mark_non_differentiable(parts)
    ctx.counts = len(inner), len(inner_bias), len(outer)
    ctx.literals, ctx.named = literals, keyword_only_inputs
    ctx.save_for_backward(x, ids, gates, outer_bias, parts, *inner, *inner_bias, *outer)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    """Without the parts, in a graph that was made for inference, they are computed again."""
    x, ids, gates, outer_bias, parts, *rest = ctx.saved_tensors
    a, b, c = ctx.counts
    inner, inner_bias, outer = rest[:a], rest[a : a + b], rest[a + b : a + b + c]
    call = (x, ids, gates, inner, inner_bias, outer, outer_bias, *ctx.literals)
    operators = torch.ops.sparse_compiler
    if parts is None:
        parts = operators.moe_training(*call, **ctx.named)[1]
    dx, dgates, *others = operators.moe_backward(grad, parts, *call, **ctx.named)
    return (
        dx, None, dgates, others[:a], others[a : a + b], others[a + b : a + b + c],
        None if outer_bias is None else others[-1], *[None] * len(ctx.literals),
    )  # fmt: skip


for _name in ("moe", "moe_training"):
    torch.library.register_autograd(
        f"sparse_compiler::{_name}", _backward, setup_context=_save, lib=LIBRARY
    )

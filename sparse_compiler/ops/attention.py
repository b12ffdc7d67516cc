"""The sparse attention operators: softmax(score(q k^T)) v over the tiles that a score leaves open.

``score`` is the text of an expression (``sparse_compiler.score``) in the raw product s, the batch,
head, query and key, elements of the ``leaves`` and runtime ``integers``: scale, mask, bias and
soft-cap are all in it. ``kinds`` says of every tile of 64 queries and 64 keys whether it is empty,
partial, full, or partial by its indices alone. It decides the speed and never the result, so the
bodies here, the operators' meaning and their oracle, do not read it. CPUs run the kernels of
``codegen`` instead.

- ``tile_kinds``: the map of a score, ``uint8 [batch or 1, heads or 1, ceil(queries / 64) *
  ceil(keys / 64) + 1]``, row by row (``flat``); computed once a mask and shared by all layers
  that use it.
- ``attention``: q [B, H, M, D], k [B, G, N, D], v [B, G, N, E], with G dividing H; the result is
  [B, H, M, E], stored as [B, M, H, E], so that the transpose behind it is free. ``sink`` is one
  more logit a row, broadcastable to [B, H, M], whose weight goes nowhere. A row with nothing
  unmasked gives 0 (``empty_row="zero"``) or NaN (``"nan"``).
- ``attention_training``: the same, and the log-sum-exp of each row [B, H, M], with gradients for
  q, k, v, the sink, and the leaf number ``grad_leaf`` (-1: none).
"""

from __future__ import annotations

from typing import Any

import torch

from sparse_compiler.errors import UnsupportedError
from sparse_compiler.score import tiles
from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import B, H, K, Q, load, parse, to_text

LIBRARY = torch.library.Library("sparse_compiler", "FRAGMENT")
_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor kinds, Tensor[] leaves, SymInt[] integers, "
    "Tensor? sink, Tensor? seed, str score, str empty_row, float dropout"
)
_TAGS = (torch.Tag.flexible_layout,)
LIBRARY.define(
    "tile_kinds(Tensor[] leaves, SymInt[] integers, str score, SymInt batch, SymInt heads, "
    "SymInt queries, SymInt keys, Tensor like, *, str digest='') -> Tensor"
)
LIBRARY.define(f"attention({_CALL}, *, str digest='') -> Tensor", tags=_TAGS)
LIBRARY.define(
    f"attention_training({_CALL}, int grad_leaf, *, str digest='') -> (Tensor, Tensor)", tags=_TAGS
)
LIBRARY.define(
    f"attention_backward(Tensor grad, Tensor out, Tensor lse, {_CALL}, int grad_leaf, "
    "*, str digest='') -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _tile_kinds(
    leaves: list[torch.Tensor],
    integers: list[int],
    score: str,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    like: torch.Tensor,
    *,
    digest: str = "",
) -> torch.Tensor:
    return flat(tiles.classify(parse(score), leaves, integers, batch, heads, queries, keys))


def flat(kinds: torch.Tensor) -> torch.Tensor:
    """A map of tiles as operators take it: rows behind each other, and one more element.

    Of a size that may be 1 PyTorch asks whether it is, and compiles again when the answer changes;
    and of four dimensions whether they are channels-last.
    """
    return torch.nn.functional.pad(kinds.flatten(2), (0, 1))


_WORD = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The kernels' 32-bit mix, on int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def keeps(seed: torch.Tensor, shape: tuple[int, ...], probability: float) -> torch.Tensor:
    """Which weights [B, H, M, N] dropout keeps: the kernels' hash of seed, head, query and key."""
    batch, heads, queries, keys = shape
    head = torch.arange(batch * heads, device=seed.device).view(batch, heads, 1, 1)
    query = torch.arange(queries, device=seed.device).view(-1, 1)
    key = torch.arange(keys, device=seed.device)
    row = _mix(_mix(_mix(_mix(seed & _WORD) ^ (seed >> 32 & _WORD)) ^ head) ^ query)
    threshold = min(int(probability * 2.0**32), _WORD)
    return _mix(row ^ (key * 0x9E3779B1 & _WORD)) >= threshold


def _probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    leaves: list[torch.Tensor],
    integers: list[int],
    sink: torch.Tensor | None,
    score: str,
    empty_row: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [B, H, M, N] and log-sum-exps [B, H, M], of q and k with equal heads."""
    products = torch.matmul(q, k.transpose(-1, -2))
    scores = evaluate(parse(score), products, leaves, integers, *products.shape)
    columns = scores
    if sink is not None:
        shape = (*scores.shape[:3], 1)
        columns = torch.cat([scores, sink.to(scores).expand(shape[:3]).unsqueeze(-1)], -1)
    lse = torch.logsumexp(columns, -1)
    # Not exp(scores - lse): of a row of finfo.min the sum is lost in rounding.
    weights = torch.softmax(columns, -1)[..., : scores.shape[-1]]
    if empty_row == "zero":
        weights = weights.masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    return weights, lse


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kinds: torch.Tensor,
    leaves: list[torch.Tensor],
    integers: list[int],
    sink: torch.Tensor | None,
    seed: torch.Tensor | None,
    score: str,
    empty_row: str,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    group = q.shape[1] // max(k.shape[1], 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))
    weights, lse = _probabilities(q.to(wide), k, leaves, integers, sink, score, empty_row)
    if dropout:
        assert seed is not None
        weights = weights * keeps(seed, tuple(weights.shape), dropout)
        weights = weights / (1 - dropout) if dropout < 1 else weights * 0
    out = torch.matmul(weights, v).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, digest: str = ""
) -> torch.Tensor:
    """The body of the operator ``attention``."""
    return _attend(q, k, v, *args)[0]


def attention_training(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, digest: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """The body of the operator ``attention_training``."""
    out, lse = _attend(q, k, v, *args[:-1])
    return out, lse.to(torch.promote_types(torch.float32, lse.dtype))


def attention_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kinds: torch.Tensor,
    leaves: list[torch.Tensor],
    integers: list[int],
    sink: torch.Tensor | None,
    seed: torch.Tensor | None,
    score: str,
    empty_row: str,
    dropout: float,
    grad_leaf: int,
    *,
    digest: str = "",
) -> tuple[torch.Tensor, ...]:
    """The body of ``attention_backward``.

    Returns:
        Gradients of q, k, v, of the sink's logit in each row [B, H, M] and of the leaf at each
        pair [B, H, M, N], both empty where there is none.
    """
    rows, keys = lse.shape, k.shape[2]
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        if sink is not None:
            sink = sink.detach().expand(rows).clone().requires_grad_()
            inputs.append(sink)
        if grad_leaf >= 0:
            leaves = list(leaves)
            full = leaves[grad_leaf].detach().expand(*rows, keys).clone().requires_grad_()
            leaves[grad_leaf] = full
            inputs.append(full)
            # What was broadcast is indexed by all four.
            expression = parse(score)
            (read,) = (node for node in expression.loads() if node.slot == grad_leaf)
            everywhere = load(grad_leaf, read.dtype, B, H, Q, K)
            score = to_text(expression.substitute({read: everywhere}))
        call = (kinds, leaves, integers, sink, seed, score, empty_row, dropout)
        again, _ = _attend(inputs[0], inputs[1], inputs[2], *call)
        found = list(torch.autograd.grad(again, inputs, grad))
    dq, dk, dv = found[:3]
    none = q.new_empty(0, dtype=lse.dtype)
    dsink = found[3].to(lse.dtype) if sink is not None else none
    dleaf = found[-1].to(lse.dtype) if grad_leaf >= 0 else none.clone()
    return dq, dk, dv, dsink, dleaf


for _name, _body in {
    "tile_kinds": _tile_kinds,
    "attention": attention,
    "attention_training": attention_training,
    "attention_backward": attention_backward,
}.items():
    LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")


def _out(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)


def _lse(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(torch.float32, q.dtype))


@torch.library.register_fake("sparse_compiler::tile_kinds")
def _fake_tile_kinds(
    leaves: list[torch.Tensor],
    integers: list[int],
    score: str,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    like: torch.Tensor,
    *,
    digest: str = "",
) -> torch.Tensor:
    expression = parse(score)
    sizes = (
        batch if expression.depends_on("b") else 1,
        heads if expression.depends_on("h") else 1,
        ((queries + tiles.BLOCK_Q - 1) // tiles.BLOCK_Q)
        * ((keys + tiles.BLOCK_K - 1) // tiles.BLOCK_K)
        + 1,
    )
    return like.new_empty(sizes, dtype=torch.uint8)


@torch.library.register_fake("sparse_compiler::attention")
def _fake_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, digest: str = ""
) -> torch.Tensor:
    return _out(q, v)


@torch.library.register_fake("sparse_compiler::attention_training")
def _fake_attention_training(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, digest: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    return _out(q, v), _lse(q)


@torch.library.register_fake("sparse_compiler::attention_backward")
def _fake_attention_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: Any,
    digest: str = "",
) -> tuple[torch.Tensor, ...]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    sink, grad_leaf = args[3], args[-1]
    dsink = q.new_empty(lse.shape if sink is not None else 0, dtype=lse.dtype)
    dleaf = q.new_empty((*lse.shape, k.shape[2]) if grad_leaf >= 0 else 0, dtype=lse.dtype)
    return dq, dk, dv, dsink, dleaf


def _save(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, str],
    output: tuple[torch.Tensor, ...],
) -> None:
    q, k, v, kinds, leaves, integers, sink, seed, *literals = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.leaves = len(leaves)
    ctx.integers, ctx.literals, ctx.named = integers, literals, keyword_only_inputs
    ctx.save_for_backward(out, lse, q, k, v, kinds, sink, seed, *leaves)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[Any, ...]:
    out, lse, q, k, v, kinds, sink, seed, *leaves = ctx.saved_tensors
    dq, dk, dv, dsink, dleaf = torch.ops.sparse_compiler.attention_backward(
        grad, out, lse, q, k, v, kinds, leaves, ctx.integers, sink, seed, *ctx.literals, **ctx.named
    )
    grad_leaf = ctx.literals[-1]
    grads: list[torch.Tensor | None] = [None] * len(leaves)
    if grad_leaf >= 0:
        grads[grad_leaf] = _summed(dleaf, leaves[grad_leaf])
    for_sink = None if sink is None else _summed(dsink, sink)
    # Of an empty list autograd cannot tell that it held no tensors.
    no_integers: list[None] | None = None if ctx.integers else []
    return dq, dk, dv, None, grads, no_integers, for_sink, None, *[None] * len(ctx.literals)


def _save_inference(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, str],
    output: torch.Tensor,
) -> None:
    q, k, v, kinds, leaves, integers, sink, seed, *literals = inputs
    ctx.leaves, ctx.learned = len(leaves), any(leaf.requires_grad for leaf in leaves)
    ctx.integers, ctx.literals, ctx.named = integers, literals, keyword_only_inputs
    ctx.save_for_backward(q, k, v, kinds, sink, seed, *leaves)


def _backward_of_inference(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Gradients of a graph that was made for inference: its rows' sums are computed again."""
    if ctx.learned:
        raise UnsupportedError(
            "this attention was rewritten for inference, where a learned bias gets no gradient: "
            "run the pass with PassContext(training=True)."
        )
    q, k, v, kinds, sink, seed, *leaves = ctx.saved_tensors
    call = (q, k, v, kinds, leaves, ctx.integers, sink, seed, *ctx.literals, -1)
    operators = torch.ops.sparse_compiler
    out, lse = operators.attention_training(*call, **ctx.named)
    dq, dk, dv, dsink, _ = operators.attention_backward(grad, out, lse, *call, **ctx.named)
    for_sink = None if sink is None else _summed(dsink, sink)
    no_integers: list[None] | None = None if ctx.integers else []
    nothing = [None] * len(ctx.literals)
    return dq, dk, dv, None, [None] * ctx.leaves, no_integers, for_sink, None, *nothing


def _summed(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient over all pairs, summed to the shape that was broadcast."""
    return grad.sum_to_size(like.shape).to(like.dtype)


torch.library.register_autograd(
    "sparse_compiler::attention_training", _backward, setup_context=_save, lib=LIBRARY
)
torch.library.register_autograd(
    "sparse_compiler::attention",
    _backward_of_inference,
    setup_context=_save_inference,
    lib=LIBRARY,
)

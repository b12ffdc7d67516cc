"""``scaled_dot_product_attention`` as a site: its mask, scale and flags become the score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.attention.assemble import (
    Lead,
    Reading,
    assemble,
    check_dtype,
    choose,
    leads,
    site_sizes,
)
from sparse_compiler.passes.attention.facts import GraphFacts
from sparse_compiler.passes.attention.found import Refusal, Site
from sparse_compiler.passes.attention.indices import Indices
from sparse_compiler.passes.attention.lift import Lifter
from sparse_compiler.passes.attention.lift_views import Index
from sparse_compiler.passes.attention.symbols import sizes_of
from sparse_compiler.passes.pointwise import NotLiftable
from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import B, Expr, H, K, Q, S
from sparse_compiler.score.node import ZERO
from sparse_compiler.static import arguments

aten = torch.ops.aten


def read_fused(facts: GraphFacts, node: fx.Node) -> Site | Refusal:
    """The site of one ``scaled_dot_product_attention``."""
    given = arguments(node)
    spelling = _spelling(given)
    reason = ""
    try:
        check_dtype(node)
        for lead in leads(sizes_of(given["query"])[:-2], _heads_nearby(node, given["query"])):
            try:
                return _site(facts, node, given, lead, spelling)
            except NotLiftable as error:
                reason = reason or str(error)
    except NotLiftable as error:
        reason = str(error)
    return Refusal(node, reason, spelling)


def _spelling(given: dict[str, Any]) -> str:
    mask = given["attn_mask"]
    if given["is_causal"]:
        return "sdpa with is_causal"
    if mask is None:
        return "sdpa"
    kind = "bool" if mask.meta["val"].dtype is torch.bool else "float"
    return f"sdpa with a {kind} mask"


def _heads_nearby(node: fx.Node, query: fx.Node) -> Iterator[sympy.Expr]:
    """Numbers of heads, where queries have a single leading dimension."""
    yield from heads_of(query, sizes_of(query)[0], [node])


def heads_of(query: fx.Node, both: sympy.Expr, around: list[fx.Node]) -> Iterator[sympy.Expr]:
    """Numbers of heads that shapes suggest for a dimension that is batch and heads."""
    waiting = [*around, *(user for node in around for user in node.users)]
    node: Any = query
    for _ in range(6):
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            break
        waiting.append(node)
        node = node.args[0] if node.args else None
    seen = set()
    for node in waiting:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        shape = sizes_of(node)
        if len(shape) != 4:
            continue
        for heads in (shape[1], shape[2]):
            fits = heads.is_Integer and heads > 1 and sympy.cancel(shape[0] * heads - both) == 0
            if fits and heads not in seen:
                seen.add(heads)
                yield heads


def _site(
    facts: GraphFacts, node: fx.Node, given: dict[str, Any], lead: Lead, spelling: str
) -> Site:
    query, key, value, mask = (given[n] for n in ("query", "key", "value", "attn_mask"))
    batch, heads = lead.extents()
    shapes = [sizes_of(x) for x in (query, key, value)]
    extents = {B: batch, H: heads, Q: shapes[0][-2], K: shapes[1][-2]}
    indices = Indices(facts.symbols, extents)
    at = lead.index(indices)
    q, k = indices.atom(Q), indices.atom(K)

    scale = given.get("scale")
    factors: tuple[tuple[Any, fx.Node], ...] = ()
    if scale is None:
        channels = shapes[0][-1]
        if not channels.is_Integer:
            raise NotLiftable("its heads have a dynamic number of channels")
        scale = 1 / math.sqrt(int(channels))
    elif isinstance(scale, fx.Node):
        factors, scale = ((aten.mul.Tensor, scale),), 1.0
    score = e.mul(S, float(scale))
    lifter = Lifter(facts, indices, node, node)
    if given["is_causal"]:
        score = e.where(e.le(k, q), score, -math.inf)
    elif mask is not None:
        bias = lifter.operand(mask, (*at, q, k))
        if mask.meta["val"].dtype is torch.bool:
            score = e.where(bias, score, -math.inf)
        else:
            score = e.add(score, bias)

    reading = Reading(
        (query, (*_broadcast(at, shapes[0]), q, _one(K, shapes[0]))),
        (key, (*_shared(indices, at, shapes[1], lead, given), k, _one(Q, shapes[1]))),
        (value, (*_shared(indices, at, shapes[2], lead, given), k, _one(Q, shapes[2]))),
    )
    operands = choose(indices, facts, reading, node.meta["val"].dtype, node)
    if factors:
        operands = dataclasses.replace(
            operands, query=dataclasses.replace(operands.query, factors=factors)
        )
    return assemble(
        facts,
        indices,
        operands,
        lead.output(node, range(len(at) + 2)),
        score,
        lifter.leaves,
        lifter.meanings,
        node,
        [node],
        site_sizes(indices, shapes[0][-1], shapes[2][-1], (query, key, value)),
        sink=None,
        dropout=float(given["dropout_p"]),
        empty_row="zero",
        spelling=spelling,
    )


def _one(index: Expr, shape: list[sympy.Expr]) -> Expr:
    return ZERO if shape[-1] == 1 else index


def _broadcast(at: Index, shape: list[sympy.Expr]) -> Index:
    pairs = zip(at[len(at) - len(shape) + 2 :], shape[:-2], strict=True)
    return tuple(ZERO if size == 1 else index for index, size in pairs)


def _shared(
    indices: Indices, at: Index, shape: list[sympy.Expr], lead: Lead, given: dict[str, Any]
) -> Index:
    """The leading index of keys or values, which several query heads may share."""
    index = _broadcast(at, shape)
    if not given.get("enable_gqa") or not index or shape[-3] == lead.sizes[-1]:
        return index
    group = sympy.cancel(lead.sizes[-1] / shape[-3])
    return (*index[:-1], indices.divide(at[-1], group)[0])

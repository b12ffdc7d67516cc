"""What is known of one attention of a graph: a site that can be rewritten, or a refusal."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.attention.leaves import Leaf
from sparse_compiler.passes.attention.operands import Operand
from sparse_compiler.passes.attention.output import Output
from sparse_compiler.passes.attention.symbols import Integer
from sparse_compiler.region import Builder
from sparse_compiler.score.expr import B, Expr, H, Q


@dataclasses.dataclass(frozen=True)
class Meaning:
    """A score for reports, with the masks in it that the score itself reads as one tensor.

    Attributes:
        score: in slots of its own.
        leaves: what it loads, by slot.
    """

    score: Expr
    leaves: tuple[Leaf, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """One attention: softmax(score(q k^T)) v.

    Attributes:
        node: the softmax, or the ``scaled_dot_product_attention``.
        region: the nodes that a rewrite replaces, in graph order; the last one is its output.
        query: seen as [B, H, M, D].
        key: seen as [B, HKV, N, D], without copies for each query head.
        value: seen as [B, HKV, N, DV].
        output: how the result becomes the region's output.
        score: what the softmax sees at (b, h, q, k), in the product ``S`` of the views above.
        leaves: what it loads, by slot.
        integers: its runtime integers, by place.
        meaning: the score as the model spells it.
        sink: one more logit a row, or None.
        dropout: probability, of the weights.
        empty_row: what a row gives that is masked all over: ``"zero"``, or ``"nan"``.
        spelling: how the model writes it, for reports.
        batch: B; like the other sizes a number, or a SymInt.
        heads: H, of the queries.
        kv_heads: HKV, which divides H.
        queries: M.
        keys: N.
        head_dim: D.
        value_dim: DV.
        dtype: of query, key, value and output.
        repeats: whether the model copies keys and values for each query head.
    """

    node: fx.Node
    region: tuple[fx.Node, ...]
    query: Operand
    key: Operand
    value: Operand
    output: Output
    score: Expr
    leaves: tuple[Leaf, ...]
    integers: tuple[Integer, ...]
    meaning: Meaning
    sink: Leaf | None
    dropout: float
    empty_row: str
    spelling: str
    batch: Any
    heads: Any
    kv_heads: Any
    queries: Any
    keys: Any
    head_dim: Any
    value_dim: Any
    dtype: torch.dtype
    repeats: bool

    @property
    def grad_leaf(self) -> int | None:
        """The slot of the leaf that a gradient flows into, or None."""
        slots = [slot for slot, leaf in enumerate(self.leaves) if leaf.kind == "learned"]
        return slots[0] if slots else None

    def q(self, builder: Builder) -> fx.Node:
        """The queries [B, H, M, D]."""
        return self.query.build(builder, self.batch, self.heads)

    def k(self, builder: Builder) -> fx.Node:
        """The keys [B, HKV, N, D]."""
        return self.key.build(builder, self.batch, self.kv_heads)

    def v(self, builder: Builder) -> fx.Node:
        """The values [B, HKV, N, DV]."""
        return self.value.build(builder, self.batch, self.kv_heads)

    def sink_node(self, builder: Builder) -> fx.Node | None:
        """The sink's logits [B or 1, H or 1, M or 1]."""
        return self.sink.build(builder, (B, H, Q)) if self.sink else None

    def restore(self, builder: Builder, result: fx.Node) -> fx.Node:
        """The region's output, from the attention's result [B, H, M, DV]."""
        return self.output.build(builder, result)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An attention that is left alone.

    Attributes:
        node: its softmax, or the ``scaled_dot_product_attention``.
        reason: why, in a sentence without its full stop.
        spelling: how the model writes it, as far as it was read.
        error: an internal failure, if that is the reason.
    """

    node: fx.Node
    reason: str
    spelling: str = ""
    error: Exception | None = None

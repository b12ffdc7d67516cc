"""Attention over the tiles that its mask leaves open.

Find: a softmax between two contractions, or ``scaled_dot_product_attention`` (``site``). What
stands between the product of queries and keys and the softmax is lifted to one expression of
(batch, head, query, key) (``lift``), and interval arithmetic says which tiles of 64 queries and 64
keys it leaves empty. Check: something is empty, the kernels can compute it, and skipping pays.
Rewrite: one operator that visits the other tiles.

The map of the tiles is a constant where nothing at run time decides it. Otherwise the graph
computes it, once for all attentions with the same mask.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sparse_compiler.derived import derive
from sparse_compiler.ops.attention import flat
from sparse_compiler.passes.attention.example import example_tensor, hint
from sparse_compiler.passes.attention.found import Refusal, Site
from sparse_compiler.passes.attention.settle import Settled, remake, settle
from sparse_compiler.passes.attention.site import find_sites
from sparse_compiler.passes.base import Pass, PassContext, Rewrite, module_path
from sparse_compiler.passes.verify import verifier
from sparse_compiler.region import Builder, Region, replace_region
from sparse_compiler.score import patterns, tiles
from sparse_compiler.score.cost import AttentionProblem
from sparse_compiler.score.expr import to_text
from sparse_compiler.score.fill import fill_of
from sparse_compiler.score.masks import plan
from sparse_compiler.static import StaticValues, arguments, combine

aten = torch.ops.aten
ops = torch.ops.sparse_compiler
_DTYPES = (torch.float32, torch.bfloat16)
_MOST_DIM = 256


class Attention(Pass):
    """Skips tiles of attention whose every weight is zero; see the module's text."""

    name = "attention"

    def __init__(self, context: PassContext | None = None) -> None:
        super().__init__(context)
        self._maps: dict[tuple[Any, ...], fx.Node] = {}

    def run(self, gm: fx.GraphModule) -> None:
        static = StaticValues(gm, training=self.context.training)
        self._maps.clear()
        for found in find_sites(gm, static):
            rewrite = Rewrite("attention", module_path(found.node, found.node.name))
            rewrite.spelling = found.spelling
            self.context.rewrites.append(rewrite)
            if isinstance(found, Refusal):
                rewrite.reason = found.reason
                if found.error is not None:
                    self.context.failed(rewrite, found.error)
                continue
            try:
                self._consider(gm, found, static, rewrite)
            except Exception as error:
                self.context.failed(rewrite, error)

    def _consider(
        self, gm: fx.GraphModule, site: Site, static: StaticValues, rewrite: Rewrite
    ) -> None:
        sizes = (site.batch, site.heads, site.queries, site.keys)
        rewrite.shape = tuple(hint(size) for size in (*sizes, site.head_dim))
        rewrite.dtype = str(site.dtype).removeprefix("torch.")
        settled = settle(site, static)
        known = [
            static.value(leaf.node) if leaf.kind == "static" else None
            for leaf in settled.meaning.leaves
        ]
        earlier = rewrite.shape[3] - rewrite.shape[2]
        rewrite.pattern = patterns.describe(settled.meaning.score, known, earlier)
        refusal = _refuse(site, settled)
        if refusal:
            rewrite.reason = refusal
            return
        problem = self._problem(gm, site, settled, static)
        rewrite.sparsity = 1 - problem.density
        rewrite.rows = (problem.queries,)
        if problem.density == 1 and not _may_be_masked(settled):
            rewrite.reason = f"no tile of {tiles.BLOCK_Q} queries and {tiles.BLOCK_K} keys is empty"
            return
        if self.context.out_of_fuel():
            rewrite.reason = "options['fuel'] is used up"
            return
        decision = self.context.selector.attend(problem)
        rewrite.speedup, rewrite.baseline_ms = decision.speedup, decision.baseline_ms
        rewrite.sparse_ms = decision.sparse_ms
        rewrite.reason = f"{_tiles(problem)}; {decision.reason}"
        if decision.format is None:
            return
        self._rewrite(gm, site, settled, static, problem, rewrite)
        rewrite.applied, rewrite.format = True, decision.format

    def _problem(
        self, gm: fx.GraphModule, site: Site, settled: Settled, static: StaticValues
    ) -> AttentionProblem:
        inputs = gm.meta.get("example_inputs", {})
        leaves = [example_tensor(leaf, static, inputs) for leaf in settled.leaves]
        integers = [hint(integer.size) for integer in site.integers]
        batch, heads = hint(site.batch), hint(site.heads)
        queries, keys = hint(site.queries), hint(site.keys)
        kinds = tiles.classify(settled.score, leaves, integers, batch, heads, queries, keys)
        return AttentionProblem(
            batch=batch,
            heads=heads,
            kv_heads=hint(site.kv_heads),
            queries=queries,
            keys=keys,
            head_dim=hint(site.head_dim),
            value_dim=hint(site.value_dim),
            dtype=site.dtype,
            score=to_text(settled.score),
            kinds=kinds,
            leaves=tuple(leaves),
            integers=tuple(integers),
            empty_row=site.empty_row,
            sink=site.sink is not None,
            dropout=site.dropout,
            repeats=site.repeats,
            fused=site.spelling.startswith("sdpa"),
            training=self.context.training,
            threads=torch.get_num_threads(),
        )

    def _rewrite(
        self,
        gm: fx.GraphModule,
        site: Site,
        settled: Settled,
        static: StaticValues,
        problem: AttentionProblem,
        rewrite: Rewrite,
    ) -> None:
        derived: list[str] = []

        def build(builder: Builder, *inputs: fx.Node) -> fx.Node:
            q, k, v = site.q(builder), site.k(builder), site.v(builder)
            leaves = [leaf.build(builder) for leaf in settled.leaves]
            integers = [integer.build(builder) for integer in site.integers]
            kinds = self._kinds(builder, site, settled, problem, (q, k), leaves, integers, derived)
            seed = None
            if site.dropout:
                seed = builder.call(
                    aten.randint.low, -(2**62), 2**62, [], dtype=torch.int64, device="cpu"
                )
            call = (
                q, k, v, kinds, leaves, integers, site.sink_node(builder), seed,
                problem.score, site.empty_row, site.dropout,
            )  # fmt: skip
            if self.context.training:
                grad_leaf = -1 if settled.grad_leaf is None else settled.grad_leaf
                both = builder.call(ops.attention_training.default, *call, grad_leaf)
                return site.restore(builder, builder.call(operator.getitem, both, 0))
            return site.restore(builder, builder.call(ops.attention.default, *call))

        replace_region(
            gm,
            Region.of(site.region),
            build,
            rule=f"{self.name}: {rewrite.pattern}",
            verify=None if site.dropout else verifier(gm, static, self.context, rewrite.target),
            fresh=True,
        )
        if derived:
            sizes = (problem.batch, problem.heads, problem.queries, problem.keys)
            old = torch.zeros(1, dtype=torch.uint8) if settled.at_run_time else flat(problem.kinds)
            expression = combine(remake(settled, old, sizes), settled.guarded)
            gm.meta.setdefault("derived", []).append(
                derive(derived, expression, lambda value: [value], rewrite.target)
            )

    def _kinds(
        self,
        builder: Builder,
        site: Site,
        settled: Settled,
        problem: AttentionProblem,
        tensors: tuple[fx.Node, fx.Node],
        leaves: list[fx.Node],
        integers: list[fx.Node],
        derived: list[str],
    ) -> fx.Node:
        """The map of the tiles: a constant, or computed in the graph; shared if it may be."""
        sizes = (site.batch, site.heads, site.queries, site.keys)
        sources = tuple(leaf.node for leaf in settled.leaves)
        key = (problem.score, sources, site.integers, tuple(map(str, sizes)))
        if not settled.guarded and key in self._maps:
            return self._maps[key]
        if settled.at_run_time:
            like = tensors[0]
            if settled.guarded:
                like = builder.constant("guard", torch.zeros(1, dtype=torch.uint8))
                derived.append(str(like.target))
            node = builder.call(
                ops.tile_kinds.default,
                leaves,
                integers,
                problem.score,
                *(_size(builder, tensors, place) for place in range(4)),
                like,
            )
        else:
            node = builder.constant("tiles", flat(problem.kinds))
            if settled.guarded:
                derived.append(str(node.target))
        if not settled.guarded:
            self._maps[key] = node
        return node


def _size(builder: Builder, tensors: tuple[fx.Node, fx.Node], place: int) -> Any:
    """Batch, heads, queries (of q) or keys (of k): a literal, or a node where it is dynamic."""
    node, dim = (tensors[0], place) if place < 3 else (tensors[1], 2)
    size = node.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    return builder.call(aten.sym_size.int, node, dim)


def _may_be_masked(settled: Settled) -> bool:
    """Whether another call may leave tiles empty where this one leaves none.

    A bias for each head may hold anything, but in a model that adds no mask it is just a bias.
    """
    found = plan(settled.score)
    return settled.at_run_time and bool(found.conditions or found.additions)


def _tiles(problem: AttentionProblem) -> str:
    total = problem.kinds.numel()
    return f"{problem.density:.0%} of {total} tiles are computed"


def _refuse(site: Site, settled: Settled) -> str | None:
    """Why no sparse kernel can compute this attention, or would skip anything; or None."""
    if site.dtype not in _DTYPES:
        name = str(site.dtype).removeprefix("torch.")
        return f"it is {name}: the kernels take float32 and bfloat16"
    device = site.node.meta["val"].device.type
    if device != "cpu":
        return f"it is on {device}: this version has kernels for CPUs only"
    for size in (site.head_dim, site.value_dim):
        if not isinstance(size, int) or not 1 <= size <= _MOST_DIM:
            return f"its heads have {size} channels: the kernels take up to {_MOST_DIM}"
    if any(leaf.dtype == "f16" for leaf in settled.leaves):
        return "its mask is float16, which no kernel loads: write it as bool or float32"
    fused = site.node.target is aten.scaled_dot_product_attention.default
    if fused and arguments(site.node)["is_causal"]:
        return "PyTorch's own kernel skips what is_causal=True masks"
    fill = fill_of(settled.score)
    if fill.skippable:
        return None
    if fill.near_miss is not None:
        least = f"{fill.near_miss:g}"
        return (
            f"masked scores are {least} and not -inf: the weight exp({least}) is not zero, so "
            "nothing may be skipped"
        )
    return "nothing is masked"

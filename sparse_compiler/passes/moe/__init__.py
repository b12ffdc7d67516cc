"""Mixtures of experts: each token through the experts it is routed to, and no others.

Find: the ways of writing one, each in a module of its own that reads the graph and proves what the
routing is. Check: the kernels can compute it, and doing so pays. Rewrite: one operator
(``ops.moe``) that takes tokens, expert ids and their weights, and the model's own parameters where
they lie.

- ``grouped``: pairs of a token and an expert sorted by expert, one grouped product a layer.
- ``gathered``: the weights of each pair's expert gathered, one batched product a layer.
- ``capacity``: one-hot dispatch into a fixed number of slots an expert.
- ``dense``: every expert on every token, weights stacked, results weighted by mostly zeros.
- ``unrolled``: the same with experts of their own, one after the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from sparse_compiler.dispatch import MoeProblem
from sparse_compiler.formats.cost import DYNAMIC_ROWS, Decision
from sparse_compiler.ops import moe as _operators  # noqa: F401  registers the operators
from sparse_compiler.passes.attention.example import hint
from sparse_compiler.passes.base import Pass, Rewrite, module_path
from sparse_compiler.passes.moe import capacity, dense, gathered, grouped, unrolled
from sparse_compiler.passes.moe.prepared import prepared
from sparse_compiler.passes.moe.site import Refusal, Site
from sparse_compiler.passes.moe.writes import owner
from sparse_compiler.passes.verify import verifier
from sparse_compiler.region import Builder, Region, replace_region
from sparse_compiler.score.expr import to_text
from sparse_compiler.static import StaticValues

aten = torch.ops.aten
ops = torch.ops.sparse_compiler

Finder = Callable[[fx.GraphModule, StaticValues], Iterator[Site | Refusal]]

FINDERS: tuple[Finder, ...] = (
    grouped.find,
    gathered.find,
    capacity.find,
    dense.find,
    unrolled.find,
)

_DTYPES = (torch.float32, torch.bfloat16)


class Moe(Pass):
    """Computes the routed pairs of tokens and experts only; see the module's text."""

    name = "moe"

    def run(self, gm: fx.GraphModule) -> None:
        self.context.rewrites.extend(prepared(gm))
        static = StaticValues(gm, training=self.context.training)
        chosen: list[tuple[Site, Rewrite]] = []
        for found in find_sites(gm, static, self._failed):
            rewrite = Rewrite(self.name, _target(found))
            rewrite.spelling = found.spelling
            self.context.rewrites.append(rewrite)
            if isinstance(found, Refusal):
                rewrite.reason = found.reason
                continue
            try:
                if self._decide(found, static, rewrite, len(chosen)):
                    chosen.append((found, rewrite))
            except Exception as error:
                self.context.failed(rewrite, error)
        # The last first: what one reads may be the result of one before it.
        for site, rewrite in reversed(chosen):
            try:
                self._rewrite(gm, site, static, rewrite)
                rewrite.applied, rewrite.format = True, "routed"
            except Exception as error:
                self.context.failed(rewrite, error)

    def _failed(self, error: Exception) -> None:
        """A finder failed inside: what it would have found stays as it is."""
        rewrite = Rewrite(self.name, "the whole graph")
        self.context.rewrites.append(rewrite)
        self.context.failed(rewrite, error)

    def _decide(self, site: Site, static: StaticValues, rewrite: Rewrite, waiting: int) -> bool:
        """Whether to rewrite a site; says why."""
        problem = self._problem(site)
        rewrite.shape = (
            problem.tokens, site.experts, site.choices, site.features, site.hidden,
        )  # fmt: skip
        rewrite.rows = (problem.tokens,)
        rewrite.dtype = str(site.dtype).removeprefix("torch.")
        rewrite.pattern = f"top {site.choices} of {site.experts}"
        if problem.written_pairs > problem.pairs:
            rewrite.sparsity = 1 - problem.pairs / problem.written_pairs
        refusal = _refuse(site, self.context.training)
        if refusal:
            rewrite.reason = refusal
            return False
        fuel = self.context.options.fuel
        applied = sum(item.applied for item in self.context.rewrites)
        if fuel is not None and applied + waiting >= fuel:
            rewrite.reason = "options['fuel'] is used up"
            return False
        zeros = _zeros(site, static)
        if site.form == "dense" and (1 - zeros) * problem.written_pairs < problem.pairs:
            rewrite.reason = (
                f"its experts' weights are {zeros:.0%} zeros: skipping those on every token saves "
                f"more than running {site.choices} of {site.experts} experts"
            )
            return False
        decision = self._dispatch(problem, isinstance(site.tokens, int))
        rewrite.speedup, rewrite.baseline_ms = decision.speedup, decision.baseline_ms
        rewrite.sparse_ms = decision.sparse_ms
        rewrite.reason = (
            f"{problem.pairs} of {problem.written_pairs} pairs are computed; {decision.reason}"
        )
        return decision.format is not None

    def _dispatch(self, problem: MoeProblem, fixed: bool) -> Decision:
        """The verdict; of a number of tokens that may change, the worst one's."""
        counts = {problem.tokens} if fixed else {problem.tokens, *DYNAMIC_ROWS}
        worst: Decision | None = None
        for tokens in sorted(counts):
            slots = -(-problem.slots * tokens // max(problem.tokens, 1))
            same = dataclasses.replace(problem, tokens=tokens, slots=slots)
            decision = self.context.selector.dispatch(same)
            if decision.format is None:
                return decision
            if worst is None or (decision.speedup or 0) < (worst.speedup or 0):
                worst = decision
        assert worst is not None
        return worst

    def _problem(self, site: Site) -> MoeProblem:
        return MoeProblem(
            tokens=hint(site.tokens),
            choices=site.choices,
            experts=site.experts,
            features=site.features,
            hidden=site.hidden,
            out_features=site.out_features,
            parts=_parts(site),
            dtype=site.dtype,
            body=to_text(site.body),
            form=site.form,
            listed=len(site.outer) > 1,
            turned=site.turned,
            bias=bool(site.inner_bias) or site.outer_bias is not None,
            slots=hint(site.slots),
            training=self.context.training,
            threads=torch.get_num_threads(),
        )

    def _rewrite(
        self, gm: fx.GraphModule, site: Site, static: StaticValues, rewrite: Rewrite
    ) -> None:
        region = Region.of(site.region)

        def build(builder: Builder, *inputs: fx.Node) -> list[fx.Node]:
            call = (
                site.x(builder), site.ids(builder), site.gates(builder),
                [make(builder) for make in site.inner],
                [make(builder) for make in site.inner_bias],
                [make(builder) for make in site.outer],
                None if site.outer_bias is None else site.outer_bias(builder),
                to_text(site.body), site.experts, site.passthrough, site.gates_on_input,
            )  # fmt: skip
            if self.context.training:
                both = builder.call(ops.moe_training.default, *call)
                result = builder.call(operator.getitem, both, 0)
            else:
                result = builder.call(ops.moe.default, *call)
            # An operator in place has two names for what it returns.
            return [site.restore(builder, result)] * len(region.outputs)

        # Results of another type than the experts' are held to their own type's bound.
        alike = site.node.meta["val"].dtype == site.dtype
        replace_region(
            gm,
            region,
            build,
            rule=f"{self.name}: {site.spelling}, {rewrite.pattern}",
            verify=verifier(gm, static, self.context, rewrite.target) if alike else None,
            fresh=True,
        )


def _zeros(site: Site, static: StaticValues) -> float:
    """Fraction of lasting zeros in the weights of experts that are linear layers of their own."""
    zeros, elements = 0, 0
    for node in site.region:
        weight = node.args[1] if node.target is aten.linear.default else None
        if not isinstance(weight, fx.Node) or static.is_trainable(weight):
            continue
        value = static.value(weight)
        if value is not None:
            zeros += value.numel() - int(value.count_nonzero())
            elements += value.numel()
    return zeros / elements if elements else 0.0


def _target(found: Site | Refusal) -> str:
    """The module of the result; of one that the model itself adds up, what its experts share."""
    path = module_path(found.node, "")
    if path or isinstance(found, Refusal):
        return path or found.node.name
    paths = {module_path(node, "") for node in found.region} - {""}
    levels = zip(*(inside.split(".") for inside in paths), strict=False)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, levels)
    return ".".join(names[0] for names in shared) or found.node.name


def find_sites(
    gm: fx.GraphModule, static: StaticValues, failed: Callable[[Exception], None] | None = None
) -> list[Site | Refusal]:
    """Every mixture of experts of the graph, in its order; no two sites share a node.

    Args:
        gm: a canonical graph; it is not changed.
        static: its static values.
        failed: called with what a finder raised; without it, it is raised.
    """
    sites: list[Site] = []
    refusals: dict[fx.Node, Refusal] = {}
    taken: set[fx.Node] = set()
    for finder in FINDERS:
        try:
            found = list(finder(gm, static))
        except Exception as error:
            if failed is None:
                raise
            failed(error)
            continue
        for item in found:
            if isinstance(item, Refusal):
                refusals.setdefault(item.node, item)
            elif taken.isdisjoint(item.region):
                sites.append(item)
                taken |= item.region
    left = [refusal for node, refusal in refusals.items() if node not in taken]
    return sorted([*sites, *left], key=lambda item: item.node)


def _parts(site: Site) -> int:
    stacked = len(site.outer) == 1 and site.experts > 1
    return len(site.inner) if stacked or site.experts == 1 else len(site.inner) // site.experts


def _refuse(site: Site, training: bool) -> str | None:
    """Why no kernel can compute this mixture, or it cannot be moved; or None."""
    if site.dtype not in _DTYPES:
        name = str(site.dtype).removeprefix("torch.")
        return f"it is {name}: the kernels take float32 and bfloat16"
    device = site.node.meta["val"].device.type
    if device != "cpu":
        return f"it is on {device}: this version has kernels for CPUs only"
    if not 1 <= _parts(site) <= 2:
        return f"{_parts(site)} linear layers feed an expert's body: the kernels take one or two"
    region = Region.of(site.region)
    reason = region.why_not_movable(fresh=True)
    if reason is not None:
        return f"it cannot be moved: {reason}"
    strangers = [node for node in region.outputs if owner(node) is not owner(site.node)]
    if strangers:
        return f"{strangers[0].name}, a step of it, is used for something else as well"
    if training and _switches_gradients(site):
        return "gradients are switched on or off in the midst of it"
    return None


def _switches_gradients(site: Site) -> bool:
    node, last = min(site.region), max(site.region)
    while node is not last:
        if node.target is torch._C._set_grad_enabled:
            return True
        node = node.next
    return False

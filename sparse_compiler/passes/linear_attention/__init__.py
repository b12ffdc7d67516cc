"""Attention without softmax is multiplied in another order.

``(φ(q) φ(k)ᵀ) v`` is a sum of products, and the order in which they are taken is free. As it is
often written it costs n²; as ``φ(q) (φ(k)ᵀ v)`` it costs n·d·e. The causal form, written with an
[n, n] mask or with a running sum of [n, d, e], runs in chunks. Nothing here looks for spellings: a
chain of multilinear operators is read as what it computes (``reader``, ``rules``, ``network``), the
cheapest order is planned (``plan``), and emitted as plain ATen operators (``results``, ``chunks``),
whose gradients come with them.

What is exact:

- Finite numbers: the same sum in another order, so the result differs by rounding, as any two
  matrix products do. Sums over all keys are formed, which float16 cannot hold: it is refused.
- Scores that the model masks with zeros are never computed. Where it multiplies by the mask, and
  such a score is infinite, the model's result is NaN and the rewritten one is not.
- A key or value that is not finite makes the result not finite wherever it does so in the model; in
  the causal form it may do so for queries before it, too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import fx

from sparse_compiler.derived import DoesNotFit, derive
from sparse_compiler.errors import RegionError
from sparse_compiler.formats.cost import Decision, ModelSelector
from sparse_compiler.passes.base import Pass, Rewrite, module_path
from sparse_compiler.passes.linear_attention.emit import Emitter
from sparse_compiler.passes.linear_attention.indices import hint
from sparse_compiler.passes.linear_attention.plan import CHUNK
from sparse_compiler.passes.linear_attention.reader import Reader, ends_here
from sparse_compiler.passes.linear_attention.results import build
from sparse_compiler.passes.linear_attention.rules import PRODUCTS
from sparse_compiler.passes.linear_attention.site import Root, Site, sites
from sparse_compiler.passes.linear_attention.triangles import Fact
from sparse_compiler.passes.trial import Run, largest_bytes, trial
from sparse_compiler.passes.verify import Verify, verifier
from sparse_compiler.region import Builder, Region, replace_region
from sparse_compiler.static import StaticValues

# Bytes of a tensor above which the model's own form is not run for its time.
_MOST_BYTES = 2**30


class _Undo(Exception):
    """Ends a trial: what was built is erased again."""


class LinearAttention(Pass):
    """Re-associates attention without softmax; see the module's text."""

    name = "linear_attention"

    def run(self, gm: fx.GraphModule) -> None:
        """Find, check, rewrite."""
        static = StaticValues(gm, training=self.context.training)
        reader = Reader(static)
        roots = []
        for node in gm.graph.nodes:
            network = reader.read(node)
            if ends_here(node, network):
                reader.roots.add(node)
                roots.append(Root.of(node, network))
        self._report_obstacles(gm, reader)
        chosen = []
        for site in sites(roots):
            if not site.is_candidate(reader):
                continue
            rewrite = self._candidate(site.main.node)
            try:
                if self._pays(site, reader, rewrite):
                    chosen.append((site, rewrite))
            except Exception as error:
                self.context.failed(rewrite, error)
        replaced: dict[fx.Node, fx.Node] = {}
        for site, rewrite in chosen:
            try:
                self._rewrite(gm, site, reader, rewrite, replaced)
            except RegionError as refused:
                rewrite.reason = str(refused)
            except Exception as error:
                self.context.failed(rewrite, error)

    def _candidate(self, node: fx.Node) -> Rewrite:
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        rewrite = Rewrite("linear_attention", module_path(node, node.name), dtype=dtype)
        self.context.rewrites.append(rewrite)
        return rewrite

    def _report_obstacles(self, gm: fx.GraphModule, reader: Reader) -> None:
        """Scores that meet the values after something that is no sum of products."""
        for node in gm.graph.nodes:
            blocked = [source for source in node.all_input_nodes if source in reader.obstacles]
            if node.target in PRODUCTS and blocked:
                self._candidate(node).reason = reader.obstacles[blocked[0]]

    def _pays(self, site: Site, reader: Reader, rewrite: Rewrite) -> bool:
        """Whether a site can be rewritten, and is faster then; the reason goes into ``rewrite``."""
        rewrite.shape, rewrite.spelling = site.shape, site.spelling
        rewrite.pattern = "causal" if site.causal else "all keys"
        rewrite.reason = site.why_not(reader)
        if rewrite.reason:
            return False
        decision = self._decide(site, reader)
        rewrite.speedup, rewrite.baseline_ms = decision.speedup, decision.baseline_ms
        rewrite.sparse_ms = decision.sparse_ms
        rewrite.reason = f"{decision.reason} at {rewrite.shape[1]} queries, {rewrite.shape[2]} keys"
        return decision.format is not None

    def _decide(self, site: Site, reader: Reader) -> Decision:
        """Timed operator by operator; by the roofline where the model's own form needs too much."""
        estimate, options = site.milliseconds(), self.context.options
        model = ModelSelector(options.min_speedup)
        if largest_bytes(site.dying) > _MOST_BYTES and options.selection == "measure":
            return model.race("", estimate, None)
        if options.selection == "measure" and model.race("", estimate, None).format is None:
            return model.race("", estimate, None)
        training = self.context.training
        sizes = [tuple(hint(n) for n in root.node.meta["val"].shape) for root in site.roots]
        key = [self.name, site.spelling, site.shape, sizes, site.dtype, training, CHUNK]
        key.append(torch.get_num_threads())

        def runs() -> tuple[Run, Run]:
            roots = [root.node for root in site.roots]
            before = trial(site.dying, roots, training=training)
            parts = [self._unmade(site, root, reader) for root in site.roots if root.node.users]

            def after() -> None:
                for part in parts:
                    part()

            return before, after

        return self.context.selector.race(str(key), estimate, runs)

    def _unmade(self, site: Site, root: Root, reader: Reader) -> Run:
        """What would be emitted for a root, of which the graph keeps nothing."""
        found: list[Run] = []

        def take(region: Region, created: Sequence[fx.Node], results: Sequence[fx.Node]) -> None:
            found.append(trial(created, results, training=self.context.training))
            raise _Undo

        gm = root.node.graph.owning_module
        assert isinstance(gm, fx.GraphModule)
        try:
            build = functools.partial(_build, Emitter(site.dtype, {}), root)
            replace_region(gm, _removable(root), build, rule="trial", fresh=True, verify=take)
        except _Undo:
            pass
        return found[0]

    def _rewrite(
        self,
        gm: fx.GraphModule,
        site: Site,
        reader: Reader,
        rewrite: Rewrite,
        replaced: dict[fx.Node, fx.Node],
    ) -> None:
        if self.context.out_of_fuel():
            rewrite.reason = "options['fuel'] is used up"
            return
        masks = site.masks(replaced)
        emit = Emitter(site.dtype, replaced)
        format = f"chunks of {CHUNK}" if site.causal else "reordered"
        made: list[fx.Node] = []
        for root in site.roots:
            if not root.node.users:
                continue
            whole = sorted({*root.network.inside, *masks})
            (replaced[root.node],) = replace_region(
                gm,
                _removable(root),
                functools.partial(_build, emit, root),
                rule=f"{self.name}: {format}",
                fresh=True,
                verify=_verify(
                    verifier(gm, reader.static, self.context, rewrite.target), whole, made
                ),
            )
        for node in masks:
            fact = reader.masks.facts.get(node)
            if fact is not None:
                remake = functools.partial(_check, fact)
                derived = derive((), fact.expression, remake, rewrite.target)
                gm.meta.setdefault("derived", []).append(derived)
        rewrite.applied, rewrite.format = True, format


def _build(emit: Emitter, root: Root, builder: Builder, *inputs: fx.Node) -> fx.Node:
    emit.builder = builder
    return build(emit, root.network, root.plans, root.node)


def _removable(root: Root) -> Region:
    """The root and all nodes that only it needs."""
    nodes = {root.node}
    for node in sorted(root.network.inside, reverse=True):
        if all(user in nodes for user in node.users):
            nodes.add(node)
    return Region.of(nodes)


def _verify(check: Verify | None, nodes: list[fx.Node], made: list[fx.Node]) -> Verify | None:
    """Compares all that leads from the factors to a result, not only what is removed with it.

    Args:
        check: what compares a region with its replacement.
        nodes: what leads from the factors to the result, masks included.
        made: the new nodes of the site's earlier results, which later ones share.
    """
    if check is None:
        return None

    def verify(region: Region, created: Sequence[fx.Node], results: Sequence[fx.Node]) -> None:
        made.extend(created)
        check(Region(tuple(nodes), region.outputs, ()), made, results)

    return verify


def _check(fact: Fact, value: torch.Tensor) -> list[torch.Tensor]:
    if not fact.holds(value):
        raise DoesNotFit("a causal mask is not causal any more")
    return []

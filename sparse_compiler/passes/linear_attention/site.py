"""One attention: the results that have to be rewritten together, and whether they may be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.cost import (
    planned_work,
    rewritten_ms,
    written_ms,
    written_work,
)
from sparse_compiler.passes.linear_attention.indices import Index, hint, numel
from sparse_compiler.passes.linear_attention.network import Factor, Network, large_factors
from sparse_compiler.passes.linear_attention.plan import (
    Chunked,
    Product,
    Refused,
    TermPlan,
    between,
    indices_of,
    plan,
    signature,
)
from sparse_compiler.passes.linear_attention.reader import Reader, is_wide
from sparse_compiler.passes.linear_attention.rules import PRODUCTS
from sparse_compiler.passes.linear_attention.views import VIEWS
from sparse_compiler.static import is_mutated, with_aliases, writes_to

aten = torch.ops.aten

# Reordering that saves less than this share of the multiplications is not worth a different result.
_LESS_WORK = 0.8


@dataclasses.dataclass(frozen=True)
class Root:
    """A sum of products that others read: an output, a normaliser, a state.

    Attributes:
        plans: how each term is computed; empty if ``refusal`` says why there is no better way.
    """

    node: fx.Node
    network: Network
    plans: tuple[TermPlan, ...] = ()
    refusal: str = ""

    @classmethod
    def of(cls, node: fx.Node, network: Network) -> Root:
        """The root with its plans."""
        covered = {index for term in network.terms for index in term.indices}
        if any(index not in covered for dim in network.dims for index in dim):
            return cls(node, network, refusal="the result is repeated along a dimension")
        try:
            return cls(node, network, tuple(plan(term) for term in network.terms))
        except Refused as refused:
            return cls(node, network, refusal=str(refused))

    @property
    def is_output(self) -> bool:
        """Whether queries, keys and values are all in it; a normaliser has no values."""
        return any(len(large_factors(term.factors)) > 2 for term in self.network.terms)

    @property
    def factors(self) -> list[Factor]:
        return [factor for term in self.network.terms for factor in term.factors]


@dataclasses.dataclass(frozen=True)
class Site:
    """Roots that share what they are computed from, in graph order."""

    roots: tuple[Root, ...]

    @property
    def main(self) -> Root:
        """The root that reports are about: the last output."""
        outputs = [root for root in self.roots if root.is_output]
        return (outputs or list(self.roots))[-1]

    @property
    def dying(self) -> list[fx.Node]:
        """What the rewrite makes superfluous, in graph order."""
        return sorted(frozenset().union(*(root.network.inside for root in self.roots)))

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype that the model computes products in."""
        found = self.main.node.meta["val"].dtype
        for node in self.dying:
            if node.target in PRODUCTS:
                found = torch.promote_types(found, node.meta["val"].dtype)
        return found

    @property
    def spelling(self) -> str:
        """The operators between the factors and the results, but for views."""
        return ", ".join(
            str(node.target).split(".")[1].rstrip("_")
            for node in self.dying
            if node.target not in VIEWS
        )

    @property
    def causal(self) -> bool:
        return any(term.causal for root in self.roots for term in root.network.terms)

    @property
    def shape(self) -> tuple[int, ...]:
        """Batch (times heads), queries, keys, features, and the size of a value, by their hints."""
        found = [_sizes(item.core) for item in self.main.plans]
        shape = tuple(hint(size) for size in self.main.node.meta["val"].shape)
        return max(found, key=len, default=()) or shape

    def milliseconds(self) -> tuple[float, float]:
        """Estimates of one core's time, as written and rewritten."""
        plans = [item for root in self.roots for item in root.plans]
        return written_ms(self.dying), rewritten_ms(plans, self.dtype)

    def is_candidate(self, reader: Reader) -> bool:
        """Whether it is attention without softmax, be it linear already."""
        return self.main.is_output and (self._is_large(reader) or self._is_linear(reader))

    def _is_large(self, reader: Reader) -> bool:
        """Whether an intermediate result is larger than all that it is computed from."""
        roots = {root.node for root in self.roots}
        if any(is_wide(reader.read(node), 1.5) for node in self.dying if node not in roots):
            return True
        # An einsum of three operands has an intermediate result that no node shows.
        operands = [node.args[1] for node in self.dying if node.target is aten.einsum.default]
        return any(len(x) > 2 for x in operands) and self._work_is_saved()  # type: ignore[arg-type]

    def _is_linear(self, reader: Reader) -> bool:
        """Whether the model itself sums keys times values, over all of them or step by step."""
        roots = {root.node for root in self.roots}
        for node in self.dying:
            for term in reader.read(node).terms if node not in roots else ():
                large = large_factors(term.factors)
                sizes = [numel(factor.indices) for factor in large]
                if len(sizes) > 1 and math.prod(map(hint, node.meta["val"].shape)) < min(sizes):
                    return True
                summed = (c.column for c in term.causal if c.column in term.bound)
                if any(sum(index in f.indices for f in large) > 1 for index in summed):
                    return True
        return False

    def why_not(self, reader: Reader) -> str:
        """Why it is left as it is, whatever that costs; empty if it may be rewritten."""
        if self.dtype is torch.float16:
            return "in float16 sums over all keys may overflow: use bfloat16 or float32"
        refusal = next((root.refusal for root in self.roots if root.refusal), "")
        gains = refusal or self.causal or self._work_is_saved()
        if self._is_linear(reader) and not (self._is_large(reader) and gains):
            return "it is linear already: keys times values are summed first, O(n d e)"
        if refusal or gains:
            return refusal or self.why_not_replaceable()
        terms = [term for root in self.roots for term in root.network.terms]
        blocking = next(filter(None, map(between, terms)), "")
        return blocking or "no other order of multiplication is cheaper"

    def _work_is_saved(self) -> bool:
        if any(root.refusal for root in self.roots):
            return False
        plans = [item for root in self.roots for item in root.plans]
        return planned_work(plans) < _LESS_WORK * written_work(self.dying)

    def masks(self, replaced: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
        """What the masks that have been read are computed by.

        Args:
            replaced: what now stands for nodes that earlier rewrites have replaced.
        """
        factors = [factor.node for root in self.roots for factor in root.factors]
        known = {replaced.get(node, node) for node in factors}
        waiting, seen = list(self.dying), set(self.dying)
        while waiting:
            for node in waiting.pop().all_input_nodes:
                if node not in seen and node not in known and node.op == "call_function":
                    seen.add(node)
                    waiting.append(node)
        return sorted(seen - set(self.dying))

    def why_not_replaceable(self) -> str:
        """Why the nodes in between cannot be removed, empty if they can."""
        dying, roots = set(self.dying), {root.node for root in self.roots}
        for node in self.dying:
            outside = [user for user in node.users if user not in dying]
            if outside and node not in roots:
                return (
                    f"{node.name} is also used by {outside[0].name}: it has to be computed anyway"
                )
            if is_mutated(node) and not all(
                alias in dying or alias > self.roots[-1].node for alias in with_aliases([node])
            ):
                return f"{node.name} is written to in place"
        for root in self.roots:
            for factor in root.factors:
                if _written_between(factor.node, root.node, dying):
                    return f"{factor.node.name}, which it reads, is written to in place"
        return ""


def _sizes(core: Chunked | Product) -> tuple[int, ...]:
    """Batch, queries, keys, features and the size of a value; nothing if it has no such parts."""
    bound: frozenset[Index]
    if isinstance(core, Chunked):
        groups, bound = (core.queries, core.keys, core.values), frozenset(core.features)
        bound |= {core.causal.column}
    elif len(core.operands) == 3:
        bound = core.bound
        # Keys are between the two sums. The longer one is over the positions of the keys.
        by_sums = sorted(core.operands, key=lambda g: len(bound.intersection(indices_of(g))))
        first, second, keys = by_sums
        inner = [numel(bound.intersection(indices_of(group))) for group in (first, second)]
        groups = (first, keys, second) if inner[0] <= inner[1] else (second, keys, first)
    else:
        return ()
    queries, keys_, values = (frozenset(indices_of(group)) for group in groups)
    own = [queries - keys_ - values - bound, values - keys_ - queries - bound]
    batch = (queries | keys_ | values) - bound - own[0] - own[1]
    sums = [bound & keys_ & values or bound & keys_ - queries, bound & keys_ & queries]
    return numel(batch), numel(own[0]), numel(sums[0]), numel(sums[1]), numel(own[1])


def _written_between(node: fx.Node, end: fx.Node, dying: set[fx.Node]) -> bool:
    return any(
        node < user < end and alias in writes_to(user) and user not in dying
        for alias in with_aliases([node])
        for user in alias.users
    )


def sites(roots: Iterable[Root]) -> list[Site]:
    """Roots that share a node are one site, and so are an output and its normaliser."""
    groups: list[list[Root]] = []
    for root in roots:
        inside = root.network.inside
        shared = [g for g in groups if any(inside & other.network.inside for other in g)]
        groups = [group for group in groups if group not in shared]
        groups.append([*(member for group in shared for member in group), root])
    found = [Site(tuple(sorted(group, key=lambda root: root.node))) for group in groups]
    outputs = [site for site in found if site.main.is_output]
    for site in found:
        scores = _scores(site)
        if site.main.is_output or not scores or site.why_not_replaceable():
            continue
        for place, other in enumerate(outputs):
            if scores <= _scores(other):
                together = sorted((*site.roots, *other.roots), key=lambda root: root.node)
                outputs[place] = Site(tuple(together))
                break
    return outputs


def _scores(site: Site) -> set[object]:
    """What the scores inside chunks are computed from."""
    plans = [item.core for root in site.roots for item in root.plans]
    return {signature(core) for core in plans if isinstance(core, Chunked)}

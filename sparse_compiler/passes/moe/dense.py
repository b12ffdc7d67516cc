"""Every expert on every token, with the experts' weights stacked in one tensor.

``einsum("td,ehd->teh")``, ``bmm`` over experts with a bias, one product with a weight [E * I, D]:
whatever the spelling, two linear layers with a dimension of the experts (``expert``), whose results
are multiplied by gates and summed (``weighted``). Where the gates are provably mostly zero, only
the others are computed. Llama 4 multiplies the tokens, not the results: the same if an expert's
result for zeros is zero, which is proved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import fx

from sparse_compiler.passes.moe.assemble import Factor, Mixture, assemble
from sparse_compiler.passes.moe.axes import leaves
from sparse_compiler.passes.moe.backgrounds import Backgrounds
from sparse_compiler.passes.moe.expert import Reader
from sparse_compiler.passes.moe.site import Refusal, Refused, Site
from sparse_compiler.passes.moe.weighted import Read, Results, accounted, reduced, sums
from sparse_compiler.static import StaticValues, arguments

aten = torch.ops.aten


def find(gm: fx.GraphModule, static: StaticValues) -> Iterator[Site | Refusal]:
    """Mixtures that run stacked experts on all tokens, in graph order."""
    backgrounds = Backgrounds(gm.graph)
    reader = Reader(static, backgrounds.writes)
    refusals: dict[fx.Node, Refusal] = {}
    found = [*sums(gm, _stacked(reader, refusals), backgrounds.writes, "every expert (stacked)")]
    for node in list(gm.graph.nodes):
        if node.target is aten.sum.dim_IntList:
            mixture = _on_input(node, reader)
            if mixture is not None:
                found.append(mixture)
    for mixture in sorted(found, key=lambda item: item.node):
        spelling = _spelling(mixture)
        if not accounted(mixture):
            continue
        try:
            yield assemble(dataclasses.replace(mixture, spelling=spelling), backgrounds)
        except Refused as refused:
            yield Refusal(mixture.node, spelling, str(refused))
    yield from refusals.values()


def _stacked(reader: Reader, refusals: dict[fx.Node, Refusal]) -> Read:
    """Reads the results of stacked experts; notes what are experts that cannot be read."""

    def read(node: fx.Node, at: fx.Node) -> Results | None:
        try:
            found = reader.experts(node, at)
        except Refused as refused:
            if reader.is_stacked(node, at):
                refusals[node] = Refusal(node, "every expert (stacked)", str(refused))
            return None
        if found is None or found.expert is None:
            return None
        return Results((found,), found.expert.leaves()[0], leaves(found.layout))

    return read


def _on_input(node: fx.Node, reader: Reader) -> Mixture | None:
    """The sum of all experts' results for tokens that are multiplied by their gates."""
    try:
        found = reader.experts(arguments(node)["self"], node, weighted=True)
    except Refused:
        return None
    if found is None or found.expert is None or found.weighting is None:
        return None
    (expert,) = found.expert.leaves()
    layout = reduced(node, found.layout, expert)
    if layout is None:
        return None
    gates, gate_layout, at = found.weighting
    return Mixture(
        node=node,
        layout=layout,
        experts=(found,),
        expert=expert,
        factors=(Factor(gates, gate_layout, at),),
        spelling="",
        on_input=True,
    )


def _spelling(mixture: Mixture) -> str:
    names = {
        str(node.target).removeprefix("aten.").split(".")[0]
        for node in mixture.experts[0].nodes
        if any(node.target is target for target in _PRODUCTS)
    }
    where = ", weights on the input" if mixture.on_input else ""
    return f"every expert ({', '.join(sorted(names))}){where}"


_PRODUCTS = (
    aten.linear.default, aten.mm.default, aten.addmm.default, aten.bmm.default,
    aten.baddbmm.default, aten.matmul.default, aten.einsum.default,
)  # fmt: skip

"""Finds every attention of a graph, and says what its softmax sees.

A site is a ``scaled_dot_product_attention``, or a softmax whose input leads back to a product of
two activations and whose output goes into another one. What cannot be a site is a refusal with a
sentence: no softmax that looks like attention is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from sparse_compiler.passes.attention.decomposed import read_decomposed
from sparse_compiler.passes.attention.facts import GraphFacts
from sparse_compiler.passes.attention.found import Refusal, Site
from sparse_compiler.passes.attention.fused import read_fused
from sparse_compiler.passes.attention.leaves import Leaf
from sparse_compiler.passes.attention.softmaxes import read_softmax
from sparse_compiler.static import StaticValues

aten = torch.ops.aten


def find_sites(gm: fx.GraphModule, static: StaticValues) -> Iterator[Site | Refusal]:
    """The attentions of a canonical graph, in graph order.

    Args:
        gm: the graph. The region of each site may be replaced while iterating; a site found
            before another one was replaced may refer to nodes that are gone.
        static: its static values.

    Yields:
        A site for each attention that can be rewritten, a refusal for each other one.
    """
    facts = GraphFacts(gm, static)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        try:
            found = _read(facts, node)
        except Exception as error:
            reason = f"an internal error: {type(error).__name__}: {error}"
            found = Refusal(node, reason, error=error)
        if found is not None:
            yield found


def _read(facts: GraphFacts, node: fx.Node) -> Site | Refusal | None:
    if node.target is aten.scaled_dot_product_attention.default:
        return read_fused(facts, node)
    softmax = read_softmax(node)
    return None if softmax is None else read_decomposed(facts, softmax)


__all__ = ["Leaf", "Refusal", "Site", "find_sites"]

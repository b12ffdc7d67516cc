"""Finds every attention of a graph, and says what its softmax sees.

A site is a ``scaled_dot_product_attention``, or a softmax whose input leads back to a product of
two activations and whose output goes into another one. What cannot be a site is a refusal with a
sentence: no softmax that looks like attention is passed over in silence.
"""

from __future__ import annotations

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


def find_sites(gm: fx.GraphModule, static: StaticValues) -> list[Site | Refusal]:
    """The attentions of a canonical graph, in graph order.

    Args:
        gm: the graph, which is not changed.
        static: its static values.

    Returns:
        A site for each attention that can be rewritten, a refusal for each other one. Sites stay
        valid while other sites are rewritten.
    """
    facts = GraphFacts(gm, static)
    found: list[Site | Refusal] = []
    for node in gm.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            found.append(read_fused(facts, node))
            continue
        softmax = read_softmax(node) if node.op == "call_function" else None
        attention = read_decomposed(facts, softmax) if softmax is not None else None
        if attention is not None:
            found.append(attention)
    return found


__all__ = ["Leaf", "Refusal", "Site", "find_sites"]

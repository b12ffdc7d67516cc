"""Reads nodes as sums of products.

A node that merely combines tensors of its own size (a feature map, a rotation, a padded key) is a
factor as it is. Only what is larger than its factors, or has been summed, is worth taking apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.indices import NotMultilinear, numel
from sparse_compiler.passes.linear_attention.masks import MaskReader
from sparse_compiler.passes.linear_attention.network import Network, large_factors, leaf
from sparse_compiler.passes.linear_attention.rules import ENDS, IN_PLACE, RULES, SUMS
from sparse_compiler.passes.linear_attention.views import CASTS, MOVES, RESHAPES, VIEWS, view_of
from sparse_compiler.static import StaticValues, with_aliases, writes_to

aten = torch.ops.aten

# A weight stays one when rows of it are picked: the experts of a token, say.
_PICKS = (aten.index.Tensor, aten.index_select.default, aten.select.int, aten.slice.Tensor)

# Not pointwise, but scores behind them are still scores.
_PASS_ON = frozenset({*VIEWS, *MOVES, *CASTS, aten.tril.default, aten.triu.default})


class Reader:
    """The networks of one graph's nodes. Read them in graph order: chains may be long.

    Args:
        static: the graph's static values.

    Attributes:
        masks: what reads the graph's masks.
        roots: nodes that others read as factors, although they are sums of products.
        obstacles: why a node that is computed from scores is no sum of products.
    """

    def __init__(self, static: StaticValues) -> None:
        self.static = static
        self.masks = MaskReader(static)
        self.roots: set[fx.Node] = set()
        self.obstacles: dict[fx.Node, str] = {}
        self._known: dict[fx.Node, Network] = {}
        self._from_inputs: set[fx.Node] = set()
        for node in static.gm.graph.nodes:
            given = node.op == "placeholder" and not static.is_static(node)
            if given or any(source in self._from_inputs for source in node.all_input_nodes):
                self._from_inputs.add(node)

    def read(self, node: fx.Node) -> Network:
        """The node's value as a network, whose only factor is the node itself if it is no sum."""
        if node in self.roots or node.op != "call_function":
            return leaf(node)
        if node not in self._known:
            self._known[node] = self._read(node)
        return self._known[node]

    def operand(self, value: Any) -> Network:
        """An argument of an operator as a network.

        Raises:
            NotMultilinear: it is no tensor.
        """
        if not isinstance(value, fx.Node):
            raise NotMultilinear("an operand is no tensor")
        return self.read(value)

    def is_weight(self, node: fx.Node) -> bool:
        """Whether no input decides what is in it: a product with it is a layer, no attention."""
        source: Any = node
        while source in self._from_inputs:
            if source.target not in (*_PICKS, *VIEWS, *MOVES, *CASTS):
                return False
            source = source.args[0]
        return True

    def _read(self, node: fx.Node) -> Network:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return leaf(node)
        try:
            found = self._through(node)
        except NotMultilinear:
            found = None
        if found is not None:
            view = node.target in VIEWS
            if found.has_sum or (is_wide(found) and not view):
                return Network(found.dims, found.terms, found.inside | {node})
            # Views of a factor are seen through; a sum along a dimension of size 1 is one, too.
            if node.target in SUMS or (view and (is_wide(found) or node.target not in RESHAPES)):
                return found
        self._note_obstacle(node)
        return leaf(node)

    def _through(self, node: fx.Node) -> Network:
        if self._is_overwritten(node):
            raise NotMultilinear("its value changes later")
        rule = RULES.get(node.target)
        if rule is not None:
            return rule(self, node)
        if node.target in VIEWS:
            source = self.operand(node.args[0])
            dims, names = view_of(node, source.dims)
            return Network(dims, source.renamed(names).terms, source.inside)
        functional = IN_PLACE.get(_name(node))
        if functional is not None and self._owns_input(node):
            return functional(self, node)
        raise NotMultilinear("it is no multilinear operator")

    def _is_overwritten(self, node: fx.Node) -> bool:
        """Whether its value changes after it was computed, other than by its only user."""
        if node not in self.masks.written or len(node.users) == 1:
            return False
        aliases = with_aliases([node])
        return any(a in writes_to(user) and user > node for a in aliases for user in a.users)

    def _owns_input(self, node: fx.Node) -> bool:
        """Whether an in-place operator is like its functional form: nobody else sees its input."""
        source: Any = node.args[0]
        while source.op == "call_function" and len(source.users) == 1:
            if source.target not in VIEWS:
                return self.read(source).has_sum
            source = source.args[0]
        return False

    def _note_obstacle(self, node: fx.Node) -> None:
        """Remember why scores are no sum of products any more, for the report."""
        name = _name(node).rstrip("_")
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or name == "dropout"
        if not pointwise and node.target not in _PASS_ON:
            return
        for source in node.all_input_nodes:
            if source in self.obstacles:
                self.obstacles[node] = self.obstacles[source]
            elif pointwise and _is_score(self.read(source)):
                self.obstacles[node] = (
                    "dropout is applied to the scores: each has to be drawn on its own"
                    if name == "dropout"
                    else f"the scores go through {name}, which does not commute with the sum over "
                    "the keys"
                )


def is_wide(network: Network, ratio: float = 1.0) -> bool:
    """Whether it has more than ``ratio`` times the elements of any of its factors."""
    factors = [numel(f.indices) for term in network.terms for f in term.factors]
    return numel(i for dim in network.dims for i in dim) > ratio * max(factors, default=0)


def ends_here(node: fx.Node, network: Network) -> bool:
    """Whether a node is the result of an attention, its normaliser, or the state after it."""
    if not network.has_sum or node.target not in ENDS:
        return False
    if node.target in (aten.slice.Tensor, aten.select.int):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        causal = any(term.causal for term in network.terms)
        return not causal and node.meta["val"].shape != source.meta["val"].shape
    sums = [term for term in network.terms if len(term.bound) > 1]
    whole = any(len(large_factors(term.factors)) > 2 for term in sums)
    return whole or (bool(sums) and not is_wide(network, 2.0))


def _is_score(network: Network) -> bool:
    """Whether it is a sum that is larger than all that it was computed from."""
    return network.has_sum and is_wide(network)


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).split("::")[-1] if schema else ""

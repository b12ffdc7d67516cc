"""Graphs with writes in place, read as if every operator made a tensor of its own."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping

import torch
from torch import fx

from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.static import aliased_inputs, writes_to


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a node's elements are part of.

    Attributes:
        roots: the tensors, each made by an operator of its own.
        parts: which part of it, where a tensor was split: by the splitting node.
    """

    roots: frozenset[tuple[fx.Node, int]]
    parts: Mapping[fx.Node, int]

    def overlaps(self, other: _Place) -> bool:
        """Whether some element may be in both."""
        if self.roots.isdisjoint(other.roots):
            return False
        return all(other.parts.get(split, part) == part for split, part in self.parts.items())


class Writes:
    """Where a graph writes in place.

    ``now(node, reader)`` is the node whose *result* has the value that ``node`` has when
    ``reader`` runs: ``out.add_(bias)`` changes ``out``, though ``out`` is another node.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._places: dict[fx.Node, _Place] = {}
        self._writers: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        for node in graph.nodes:
            place = self._places[node] = self._place(node)
            for written in writes_to(node):
                for root in (self._places[written].roots) | place.roots:
                    self._writers.setdefault(root, []).append(node)

    def _place(self, node: fx.Node) -> _Place:
        sources = aliased_inputs(node)
        if node.target is operator.getitem:
            parent, at = node.args
            if isinstance(parent, fx.Node) and isinstance(at, int):
                return self._item(parent, at)
        if not sources:
            return _Place(frozenset([(node, 0)]), {})
        places = [self._places[source] for source in sources]
        parts = places[0].parts if len(places) == 1 else {}
        return _Place(frozenset().union(*(place.roots for place in places)), parts)

    def _item(self, parent: fx.Node, at: int) -> _Place:
        """One of several results: parts of a tensor, or tensors of their own."""
        place = self._places[parent]
        if isinstance(parent.target, torch._ops.OpOverload) and not aliased_inputs(parent):
            return _Place(frozenset([(parent, at)]), {})
        return _Place(place.roots, {**place.parts, parent: at})

    def _behind(self, node: fx.Node, reader: fx.Node | None) -> list[fx.Node]:
        place = self._places[node]
        found = {writer for root in place.roots for writer in self._writers.get(root, ())}
        return sorted(
            writer
            for writer in found
            if node < writer
            and (reader is None or writer < reader)
            and any(place.overlaps(self._places[target]) for target in writes_to(writer))
        )

    def now(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The node that has the value of ``node`` when ``reader`` runs.

        Raises:
            Refused: it was written to through a view, in a way that is not followed.
        """
        behind = self._behind(node, reader)
        for writer in behind:
            targets = writes_to(writer)
            if len(targets) != 1 or owner(targets[0]) is not owner(node):
                raise Refused(f"{node.name} is written to in place through a view of it")
        return behind[-1] if behind else node

    def changes(self, node: fx.Node, reader: fx.Node | None = None) -> bool:
        """Whether an operator behind ``node`` (and before ``reader``) writes to it."""
        return bool(self._behind(node, reader))


def owner(node: fx.Node) -> fx.Node:
    """The tensor that a chain of operators in place began with."""
    while True:
        targets = writes_to(node)
        if len(targets) != 1:
            return node
        node = targets[0]

"""What lifting has to know of a graph as a whole: writes, gradients, constants, sizes."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import fx

from sparse_compiler.canonical import fetch_attr
from sparse_compiler.passes.attention.symbols import Symbols
from sparse_compiler.static import StaticValues, with_aliases, writes_to

aten = torch.ops.aten

# Literals of the user's program, such as ``torch.tensor(-1e9)``.
_LITERAL = re.compile(r"(.*\.)?(_tensor_constant|_?lifted_tensor_(constant_?)?)\d+")

# In place, but the values stay.
_SILENT = (aten.detach_.default,)

# Tensors up to so many elements are computed while compiling, to see what is in them.
_SMALL = 1 << 16


class GraphFacts:
    """Facts about one canonical graph.

    Args:
        gm: the graph module.
        static: its static values.

    Attributes:
        symbols: where its symbolic sizes come from.
    """

    def __init__(self, gm: fx.GraphModule, static: StaticValues) -> None:
        self.gm = gm
        self.static = static
        self.symbols = Symbols(gm.graph)
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        self._seen: set[fx.Node] = set()
        self._learned: set[fx.Node] = set()
        self._constant: set[fx.Node] = set()
        self._values: dict[fx.Node, torch.Tensor | None] = {}
        self._twins: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            self._note_writes(node)
        for node in gm.graph.nodes:
            self.is_learned(node)
            if self._is_constant(node):
                self._constant.add(node)
        self._note_twins()

    def _note_writes(self, node: fx.Node) -> None:
        if node.target in _SILENT:
            return
        for alias in with_aliases(writes_to(node)):
            self._writers.setdefault(alias, []).append(node)

    def written_after(self, node: fx.Node, end: fx.Node, reader: fx.Node | None = None) -> bool:
        """Whether something between ``node`` and ``end`` writes to its storage.

        A ``reader`` that is the first to do so, and the only one to use the node, sees the value
        from before.
        """
        later = [writer for writer in self._writers.get(node, ()) if node < writer < end]
        if later and reader is later[0]:
            return len(node.users) > 1
        return bool(later)

    def is_learned(self, node: fx.Node) -> bool:
        """Whether a gradient may flow into the node's value."""
        if node not in self._seen:  # another rewrite has made it
            self._seen.add(node)
            if self._is_learned(node):
                self._learned.add(node)
        return node in self._learned

    def _is_learned(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if not self.static.training or node.target in (aten.detach.default, *_SILENT):
            return False
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return False
        leaf = self.static.leaf(node)
        if leaf is not None and leaf.requires_grad:
            return True
        if node.op == "placeholder":
            return node.name in self.gm.meta.get("with_gradient", ())
        return any(self.is_learned(source) for source in node.all_input_nodes)

    def first_like(self, node: fx.Node) -> fx.Node:
        """The first node of the graph that computes the same, which may be the node itself.

        Models convert one padding mask for each kind of layer.
        """
        return self._twins.get(node, node)

    def _note_twins(self) -> None:
        first: dict[Any, fx.Node] = {}
        for node in self.gm.graph.nodes:
            if node.op != "call_function" or node in self._writers or not _is_pure(node):
                continue
            given = fx.node.map_arg((node.args, node.kwargs), lambda item: self.first_like(item))
            key = node.target, repr(given)  # the nodes of one graph have distinct names
            self._twins[node] = first.setdefault(key, node)

    def kind(self, node: fx.Node) -> str:
        """What decides the node's value; see ``Leaf``."""
        if self.is_learned(node):
            return "learned"
        if self.static.is_static(node):
            return "static"
        return "constant" if node in self._constant else "runtime"

    def literal(self, node: fx.Node) -> Any:
        """The number that a literal of the program holds, or None for any other node."""
        if node.op != "get_attr" or not _LITERAL.fullmatch(str(node.target)):
            return None
        value = self.static.leaf(node)
        return value.item() if value is not None and value.numel() == 1 else None

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the node depends on nothing but literals: an ``arange``, and what follows."""
        return node in self._constant

    def _is_constant(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if node.op == "get_attr":
            return _LITERAL.fullmatch(str(node.target)) is not None
        if node.op != "call_function" or node in self._writers:
            return False
        if isinstance(value, torch.Tensor):
            if any(isinstance(size, torch.SymInt) for size in value.shape):
                return False
        elif not isinstance(value, (tuple, list)):
            return False
        return _is_pure(node) and all(item in self._constant for item in node.all_input_nodes)

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a small constant node, or None for any other node."""
        if node not in self._constant:
            return None
        if node not in self._values:
            value = node.meta.get("val")
            small = isinstance(value, torch.Tensor) and value.numel() <= _SMALL
            self._values[node] = _evaluated(self.gm, node) if small else None
        return self._values[node]


def _is_pure(node: fx.Node) -> bool:
    """Whether the operator's inputs decide its result."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return False
    return "empty" not in str(target)


def _evaluated(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    """The value of a node that depends on literals only."""
    needed: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in needed:
            needed.add(current)
            waiting.extend(current.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for current in sorted(needed):  # graph order
            if current.op == "get_attr":
                values[current] = fetch_attr(gm, str(current.target)).detach().clone()
                continue
            call: Any = current.target
            args, kwargs = fx.node.map_arg((current.args, current.kwargs), values.__getitem__)
            values[current] = call(*args, **kwargs)
    result = values[node]
    assert isinstance(result, torch.Tensor)
    return result

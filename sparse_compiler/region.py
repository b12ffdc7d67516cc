"""Regions of a graph, and the only way to edit one.

A region is a set of nodes that one rewrite replaces. ``region_graph`` shows an FX graph as a
networkx DiGraph; ``Region`` asks it the questions that decide whether a replacement is legal
(is the set convex? is a value it reads written to in between?); ``replace_region`` makes the edit
and records it. Passes neither insert nor erase nodes on their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sparse_compiler.errors import RegionError
from sparse_compiler.static import is_written, with_aliases, writes_to


def region_graph(graph: fx.Graph) -> nx.DiGraph:
    """The graph as a DiGraph: one vertex a node, one edge a use."""
    result: nx.DiGraph = nx.DiGraph()
    for position, node in enumerate(graph.nodes):
        result.add_node(node, position=position, target=str(node.target), op=node.op)
        result.add_edges_from((argument, node) for argument in node.all_input_nodes)
    return result


def dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each node's immediate dominator: the last node every path from the inputs goes through.

    Nodes reached only through several inputs are dominated by the first node of the graph.
    """
    digraph = region_graph(graph)
    root = next(iter(graph.nodes))
    sources = [node for node in digraph if node is not root and digraph.in_degree(node) == 0]
    digraph.add_edges_from((root, source) for source in sources)
    return dict(nx.immediate_dominators(digraph, root))


@dataclasses.dataclass(frozen=True)
class Region:
    """Nodes that are to be replaced together.

    Attributes:
        nodes: the nodes, in graph order.
        outputs: those whose values are used outside, in graph order.
        inputs: nodes outside whose values are used inside, in graph order.
    """

    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]

    @classmethod
    def of(cls, nodes: Iterable[fx.Node]) -> Region:
        """The region of these nodes.

        Raises:
            RegionError: no nodes, or nodes of several graphs, or an input or output of the graph.
        """
        wanted = set(nodes)
        if not wanted:
            raise RegionError("A region needs at least one node.")
        graphs = {node.graph for node in wanted}
        if len(graphs) > 1:
            raise RegionError("A region's nodes must all belong to one graph.")
        for node in wanted:
            if node.op != "call_function":
                raise RegionError(f"{node} is a {node.op}: only operators can be in a region.")
        inside = sorted(wanted)  # nodes compare by their place in the graph
        outputs = [n for n in inside if any(user not in wanted for user in n.users)]
        inputs = {a for n in inside for a in n.all_input_nodes if a not in wanted}
        return cls(tuple(inside), tuple(outputs), tuple(sorted(inputs)))

    @property
    def graph(self) -> fx.Graph:
        return self.nodes[0].graph

    def is_convex(self) -> bool:
        """Whether no path leaves the region and comes back."""
        inside, last = set(self.nodes), self.nodes[-1]
        waiting = [user for node in self.outputs for user in node.users if user not in inside]
        reached: set[fx.Node] = set()
        while waiting:
            node = waiting.pop()
            if node in inside:
                return False
            # What comes after the region's end cannot lead back into it.
            if node not in reached and node < last:
                reached.add(node)
                waiting.extend(node.users)
        return True

    def why_not_movable(self, *, fresh: bool = False) -> str | None:
        """Why the region may not be computed as one step at its end, or None if it may.

        Looks at the region's surroundings only, so that many edits of a large graph stay cheap.

        Args:
            fresh: the replacement's results share storage with none of its inputs; then they may
                be written to, in the region or after it (``relu_`` behind a layer).
        """
        if not self.is_convex():
            return "a path leaves the region and comes back to it"
        seen: set[fx.Node] = set()
        for node in self.nodes:
            if node in seen:
                continue
            shared = with_aliases([node])
            seen |= shared  # of nodes that share storage one is asked for all
            if is_written(shared) and not (fresh and self._owns(shared)):
                return f"{node.name} is written to in place"
        written = self._written_within()
        if written:
            return f"{written[0].name}, which it reads, is written to in place"
        for output in self.outputs:
            for user in output.users:
                if user not in self.nodes and user < self.nodes[-1]:
                    return f"{user.name} needs {output.name} before the region ends"
        return None

    def _owns(self, shared: set[fx.Node]) -> bool:
        """Whether a storage is only shared or written to in the region, or after it."""
        writers = {user for alias in shared for user in alias.users if alias in writes_to(user)}
        inside = set(self.nodes)
        return all(item in inside or item > self.nodes[-1] for item in shared | writers)

    def _written_within(self) -> list[fx.Node]:
        """Inputs that an operator between the region's first and last node writes to."""
        written = {n for node in _span(self.nodes[0], self.nodes[-1].next) for n in writes_to(node)}
        if not written:
            return []
        return [node for node in self.inputs if not written.isdisjoint(with_aliases([node]))]


def _span(first: fx.Node, stop: fx.Node) -> Iterator[fx.Node]:
    """The nodes of the graph from ``first`` to the one before ``stop``."""
    while first is not stop:
        yield first
        first = first.next


@dataclasses.dataclass(frozen=True)
class Edit:
    """One replacement, as it was made: the rule, the source lines before and after."""

    rule: str
    before: tuple[str, ...]
    after: tuple[str, ...]


class Builder:
    """Makes the nodes of a replacement; each gets its example value as it is made."""

    def __init__(self, gm: fx.GraphModule, region: Region) -> None:
        self.gm = gm
        self._graph = gm.graph
        self._fake_mode = _fake_mode(region)
        self._attributes: list[str] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator on nodes and literals."""
        values = fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
        with self._fake_mode, enable_python_dispatcher():
            value = target(*values[0], **values[1])
        node = self._graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        return node

    def constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A new buffer of the graph module (a packed weight, say), as a node."""
        number = len(self.gm.meta.setdefault("constants", []))
        attribute = f"_sparse_{number}_{name}"
        self.gm.register_buffer(attribute, tensor)
        self.gm.meta["constants"].append(attribute)
        self._attributes.append(attribute)
        node = self._graph.get_attr(attribute)
        node.meta["val"] = self._fake_mode.from_tensor(tensor, static_shapes=True)
        return node

    def undo(self) -> None:
        """Remove the buffers again, after a failure."""
        for attribute in self._attributes:
            delattr(self.gm, attribute)
            self.gm.meta["constants"].remove(attribute)


def replace_region(
    gm: fx.GraphModule,
    region: Region,
    build: Callable[..., fx.Node | Sequence[fx.Node]],
    *,
    rule: str,
    fresh: bool = False,
    verify: Callable[[Region, Sequence[fx.Node], Sequence[fx.Node]], None] | None = None,
) -> tuple[fx.Node, ...]:
    """Replace a region by new nodes and record the edit in ``gm.meta["edits"]``.

    Args:
        gm: the graph module the region belongs to.
        region: the nodes to replace.
        build: called as ``build(builder, *region.inputs)``; makes nodes with the builder and
            returns one node per region output, of the output's shape and dtype.
        rule: the name of the rewrite, for reports.
        fresh: the results share storage with none of the region's inputs.
        verify: called with the region, the new nodes and the results before anything is erased;
            what it raises undoes the edit.

    Returns:
        The nodes that now stand for the region's outputs.

    Raises:
        RegionError: the replacement would change what the graph computes. Nothing was changed.
    """
    graph = gm.graph
    reason = region.why_not_movable(fresh=fresh)
    if reason is not None:
        raise RegionError(f"{rule}: {reason}")
    last, behind = region.nodes[-1], region.nodes[-1].next
    builder = Builder(gm, region)
    try:
        with graph.inserting_before(behind):
            built = build(builder, *region.inputs)
        results = (built,) if isinstance(built, fx.Node) else tuple(built)
        _check_results(region.outputs, results, rule)
        created = list(_span(last.next, behind))
        if verify is not None:
            verify(region, created, results)
    except BaseException:
        for node in reversed(list(_span(last.next, behind))):
            graph.erase_node(node)
        builder.undo()
        raise
    edit = Edit(rule, _format(region.nodes), _format(created))
    for old, new in zip(region.outputs, results, strict=True):
        for made in created:
            for key in ("nn_module_stack", "stack_trace"):
                if key in old.meta:
                    made.meta.setdefault(key, old.meta[key])
        old.replace_all_uses_with(new)
    for node in reversed(region.nodes):
        graph.erase_node(node)
    gm.meta.setdefault("edits", []).append(edit)
    return results


def _check_results(outputs: Sequence[fx.Node], results: Sequence[fx.Node], rule: str) -> None:
    if len(outputs) != len(results):
        raise RegionError(f"{rule}: {len(results)} results for {len(outputs)} outputs.")
    for old, new in zip(outputs, results, strict=True):
        want, got = old.meta["val"], new.meta["val"]
        if tuple(want.shape) != tuple(got.shape) or want.dtype != got.dtype:
            raise RegionError(
                f"{rule}: {tuple(got.shape)} {got.dtype} cannot stand for {old.name}, "
                f"which is {tuple(want.shape)} {want.dtype}."
            )


def _format(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(str(node.format_node()) for node in nodes)


def _fake_mode(region: Region) -> FakeTensorMode:
    for node in (*region.inputs, *region.outputs):
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise RegionError("The region's nodes carry no example values: canonicalize the graph first.")

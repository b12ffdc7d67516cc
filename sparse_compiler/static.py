"""Static expressions: the part of a graph that depends on parameters and buffers alone.

A pruned weight is rarely a bare parameter. It is ``weight_orig * mask``, a parametrization, a
transpose, a cast under autocast, ``torch.where(mask, weight, 0)``. All of these are one thing: a
pure expression over static leaves, which can be evaluated while compiling and evaluated again when
a leaf has changed.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.canonical import fetch_attr

# Composite operators whose result is always their own.
_FRESH = (torch.ops.aten.matmul.default, torch.ops.aten.linear.default)
# Operators that give another result each time, or depend on more than their inputs.
_IMPURE_TAGS = (torch.Tag.nondeterministic_seeded,)


@dataclasses.dataclass(frozen=True)
class StaticExpression:
    """A value that parameters and buffers alone decide.

    Attributes:
        node: the node whose value it is.
        leaves: the ``get_attr`` nodes or placeholders it depends on, in graph order.
        steps: the operators between the leaves and ``node`` (with ``node``), in graph order. A
            copy of their arguments: it outlives the nodes, which a rewrite may erase.
    """

    node: fx.Node
    leaves: tuple[fx.Node, ...]
    steps: tuple[tuple[fx.Node, tuple[Any, ...], dict[str, Any]], ...]

    def evaluate(self, leaf_values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The expression's value for these values of its leaves (detached)."""
        values: dict[fx.Node, Any] = {
            leaf: value.detach() for leaf, value in zip(self.leaves, leaf_values, strict=True)
        }
        with torch.no_grad():
            for node, given_args, given_kwargs in self.steps:
                if node.op == "get_attr":  # a derived buffer: another name for its expression
                    values[node] = values[given_args[0]]
                    continue
                args = fx.node.map_arg(given_args, values.__getitem__)
                kwargs = fx.node.map_arg(given_kwargs, values.__getitem__)
                call: Any = node.target
                values[node] = call(*args, **kwargs)
        result = values[self.node]
        assert isinstance(result, torch.Tensor)
        return result


def combine(
    function: Callable[..., torch.Tensor], expressions: Sequence[StaticExpression]
) -> StaticExpression:
    """The expression ``function(*values)`` of the values of other expressions."""
    leaves = dict.fromkeys(leaf for item in expressions for leaf in item.leaves)
    steps = {step[0]: step for item in expressions for step in item.steps}
    # A node of no graph that only names the result.
    name = fx.Graph().create_node("call_function", function, name="combined")
    given = tuple(item.node for item in expressions)
    return StaticExpression(name, tuple(leaves), (*steps.values(), (name, given, {})))


def _made(remake: Callable[[Any], Sequence[Any]], place: int, value: torch.Tensor) -> Any:
    return remake(value)[place]


class StaticValues:
    """The static leaves of a graph and the expressions over them.

    Args:
        gm: a canonical graph. Leaves are its ``get_attr`` nodes, and the placeholders listed in
            ``gm.meta["static_inputs"]``.
        training: whether gradients may flow; then a leaf that requires grad is *trainable*: its
            zeros are accidents of the moment, not structure.
    """

    def __init__(self, gm: fx.GraphModule, *, training: bool) -> None:
        self.gm = gm
        self.training = training
        self._inputs: Mapping[str, torch.Tensor] = gm.meta.get("static_inputs", {})
        self._names: Mapping[str, str] = gm.meta.get("static_names", {})
        self._mutated = mutated_nodes(gm.graph)
        self._known: dict[fx.Node, bool] = {}
        for node in gm.graph.nodes:  # in order, so that no chain of operators is too long
            self.is_static(node)

    def leaf(self, node: fx.Node) -> torch.Tensor | None:
        """The tensor behind a static leaf, or None for any other node."""
        value: object = None
        if node.op == "placeholder":
            value = self._inputs.get(node.name)
        elif node.op == "get_attr":
            value = fetch_attr(self.gm, str(node.target))
        return value if isinstance(value, torch.Tensor) else None

    def name(self, node: fx.Node) -> str:
        """A leaf's path in the user's model, such as ``layers.0.weight``."""
        if node.op == "placeholder":
            return self._names.get(node.name, node.name)
        return str(node.target)

    def is_static(self, node: fx.Node) -> bool:
        """Whether the node's value depends on parameters, buffers and literals alone."""
        known = self._known.get(node)
        if known is None:
            known = self._known[node] = self._decide(node)
        return known

    def _decide(self, node: fx.Node) -> bool:
        if node in self._mutated:
            return False
        if node.op in ("placeholder", "get_attr"):
            return self.leaf(node) is not None
        if node.op != "call_function" or not node.all_input_nodes:
            return False
        if node.target is not operator.getitem:
            if not isinstance(node.target, torch._ops.OpOverload):
                return False
            if any(tag in node.target.tags for tag in _IMPURE_TAGS):
                return False
            if node.target._schema.is_mutable:
                return False
        return all(self.is_static(argument) for argument in node.all_input_nodes)

    def expression(self, node: fx.Node) -> StaticExpression | None:
        """The static expression that ends in ``node``, or None."""
        if not self.is_static(node):
            return None
        leaves: dict[fx.Node, None] = {}
        steps: dict[fx.Node, tuple[fx.Node, tuple[Any, ...], dict[str, Any]]] = {}
        needed: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current not in needed:
                needed.add(current)
                waiting.extend(current.all_input_nodes)
        for current in sorted(needed):  # graph order
            source = self._source(current)
            if source is not None:
                leaves.update(dict.fromkeys(source.leaves))
                steps.update((step[0], step) for step in source.steps)
                steps[current] = (current, (source.node,), {})
            elif current.op == "call_function":
                steps[current] = (current, current.args, dict(current.kwargs))
            else:
                leaves[current] = None
        return StaticExpression(node, tuple(leaves), tuple(steps.values()))

    def _source(self, node: fx.Node) -> StaticExpression | None:
        """What a buffer that another pass derived was made from, or None for other nodes."""
        if node.op != "get_attr":
            return None
        for item in self.gm.meta.get("derived", ()):
            if node.target in item.attributes:
                place = item.attributes.index(node.target)
                pick = functools.partial(_made, item.remake, place)
                return combine(pick, [item.expression])
        return None

    def value(self, node: fx.Node) -> torch.Tensor | None:
        """The present value of a static node, or None for any other node."""
        leaf = self.leaf(node) if self.is_static(node) else None
        if leaf is not None:
            return leaf.detach()
        expression = self.expression(node)
        if expression is None:
            return None
        return expression.evaluate(self.leaf_values(expression))

    def leaf_values(self, expression: StaticExpression) -> list[torch.Tensor]:
        """The present tensors behind an expression's leaves."""
        tensors = [self.leaf(leaf) for leaf in expression.leaves]
        return [tensor for tensor in tensors if tensor is not None]

    def is_trainable(self, node: fx.Node) -> bool:
        """Whether a gradient may flow into a static node, so that its zeros may not last."""
        expression = self.expression(node)
        if expression is None or not self.training:
            return False
        return any(tensor.requires_grad for tensor in self.leaf_values(expression))


def mutated_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose storage some operator of the graph writes to, views of them included."""
    return with_aliases(written for node in graph.nodes for written in writes_to(node))


def is_mutated(node: fx.Node) -> bool:
    """Whether the node is among ``mutated_nodes``: looks at its aliases only, not at the graph."""
    return is_written(with_aliases([node]))


def is_written(shared: Iterable[fx.Node]) -> bool:
    """Whether an operator writes to one of these nodes."""
    return any(node in writes_to(user) for node in shared for user in node.users)


def with_aliases(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that may share storage with them: bases, and other views of those."""
    found = set(nodes)
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        views = (user for user in node.users if node in aliased_inputs(user))
        new = {*aliased_inputs(node), *views} - found
        found |= new
        waiting.extend(new)
    return found


def writes_to(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator writes to."""
    found: list[fx.Node] = []
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return found
    if node.target._schema.is_mutable:
        for argument, value in zip(node.target._schema.arguments, _bound(node), strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                fx.node.map_arg(value, found.append)
    return found


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, defaults included; nothing for what is no ATen operator."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    named.update(zip([a.name for a in schema], node.args, strict=False))
    named.update(node.kwargs)
    return named


def _bound(node: fx.Node) -> list[Any]:
    """A node's arguments in the order of its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    positional = list(node.args)
    return [*positional, *(node.kwargs.get(name) for name in names[len(positional) :])]


def aliased_inputs(node: fx.Node) -> list[fx.Node]:
    """Inputs that a node's result may share storage with."""
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        return node.all_input_nodes
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    if node.target in _FRESH:
        return []
    found: list[fx.Node] = []
    schema = node.target._schema
    # Composite views (reshape, contiguous, flatten) alias only sometimes: assume they do.
    composite = node.target.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )
    for argument, value in zip(schema.arguments, _bound(node), strict=False):
        if argument.alias_info is not None or (composite and argument.name == "self"):
            fx.node.map_arg(value, found.append)
    return found

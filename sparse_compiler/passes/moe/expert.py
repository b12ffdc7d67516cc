"""What an expert is: two linear layers, a pointwise body between them, read backwards.

The linear layers may be those of one expert or, with a dimension for it, of all experts at once.
Which dimension of what tensor is the tokens', the experts' or the features' follows from ``axes``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.moe.axes import (
    Axis,
    Layout,
    aligned,
    arrange,
    forward,
    fresh,
    is_cast,
    is_view,
    leaves,
    same_shape,
    same_size,
    source_of,
    through,
    unify,
)
from sparse_compiler.passes.moe.body import part, read_body
from sparse_compiler.passes.moe.products import Product, read_linear
from sparse_compiler.passes.moe.site import Make, Refused
from sparse_compiler.passes.moe.writes import Writes
from sparse_compiler.region import Builder
from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import Expr
from sparse_compiler.static import StaticValues, arguments

aten = torch.ops.aten

_MOST_PARTS = 2
_SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}
_SPLITS |= {aten.split.sizes}


DEEP = "an expert has more than two linear layers one behind the other"
_MOST_STEPS = 12


@dataclasses.dataclass(frozen=True)
class Narrowing:
    """A part of an axis: the elements from ``start`` by ``step`` are the axis ``to``, or one is."""

    axis: Axis
    start: int
    step: int
    to: Axis | None


@dataclasses.dataclass(frozen=True)
class Weight:
    """A static tensor in axes, or a part of it.

    Attributes:
        node: the tensor.
        layout: of its dimensions.
        parts: what to take of it, one after the other.
    """

    node: fx.Node
    layout: Layout
    parts: tuple[Narrowing, ...] = ()

    def axes(self) -> list[Axis]:
        """Its axes, outermost first, those of the part."""
        found = [axis for dim in leaves(self.layout) for axis in dim]
        for item in self.parts:
            (axis,) = item.axis.leaves()
            if axis in found:
                place = found.index(axis)
                found[place : place + 1] = () if item.to is None else item.to.leaves()
        return found

    def make(self, wanted: Sequence[Axis], shape: list[int]) -> Make:
        """A view of it with the axes in this order."""

        def build(builder: Builder) -> fx.Node:
            node, axes = self.node, [a for dim in leaves(self.layout) for a in dim]
            sizes = [axis.size for axis in axes]
            if list(node.meta["val"].shape) != sizes:
                node = builder.call(aten.reshape.default, node, sizes)
            for item in self.parts:
                (axis,) = item.axis.leaves()
                if axis not in axes:
                    continue
                place = axes.index(axis)
                if item.to is None:
                    node = builder.call(aten.select.int, node, place, item.start)
                    del axes[place]
                    continue
                stop = item.start + item.step * (item.to.size - 1) + 1
                node = builder.call(aten.slice.Tensor, node, place, item.start, stop, item.step)
                (axes[place],) = item.to.leaves()
            return arrange(builder, node, tuple((a,) for a in axes), list(wanted), shape)

        return build


@dataclasses.dataclass(frozen=True)
class _Linear:
    """The result of a linear layer, or a part of it, in axes."""

    product: Product
    layout: Layout
    weight: Weight
    biases: tuple[Weight, ...]
    features: tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Experts:
    """One expert, or all of them.

    Attributes:
        x: the tokens.
        x_layout: of their dimensions.
        weighting: what multiplies the tokens, its layout and its reader, if that was asked for.
        inner: the first linear layers, with biases.
        outer: the second, with its biases.
        body: between them.
        layout: of the result.
        tokens, features, hidden, outputs: axes.
        expert: the axis of the experts; None for one expert.
        nodes: the products and what is between them.
    """

    x: fx.Node
    x_layout: Layout
    weighting: tuple[fx.Node, Layout, fx.Node] | None
    inner: tuple[Weight, ...]
    inner_bias: tuple[tuple[Weight, ...], ...]
    outer: Weight
    outer_bias: tuple[Weight, ...]
    body: Expr
    layout: Layout
    tokens: tuple[Axis, ...]
    features: tuple[Axis, ...]
    hidden: Axis
    outputs: Axis
    expert: Axis | None
    nodes: frozenset[fx.Node]


class Reader:
    """Reads experts of a graph.

    Args:
        static: the graph's static values.
        writes: its writes in place.
    """

    def __init__(self, static: StaticValues, writes: Writes) -> None:
        self.static, self.writes = static, writes

    def experts(
        self, node: fx.Node, reader: fx.Node, *, weighted: bool = False, slots: bool = False
    ) -> Experts | None:
        """The experts whose result a node is.

        Args:
            node: the result.
            reader: the operator that reads it.
            weighted: whether the tokens are multiplied by weights first.
            slots: whether each expert has tokens of its own, so that they have its axis.

        Returns:
            None if it is no result of a linear layer behind another one.

        Raises:
            Refused: it is, and the sentence says why it is no expert.
        """
        return _Reading(self.static, self.writes, weighted, slots).experts(node, reader)

    def is_stacked(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether a node is the result of linear layers with a dimension of their own for each."""
        try:
            found, _ = _Reading(self.static, self.writes, False, False).stages(node, reader)
        except Refused:
            return False
        product = read_linear(found, self.static)
        if product is None:
            return False
        shared = {*product.left_letters} & {*product.right_letters} & {*product.out_letters}
        sizes = dict(zip(product.out_letters, found.meta["val"].shape, strict=True))
        return any(not same_size(sizes[letter], 1) for letter in shared)


class _Reading:
    def __init__(self, static: StaticValues, writes: Writes, weighted: bool, slots: bool) -> None:
        self._static, self._writes, self._weighted = static, writes, weighted
        self._slots = slots
        self._nodes: set[fx.Node] = set()
        self._tokens: dict[fx.Node, tuple[Layout, tuple[fx.Node, Layout, fx.Node] | None]] = {}
        self._parts: list[tuple[Any, _Linear]] = []
        self._linears: dict[fx.Node, tuple[Any, _Linear] | None] = {}

    def experts(self, node: fx.Node, reader: fx.Node) -> Experts | None:
        second, stages = self.stages(node, reader)
        product = read_linear(second, self._static)
        if product is None:
            return None
        hidden, chain = source_of(product.left)
        if not self._is_behind_linear(hidden):
            return None
        self._nodes.add(second)
        body, between = read_body(
            hidden, self._leaf, self._static, product.node, writes=self._writes
        )
        self._nodes |= between
        parts = [item for _, item in self._parts]
        if len(parts) > _MOST_PARTS:
            raise Refused(f"an expert has {len(parts)} linear layers side by side")
        if len(self._tokens) != 1:
            raise Refused("the linear layers of an expert do not read the same tokens")
        ((x, (x_layout, weighting)),) = self._tokens.items()
        first = parts[0]
        if any(leaves(item.layout) != leaves(first.layout) for item in parts[1:]):
            self._agree(parts)
        layout = forward(chain, first.layout)
        weight = Weight(product.right, fresh(product.right))
        if layout is None:
            raise Refused(
                "between its linear layers an expert changes shapes in a way not followed"
            )
        axes = product.axes(layout, weight.layout)
        if axes is None:
            raise Refused("the linear layers of an expert do not fit each other")
        result: Layout | None = tuple(axes[a] for a in product.out_letters)
        biases: list[Weight] = []
        if product.bias is not None:
            assert result is not None
            biases.append(self._bias(product.bias, result))
        for kind, item in reversed(stages):
            if result is None:
                return None
            if kind == "bias":
                biases.append(self._bias(item, result))
            else:
                result = forward([item], result)
        if result is None:
            return None
        in_both = [a for a in product.right_letters if a in product.left_letters]
        return self._assemble(
            x,
            x_layout,
            weighting,
            parts,
            weight,
            biases,
            body,
            result,
            inside=[x for a in product.contracted for x in axes[a]],
            shared=[x for a in in_both if a in product.out_letters for x in axes[a]],
            free=[
                x for a in product.right_letters if a not in product.left_letters for x in axes[a]
            ],
        )

    def _assemble(
        self,
        x: fx.Node,
        x_layout: Layout,
        weighting: tuple[fx.Node, Layout, fx.Node] | None,
        parts: list[_Linear],
        weight: Weight,
        biases: list[Weight],
        body: Expr,
        layout: Layout,
        inside: list[Axis],
        shared: list[Axis],
        free: list[Axis],
    ) -> Experts | None:
        """Which axis is which, and whether all of them are accounted for."""
        inside, shared, free = (list(leaves((tuple(item),))[0]) for item in (inside, shared, free))
        features = leaves((parts[0].features,))[0]
        own = [axis for dim in leaves(x_layout) for axis in dim if not axis.repeated]
        tokens = tuple(axis for axis in own if axis not in (*features, *shared))
        if len(inside) != 1 or len(free) != 1 or len(shared) > 1 or not features:
            return None
        roles = [*tokens, *features, *shared, inside[0], free[0]]
        if len(set(roles)) != len(roles):  # two sizes are equal, and parts are turned
            return None
        expert = shared[0] if shared else None
        inner = [item.weight for item in parts]
        found = [axis for dim in leaves(layout) for axis in dim]
        wanted = {*tokens, free[0], *shared}
        if expert in own and not self._slots and linear_behind(x, self._static) is not None:
            raise Refused(DEEP)
        if set(found) != wanted or len(found) != len(wanted) or (expert in own) != self._slots:
            return None
        for item in inner:
            if set(item.axes()) != {*shared, inside[0], *features}:
                return None
        if set(weight.axes()) != {*shared, inside[0], free[0]}:
            return None
        groups = [(biases, free[0]), *((item.biases, inside[0]) for item in parts)]
        if any(set(b.axes()) - {*shared, wide} for group, wide in groups for b in group):
            raise Refused("an expert adds another bias to each token")
        return Experts(
            x=x,
            x_layout=x_layout,
            weighting=weighting,
            inner=tuple(inner),
            inner_bias=tuple(item.biases for item in parts),
            outer=weight,
            outer_bias=tuple(biases),
            body=body,
            layout=layout,
            tokens=tokens,
            features=features,
            hidden=inside[0],
            outputs=free[0],
            expert=expert,
            nodes=frozenset(self._nodes),
        )

    def _agree(self, parts: list[_Linear]) -> None:
        """Make axes of several first linear layers the same: they are multiplied elementwise."""
        for item in parts[1:]:
            for mine, other in zip(parts[0].layout, item.layout, strict=True):
                if len(mine) != len(other) or not unify(mine, other):
                    raise Refused("the first linear layers of an expert differ in shape")

    def stages(self, node: fx.Node, reader: fx.Node) -> tuple[fx.Node, list[tuple[str, fx.Node]]]:
        """The product behind views, conversions and sums with static tensors, and these."""
        stages: list[tuple[str, fx.Node]] = []
        while True:
            node = self._writes.now(node, reader)
            reader = node
            if is_view(node) or is_cast(node):
                stages.append(("view", node))
                node = node.args[0]  # type: ignore[assignment]
                continue
            pair = self._sum_with_static(node)
            if pair is None:
                return node, stages
            stages.append(("bias", pair[1]))
            self._nodes.add(node)
            node = pair[0]

    def _sum_with_static(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        if node.target not in (aten.add.Tensor, aten.add_.Tensor):
            return None
        given = arguments(node)
        left, right = given["self"], given["other"]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or given["alpha"] != 1:
            return None
        if self._static.is_static(left):
            left, right = right, left
        if self._static.is_static(left) or not self._static.is_static(right):
            return None
        return (left, right) if same_shape(left, node) else None

    def _is_behind_linear(self, node: fx.Node) -> bool:
        """Whether a linear layer is among the operators that a value is made by: a few steps."""
        waiting, seen = [node], set[fx.Node]()
        while waiting and len(seen) < 60:
            current = waiting.pop()
            if current in seen or self._static.is_static(current) or current.op != "call_function":
                continue
            seen.add(current)
            if read_linear(current, self._static) is not None:
                return True
            waiting.extend(current.all_input_nodes)
        return False

    def _leaf(self, node: fx.Node) -> Expr | None:
        """The part that a node is, if it is one: its number is its place in ``_parts``."""
        if node.target is aten.glu.default:
            return self._glu(node)
        found = self._linear(node)
        if found is None:
            return None
        return part(self._number(found))

    def _number(self, found: tuple[Any, _Linear]) -> int:
        keys = [key for key, _ in self._parts]
        if found[0] not in keys:
            self._parts.append(found)
            return len(keys)
        return keys.index(found[0])

    def _glu(self, node: fx.Node) -> Expr | None:
        given = arguments(node)
        found = self._linear(given["self"])
        if found is None:
            return None
        key, item = found
        dim = given["dim"] % len(item.layout)
        size = given["self"].meta["val"].shape[dim] // 2
        halves = [self._narrowed(key, item, dim, place * size, size, 1) for place in (0, 1)]
        if halves[0] is None or halves[1] is None:
            return None
        self._nodes.add(node)
        first, second = (part(self._number(half)) for half in halves if half is not None)
        return e.mul(first, e.sigmoid(second))

    def _linear(self, node: fx.Node) -> tuple[Any, _Linear] | None:
        """The linear layer, or part of one, that a node is the result of."""
        product = read_linear(node, self._static)
        if product is not None:
            if node not in self._linears:
                self._linears[node] = self._product(product)
            return self._linears[node]
        if node.op != "call_function":
            return None
        pair = self._sum_with_static(node)
        if pair is not None:
            return self._with_bias(node, *pair)
        if node.target is operator.getitem:
            return self._item(node)
        if not is_view(node) and node.target not in (aten.slice.Tensor, aten.select.int):
            return None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        found = self._behind(source, node)
        if found is None:
            return None
        key, item = found
        self._nodes.add(node)
        given = arguments(node)
        if node.target is aten.slice.Tensor:
            dim, step = given["dim"] % len(item.layout), given["step"]
            size = node.meta["val"].shape[dim]
            start = given["start"] or 0
            if not isinstance(size, int) or not isinstance(start, int) or start < 0:
                return None
            if size == source.meta["val"].shape[dim]:
                return key, item
            return self._narrowed(key, item, dim, start, size, step)
        if node.target is aten.select.int:
            dim = given["dim"] % len(item.layout)
            return self._narrowed(key, item, dim, given["index"], None, 1)
        layout = through(node, item.layout)
        return None if layout is None else (key, dataclasses.replace(item, layout=layout))

    def _behind(self, node: fx.Node, reader: fx.Node) -> tuple[Any, _Linear] | None:
        return self._linear(self._writes.now(node, reader))

    def _with_bias(
        self, node: fx.Node, source: fx.Node, bias: fx.Node
    ) -> tuple[Any, _Linear] | None:
        found = self._behind(source, node)
        if found is None:
            return None
        key, item = found
        self._nodes.add(node)
        biases = (*item.biases, self._bias(bias, item.layout))
        return (key, bias), dataclasses.replace(item, biases=biases)

    def _item(self, node: fx.Node) -> tuple[Any, _Linear] | None:
        """One of the results of ``chunk`` and the like."""
        split, place = node.args
        assert isinstance(split, fx.Node) and isinstance(place, int)
        if split.target not in _SPLITS:
            return None
        given = arguments(split)
        source = given["self"]
        found = self._behind(source, split)
        if found is None:
            return None
        key, item = found
        self._nodes |= {node, split}
        dim = given["dim"] % len(item.layout)
        if split.target is aten.unbind.int:
            return self._narrowed(key, item, dim, place, None, 1)
        sizes = [value.shape[dim] for value in split.meta["val"]]
        if not all(isinstance(size, int) for size in sizes):
            return None
        return self._narrowed(key, item, dim, sum(sizes[:place]), sizes[place], 1)

    @staticmethod
    def _narrowed(
        key: Any, item: _Linear, dim: int, start: int, size: int | None, step: int
    ) -> tuple[Any, _Linear] | None:
        """A part of the features of a linear layer; None if another axis is cut."""
        axes = leaves(item.layout)[dim]
        if len(axes) != 1 or axes[0] not in item.weight.axes() or not isinstance(start, int):
            return None
        to = None if size is None else Axis(size)
        cut = Narrowing(axes[0], start % axes[0].size, step, to)
        kept = () if to is None else (to,)
        if size is None:
            layout = (*item.layout[:dim], *item.layout[dim + 1 :])
        else:
            layout = (*item.layout[:dim], kept, *item.layout[dim + 1 :])

        def narrow(weight: Weight) -> Weight:
            return dataclasses.replace(weight, parts=(*weight.parts, cut))

        return (key, dim, start, size, step), dataclasses.replace(
            item,
            layout=layout,
            weight=narrow(item.weight),
            biases=tuple(narrow(bias) for bias in item.biases),
        )

    def _product(self, product: Product) -> tuple[Any, _Linear] | None:
        """A first linear layer, whole."""
        node = product.node
        x, chain = source_of(product.left)
        x = self._writes.now(x, chain[0] if chain else node)
        self._nodes.add(node)
        weighted = self._weighted_tokens(x) if self._weighted else None
        if weighted is not None:
            x, before = weighted
        elif x in self._tokens:
            before = self._tokens[x][0]
        else:
            before = fresh(x)
            self._tokens[x] = before, None
        layout = forward(chain, before)
        weight = Weight(product.right, fresh(product.right))
        if layout is None:
            return None
        axes = product.axes(layout, weight.layout)
        if axes is None:
            return None
        result = tuple(axes[a] for a in product.out_letters)
        features = tuple(axis for a in product.contracted for axis in axes[a])
        biases = () if product.bias is None else (self._bias(product.bias, result),)
        return node, _Linear(product, result, weight, biases, features)

    def _weighted_tokens(self, node: fx.Node) -> tuple[fx.Node, Layout]:
        """Tokens times their weights: x.repeat(E, 1) * weights."""
        if node.target is not aten.mul.Tensor:
            raise Refused("the sum of all experts is not weighted")
        for mine, other in (("self", "other"), ("other", "self")):
            rows, weights = arguments(node)[mine], arguments(node)[other]
            if not isinstance(rows, fx.Node) or not isinstance(weights, fx.Node):
                continue
            if not same_shape(rows, node):
                continue
            x, chain = source_of(rows)
            if not any(step.target in _COPIES for step in chain):
                continue
            known = self._tokens.get(x)
            if known is not None:
                raise Refused("the linear layers of an expert read tokens of different weights")
            base = fresh(x)
            layout = forward(chain, base)
            gates, gate_chain = source_of(weights)
            gates = self._writes.now(gates, node)
            gate_layout = fresh(gates)
            turned = forward(gate_chain, gate_layout)
            if layout is None or turned is None:
                continue
            if not aligned(layout, turned):
                continue
            self._tokens[x] = base, (gates, gate_layout, gate_chain[0] if gate_chain else node)
            self._nodes.add(node)
            return x, layout
        raise Refused("the sum of all experts is not weighted")

    def _bias(self, node: fx.Node, layout: Layout) -> Weight:
        """A bias in the axes of what it is added to."""
        if not self._static.is_static(node):
            raise Refused("an expert adds what is no parameter")
        own = fresh(node)
        if not aligned(layout, own):
            raise Refused("an expert's bias does not fit its features")
        return Weight(node, own)


_COPIES = {aten.repeat.default, aten.expand.default, aten.repeat_interleave.self_int}


def linear_behind(node: fx.Node, static: StaticValues) -> fx.Node | None:
    """The linear layer that a value comes from by a few operators of one input, or None."""
    for _ in range(_MOST_STEPS):
        if read_linear(node, static) is not None:
            return node
        inputs = [source for source in node.all_input_nodes if not static.is_static(source)]
        if len(inputs) != 1:
            return None
        node = inputs[0]
    return None

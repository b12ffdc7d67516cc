"""Cuts the dead channels out of a group: smaller weights, and the same operators on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from sparse_compiler.derived import Derived, DoesNotFit, derive
from sparse_compiler.passes.dead_channels.cover import Witnesses, find_dead
from sparse_compiler.passes.dead_channels.dims import (
    Axis,
    operand_axis,
    operator_name,
    shape,
)
from sparse_compiler.passes.dead_channels.group import Group, Layer, Step
from sparse_compiler.passes.dead_channels.weights import Values
from sparse_compiler.region import Builder, Region
from sparse_compiler.static import StaticExpression, StaticValues, arguments, combine

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which units go.

    Attributes:
        group: the channels.
        layers: every layer of the graph, by node.
        strangers: tensors that may hold infinities of their own.
        dead: all dead units.
        removed: those that are cut out; the others stay as witnesses, or to fill a vector.
        expressions: of the static nodes the group reads.
    """

    group: Group
    layers: Mapping[fx.Node, Layer]
    strangers: tuple[fx.Node, ...]
    dead: torch.Tensor
    removed: torch.Tensor
    expressions: Mapping[fx.Node, StaticExpression]

    def kept(self, axis: Axis, size: int) -> torch.Tensor:
        """Positions along a dimension that stay."""
        return self.group.positions(axis, size, ~self.removed)

    def resized(self, axis: Axis, size: int) -> int:
        """A dimension's size after the cut."""
        return size // self.group.units * int((~self.removed).sum())

    def check(self, values: Values) -> None:
        """Whether the cut is still exact for these values of the static nodes.

        Raises:
            DoesNotFit: it is not.
        """
        dead = find_dead(self.group, self.layers, values).units
        if not bool(dead[self.removed].all()):
            raise DoesNotFit("a channel that was removed is no longer dead")
        witnesses = Witnesses(self.group, self.layers, values, self.strangers)
        if not witnesses.cover(self.removed, dead & ~self.removed):
            raise DoesNotFit("the dead channels that were kept do not stand for the removed ones")


def static_nodes(group: Group, static: StaticValues) -> list[fx.Node]:
    """Static nodes whose values decide which channels of a group are dead."""
    nodes = [node for step in group.steps for node in step.reads]
    nodes += [node for reader in group.readers for node in (reader.weight, reader.bias) if node]
    return [node for node in dict.fromkeys(nodes) if shape_is_static(node, static)]


def shape_is_static(node: fx.Node, static: StaticValues) -> bool:
    """Whether a node is a tensor that parameters and buffers alone decide."""
    return isinstance(node.meta.get("val"), torch.Tensor) and static.is_static(node)


def region_of(group: Group) -> Region:
    """The group, its readers, and what lies in between and depends on it."""
    inside = {*group.axes, *(reader.node for reader in group.readers)}
    order = list(next(iter(inside)).graph.nodes)
    places = [i for i, node in enumerate(order) if node in inside]
    for node in order[places[0] : places[-1] + 1]:
        if any(argument in inside for argument in node.all_input_nodes):
            inside.add(node)
    return Region.of(inside)


class Cut:
    """Builds the replacement of a group's region.

    Args:
        plan: what to remove.
        region: what is replaced.
        target: name of the candidate, for messages.
        values: of the static nodes.

    Attributes:
        derived: records of the new constants.
        inputs: what the readers read now, and the dimension the channels are in.
    """

    def __init__(self, plan: Plan, region: Region, target: str, values: Values) -> None:
        self._plan, self._region, self._target, self._values = plan, region, target, values
        self._steps = {step.node: step for step in plan.group.steps}
        self._readers = {reader.node for reader in plan.group.readers}
        self._env: dict[fx.Node, fx.Node] = {}
        self._constants: dict[Any, fx.Node] = {}
        self._unfolded: list[Layer] = []
        self.derived: list[Derived] = []
        self.inputs: list[tuple[fx.Node, int]] = []

    def __call__(self, builder: Builder, *inputs: fx.Node) -> list[fx.Node]:
        """As ``replace_region`` wants it."""
        for node in self._region.nodes:
            if node in self._readers or (node in self._plan.layers and node in self._steps):
                made = self._layer(builder, self._plan.layers[node])
            elif node in self._steps:
                made = self._step(builder, self._steps[node])
            else:
                made = self._again(builder, node, {})
            self._env[node] = made
        axes = self._plan.group.axes
        self.inputs = [(self._env[r.x], axes[r.x].dim) for r in self._plan.group.readers]
        return [self._env[node] for node in self._region.outputs]

    def _again(
        self,
        builder: Builder,
        node: fx.Node,
        swapped: Mapping[fx.Node, fx.Node],
        literals: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        """The same call on the smaller tensors, with some operands and literals changed."""

        def new(argument: fx.Node) -> fx.Node:
            return swapped.get(argument) or self._env.get(argument, argument)

        args = list(fx.node.map_arg(node.args, new))
        kwargs = dict(fx.node.map_arg(node.kwargs, new))
        for name, value in (literals or {}).items():
            names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
            if names.index(name) < len(args):
                args[names.index(name)] = value
            else:
                kwargs[name] = value
        return builder.call(node.target, *args, **kwargs)  # type: ignore[arg-type]

    def _layer(self, builder: Builder, layer: Layer) -> fx.Node:
        cuts: list[tuple[int, Axis]] = []
        swapped: dict[fx.Node, fx.Node] = {}
        written = self._plan.group.axes.get(layer.node)
        reader = layer.node in self._readers
        if written is not None:
            cuts.append((layer.out_dims[written.dim], written))
            if layer.bias is not None:
                swapped[layer.bias] = self._constant(builder, layer.bias, [(0, written)])
        if reader:
            axis = self._plan.group.axis_of_reader(layer)
            cuts.append((layer.in_dims[axis.dim], axis))
        swapped[layer.weight] = self._constant(builder, layer.weight, cuts)
        if reader and self._folded(layer, self._values) is None:
            self._unfolded.append(layer)
            reader = False
        if not reader:
            return self._again(builder, layer.node, swapped)
        bias = self._bias(builder, layer, written)
        if layer.bias is not None:
            return self._again(builder, layer.node, {**swapped, layer.bias: bias})
        if "bias" in arguments(layer.node):
            return self._again(builder, layer.node, swapped, {"bias": bias})
        return builder.call(aten.add.Tensor, self._again(builder, layer.node, swapped), bias)

    def _folded(self, reader: Layer, values: Values) -> torch.Tensor | None:
        """What the removed channels add to a reader's outputs, or None for nothing."""
        plan = self._plan
        state = find_dead(plan.group, plan.layers, values).states[reader.x]
        axis = plan.group.axis_of_reader(reader)
        removed = plan.group.positions(axis, len(state.known), plan.removed)
        numbers = torch.where(state.known, state.value, 0)[removed].double()
        if not bool((numbers != 0).any()):
            return None
        weight = values[reader.weight]
        columns = weight.movedim(reader.in_dims[axis.dim], 0)[removed.to(weight.device)].double()
        (out,) = reader.out_dims.values()
        out -= out > reader.in_dims[axis.dim]
        rest = [d for d in range(columns.dim() - 1) if d != out]
        columns = columns.sum(dim=[d + 1 for d in rest]) if rest else columns
        return numbers.to(weight.device) @ columns

    def _bias(self, builder: Builder, layer: Layer, written: Axis | None) -> fx.Node:
        """A constant: the reader's bias with the removed channels' constants."""
        ((place, _),) = layer.out_dims.items()
        dims = len(shape(layer.node)) - place - 1 if "bias" not in arguments(layer.node) else 0
        kept = self._plan.kept(written, shape(layer.node)[place]) if written else None

        def make(own: torch.Tensor, values: Values) -> torch.Tensor:
            added = self._folded(layer, values)
            total = values[layer.bias].double() if layer.bias is not None else torch.zeros(())
            total = total if added is None else total.to(added.device) + added
            total = total.expand(shape(layer.node)[place])
            total = total if kept is None else total[kept.to(total.device)]
            return total.to(own.dtype).reshape(-1, *[1] * (dims if layer.bias is None else 0))

        return self._derived(builder, layer.bias or layer.weight, make, "bias")

    def _step(self, builder: Builder, step: Step) -> fx.Node:
        node, axis, plan = step.node, step.axis, self._plan
        swapped: dict[fx.Node, fx.Node] = {}
        for operand in step.reads:
            if operand not in plan.expressions:
                continue
            if step.kind in ("batch_norm", "depthwise"):
                swapped[operand] = self._constant(builder, operand, [(0, Axis(0, axis.outer))])
            else:
                source = operand_axis(node, operand, axis)
                if source is not None:
                    swapped[operand] = self._constant(builder, operand, [(source.dim, source)])
        return self._again(builder, node, swapped, self._literals(step))

    def _literals(self, step: Step) -> dict[str, Any]:
        """Sizes among a call's arguments that the cut changes."""
        name, axis, given = operator_name(step.node), step.axis, step.given
        new = self._plan.resized(axis, step.size)
        if step.kind == "depthwise":
            source = self._plan.group.axes[step.args[0]]
            return {"groups": self._plan.resized(source, given["groups"])}
        resizes = ("view", "reshape", "_unsafe_view", "expand", "unflatten")
        for key in ("size", "shape", "sizes") if name in resizes else ():
            if key not in given:
                continue
            sizes = list(given[key])
            dim = axis.dim
            if name == "unflatten":
                dim -= given["dim"] % (len(shape(step.node)) - len(sizes) + 1)
            if 0 <= dim < len(sizes) and sizes[dim] != -1:
                sizes[dim] = new
            return {key: sizes}
        if step.kind == "pieces" and given["dim"] % len(shape(step.node)) == axis.dim:
            if name == "split":
                return {"split_size": new}
            if name == "split_with_sizes":
                return {"split_sizes": [new] * len(given["split_sizes"])}
        return {}

    def _constant(
        self, builder: Builder, source: fx.Node, cuts: Iterable[tuple[int, Axis]]
    ) -> fx.Node:
        """The source without the removed positions along some of its dimensions."""
        cuts = tuple(cuts)
        key = (source, cuts)
        if key not in self._constants:
            sizes = shape(source)
            places = [(dim, self._plan.kept(axis, sizes[dim])) for dim, axis in cuts]

            def make(own: torch.Tensor, values: Values) -> torch.Tensor:
                for dim, kept in places:
                    own = own.index_select(dim, kept.to(own.device))
                return own

            self._constants[key] = self._derived(builder, source, make, "kept")
        return self._constants[key]

    def _derived(self, builder: Builder, source: fx.Node, make: Any, name: str) -> fx.Node:
        expressions = self._plan.expressions
        nodes = list(expressions)

        def remake(own: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            known = Values(zip(nodes, values, strict=True))
            self._plan.check(known)
            if any(self._folded(reader, known) is not None for reader in self._unfolded):
                raise DoesNotFit("a removed channel is no longer zero")
            return make(own, known)

        expression = combine(remake, [expressions[source], *expressions.values()])
        node = builder.constant(name, make(self._values[source], self._values).contiguous())
        self.derived.append(
            derive([str(node.target)], expression, lambda v: [v.contiguous()], self._target)
        )
        return node

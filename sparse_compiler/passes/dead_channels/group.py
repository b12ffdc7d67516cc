"""Channel groups: everything that has to be cut together when a channel is removed.

A group starts at the input of a layer (its *reader*) and is followed backwards to the layers that
compute the channels (its *writers*) and forwards to all other readers, through everything that
keeps channels apart. What mixes channels, or shows them to the outside, is a blocker: a sentence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.contraction import Contraction, find_contractions
from sparse_compiler.passes.dead_channels.dims import (
    KINDS,
    Axis,
    operand_axis,
    operator_name,
    refuse_operator,
    result_axis,
    shape,
)
from sparse_compiler.static import StaticValues, arguments

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution with a static weight.

    Attributes:
        in_dims: from dimensions of ``x`` that are summed over to dimensions of the weight.
        out_dims: from dimensions of the result to dimensions of the weight.
        geometry: which inputs an output sees, besides channels; equal geometries see the same,
            and () is its own row.
        padded: whether zeros are padded in, so that a constant input is none at the border.
        name: the weight's module path, for reports.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    in_dims: Mapping[int, int]
    out_dims: Mapping[int, int]
    geometry: tuple[Any, ...]
    padded: bool
    name: str

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """out_features and in_features; the taps of a kernel count as inputs."""
        sizes = shape(self.weight)
        outs = math.prod(sizes[d] for d in self.out_dims.values())
        used = {*self.out_dims.values(), *self.in_dims.values()}
        taps = sizes[2:] if self.node.target in _CONVOLUTIONS else ()
        ins = math.prod(sizes[d] for d in used - set(self.out_dims.values())) * math.prod(taps)
        return outs, ins


def find_layers(gm: fx.GraphModule, static: StaticValues) -> dict[fx.Node, Layer]:
    """Every layer of the graph, in graph order."""
    found = {item.node: item for item in find_contractions(gm, static)}
    layers: dict[fx.Node, Layer] = {}
    for node in gm.graph.nodes:
        layer = None
        if node.target in _CONVOLUTIONS:
            layer = _convolution(node, static)
        elif node in found:
            layer = _linear(found[node], static)
        if layer is not None:
            layers[node] = layer
    return layers


def _name(weight: fx.Node, static: StaticValues) -> str:
    expression = static.expression(weight)
    assert expression is not None
    names = [static.name(leaf) for leaf in expression.leaves]
    name = next((name for name in names if "mask" not in name), weight.name)
    for suffix in (".weight", ".weight_orig", ".original", ".parametrizations.weight"):
        name = name.removesuffix(suffix)
    return name


def _linear(item: Contraction, static: StaticValues) -> Layer:
    x, w, out = item.x_letters, item.w_letters, item.out_letters
    rows = tuple(x.find(a) for a in out)
    in_place = all(place in (-1, i) for i, place in enumerate(rows))
    return Layer(
        item.node,
        item.x,
        item.weight,
        item.bias,
        {i: w.index(a) for i, a in enumerate(x) if a in item.in_letters},
        {i: w.index(a) for i, a in enumerate(out) if a in item.out_feature_letters},
        () if in_place else ("linear", *rows),
        False,
        _name(item.weight, static),
    )


def _convolution(node: fx.Node, static: StaticValues) -> Layer | None:
    given = arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    if given["groups"] != 1 or static.is_static(x) or not static.is_static(weight):
        return None
    if len(shape(x)) != len(shape(weight)):
        return None
    padding = given["padding"]
    geometry = tuple(str(given[key]) for key in ("stride", "padding", "dilation"))
    return Layer(
        node,
        x,
        weight,
        bias,
        {1: 1},
        {1: 0},
        ("convolution", *shape(weight)[2:], *geometry),
        padding == "same" or any(p != 0 for p in padding if not isinstance(p, str)),
        _name(weight, static),
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """One node of a group, with a copy of its arguments: a rewrite erases the node."""

    node: fx.Node
    kind: str
    args: tuple[Any, ...]
    given: Mapping[str, Any]
    axis: Axis
    reads: tuple[fx.Node, ...]

    @property
    def size(self) -> int:
        return int(shape(self.node)[self.axis.dim])


@dataclasses.dataclass
class Group:
    """Channels that live and die together.

    Attributes:
        axes: where they are, in every tensor that carries them.
        units: how many there are: single channels, or heads.
        writers: layers that compute them.
        readers: layers that sum over them, with the dimension of ``x`` they are in.
        strangers: tensors without channels that pointwise operators mix in.
        blockers: sentences that say why no channel can be removed.
        steps: the nodes in ``axes``, in graph order.
    """

    axes: dict[fx.Node, Axis] = dataclasses.field(default_factory=dict)
    units: int = 0
    writers: list[Layer] = dataclasses.field(default_factory=list)
    readers: list[Layer] = dataclasses.field(default_factory=list)
    strangers: list[fx.Node] = dataclasses.field(default_factory=list)
    blockers: list[str] = dataclasses.field(default_factory=list)
    steps: list[Step] = dataclasses.field(default_factory=list)

    def axis_of_reader(self, reader: Layer) -> Axis:
        """The channel axis of a reader's input."""
        return self.axes[reader.x]

    def positions(self, axis: Axis, size: int, kept: torch.Tensor) -> torch.Tensor:
        """Indices along a dimension of ``size`` that belong to the kept units."""
        places = torch.arange(size).view(axis.outer, self.units, -1)
        return places[:, kept].flatten()

    def by_unit(self, vector: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Values along a dimension as [units, outer * span]."""
        return vector.view(axis.outer, self.units, -1).transpose(0, 1).flatten(1)


def grow(start: Layer, dim: int, layers: Mapping[fx.Node, Layer], static: StaticValues) -> Group:
    """The group of the channels that ``start`` reads along dimension ``dim`` of its input."""
    group = Group()
    queue: list[fx.Node] = []

    def assign(node: fx.Node, axis: Axis) -> None:
        size = shape(node)[axis.dim] if shape(node) else None
        if not isinstance(size, int) or size % axis.outer:
            group.blockers.append(f"the channels of {node.name} are a dynamic dimension")
        elif group.axes.setdefault(node, axis) != axis:
            group.blockers.append(f"{node.name} carries the channels in two ways")
        elif node not in queue:
            group.units = math.gcd(group.units, size // axis.outer)
            queue.append(node)

    assign(start.x, Axis(dim))
    for node in queue:  # grows while it is walked
        if group.units < 2:
            group.blockers.append("the channels cannot be told apart")
            break
        _backwards(node, group, layers, static, assign)
        _forwards(node, group, layers, assign)
    if not group.blockers:
        order = {node: i for i, node in enumerate(start.node.graph.nodes)}
        for node in sorted(group.axes, key=order.__getitem__):
            layer = layers.get(node)
            kind = "layer" if layer is not None else KINDS[node.target]
            reads = tuple(node.all_input_nodes)
            step = Step(node, kind, node.args, arguments(node), group.axes[node], reads)
            group.steps.append(step)
    return group


def _backwards(
    node: fx.Node,
    group: Group,
    layers: Mapping[fx.Node, Layer],
    static: StaticValues,
    assign: Callable[[fx.Node, Axis], None],
) -> None:
    axis = group.axes[node]
    layer = layers.get(node)
    if layer is not None:
        if axis.dim not in layer.out_dims:
            group.blockers.append(f"{layer.name} is applied to every channel on its own")
        elif layer.bias is not None and not _plain_bias(layer, static):
            group.blockers.append(f"the bias of {layer.name} is not a parameter")
        else:
            group.writers.append(layer)
        return
    if node.op != "call_function":
        group.blockers.append(f"{node.name} comes from outside the graph")
        return
    refusal = refuse_operator(node)
    if refusal:
        group.blockers.append(refusal)
        return
    found = False
    for operand in node.all_input_nodes:
        if not shape(operand):
            continue
        source = operand_axis(node, operand, axis)
        if static.is_static(operand):
            if source is not None and KINDS[node.target] not in ("pointwise", "batch_norm"):
                group.blockers.append(f"{operand.name} is a parameter and carries channels")
        elif source is not None:
            assign(operand, source)
            found = True
        elif KINDS[node.target] == "pointwise":
            group.strangers.append(operand)
        elif KINDS[node.target] != "attention":  # a mask, which is the same for every head
            group.blockers.append(f"{operator_name(node)} mixes channels")
    if not found and not group.blockers:
        group.blockers.append(f"{operator_name(node)} makes channels of something else")


def _plain_bias(layer: Layer, static: StaticValues) -> bool:
    bias = layer.bias
    assert bias is not None
    return static.is_static(bias) and len(shape(bias)) == 1 and len(layer.out_dims) == 1


def _forwards(
    node: fx.Node,
    group: Group,
    layers: Mapping[fx.Node, Layer],
    assign: Callable[[fx.Node, Axis], None],
) -> None:
    axis = group.axes[node]
    for user in node.users:
        layer = layers.get(user)
        if layer is not None:
            if node is not layer.x or node is layer.bias or axis.dim not in layer.in_dims:
                group.blockers.append(f"{layer.name} is applied to every channel on its own")
            else:
                group.readers.append(layer)
            continue
        if user.op == "output":
            group.blockers.append(f"{node.name} is an output of the graph")
            continue
        if user.target is aten.sym_size.int and user.args[1] != axis.dim:
            continue
        refusal = refuse_operator(user)
        if refusal:
            group.blockers.append(refusal)
            continue
        target = result_axis(user, node, axis)
        if target is None:
            group.blockers.append(f"{operator_name(user)} mixes channels")
        else:
            assign(user, target)

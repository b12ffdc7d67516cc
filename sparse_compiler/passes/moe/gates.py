"""Gates of which most are 0: a proof, and which of them are not.

A model that runs every expert on every token weights the results with gates [.., E]. What the
others were computed for is lost where at most K gates of a token can be other than 0, for every
input: where they are scattered to the places of a top-k, multiplied by one-hot vectors, or the
softmax of what is -inf elsewhere. ``Backgrounds`` proves that and finds the places, the experts'
ids; the gates themselves are read at these places, whatever the model does to them.
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
    expanded,
    forward,
    fresh,
    regroup,
    source_of,
)
from sparse_compiler.passes.moe.backgrounds import Background, Backgrounds
from sparse_compiler.passes.moe.spots import Size, Spots
from sparse_compiler.region import Builder
from sparse_compiler.static import arguments

aten = torch.ops.aten

SOFT = "every expert has a weight for every token: the gates are soft"
_THRESHOLD = (
    "its gates are those above a threshold: where scores are tied, more than k of them are left"
)
_COMPARED = ("lt", "le", "gt", "ge", "less", "greater", "less_equal", "greater_equal")
_MOST_NODES = 64


@dataclasses.dataclass(frozen=True)
class Routed:
    """Gates of which at most ``choices`` of a token are not 0.

    Attributes:
        spots: where, along the dimension of the experts.
        choices: K.
        experts: E.
        dim: the dimension of the experts.
        distinct: whether no expert is chosen twice for a token.
    """

    spots: tuple[Spots, ...]
    choices: int
    experts: int
    dim: int
    distinct: bool

    def nodes(self) -> set[fx.Node]:
        """The nodes that the ids are made from."""
        return {node for item in self.spots for node in item.nodes()}

    def sized(self) -> set[fx.Node]:
        """The nodes whose sizes the ids are made with."""
        return {node for item in self.spots for node in item.sized()}

    def ids(self, builder: Builder, shape: Sequence[object]) -> fx.Node:
        """The experts' ids, int64; -1 for one that stands there already.

        Args:
            builder: makes the nodes.
            shape: the sizes of the gates but that of the experts, numbers or nodes.
        """
        whole = [*shape[: self.dim], -1, *shape[self.dim :]]
        parts = []
        for item in self.spots:
            part = item.build(builder)
            if any(size == 1 for size in item.shape):
                part = builder.call(aten.expand.default, part, whole)
            if part.meta["val"].dtype is not torch.int64:
                part = builder.call(aten.to.dtype, part, torch.int64)
            parts.append(part)
        ids = parts[0]
        if len(parts) > 1:
            ids = builder.call(aten.cat.default, parts, self.dim)
        return ids if self.distinct else _once(builder, ids, self.dim)

    def at(self, builder: Builder, gates: fx.Node, ids: fx.Node) -> fx.Node:
        """The gates at the ids."""
        if not (self.distinct and all(item.inside for item in self.spots)):
            ids = builder.call(aten.clamp.default, ids, 0, self.experts - 1)
        return builder.call(aten.gather.default, gates, self.dim, ids)


def _once(builder: Builder, ids: fx.Node, dim: int) -> fx.Node:
    """Ids with -1 for those that are in their row before."""
    count = ids.meta["val"].shape[dim]
    rows = builder.call(aten.unsqueeze.default, ids, dim + 1)
    columns = builder.call(aten.unsqueeze.default, ids, dim)
    same = builder.call(aten.eq.Tensor, rows, columns)
    value = ids.meta["val"]
    earlier = builder.call(aten.ones.default, [count, count], dtype=torch.bool, device=value.device)
    earlier = builder.call(aten.tril.default, earlier, -1)
    behind = value.dim() - 1 - dim
    if behind:
        shape = [count, count, *[1] * behind]
        earlier = builder.call(aten.reshape.default, earlier, shape)
    both = builder.call(aten.logical_and.default, same, earlier)
    again = builder.call(aten.any.dim, both, dim + 1)
    return builder.call(aten.masked_fill.Scalar, ids, again, -1)


def routed(
    backgrounds: Backgrounds, gates: fx.Node, dim: int, experts: int, at: fx.Node
) -> Routed | str:
    """Which gates of a token may be other than 0, or why all of them may.

    Args:
        backgrounds: those of the graph.
        gates: the gates.
        dim: their dimension of the experts; for one expert's gates, the one behind the last.
        experts: E.
        at: the node that reads them.

    Returns:
        The places, or a sentence.
    """
    found = backgrounds.of(gates, dim, at)
    if found is None or found.value != 0:
        return _why(gates)
    return _of(found, dim, experts)


def _of(found: Background, dim: int, experts: int) -> Routed | str:
    if not found.spots:
        return "its gates are all 0"
    choices = found.count
    if choices >= experts:
        return f"as many as {choices} of its {experts} experts have a weight for each token"
    distinct = choices == 1 or (len(found.spots) == 1 and _is_top(found.spots[0], dim))
    return Routed(found.spots, choices, experts, dim, distinct)


def routed_columns(
    backgrounds: Backgrounds, columns: Sequence[fx.Node], at: Sequence[fx.Node]
) -> Routed | str:
    """The same of gates that are one tensor an expert: ``(ids == i) * weights`` of expert i."""
    first: Background | None = None
    dim = columns[0].meta["val"].dim()
    for index, (column, reader) in enumerate(zip(columns, at, strict=True)):
        found = backgrounds.of_expert(index).of(column, dim, reader)
        if found is None or found.value != 0:
            return _why(column)
        if first is not None and found.spots != first.spots:
            return "its experts are not chosen by the same ids"
        first = first or found
    assert first is not None
    return _of(first, dim, len(columns))


def _is_top(item: Spots, dim: int) -> bool:
    """Whether the indices of a row are those of a top-k, which are all different."""
    base, chain = source_of(item.source)
    if base.target is not operator.getitem or base.args[1] != 1:
        return False
    top = base.args[0]
    assert isinstance(top, fx.Node)
    if top.target not in (aten.topk.default, aten.sort.default, aten.sort.stable):
        return False
    layout = fresh(base)
    place = arguments(top)["dim"] % len(layout)
    row = layout[place]
    found = forward(chain, layout)
    for target, args in item.steps:
        found = None if found is None else _step(target, args, found)
    return found is not None and _leaves(found[dim]) == _leaves(row)


def _leaves(axes: Sequence[Axis]) -> list[Axis]:
    return [leaf for axis in axes for leaf in axis.leaves()]


def _step(target: Any, args: tuple[Any, ...], layout: Layout) -> Layout | None:
    """The layout behind one of the steps of spots."""
    if target is aten.unsqueeze.default:
        return (*layout[: args[0]], (), *layout[args[0] :])
    if target is aten.permute.default:
        return tuple(layout[dim] for dim in args[0])
    if target is aten.select.int:
        return (*layout[: args[0]], *layout[args[0] + 1 :])
    sizes = [s.node.meta["val"].shape[s.dim] if isinstance(s, Size) else s for s in args[0]]
    return expanded(layout, sizes) if target is aten.expand.default else regroup(layout, sizes)


def _why(gates: fx.Node) -> str:
    """Why gates are not seen to be mostly 0."""
    seen: set[fx.Node] = set()
    waiting = [gates]
    compared = top = False
    while waiting and len(seen) < _MOST_NODES:
        node = waiting.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        name = str(node.target).removeprefix("aten.").split(".")[0]
        compared = compared or name in _COMPARED
        top = top or name in ("topk", "kthvalue", "sort", "quantile")
        waiting.extend(node.all_input_nodes)
    return _THRESHOLD if compared and top else SOFT

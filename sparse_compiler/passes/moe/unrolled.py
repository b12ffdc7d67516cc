"""Every expert on every token, with experts of their own: a loop over modules, unrolled.

``stack([expert(x) for expert in experts])`` weighted and summed, ``out += expert(x) * gates[:, i]``
and the like: E alike experts that read the same tokens. Each is read once (``expert``), so that the
time grows with the number of nodes and no faster, and all of them become one operator.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.moe.assemble import Factor, Mixture, assemble
from sparse_compiler.passes.moe.axes import (
    Axis,
    Layout,
    aligned,
    forward,
    fresh,
    keeps_shape,
    leaves,
    same_shape,
    unify,
)
from sparse_compiler.passes.moe.backgrounds import Backgrounds
from sparse_compiler.passes.moe.expert import DEEP, Experts, Reader, linear_behind
from sparse_compiler.passes.moe.site import Refusal, Refused, Site
from sparse_compiler.passes.moe.weighted import (
    Read,
    Results,
    accounted,
    behind_views,
    factor_of,
    factors_of,
    sums,
)
from sparse_compiler.passes.moe.writes import Writes
from sparse_compiler.static import StaticValues, arguments

aten = torch.ops.aten

_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_STACKED = "every expert (stacked results)"
_ADDED = "every expert (loop)"


def find(gm: fx.GraphModule, static: StaticValues) -> Iterator[Site | Refusal]:
    """Mixtures of experts that are modules of their own, in graph order."""
    backgrounds = Backgrounds(gm.graph)
    reader = Reader(static, backgrounds.writes)
    refusals: dict[fx.Node, Refusal] = {}
    read = _listed(reader, refusals)
    found: list[Mixture] = list(sums(gm, read, backgrounds.writes, _STACKED))
    for top, terms in _chains(gm, backgrounds.writes):
        try:
            mixture = _added(top, terms, reader, backgrounds)
        except Refused as refused:
            refusals[top] = Refusal(top, _ADDED, str(refused))
            continue
        if mixture is not None:
            found.append(mixture)
    sites: list[Site | Refusal] = list(refusals.values())
    for mixture in found:
        if not accounted(mixture):
            continue
        try:
            sites.append(assemble(mixture, backgrounds))
        except Refused as refused:
            sites.append(Refusal(mixture.node, mixture.spelling, str(refused)))
    yield from sorted(sites, key=lambda site: site.node)


def _listed(reader: Reader, refusals: dict[fx.Node, Refusal]) -> Read:
    """Reads the results of experts that are stacked behind each other."""

    def read(node: fx.Node, at: fx.Node) -> Results | None:
        base, chain = behind_views(node, at, reader.writes)
        if base.target not in (aten.stack.default, aten.cat.default):
            return None
        given = arguments(base)
        items = given["tensors"]
        if len(items) < 2:
            return None
        try:
            experts = [reader.experts(item, base) for item in items]
            whole = [item for item in experts if item is not None and item.expert is None]
            if len(whole) != len(items):
                return None
            merge(whole, reader.static)
        except Refused as refused:
            refusals[base] = Refusal(base, _STACKED, str(refused))
            return None
        expert = Axis(len(items))
        layout = _stacked(base, given["dim"], leaves(whole[0].layout), expert)
        layout = forward(chain, layout)
        return None if layout is None else Results(tuple(whole), expert, leaves(layout))

    return read


def _stacked(node: fx.Node, dim: int, layout: Layout, expert: Axis) -> Layout | None:
    """The layout of results that are stacked, or of such with a dimension of 1 concatenated."""
    rank = node.meta["val"].dim()
    place = dim % rank
    if node.target is aten.stack.default:
        return (*layout[:place], (expert,), *layout[place:])
    if layout[place]:
        return None
    return (*layout[:place], (expert,), *layout[place + 1 :])


def merge(experts: Sequence[Experts], static: StaticValues) -> None:
    """Make the axes of alike experts the same.

    Raises:
        Refused: they do not read the same tokens, or differ in shape.
    """
    first = experts[0]
    for item in experts[1:]:
        if item.x is not first.x:
            layers = [linear_behind(other.x, static) for other in (first, item)]
            deep = None not in layers and layers[0] is not layers[1]
            raise Refused(DEEP if deep else "its experts do not read the same tokens")
        pairs = [*zip(first.x_layout, item.x_layout, strict=True)]
        if len(item.layout) != len(first.layout):
            raise Refused("its experts are not alike: they differ in shape")
        pairs += zip(first.layout, item.layout, strict=True)
        if not all(len(a) == len(b) and unify(a, b) for a, b in pairs):
            raise Refused("its experts are not alike: they differ in shape")


def _chains(gm: fx.GraphModule, writes: Writes) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Sums of two and more terms, each with its terms, first to last."""
    inside: set[fx.Node] = set()
    for node in reversed(list(gm.graph.nodes)):
        if node in inside or not _is_add(node):
            continue
        terms: list[fx.Node] = []
        waiting: list[tuple[Any, fx.Node]] = [(node, node)]
        while waiting:
            item, reader = waiting.pop()
            now = item if item is reader else _now(item, reader, writes)
            if now is not None and _is_add(now) and (now is node or _only(now, item, reader)):
                inside.add(now)
                given = arguments(now)
                waiting += [(given["other"], now), (given["self"], now)]
            elif isinstance(item, fx.Node):
                terms.append(item if now is None else now)
        yield node, terms


def _now(item: Any, reader: fx.Node, writes: Writes) -> fx.Node | None:
    if not isinstance(item, fx.Node):
        return None
    try:
        return writes.now(item, reader)
    except Refused:
        return None


def _only(now: fx.Node, item: fx.Node, reader: fx.Node) -> bool:
    """Whether a sum is read by the next one alone, under whatever name."""
    return set(now.users) <= {reader} and (now is item or reader in item.users)


def _is_add(node: fx.Node) -> bool:
    if node.target not in _ADDS:
        return False
    given = arguments(node)
    left, right = given["self"], given["other"]
    if given["alpha"] != 1 or not isinstance(left, fx.Node):
        return False
    if not isinstance(right, fx.Node):
        return right == 0
    values = (left.meta.get("val"), right.meta.get("val"))
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    return same_shape(left, node) and same_shape(right, node)


@dataclasses.dataclass(frozen=True)
class _Gate:
    """What one expert's result is multiplied by: one of many in a tensor, or its own."""

    node: fx.Node
    reader: fx.Node
    key: Any
    source: fx.Node
    chain: tuple[fx.Node, ...]
    picked: tuple[fx.Node, int, int] | None


@dataclasses.dataclass(frozen=True)
class _Term:
    node: fx.Node
    expert: Experts
    gates: tuple[_Gate, ...]
    scale: float


def _added(
    top: fx.Node, terms: list[fx.Node], reader: Reader, backgrounds: Backgrounds
) -> Mixture | None:
    """Out = expert_0(x) * g_0 + expert_1(x) * g_1 + ... + what else there is."""
    groups: dict[Any, list[_Term]] = {}
    unread: list[Refused] = []
    for node in terms:
        try:
            term = _term(node, reader)
        except Refused as refused:
            unread.append(refused)
            continue
        if term is not None:
            item = term.expert
            key = item.x, item.body, term.scale, tuple(gate.key for gate in term.gates)
            groups.setdefault(key, []).append(term)
    group = max(groups.values(), key=len, default=[])
    if len(group) < 2:
        if len(unread) > 1:
            raise unread[0]
        return None
    group = _in_order(group)
    merge([term.expert for term in group], reader.static)
    expert = Axis(len(group))
    whole = leaves(group[0].expert.layout)
    factors = [
        _factor([term.gates[place] for term in group], whole, expert, reader.writes)
        for place in range(len(group[0].gates))
    ]
    if any(factor is None for factor in factors):
        return None
    ours = {term.node for term in group}
    rest = [node for node in terms if node not in ours and not _is_zero(node, top, backgrounds)]
    return Mixture(
        node=top,
        layout=whole,
        experts=tuple(term.expert for term in group),
        expert=expert,
        factors=tuple(factor for factor in factors if factor is not None),
        spelling=_ADDED,
        scale=group[0].scale,
        rest=tuple(rest),
    )


def _is_zero(node: fx.Node, top: fx.Node, backgrounds: Backgrounds) -> bool:
    """Whether a term is a tensor of zeros."""
    if not node.meta["val"].dim():
        return False
    # As it was made: what is written to it are the other terms.
    found = backgrounds.of(node, 0, node)
    return found is not None and found.value == 0 and not found.spots


def _term(node: fx.Node, reader: Reader) -> _Term | None:
    product, chain = behind_views(node, node, reader.writes)
    if chain:
        return None
    weighted = factors_of(product, reader.writes)
    if len(weighted.factors) < 2:
        return None
    for place, (item, at) in enumerate(weighted.factors):
        if not same_shape(item, node):
            continue
        others = [pair for j, pair in enumerate(weighted.factors) if j != place]
        try:
            expert = reader.experts(item, at)
        except Refused:
            # Rotary embeddings are sums of products, too: a gate is one number for all features.
            if any(other.meta["val"].shape[-1:] != (1,) for other, _ in others):
                continue
            raise
        if expert is None or expert.expert is not None:
            continue
        gates = tuple(_gate(*pair, reader.writes) for pair in others)
        return _Term(node, expert, gates, weighted.scale)
    return None


def _gate(node: fx.Node, at: fx.Node, writes: Writes) -> _Gate:
    base, chain = behind_views(node, at, writes)
    first = chain[0] if chain else at
    picked = _picked(base)
    if picked is not None:
        source, dim, place = picked
        while keeps_shape(source):  # gates[:, i] is gates[:][:, i] to some traces
            source = writes.now(source.args[0], source)  # type: ignore[arg-type]
        picked = source, dim, place
        key: Any = "picked", source, dim, base.target
    else:
        key = "own", str(base.target)
    return _Gate(node, first, key, base, tuple(chain), picked)


def _picked(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Of one element along a dimension: the tensor, the dimension, the element."""
    if node.target is operator.getitem:
        split, place = node.args
        assert isinstance(split, fx.Node)
        kinds = (
            aten.unbind.int,
            aten.split.Tensor,
            aten.chunk.default,
            aten.split_with_sizes.default,
        )
        if split.target not in kinds or not isinstance(place, int):
            return None
        source, dim = arguments(split)["self"], arguments(split)["dim"]
        dim %= source.meta["val"].dim()
        alone = split.target is aten.unbind.int or all(
            value.shape[dim] == 1 for value in split.meta["val"]
        )
        return (source, dim, place) if alone else None
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return None
    given = arguments(node)
    source = given["self"]
    dim = given["dim"] % source.meta["val"].dim()
    size = source.meta["val"].shape[dim]
    if not isinstance(size, int):
        return None
    if node.target is aten.select.int:
        place = given["index"]
        return (source, dim, place % size) if isinstance(place, int) else None
    start = given["start"] or 0
    if node.meta["val"].shape[dim] != 1 or not isinstance(start, int):
        return None
    return source, dim, start % size


def _in_order(group: list[_Term]) -> list[_Term]:
    """The terms by their places in the gates.

    Raises:
        Refused: gates without experts, or experts that share one.
    """
    for place, gate in enumerate(group[0].gates):
        if gate.picked is None:
            continue
        source, dim, _ = gate.picked
        places = [picked[2] for term in group if (picked := term.gates[place].picked) is not None]
        if sorted(places) != list(range(len(group))):
            raise Refused("two of its experts have the same gate, or one has none")
        if source.meta["val"].shape[dim] != len(group):
            size = source.meta["val"].shape[dim]
            raise Refused(f"only {len(group)} of {size} gates are those of alike experts")
        return [term for _, term in sorted(zip(places, group, strict=True), key=lambda p: p[0])]
    return group


def _factor(gates: list[_Gate], whole: Layout, expert: Axis, writes: Writes) -> Factor | None:
    """The gates of all experts as one factor."""
    first = gates[0]
    if first.picked is None:
        if all(gate.source is first.source for gate in gates):
            return factor_of(first.node, first.reader, whole, writes)
        layouts = []
        for gate in gates:
            layout = fresh(gate.source)
            turned = forward(gate.chain, layout)
            if turned is None or not aligned(whole, turned):
                return None
            layouts.append(leaves(layout))
        if any(layout != layouts[0] for layout in layouts):
            return None
        columns = tuple((gate.source, gate.reader) for gate in gates)
        return Factor(first.source, layouts[0], first.reader, columns)
    source, dim, _ = first.picked
    base, chain = behind_views(source, first.source, writes)
    layout = fresh(base)
    many = forward(chain, layout)
    if many is None or len(leaves(many)[dim]) != 1 or not unify((expert,), many[dim]):
        return None
    for place, gate in enumerate(gates):
        if gate.picked is None or gate.picked[2] != place:
            return None
        keep = gate.source.meta["val"].dim() == len(many)
        one = (*many[:dim], *([()] if keep else []), *many[dim + 1 :])
        turned = forward(gate.chain, leaves(one))
        if turned is None or not aligned(whole, turned):
            return None
    return Factor(base, leaves(layout), chain[0] if chain else first.source)

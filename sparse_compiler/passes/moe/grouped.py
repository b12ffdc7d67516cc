"""Pairs sorted by expert, and one grouped product for each linear layer.

``perm = sort(ids)``; rows ``x[perm // K]``; ``_grouped_mm(rows, weight, offsets)`` (or the operator
of Hugging Face's with that meaning); the body; another grouped product; weights; back to the order
of the tokens, by the inverse of the permutation or by adding each row to its token. It is proved
that the offsets count the ids that are sorted, and that each row goes back where it came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.attention.symbols import sizes_of
from sparse_compiler.passes.moe.body import read_body
from sparse_compiler.passes.moe.copies import repeated
from sparse_compiler.passes.moe.follower import (
    ROWS,
    Combined,
    Dispatch,
    Follower,
    cast,
    column_root,
    gates_of,
    gates_or_ones,
)
from sparse_compiler.passes.moe.layout import FEATURES, SAME, Axis, Layout
from sparse_compiler.passes.moe.parts import Parts, bias_of, weight_of
from sparse_compiler.passes.moe.regions import region_of
from sparse_compiler.passes.moe.routing import Routing
from sparse_compiler.passes.moe.site import Make, Refusal, Refused, Site, given
from sparse_compiler.passes.moe.writes import Writes
from sparse_compiler.static import StaticValues, arguments

aten = torch.ops.aten

SPELLING = "grouped_mm"
_FALLBACK = "transformers::grouped_mm_fallback"
# Between two grouped products of one mixture there are a few pointwise operators.
_NEAR = 64


def find(gm: fx.GraphModule, static: StaticValues) -> Iterator[Site | Refusal]:
    """Every grouped product of the graph, as part of a site or of a refusal."""
    products = [node for node in gm.graph.nodes if _is_grouped(node)]
    if not products:
        return
    routing = Routing(Writes(gm.graph))
    firsts: dict[fx.Node, _First] = {}
    reasons: dict[fx.Node, str] = {}
    told: set[fx.Node] = set()
    for node in products:
        try:
            firsts[node] = _first(routing, node)
            continue
        except Refused as error:
            reasons[node] = str(error)
        near = _products_near(node)
        if not near:
            continue
        told |= {node, *near}
        try:
            yield _Reading(static, routing, firsts, reasons, node).site()
        except Refused as error:
            yield Refusal(node, SPELLING, str(error))
    for node in products:
        if node not in told:
            reason = reasons.get(node, "its rows reach no second grouped product")
            yield Refusal(node, SPELLING, reason)


def _is_grouped(node: fx.Node) -> bool:
    return schema_name(node) in ("_grouped_mm", _FALLBACK)


def _products_near(node: fx.Node) -> set[fx.Node]:
    """Grouped products that lead to ``node`` without another one in between."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = list(node.all_input_nodes[:1])
    while waiting and len(seen) < _NEAR:
        item = waiting.pop(0)
        if item in seen:
            continue
        seen.add(item)
        if _is_grouped(item):
            found.add(item)
        else:
            waiting.extend(item.all_input_nodes)
    return found


def _operands(routing: Routing, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Rows [S, D], weight [E, D, columns] and offsets [E] of a grouped product."""
    fallback = schema_name(node) == _FALLBACK
    names = ("input", "weight", "offs") if fallback else ("self", "mat2", "offs")
    rows, weight, ends = (routing.operand(node, name) for name in names)
    if not all(isinstance(item, fx.Node) for item in (rows, weight, ends)):
        raise Refused("its groups are not rows of one matrix")
    if rows.meta["val"].dim() != 2 or weight.meta["val"].dim() != 3:
        raise Refused("its groups are not rows of one matrix")
    if not all(size.is_Integer for size in sizes_of(weight)):
        raise Refused("the sizes of its weights are not known")
    options = arguments(node)
    if options.get("bias") is not None:
        raise Refused("the grouped product itself adds a bias")
    if node.meta["val"].dtype != rows.meta["val"].dtype:
        raise Refused("the grouped product returns another type than it takes")
    return rows, weight, ends


@dataclasses.dataclass(frozen=True)
class _First:
    """A first linear layer: rows are tokens in the order of their experts.

    Attributes:
        x: the tokens [T, D].
        dispatch: how its rows are sorted.
        gates: weights that its rows were multiplied by, with their source; or None.
    """

    x: fx.Node
    dispatch: Dispatch
    gates: tuple[Make, fx.Node] | None


def _first(routing: Routing, node: fx.Node) -> _First:
    """A grouped product of tokens.

    Raises:
        Refused: its rows are not provably tokens, sorted by the expert of each.
    """
    rows, weight, ends = _operands(routing, node)
    experts = int(sizes_of(weight)[0])
    scale: fx.Node | None = None
    masks: list[fx.Node] = []
    while True:
        name = schema_name(rows)
        if name in SAME:
            rows = _operand(routing, rows, "self")
        elif name == "masked_fill":
            masks.append(_operand(routing, rows, "mask"))
            rows = _operand(routing, rows, "self")
        elif name == "mul" and scale is None and _column_of(routing, rows) is not None:
            rows, scale = _column_of(routing, rows) or (rows, None)
        else:
            break
    x, dispatch = _sorted_tokens(routing, rows, experts)
    assert dispatch.perm is not None
    reason = routing.counts(ends, dispatch.perm, experts)
    if reason is not None:
        raise Refused(reason)
    if not all(dispatch.masks(mask) for mask in masks):
        raise Refused("its rows are masked by something else than experts that do not exist")
    layout = Layout(((Axis(ROWS, sizes_of(rows)[0]),), (Axis(FEATURES, sizes_of(rows)[1]),)))
    gates = None if scale is None else gates_of(routing, dispatch, scale, layout)
    return _First(x, dispatch, gates)


def _operand(routing: Routing, node: fx.Node, name: str) -> fx.Node:
    value = routing.operand(node, name)
    if not isinstance(value, fx.Node):
        raise Refused("its rows are not tokens that a sorted index picks")
    return value


def _column_of(routing: Routing, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(rows, weights) of a product of rows with one number a row."""
    operands = [routing.operand(node, name) for name in ("self", "other")]
    for rows, column in (operands, operands[::-1]):
        if isinstance(rows, fx.Node) and isinstance(column, fx.Node):
            sizes = sizes_of(column)
            if len(sizes) == 2 and sizes[1] == 1 and sizes_of(rows) == sizes_of(node):
                return rows, column
    return None


def _sorted_tokens(routing: Routing, rows: fx.Node, experts: int) -> tuple[fx.Node, Dispatch]:
    unknown = Refused("its rows are not provably tokens that sorted expert ids pick")
    picked = routing.picked(rows)
    if picked is None:
        raise unknown
    x, index = picked
    tokens = routing.token_index(index)
    if tokens is None and routing.sorts(routing.flat(index)) is not None:
        # Copies of the tokens, one a pair, put in order; or one choice a token.
        perm = routing.flat(index)
        x, times, by_choice = repeated(routing, x)
    elif tokens is not None and tokens.perm is not None:
        perm, times, by_choice = tokens.perm, tokens.divisor, tokens.by_choice
    else:
        raise unknown
    if x.meta["val"].dim() != 2:
        raise unknown
    total, count = sizes_of(perm)[0], sizes_of(x)[0]
    choices = sympy.cancel(total / count) if by_choice else times
    if by_choice and times != count:
        raise unknown
    if not choices.is_Integer or sympy.expand(choices * count) != total:
        raise Refused("the number of its rows is not a multiple of the number of tokens")

    def masks(node: fx.Node) -> bool:
        return _masks_strangers(routing, node, perm, experts)

    return x, Dispatch(count, int(choices), by_choice, perm, masks)


def _masks_strangers(routing: Routing, mask: fx.Node, perm: fx.Node, experts: int) -> bool:
    """Whether a mask is true where the id of a row is E or more, and only there."""
    mask = routing.flat(mask)
    bound = arguments(mask).get("other")
    least = {"ge": experts, "gt": experts - 1}.get(schema_name(mask))
    ids = routing.operand(mask, "self")
    if bound is None or bound != least or not isinstance(ids, fx.Node):
        return False
    return routing.are_sorted_ids(ids, perm, experts)


class _Reading:
    """Reads one mixture of experts, backward and forward from its second grouped product."""

    def __init__(
        self,
        static: StaticValues,
        routing: Routing,
        firsts: dict[fx.Node, _First],
        reasons: dict[fx.Node, str],
        outer: fx.Node,
    ) -> None:
        self._static = static
        self._routing = routing
        self._firsts = firsts
        self._reasons = reasons
        self._outer = outer
        self._first: _First | None = None
        self._clamped = False
        self._sources: list[fx.Node] = []

    def site(self) -> Site:
        """The site.

        Raises:
            Refused: it is none; the sentence says why.
        """
        routing, outer = self._routing, self._outer
        rows, weight, ends = _operands(routing, outer)
        experts, hidden, out_features = (int(size) for size in sizes_of(weight))
        parts = Parts(routing, self._start, self._bias, self._masked)
        peeled = self._peeled(rows)
        body, _ = read_body(peeled[0], parts.leaf, self._static, peeled[1], routing.writes)
        first = self._first
        assert first is not None and first.dispatch.perm is not None
        if len(parts.found) > 2:
            raise Refused(f"{len(parts.found)} linear layers feed its body, not one or two")
        reason = routing.counts(ends, first.dispatch.perm, experts)
        if reason is not None:
            raise Refused(reason)
        combined = self._combined(first, peeled[2])
        dtype = rows.meta["val"].dtype
        ids = routing.sorts(first.dispatch.perm)
        assert ids is not None
        gates = combined.gates or (first.gates[0] if first.gates else None)
        self._sources += [first.x, ids, *combined.sources]
        self._sources += [first.gates[1]] if first.gates else []
        self._sources += [item for item in (combined.bias, combined.base) if item is not None]
        inner = []
        for columns in parts.found:
            stored = _operands(routing, columns.product)[1]
            if sizes_of(stored)[0] != experts or stored.meta["val"].dtype != dtype:
                raise Refused("the linear layers are not of the same experts")
            inner.append(weight_of(columns, *self._stored(stored)))
            self._sources += [columns.bias] if columns.bias is not None else []
        biased = [columns.bias is not None for columns in parts.found]
        if any(biased) and not all(biased):
            raise Refused("one of the parts has a bias and the other has none")
        second, turned = self._stored(weight)
        products = [outer, *(columns.product for columns in parts.found)]
        outer_bias = combined.bias
        return Site(
            node=combined.node,
            region=region_of(combined.node, self._sources, routing.writes, products),
            spelling=SPELLING,
            form="grouped",
            x=lambda builder: cast(builder, first.x, dtype),
            ids=lambda builder: first.dispatch.table(builder, cast(builder, ids, torch.int64)),
            gates=gates_or_ones(gates, first.dispatch, ids, dtype),
            inner=inner,
            inner_bias=[bias_of(columns) for columns in parts.found] if all(biased) else [],
            outer=[_turned(second) if turned else given(second)],
            outer_bias=None if outer_bias is None else given(outer_bias),
            body=body,
            experts=experts,
            choices=first.dispatch.choices,
            tokens=first.x.meta["val"].shape[0],
            features=int(sizes_of(first.x)[1]),
            hidden=hidden,
            out_features=out_features,
            dtype=dtype,
            restore=combined.restore,
            gates_on_input=first.gates is not None,
            turned=turned,
        )

    def _start(self, node: fx.Node) -> Layout | None:
        """The layout of a first linear layer's result."""
        if not _is_grouped(node):
            return None
        first = self._firsts.get(node)
        if first is None:
            raise Refused(self._reasons.get(node, "its rows are not tokens"))
        if self._first is not None and not self._alike(first, self._first):
            raise Refused("its linear layers see different tokens")
        self._first = first
        rows, columns = sizes_of(node)
        return Layout(((Axis(ROWS, rows),), (Axis(FEATURES, columns),)))

    def _alike(self, one: _First, other: _First) -> bool:
        perms = one.dispatch.perm, other.dispatch.perm
        assert perms[0] is not None and perms[1] is not None
        gates = tuple(None if item.gates is None else item.gates[1] for item in (one, other))
        same = one.x is other.x and self._routing.same(perms[0], perms[1])
        return same and gates[0] is gates[1]

    def _bias(self, node: fx.Node, layout: Layout) -> fx.Node | None:
        """The biases [E, columns], if a node is the bias of each row's expert."""
        while schema_name(node) in SAME:
            node = _operand(self._routing, node, "self")
        picked = self._routing.picked(node)
        axis = layout.features()
        if picked is None or axis is None or layout.place(ROWS) != 0 or len(layout.dims) != 2:
            return None
        first, (source, index) = self._first, picked
        assert first is not None and first.dispatch.perm is not None
        sizes = sizes_of(source)
        if len(sizes) != 2 or sizes[1] != axis.size or axis.stride != 1 or layout.offset:
            return None
        if not self._routing.are_sorted_ids(index, first.dispatch.perm, int(sizes[0])):
            return None
        self._clamped |= schema_name(self._routing.uncast(index)) in ("clamp", "clamp_max", "clip")
        return source

    def _masked(self, mask: Any) -> bool:
        first = self._first
        return isinstance(mask, fx.Node) and first is not None and first.dispatch.masks(mask)

    def _peeled(self, rows: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """(hidden features, their reader, weights [S, 1] that they are multiplied by)."""
        reader = self._outer
        node = rows
        while schema_name(node) in SAME:
            reader, node = node, _operand(self._routing, node, "self")
        column = _column_of(self._routing, node) if schema_name(node) == "mul" else None
        # Hidden features of size 1 are columns, too: weights are picked.
        if column is None or self._routing.picked(column_root(self._routing, column[1])) is None:
            return node, reader, None
        return column[0], node, column[1]

    def _combined(self, first: _First, scale: fx.Node | None) -> Combined:
        outer = self._outer
        rows, columns = sizes_of(outer)
        layout = Layout(((Axis(ROWS, rows),), (Axis(FEATURES, columns),)))
        start = Combined(outer, layout)
        if scale is not None:
            gates, source = gates_of(self._routing, first.dispatch, scale, layout)
            start = Combined(outer, layout, gates, (source,))
        combined = Follower(self._routing, first.dispatch, self._bias).run(start)
        if first.gates is not None and combined.gates is not None:
            raise Refused("both the tokens and the experts' results are weighted")
        if self._clamped and not combined.masked:
            raise Refused("tokens of experts that do not exist get another expert's bias")
        return combined

    def _stored(self, weight: fx.Node) -> tuple[fx.Node, bool]:
        """(the weight as it is stored, whether that is [E, in, out])."""
        if schema_name(weight) == "transpose":
            options = arguments(weight)
            source = self._routing.operand(weight, "self")
            if {options["dim0"] % 3, options["dim1"] % 3} == {1, 2} and isinstance(source, fx.Node):
                self._sources.append(source)
                return source, False
        self._sources.append(weight)
        return weight, True


def _turned(weight: fx.Node) -> Make:
    return lambda builder: builder.call(aten.transpose.int, weight, 1, 2)

"""The weights of each pair's expert gathered, and one batched product for each linear layer.

``W[ids]`` is a copy of a whole weight for each pair of a token and an expert; ``bmm`` or ``einsum``
multiplies each with its token. Index letters say which dimensions are pairs, and which of them the
tokens lack: those are the choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.attention.products import Product, read_product
from sparse_compiler.passes.attention.symbols import sizes_of
from sparse_compiler.passes.moe.body import read_body
from sparse_compiler.passes.moe.copies import repeated
from sparse_compiler.passes.moe.follower import (
    CHOICES,
    TOKENS,
    Combined,
    Dispatch,
    Follower,
    cast,
    gates_or_ones,
)
from sparse_compiler.passes.moe.layout import (
    FEATURES,
    SAME,
    Axis,
    Dim,
    Layout,
    follow,
    viewed,
)
from sparse_compiler.passes.moe.parts import Parts, bias_of, weight_of
from sparse_compiler.passes.moe.regions import region_of
from sparse_compiler.passes.moe.routing import Routing
from sparse_compiler.passes.moe.site import Make, Refusal, Refused, Site, given
from sparse_compiler.passes.moe.writes import Writes
from sparse_compiler.region import Builder
from sparse_compiler.static import StaticValues

aten = torch.ops.aten

_PAIRS = ("pairs", "first pairs", "second pairs")
_ROWS, _COLUMNS = "weight rows", "weight columns"
# Between two products of one mixture there are a few pointwise operators.
_NEAR = 64
_PICKS = ("index", "index_select", "embedding", "gather")


@dataclasses.dataclass(frozen=True)
class _Linear:
    """One linear layer: rows times the gathered weights.

    Attributes:
        product: the operator, in index letters.
        weight: [E, out, in], or [E, in, out].
        turned: whether it is the latter.
        ids: of the experts, with one or two dimensions.
        rows: what is multiplied.
        letters: of its dimensions.
        dims: what each letter stands for.
        layout: of the result.
    """

    product: Product
    weight: fx.Node
    turned: bool
    ids: fx.Node
    rows: fx.Node
    letters: str
    dims: Mapping[str, Dim]
    layout: Layout

    @property
    def spelling(self) -> str:
        name = schema_name(self.product.node)
        return "batched_mm" if name in ("bmm", "baddbmm") else f"gathered {name}"


def find(gm: fx.GraphModule, static: StaticValues) -> Iterator[Site | Refusal]:
    """Every product of gathered weights, as part of a site or of a refusal."""
    if not any(_is_pick(node) for node in gm.graph.nodes):
        return
    routing = Routing(Writes(gm.graph))
    linears: dict[fx.Node, _Linear] = {}
    for node in gm.graph.nodes:
        try:
            found = _linear(routing, node)
        except Refused:  # something is written to through a view: nothing is read there
            continue
        if found is not None:
            linears[node] = found
    # Other tensors are picked from, too: blocks of keys, tables of positions.
    stored = {node for node, linear in linears.items() if static.is_static(linear.weight)}
    alone: dict[fx.Node, str] = {}
    used: set[fx.Node] = set()
    for node, linear in linears.items():
        reading = _Reading(static, routing, linears, linear)
        try:
            reading.read()
        except Refused as error:
            alone[node] = str(error)
            continue
        used |= {node, *reading.products()}
        try:
            yield reading.site()
        except Refused as error:
            if node in stored:
                yield Refusal(node, linear.spelling, str(error))
    # The last first: what leads to one that is refused is refused with it.
    for node in reversed([node for node in alone if node not in used]):
        if node in used:
            continue
        near = _near(linears, node)
        used |= near
        reason = alone[node] if near else "its results reach no second linear layer"
        if node in stored:
            yield Refusal(node, linears[node].spelling, reason)


def _near(linears: dict[fx.Node, _Linear], node: fx.Node) -> set[fx.Node]:
    """Products that lead to the rows of another one, without a third in between."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    waiting = [linears[node].rows]
    while waiting and len(seen) < _NEAR:
        item = waiting.pop(0)
        if item in seen:
            continue
        seen.add(item)
        if item in linears:
            found.add(item)
        else:
            waiting.extend(item.all_input_nodes)
    return found


def _is_pick(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return schema_name(node) in _PICKS and isinstance(value, torch.Tensor) and value.dim() in (3, 4)


def _linear(routing: Routing, node: fx.Node) -> _Linear | None:
    product = read_product(node)
    if product is None or product.bias is not None or product.alpha != 1.0:
        return None
    for weight, rows in ((product.left, product.right), (product.right, product.left)):
        seen = _weight(routing, routing.writes.now(weight, node))
        if seen is None or product.left is product.right:
            continue
        source, ids, layout = seen
        letters = product.letters(weight)
        dims = dict(zip(letters, layout.dims, strict=True))
        kind = [axis.name for axis in dims[product.summed]]
        if kind not in ([_ROWS], [_COLUMNS]):
            continue
        other = _COLUMNS if kind == [_ROWS] else _ROWS
        result: list[Dim] = []
        for letter, size in zip(product.out_letters, sizes_of(node), strict=True):
            dim = dims.get(letter, ())
            if letter not in dims and size != 1:
                break
            if [axis.name for axis in dim] == [other]:
                dim = (Axis(FEATURES, size),)
            result.append(dim)
        else:
            return _Linear(
                product,
                source,
                kind == [_ROWS],
                ids,
                routing.writes.now(rows, node),
                product.letters(rows),
                dims,
                Layout(tuple(result)),
            )
    return None


def _weight(routing: Routing, node: fx.Node) -> tuple[fx.Node, fx.Node, Layout] | None:
    """(stacked weight, ids, layout) of gathered weights, seen in any way."""
    chain: list[fx.Node] = []
    while not _is_pick(node):
        source = viewed(node)
        if source is None:
            return None
        chain.append(node)
        node = routing.writes.now(source, node)
    picked = routing.picked(node)
    if picked is None or picked[0].meta["val"].dim() != 3:
        return None
    source, ids = picked
    if not all(size.is_Integer for size in sizes_of(source)):
        return None
    names = (_ROWS, _COLUMNS)
    sizes = sizes_of(source)[1:]
    axes = [Axis(name, size) for name, size in zip(names, sizes, strict=True)]
    layout: Layout | None = Layout((*_pair_dims(ids), *((axis,) for axis in axes)))
    for item in reversed(chain):
        layout = follow(layout, item) if layout is not None else None
    return None if layout is None else (source, ids, layout)


def _pair_dims(ids: fx.Node) -> tuple[Dim, ...]:
    sizes = sizes_of(ids)
    names = _PAIRS[:1] if len(sizes) == 1 else _PAIRS[1:]
    return tuple((Axis(name, size),) for name, size in zip(names, sizes, strict=True))


class _Reading:
    """Reads one mixture of experts, backward and forward from its second product."""

    def __init__(
        self,
        static: StaticValues,
        routing: Routing,
        linears: dict[fx.Node, _Linear],
        outer: _Linear,
    ) -> None:
        self._static = static
        self._routing = routing
        self._linears = linears
        self._outer = outer
        self._axes: dict[str, Dim] = {}
        self._parts = Parts(routing, self._start, self._bias, lambda mask: False)

    def products(self) -> set[fx.Node]:
        """The first products that the second one's rows are made of."""
        return {columns.product for columns in self._parts.found}

    def read(self) -> None:
        """Read the body.

        Raises:
            Refused: no pointwise body leads from first products to this one.
        """
        chain: list[fx.Node] = []
        node, reader = self._outer.rows, self._outer.product.node
        while (source := viewed(node)) is not None and self._parts.leaf(node) is None:
            chain.append(node)
            node, reader = self._routing.writes.now(source, node), node
        self._body, _ = read_body(
            node, self._parts.leaf, self._static, reader, self._routing.writes
        )
        layout: Layout | None = self._parts.found[0].layout
        for item in reversed(chain):
            layout = follow(layout, item) if layout is not None else None
        self._check_rows(layout)

    def _check_rows(self, layout: Layout | None) -> None:
        """The hidden features of each pair meet the weights of the same pair."""
        outer = self._outer
        hidden = (Axis(FEATURES, outer.product.size(outer.product.summed)),)
        wanted = [
            hidden if letter == outer.product.summed else outer.dims.get(letter, ())
            for letter in outer.letters
        ]
        if layout is None or layout.names() != Layout(tuple(wanted)).names():
            raise Refused("the second linear layers see other pairs than the first")

    def _start(self, node: fx.Node) -> Layout | None:
        linear = self._linears.get(node)
        if linear is None or linear is self._outer:
            return None
        if not self._same_ids(linear.ids):
            raise Refused("the linear layers are not provably of the same experts")
        return linear.layout

    def _same_ids(self, ids: fx.Node) -> bool:
        alike = len(sizes_of(ids)) == len(sizes_of(self._outer.ids))
        return alike and self._routing.uncast(ids) is self._routing.uncast(self._outer.ids)

    def _bias(self, node: fx.Node, layout: Layout) -> fx.Node | None:
        """The biases [E, columns], if a node is the bias of each pair's expert."""
        chain: list[fx.Node] = []
        while schema_name(node) not in _PICKS:
            source = viewed(node)
            if source is None:
                return None
            chain.append(node)
            node = self._routing.writes.now(source, node)
        picked = self._routing.picked(node)
        if picked is None or len(sizes_of(picked[0])) != 2 or not self._same_ids(picked[1]):
            return None
        count = sizes_of(picked[0])[1]
        own: Layout | None = Layout((*_pair_dims(picked[1]), (Axis(FEATURES, count),)))
        for item in reversed(chain):
            own = follow(own, item) if own is not None else None
        if own is None or not count.is_Integer:
            return None
        whole = own in (layout, self._named_back(layout))
        return picked[0] if whole else None

    def _named_back(self, layout: Layout) -> Layout:
        """A layout in tokens and choices as one in the dimensions of the ids."""
        back = {dim: name for name, dim in self._axes.items()}
        sizes = {axis.name: axis for dim in _pair_dims(self._outer.ids) for axis in dim}
        dims = tuple((sizes[back[dim]],) if dim in back else dim for dim in layout.dims)
        return Layout(dims, layout.offset)

    def site(self) -> Site:
        """The site.

        Raises:
            Refused: it is none; the sentence says why.
        """
        routing, outer = self._routing, self._outer
        firsts = [self._linears[columns.product] for columns in self._parts.found]
        if len(firsts) > 2:
            raise Refused(f"{len(firsts)} linear layers feed its body, not one or two")
        x, source, dispatch = self._tokens(firsts[0])
        for linear in firsts[1:]:
            if self._tokens(linear)[1] is not source:
                raise Refused("its linear layers see different tokens")
        layout = self._named(outer.layout)
        combined = Follower(routing, dispatch, self._bias).run(Combined(outer.product.node, layout))
        dtype = outer.weight.meta["val"].dtype
        experts = int(sizes_of(outer.weight)[0])
        if any(sizes_of(linear.weight)[0] != experts for linear in firsts):
            raise Refused("the linear layers are not of the same experts")
        biased = [columns.bias is not None for columns in self._parts.found]
        if any(biased) and not all(biased):
            raise Refused("one of the parts has a bias and the other has none")
        ids, bias = outer.ids, combined.bias
        found = [columns.bias for columns in self._parts.found if columns.bias is not None]
        sources = [source, ids, outer.weight, *(linear.weight for linear in firsts), *found]
        sources += [*combined.sources, *(n for n in (bias, combined.base) if n is not None)]
        products = [outer.product.node, *self.products()]
        rows, columns = sizes_of(outer.weight)[1:]
        hidden, out_features = (rows, columns) if outer.turned else (columns, rows)
        features = sizes_of(firsts[0].weight)[1 if firsts[0].turned else 2]
        return Site(
            node=combined.node,
            region=region_of(combined.node, sources, routing.writes, products),
            spelling=outer.spelling,
            form="gathered",
            x=lambda builder: cast(builder, x(builder), dtype),
            ids=self._ids(dispatch, experts),
            gates=gates_or_ones(combined.gates, dispatch, ids, dtype),
            inner=[
                weight_of(columns, linear.weight, linear.turned)
                for columns, linear in zip(self._parts.found, firsts, strict=True)
            ],
            inner_bias=[bias_of(columns) for columns in self._parts.found] if all(biased) else [],
            outer=[_second(outer)],
            outer_bias=None if bias is None else given(bias),
            body=self._body,
            experts=experts,
            choices=dispatch.choices,
            tokens=self._count(dispatch),
            features=int(features),
            hidden=int(hidden),
            out_features=int(out_features),
            dtype=dtype,
            restore=combined.restore,
            turned=outer.turned,
        )

    def _tokens(self, linear: _Linear) -> tuple[Make, fx.Node, Dispatch]:
        """The tokens [T, D] that a first product multiplies, the node they come from, and K."""
        letters, summed = linear.letters, linear.product.summed
        sizes = dict(zip(letters, sizes_of(linear.rows), strict=True))
        covered: list[str] = []
        for letter in letters:
            dim = linear.dims.get(letter, ())
            whole = dim and sizes[letter] == sympy.expand(sympy.Mul(*(a.size for a in dim)))
            if letter != summed and whole:
                covered.extend(axis.name for axis in dim if axis.name in _PAIRS)
        pairs = [axis for dim in _pair_dims(self._outer.ids) for axis in dim]
        if covered != [axis.name for axis in pairs if axis.name in covered]:
            raise Refused("its rows are not provably tokens in their order")
        if len(pairs) == 1:
            return self._flat_tokens(linear, pairs[0])
        lacking = [axis for axis in pairs if axis.name not in covered]
        if not lacking:
            lacking, rows = self._expanded(linear, pairs)
        else:
            rows = linear.rows
        having = [axis for axis in pairs if axis not in lacking]
        if len(lacking) != 1 or not lacking[0].size.is_Integer:
            raise Refused("its rows are not provably one for each token")
        features = int(sizes[summed])
        self._axes = {
            having[0].name: (Axis(TOKENS, having[0].size),),
            lacking[0].name: (Axis(CHOICES, lacking[0].size),),
        }
        by_choice = lacking[0] is pairs[0]
        dispatch = _dispatch(having[0].size, int(lacking[0].size), by_choice)
        origin = self._routing.flat(rows)
        return _flattened(origin, features), origin, dispatch

    def _expanded(self, linear: _Linear, pairs: list[Axis]) -> tuple[list[Axis], fx.Node]:
        """The axis that ``expand`` gave the rows, and the rows before that."""
        node = linear.rows
        while schema_name(node) in ("view", "reshape", "unsqueeze", "squeeze", *SAME):
            source = self._routing.operand(node, "self")
            if not isinstance(source, fx.Node):
                break
            node = source
        source = self._routing.operand(node, "self") if schema_name(node) == "expand" else None
        if isinstance(source, fx.Node):
            before, after = sizes_of(source), sizes_of(node)
            if len(before) == len(after) and after[:2] == [axis.size for axis in pairs]:
                wider = [place for place, size in enumerate(before) if size != after[place]]
                if wider in ([0], [1]):
                    return [pairs[wider[0]]], source
        # A dimension of size 1 is no choice.
        return [axis for axis in pairs if axis.size == 1][-1:], linear.rows

    def _flat_tokens(self, linear: _Linear, pairs: Axis) -> tuple[Make, fx.Node, Dispatch]:
        node = linear.rows
        features = linear.product.size(linear.product.summed)
        while True:
            x, times, by_choice = repeated(self._routing, node)
            if x is not node:
                break
            names = ("view", "reshape", "unsqueeze", "squeeze", "contiguous", "clone", *SAME)
            source = self._routing.operand(node, "self") if schema_name(node) in names else None
            if not isinstance(source, fx.Node):
                break
            node = source
        if x is not node and len(sizes_of(x)) == 2 and sizes_of(x)[1] == features:
            count = sizes_of(x)[0]
            choices = sympy.cancel(pairs.size / count) if by_choice else times
            if choices.is_Integer and sympy.expand(choices * count) == pairs.size:
                dispatch = _dispatch(count, int(choices), by_choice)
                self._axes = {pairs.name: tuple(dispatch.pairs())}
                return given(x), x, dispatch
        # Each pair brings a row of its own: as many tokens as pairs.
        dispatch = _dispatch(pairs.size, 1, False)
        self._axes = {pairs.name: tuple(dispatch.pairs())}
        origin = self._routing.flat(linear.rows)
        return _flattened(origin, int(features)), origin, dispatch

    def _named(self, layout: Layout) -> Layout:
        """A layout in the dimensions of the ids as one in tokens and choices."""
        dims = tuple(
            tuple(axis for item in dim for axis in self._axes.get(item.name, (item,)))
            for dim in layout.dims
        )
        return Layout(dims, layout.offset)

    def _ids(self, dispatch: Dispatch, experts: int) -> Make:
        ids = self._outer.ids
        wrapped = not self._routing.below(ids, experts)

        def make(builder: Builder) -> fx.Node:
            table = dispatch.table(builder, cast(builder, ids, torch.int64))
            if wrapped:  # an index counts from the end if it is negative
                table = builder.call(aten.remainder.Scalar, table, experts)
            return table

        return make

    def _count(self, dispatch: Dispatch) -> Any:
        for size in self._outer.ids.meta["val"].shape:
            if sympy.sympify(_symbol(size)) == dispatch.tokens:
                return size
        return self._outer.ids.meta["val"].shape[0] // dispatch.choices


def _symbol(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _dispatch(tokens: sympy.Expr, choices: int, by_choice: bool) -> Dispatch:
    return Dispatch(tokens, choices, by_choice, None, lambda mask: False)


def _flattened(rows: fx.Node, features: int) -> Make:
    return lambda builder: builder.call(aten.reshape.default, rows, [-1, features])


def _second(linear: _Linear) -> Make:
    weight = linear.weight
    if not linear.turned:
        return given(weight)
    return lambda builder: builder.call(aten.transpose.int, weight, 1, 2)

"""From the results of all pairs to one result a token: weights, the original order, the sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.attention.products import read_product
from sparse_compiler.passes.attention.symbols import sizes_of
from sparse_compiler.passes.moe.layout import (
    FEATURES,
    SAME,
    Axis,
    Dim,
    Layout,
    follow,
    viewed,
)
from sparse_compiler.passes.moe.routing import Routing, TokenIndex
from sparse_compiler.passes.moe.site import Make, Refused
from sparse_compiler.region import Builder
from sparse_compiler.static import arguments, writes_to

aten = torch.ops.aten

# They read a tensor's shape and type, not its values.
_SHAPE_ONLY = (
    "empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "sym_size",
)  # fmt: skip

TOKENS, CHOICES, ROWS = "tokens", "choices", "rows"


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How pairs are laid out.

    Attributes:
        tokens: T.
        choices: K.
        by_choice: whether pairs are counted choice by choice.
        perm: the pair of each row, where rows are sorted by expert; or None.
        masks: whether a boolean node says which rows are of no expert.
    """

    tokens: sympy.Expr
    choices: int
    by_choice: bool
    perm: fx.Node | None
    masks: Callable[[fx.Node], bool]

    def pairs(self) -> list[Axis]:
        """The axes of all pairs, in order."""
        found = [Axis(TOKENS, self.tokens), Axis(CHOICES, sympy.Integer(self.choices))]
        return found[::-1] if self.by_choice else found

    def table(self, builder: Builder, flat: fx.Node) -> fx.Node:
        """A value for each pair, in the order of the pairs, as [T, K]."""
        if not self.by_choice:
            return builder.call(aten.reshape.default, flat, [-1, self.choices])
        turned = builder.call(aten.reshape.default, flat, [self.choices, -1])
        return builder.call(aten.contiguous.default, builder.call(aten.t.default, turned))


@dataclasses.dataclass(frozen=True)
class Combined:
    """What becomes of the experts' results.

    Attributes:
        node: the last operator of it: one result a token.
        layout: of ``node``.
        gates: the weights [T, K], None if there are none.
        sources: nodes that the weights are made of.
        bias: [E, O], added to each expert's result, or None.
        base: what the sum is added to, or None.
        masked: whether rows of no expert were made 0.
    """

    node: fx.Node
    layout: Layout
    gates: Make | None = None
    sources: tuple[fx.Node, ...] = ()
    bias: fx.Node | None = None
    base: fx.Node | None = None
    masked: bool = False

    def restore(self, builder: Builder, result: fx.Node) -> fx.Node:
        """``node``'s value from the operator's result [T, O]."""
        order = [axis.name for axis in self.layout.axes() if axis.name in (TOKENS, FEATURES)]
        if order == [FEATURES, TOKENS]:
            result = builder.call(aten.t.default, result)
        if sizes_of(result) != sizes_of(self.node):
            # One dimension at most is not known, the tokens.
            shape = [int(size) if size.is_Integer else -1 for size in sizes_of(self.node)]
            result = builder.call(aten.reshape.default, result, shape)
        result = cast(builder, result, self.node.meta["val"].dtype)
        if self.base is not None:
            result = builder.call(aten.add.Tensor, self.base, result)
        return result


class Follower:
    """Follows the results of the second linear layers forward.

    Args:
        routing: of the graph.
        dispatch: of the pairs.
        bias_of: the biases [E, O] if a node is the bias of each row's expert.
    """

    def __init__(
        self,
        routing: Routing,
        dispatch: Dispatch,
        bias_of: Callable[[fx.Node, Layout], fx.Node | None],
    ) -> None:
        self._routing = routing
        self._dispatch = dispatch
        self._bias_of = bias_of
        self._names: set[fx.Node] = set()

    def run(self, found: Combined) -> Combined:
        """From the second linear layers' result to one result a token.

        Args:
            found: that result, with all features, and weights that were found before it.

        Raises:
            Refused: something else happens to the results.
        """
        whole: Combined | None = None
        self._names = {found.node}
        while True:
            if self._is_whole(found):
                whole = found
                if self._dispatch.choices > 1:
                    break
            try:
                found = self._step(found)
            except Refused:
                # With one choice there is nothing to sum: weights and views belong to it.
                if whole is None:
                    raise
                break
        return self._cast(whole)

    def _is_whole(self, found: Combined) -> bool:
        """Whether there is one result a token, in their order."""
        axes = [axis for axis in found.layout.axes() if axis.size != 1]
        names = [axis.name for axis in axes if axis.name != FEATURES]
        one = names == ([TOKENS] if self._dispatch.tokens != 1 else [])
        return one and found.layout.features() is not None

    def _cast(self, found: Combined) -> Combined:
        """With the cast back to the tokens' type behind it, so that nothing is rounded twice."""
        users = list(found.node.users)
        if found.base is None and len(users) == 1 and schema_name(users[0]) == "to":
            after, before = users[0].meta["val"], found.node.meta["val"]
            if after.dtype.is_floating_point and after.dtype.itemsize < before.dtype.itemsize:
                return dataclasses.replace(found, node=users[0])
        return found

    def _step(self, found: Combined) -> Combined:
        user = self._user()
        name = schema_name(user)
        if viewed(user) in self._names:
            layout = follow(found.layout, user)
            if layout is None:
                raise Refused(f"its results are taken apart by {name} before they are summed")
            return self._moved(found, user, layout)
        step = _STEPS.get(name)
        result = step(self, found, user) if step is not None else None
        if result is None:
            result = self._product(found, user)
        if result is None:
            raise Refused(
                f"the experts' results go through {name or user.target} before they are summed: "
                "only weights may be applied to them"
            )
        return result

    def _user(self) -> fx.Node:
        found = {user for name in self._names for user in name.users} - self._names
        users = sorted(user for user in found if schema_name(user) not in _SHAPE_ONLY)
        values = [user for user in users if isinstance(user.meta.get("val"), (torch.Tensor, list))]
        values = values or users
        if not values or values[0].op == "output":
            raise Refused("the experts' results are not summed over a token's choices")
        if len(users) > 1 and not set(writes_to(values[0])) & self._names:
            raise Refused(
                "the experts' results are used more than once before they are summed, as norms do: "
                "only weights may be applied to them"
            )
        return values[0]

    def _moved(self, found: Combined, user: fx.Node, layout: Layout, **more: Any) -> Combined:
        if set(writes_to(user)) & self._names:
            self._names.add(user)
        else:
            self._names = {user}
        return dataclasses.replace(found, node=user, layout=layout, **more)

    def _other(self, user: fx.Node) -> fx.Node | None:
        """The operand that is not the experts' results; None if both are, or it is a number."""
        given = arguments(user)
        mine = [name for name in ("self", "other") if given.get(name) in self._names]
        if len(mine) != 1:
            return None
        other = self._routing.operand(user, "other" if mine == ["self"] else "self")
        return other if isinstance(other, fx.Node) else None

    def _add(self, found: Combined, user: fx.Node) -> Combined | None:
        other = self._other(user)
        if other is None or arguments(user).get("alpha", 1) != 1:
            return None
        if found.gates is not None or found.bias is not None:
            return None
        bias = self._bias_of(other, found.layout)
        return None if bias is None else self._moved(found, user, found.layout, bias=bias)

    def _mul(self, found: Combined, user: fx.Node) -> Combined | None:
        other = self._other(user)
        if other is None:
            return None
        if found.gates is not None:
            raise Refused("the experts' results are weighted twice")
        gates, source = gates_of(self._routing, self._dispatch, other, found.layout)
        if sizes_of(user) != sizes_of(found.node):
            return None
        return self._moved(found, user, found.layout, gates=gates, sources=(source,))

    def _masked_fill(self, found: Combined, user: fx.Node) -> Combined | None:
        mask, filled = self._routing.operand(user, "mask"), arguments(user)["self"]
        if filled not in self._names or arguments(user)["value"] != 0:
            return None
        if not isinstance(mask, fx.Node) or not self._dispatch.masks(mask):
            return None
        return self._moved(found, user, found.layout, masked=True)

    def _index(self, found: Combined, user: fx.Node) -> Combined | None:
        """Rows back in the order of the pairs."""
        picked, perm = self._routing.picked(user), self._dispatch.perm
        if picked is None or perm is None or found.layout.place(ROWS) != 0:
            return None
        if arguments(user).get("self") not in self._names:
            return None
        if not self._routing.inverse(picked[1], perm):
            raise Refused("the order of the results is not provably that of the tokens")
        return self._moved(found, user, self._unsorted(found.layout))

    def _index_put(self, found: Combined, user: fx.Node) -> Combined | None:
        """Rows written to the places of their pairs."""
        given, perm = arguments(user), self._dispatch.perm
        into, indices = given["self"], given["indices"]
        if perm is None or found.layout.place(ROWS) != 0 or given["accumulate"]:
            return None
        if not isinstance(indices, (list, tuple)) or len(indices) != 1:
            return None
        if not isinstance(indices[0], fx.Node) or not self._routing.same(indices[0], perm):
            raise Refused("the order of the results is not provably that of the tokens")
        if sizes_of(into) != sizes_of(found.node) or given["values"] not in self._names:
            return None
        result = self._moved(found, user, self._unsorted(found.layout))
        self._names.update(writes_to(user))
        return result

    def _unsorted(self, layout: Layout) -> Layout:
        return Layout((tuple(self._dispatch.pairs()), *layout.dims[1:]), layout.offset)

    def _sum(self, found: Combined, user: fx.Node) -> Combined | None:
        given, rank = arguments(user), len(found.layout.dims)
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or [])
        dtype = given.get("dtype")
        narrow = dtype is not None and dtype.itemsize < found.node.meta["val"].dtype.itemsize
        if len(dims) != 1 or narrow or found.layout.dims[dims[0] % rank] not in self._summed():
            return None
        place = dims[0] % rank
        kept: tuple[Dim, ...] = ((),) if given.get("keepdim") else ()
        new = (*found.layout.dims[:place], *kept, *found.layout.dims[place + 1 :])
        return self._moved(found, user, Layout(new, found.layout.offset))

    def _summed(self) -> tuple[Dim, ...]:
        """Dimensions that hold a token's choices."""
        choices = (Axis(CHOICES, sympy.Integer(self._dispatch.choices)),)
        return (choices, ()) if self._dispatch.choices == 1 else (choices,)

    def _index_add(self, found: Combined, user: fx.Node) -> Combined | None:
        """Each row added to the result of its token."""
        given = arguments(user)
        scatter = schema_name(user) == "scatter_add"
        if given["dim"] != 0 or given.get("alpha", 1) != 1 or len(found.layout.dims) != 2:
            return None
        if given["src" if scatter else "source"] not in self._names:
            return None
        index, base = (self._routing.operand(user, name) for name in ("index", "self"))
        rows = self._routing.repeated_rows(index)
        if rows is None or sizes_of(base)[1] != sizes_of(found.node)[1]:
            return None
        if scatter and sizes_of(index) != sizes_of(found.node):
            return None
        tokens = self._routing.token_index(rows)
        if tokens is None or not self._same_pairs(tokens, found.layout):
            raise Refused("the tokens that results are added to are not provably their own")
        if sizes_of(base)[0] != self._dispatch.tokens:
            raise Refused("results are added to more rows than there are tokens")
        layout = Layout(((Axis(TOKENS, self._dispatch.tokens),), found.layout.dims[1]))
        zeros = schema_name(base) in ("zeros", "zeros_like", "new_zeros")
        result = self._moved(found, user, layout, base=None if zeros else base)
        self._names.update(writes_to(user))
        return result

    def _same_pairs(self, tokens: TokenIndex, layout: Layout) -> bool:
        """Whether row r of the layout is of token r of the index."""
        dispatch = self._dispatch
        if layout.place(ROWS) == 0:
            if tokens.perm is None or dispatch.perm is None:
                return False
            if not self._routing.same(tokens.perm, dispatch.perm):
                return False
        elif tokens.perm is not None or layout.dims[0] != tuple(dispatch.pairs()):
            return False
        wanted = dispatch.tokens if dispatch.by_choice else sympy.Integer(dispatch.choices)
        return bool(tokens.by_choice == dispatch.by_choice and tokens.divisor == wanted)

    def _product(self, found: Combined, user: fx.Node) -> Combined | None:
        """The weighted sum in one product: ``einsum("tkd,tk->td", y, gates)``."""
        product = read_product(user)
        if product is None or found.gates is not None or product.bias is not None:
            return None
        if (product.left in self._names) == (product.right in self._names):
            return None
        left = product.left in self._names
        mine, other = (product.left, product.right) if left else (product.right, product.left)
        dims = dict(zip(product.letters(mine), found.layout.dims, strict=True))
        if product.alpha != 1.0 or dims.get(product.summed) not in self._summed():
            return None
        gates, theirs = self._routing.writes.now(other, user), product.letters(other)
        pairs = [axis for axis in found.layout.axes() if axis.name != FEATURES and axis.size != 1]
        covered: list[Axis] = []
        for letter, size in zip(theirs, sizes_of(gates), strict=True):
            dim = dims.get(letter, ())
            if size != sympy.expand(sympy.Mul(*(axis.size for axis in dim))):
                return None
            covered.extend(dim)
        if any(axis.name == FEATURES for axis in covered):
            return None
        if any(axis not in covered for axis in pairs):
            return None
        make = _table(self._dispatch, gates, [dims.get(letter, ()) for letter in theirs])
        layout = Layout(tuple(dims.get(letter, ()) for letter in product.out_letters))
        return self._moved(found, user, layout, gates=make, sources=(gates,))


def gates_of(
    routing: Routing, dispatch: Dispatch, node: fx.Node, layout: Layout
) -> tuple[Make, fx.Node]:
    """The weights [T, K] that a product with a value of this layout multiplies, and their source.

    Raises:
        Refused: they are not one for each pair.
    """
    wrong = Refused("the experts' results are multiplied by what is not one weight for each pair")
    sizes = sizes_of(node)
    if len(sizes) > len(layout.dims):
        raise wrong
    dims = layout.dims[len(layout.dims) - len(sizes) :]
    covered: list[Axis] = []
    for dim, size in zip(dims, sizes, strict=True):
        if any(axis.name == FEATURES for axis in dim):
            if size != 1:
                raise wrong
        elif size == sympy.expand(sympy.Mul(*(axis.size for axis in dim))):
            covered.extend(dim)
        else:
            raise wrong
    pairs = [axis for axis in layout.axes() if axis.name != FEATURES and axis.size != 1]
    if any(axis not in covered for axis in pairs):
        raise wrong
    if layout.place(ROWS) is None:
        kept = [() if any(a.name == FEATURES for a in dim) else dim for dim in dims]
        return _table(dispatch, node, kept), node
    picked = routing.picked(column_root(routing, node))
    if picked is None or dispatch.perm is None or not routing.same(picked[1], dispatch.perm):
        raise Refused("the weights of the sorted rows are not provably those of their pairs")
    source, dtype = picked[0], node.meta["val"].dtype
    if _elements(source) != _elements(dispatch.perm):
        raise wrong
    return lambda builder: dispatch.table(builder, cast(builder, source, dtype)), source


def column_root(routing: Routing, node: fx.Node) -> fx.Node:
    """The first tensor with these elements in this order, before casts."""
    node = routing.flat(node)
    while schema_name(node) in SAME:
        before = routing.operand(node, "self")
        if not isinstance(before, fx.Node):
            break
        node = routing.flat(before)
    return node


def _elements(node: fx.Node) -> sympy.Expr:
    return sympy.expand(sympy.Mul(*sizes_of(node)))


def _table(dispatch: Dispatch, node: fx.Node, dims: list[Dim]) -> Make:
    """A tensor with these dimensions, which together are all pairs, as [T, K]."""
    names = [axis.name for dim in dims for axis in dim if axis.size != 1]
    turned = names == [axis.name for axis in reversed(dispatch.pairs())]

    def make(builder: Builder) -> fx.Node:
        if not turned or len(names) < 2:
            return dispatch.table(builder, node)
        # Two dimensions: one that is both would be in the order of the pairs.
        first, second = (place for place, dim in enumerate(dims) if dim)
        swapped = builder.call(aten.transpose.int, node, first, second)
        return dispatch.table(builder, swapped)

    return make


def cast(builder: Builder, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The node in this dtype."""
    if node.meta["val"].dtype == dtype:
        return node
    return builder.call(aten.to.dtype, node, dtype)


def gates_or_ones(gates: Make | None, dispatch: Dispatch, ids: fx.Node, dtype: torch.dtype) -> Make:
    """The weights as floats, and ones if there are none."""

    def make(builder: Builder) -> fx.Node:
        if gates is None:
            return builder.call(aten.ones_like.default, dispatch.table(builder, ids), dtype=dtype)
        made = gates(builder)
        return made if made.meta["val"].is_floating_point() else cast(builder, made, dtype)

    return make


_STEPS: dict[str, Callable[[Follower, Combined, fx.Node], Combined | None]] = {
    "add": Follower._add,
    "__iadd__": Follower._add,
    "mul": Follower._mul,
    "multiply": Follower._mul,
    "masked_fill": Follower._masked_fill,
    "index": Follower._index,
    "index_select": Follower._index,
    "gather": Follower._index,
    "index_put": Follower._index_put,
    "sum": Follower._sum,
    "index_add": Follower._index_add,
    "scatter_add": Follower._index_add,
}

"""Where a tensor is not what it is everywhere else: the indices that were written to it.

``zeros.scatter(1, ids, values)`` is 0 along dimension 1 but at ``ids``; so is what a mask of it
multiplies, and ``softmax`` of a tensor that is -inf but at ``ids``. ``Backgrounds`` follows such
facts through a graph: the *background*, one number, and the *spots*, at which anything may be.
It assumes that other values are finite: a product with 0 is 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.moe.axes import VIEWS, is_cast, order, same_size
from sparse_compiler.region import Builder
from sparse_compiler.static import arguments, mutated_nodes, with_aliases, writes_to

aten = torch.ops.aten
_MOST_DEPTH = 200


@dataclasses.dataclass(frozen=True)
class Spots:
    """Indices along one dimension of a tensor.

    Attributes:
        source: the integer tensor that holds them.
        steps: operators and their arguments behind the first, which make of it a tensor like the
            one described: of size ``count`` in the dimension, and elsewhere of its sizes, or 1.
        count: how many there are in each row.
        inside: whether an operator has checked that they are indices of the dimension.
    """

    source: fx.Node
    steps: tuple[tuple[Any, tuple[Any, ...]], ...]
    count: int
    inside: bool

    def then(self, target: Any, *args: Any, count: int | None = None) -> Spots:
        """The indices after one more operator."""
        held = tuple(tuple(a) if isinstance(a, list) else a for a in args)
        steps = (*self.steps, (target, held))
        return dataclasses.replace(self, steps=steps, count=count or self.count)

    def build(self, builder: Builder) -> fx.Node:
        """The indices as a node."""
        node = self.source
        for target, args in self.steps:
            listed = [list(a) if isinstance(a, tuple) else a for a in args]
            node = builder.call(target, node, *_with_sizes(builder, listed))
        return node

    def nodes(self) -> set[fx.Node]:
        """The nodes of the graph that they are made from."""
        found: set[fx.Node] = {self.source}
        fx.node.map_arg([args for _, args in self.steps], found.add)
        return found | {size.node for _, args in self.steps for size in _dynamic(args)}


@dataclasses.dataclass(frozen=True)
class _Size:
    """A size of a node that has no number before the graph runs."""

    node: fx.Node
    dim: int


def _dynamic(args: Any) -> list[_Size]:
    if isinstance(args, _Size):
        return [args]
    if isinstance(args, (tuple, list)):
        return [size for item in args for size in _dynamic(item)]
    return []


def _with_sizes(builder: Builder, args: Any) -> Any:
    if isinstance(args, _Size):
        return builder.call(aten.sym_size.int, args.node, args.dim)
    if isinstance(args, list):
        return [_with_sizes(builder, item) for item in args]
    return args


@dataclasses.dataclass(frozen=True)
class Background:
    """What a tensor is along a dimension: ``value``, but at the spots."""

    value: float | bool
    spots: tuple[Spots, ...] = ()

    @property
    def count(self) -> int:
        """How many elements of a row may be something else."""
        return sum(spots.count for spots in self.spots)


def _joined(*lists: Sequence[Spots]) -> tuple[Spots, ...]:
    return tuple(dict.fromkeys(item for spots in lists for item in spots))


class Backgrounds:
    """Backgrounds of a graph's tensors along a dimension.

    Args:
        graph: the graph.
        index: if given, tensors are the ones of this expert, and what is described is the
            dimension behind their last one in which those of all experts would be stacked;
            literals that are ``index`` in a comparison stand for the experts.
    """

    def __init__(self, graph: fx.Graph, index: int | None = None) -> None:
        self._index = index
        self._mutated = mutated_nodes(graph)
        self._known: dict[tuple[fx.Node, int], Background | None] = {}
        self._depth = 0

    def of(self, node: fx.Node, dim: int, at: fx.Node | None = None) -> Background | None:
        """The background of ``node`` as the node ``at`` sees it, or None if there is none known."""
        settled = self.settled(node, at)
        if settled is None or not isinstance(settled.meta.get("val"), torch.Tensor):
            return None
        key = settled, dim
        if key not in self._known:
            if self._depth > _MOST_DEPTH:
                return None
            self._depth += 1
            self._known[key] = self._find(settled, dim)
            self._depth -= 1
        return self._known[key]

    def settled(self, node: fx.Node, at: fx.Node | None) -> fx.Node | None:
        """The last of the operators that wrote to ``node`` before ``at``; ``node`` if none did."""
        if node not in self._mutated:
            return node
        aliases = with_aliases([node])
        writers = {u for alias in aliases for u in alias.users if alias in writes_to(u)}
        before = sorted(w for w in writers if at is None or w < at)
        if not before or before[-1] < node:
            return node
        # Views that are written to are another matter.
        plain = all(writes_to(w)[0] is w.args[0] and len(writes_to(w)) == 1 for w in before)
        whole = aliases <= {*writers, *(w.args[0] for w in writers)} | _readers(aliases, writers)
        return before[-1] if plain and whole else None

    def _find(self, node: fx.Node, dim: int) -> Background | None:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None
        name = str(node.target.overloadpacket.__name__).rstrip("_")
        rule = _RULES.get(name)
        if node.target in VIEWS:
            return self._view(node, dim)
        if rule is not None:
            return rule(self, node, dim)
        if torch.Tag.pointwise in node.target.tags:
            return self._pointwise(node, dim)
        return None

    def operand(self, value: Any, at: fx.Node, dim: int) -> Background | None:
        """The background of an operand of a pointwise operator, along ``dim`` of its result."""
        if isinstance(value, (bool, int, float)):
            return Background(value)
        if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], torch.Tensor):
            return None
        lead = at.meta["val"].dim() - value.meta["val"].dim()
        found = self.of(value, max(dim - lead, -1), at) if dim >= lead else self._flat(value, at)
        if found is None or not lead:
            return found
        spots = found.spots
        for _ in range(lead):
            spots = tuple(item.then(aten.unsqueeze.default, 0) for item in spots)
        return Background(found.value, spots)

    def _flat(self, node: fx.Node, at: fx.Node) -> Background | None:
        """Of a tensor without the dimension: if it is the same everywhere."""
        found = self.of(node, 0, at) if node.meta["val"].dim() else None
        return found if found is not None and not found.spots else None

    def _pointwise(self, node: fx.Node, dim: int) -> Background | None:
        """Any pointwise operator: what it makes of its operands' backgrounds."""
        given = arguments(node)
        found: dict[str, Background] = {}
        for name, value in given.items():
            if isinstance(value, fx.Node):
                background = self.operand(value, node, dim)
                if background is None:
                    return None
                found[name] = background
        call: Any = node.target
        if call._schema.is_mutable:
            return None
        values = {
            name: torch.tensor(item.value, dtype=given[name].meta["val"].dtype)
            for name, item in found.items()
        }
        schema = [(a.name, a.kwarg_only) for a in call._schema.arguments if a.name in given]
        args = [values.get(name, given[name]) for name, only in schema if not only]
        kwargs = {name: values.get(name, given[name]) for name, only in schema if only}
        result = call(*args, **kwargs).item()
        return Background(result, _joined(*(item.spots for item in found.values())))

    def _view(self, node: fx.Node, dim: int) -> Background | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value, result = source.meta["val"], node.meta["val"]
        if node.target in (aten.contiguous.default, aten.clone.default, aten.alias.default,
                           aten.detach.default, aten.lift_fresh_copy.default):  # fmt: skip
            return self.of(source, dim, node)
        turned = _turn(node)
        if turned is not None:
            whole = [*turned, len(turned)] if dim == len(turned) else turned
            found = self.of(source, whole[dim], node)
            return self._each(found, lambda item: item.then(aten.permute.default, whole))
        if node.target in (aten.repeat.default, aten.repeat_interleave.self_int):
            return None
        virtual = dim == result.dim()
        before = value.dim() if virtual else _same_place(value.shape, result.shape, dim)
        if before is None:
            return None
        found = self.of(source, before, node)
        if found is None or not found.spots:
            return found
        expanding = node.target in (aten.expand.default, aten.expand_as.default)
        if expanding:  # sizes of 1 stand for all: only new dimensions have to be there
            missing = result.dim() - value.dim()
            return self._each(found, lambda item: _leading(item, missing))
        spread = [_size(source, j) for j in range(value.dim())]
        shape = [_size(node, j) for j in range(result.dim())]

        def reshape(item: Spots) -> Spots:
            have, want = list(spread), list(shape)
            if virtual:
                have.append(item.count)
                want.append(item.count)
            else:
                have[before], want[dim] = item.count, item.count
            return item.then(aten.expand.default, have).then(aten.reshape.default, want)

        return self._each(found, reshape)

    @staticmethod
    def _each(found: Background | None, change: Callable[[Spots], Spots]) -> Background | None:
        if found is None:
            return None
        return Background(found.value, tuple(change(item) for item in found.spots))

    # What the operators do.

    def _constant(self, node: fx.Node, dim: int) -> Background | None:
        name = str(node.target.overloadpacket.__name__)  # type: ignore[union-attr]
        given = arguments(node)
        if "zeros" in name:
            return Background(0.0)
        if "ones" in name:
            return Background(1.0)
        fill = given.get("fill_value", given.get("value"))
        return Background(fill) if isinstance(fill, (bool, int, float)) else None

    def _cast(self, node: fx.Node, dim: int) -> Background | None:
        source = node.args[0]
        found = self.of(source, dim, node) if isinstance(source, fx.Node) else None
        if found is None:
            return None
        value = torch.tensor(found.value).to(node.meta["val"].dtype).item()
        return Background(value, found.spots)

    def _scatter(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        target, index = given["self"], given["index"]
        found = self.of(target, dim, node)
        shape = target.meta["val"].shape
        if found is None or given["dim"] % max(len(shape), 1) != dim or dim == len(shape):
            return None
        sizes = index.meta["val"].shape
        count = sizes[dim]
        same = all(same_size(a, b) for j, (a, b) in enumerate(zip(sizes, shape, strict=True))
                   if j != dim)  # fmt: skip
        if not same or not isinstance(count, int) or self.settled(index, node) is not index:
            return None
        return Background(found.value, _joined(found.spots, [Spots(index, (), count, True)]))

    def _one_hot(self, node: fx.Node, dim: int) -> Background | None:
        ids = node.args[0]
        assert isinstance(ids, fx.Node)
        if self.settled(ids, node) is not ids:
            return None
        if dim == ids.meta["val"].dim():
            return Background(0, (Spots(ids, ((aten.unsqueeze.default, (dim,)),), 1, True),))
        return None

    def _eq(self, node: fx.Node, dim: int) -> Background | None:
        """Of ids with the numbers of the experts, or with one that stands for all."""
        for mine, other in (("self", "other"), ("other", "self")):
            ids, numbers = arguments(node)[mine], arguments(node)[other]
            if not isinstance(ids, fx.Node) or not self._is_ids(ids, node):
                continue
            if self._index is not None and dim == node.meta["val"].dim():
                if isinstance(numbers, (int, float)) and numbers == self._index:
                    return Background(False, (_alone(ids, node, dim),))
            elif isinstance(numbers, fx.Node) and self._counts(numbers, node, dim):
                lead = node.meta["val"].dim() - ids.meta["val"].dim()
                shape = ids.meta["val"].shape
                if dim < lead or same_size(shape[dim - lead], 1):
                    found = Spots(ids, (), 1, False)
                    return Background(False, (_leading(found, lead),))
        return self._pointwise(node, dim)

    def _is_ids(self, ids: fx.Node, at: fx.Node) -> bool:
        value = ids.meta.get("val")
        whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
        return whole and value.dtype is not torch.bool and self.settled(ids, at) is ids

    @staticmethod
    def _counts(node: fx.Node, at: fx.Node, dim: int) -> bool:
        """Whether a node is 0, 1, 2, ... along ``dim`` of ``at`` and depends on nothing else."""
        shape = node.meta["val"].shape
        place = dim - (at.meta["val"].dim() - len(shape))
        while node.target in VIEWS or is_cast(node):
            node = node.args[0]  # type: ignore[assignment]
        whole = place >= 0 and all(
            same_size(size, 1) for j, size in enumerate(shape) if j != place
        )
        if not whole or node.op != "call_function" or not str(node.target).startswith("aten.arange"):
            return False
        given = arguments(node)
        steps = given.get("start", 0) == 0 and given.get("step", 1) == 1
        return steps and same_size(node.meta["val"].shape[0], at.meta["val"].shape[dim])

    def _mul(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        sides = [self.operand(given[name], node, dim) for name in ("self", "other")]
        zero = [side for side in sides if side is not None and side.value == 0]
        if zero:
            return min(zero, key=lambda side: side.count)
        return self._pointwise(node, dim)

    def _div(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        top = self.operand(given["self"], node, dim)
        if top is not None and top.value == 0 and given.get("rounding_mode") is None:
            return Background(0.0, top.spots)
        return self._pointwise(node, dim)

    def _add(self, node: fx.Node, dim: int) -> Background | None:
        """A sum; with -inf, whatever is added."""
        given = arguments(node)
        sides = [self.operand(given[name], node, dim) for name in ("self", "other")]
        for side in sides:
            if side is not None and side.value == -math.inf and given.get("alpha", 1) == 1:
                return side if "add" in str(node.target) or side is sides[0] else None
        return self._inplace(node, dim)

    def _inplace(self, node: fx.Node, dim: int) -> Background | None:
        """Sums whose operator may write to its first operand."""
        given = arguments(node)
        sides = [self.operand(given[name], node, dim) for name in ("self", "other")]
        left, right = sides
        if left is None or right is None or given.get("alpha", 1) != 1:
            return None
        sign = -1 if "sub" in str(node.target) else 1
        value = left.value + sign * right.value
        return Background(value, _joined(left.spots, right.spots))

    def _and(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        sides = [self.operand(given[name], node, dim) for name in ("self", "other")]
        false = [side for side in sides if side is not None and side.value == 0]
        return min(false, key=lambda side: side.count) if false else self._pointwise(node, dim)

    def _or(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        sides = [self.operand(given[name], node, dim) for name in ("self", "other")]
        boolean = node.meta["val"].dtype is torch.bool
        true = [side for side in sides if side is not None and side.value]
        if boolean and true:
            return min(true, key=lambda side: side.count)
        return self._pointwise(node, dim)

    def _choice(
        self, node: fx.Node, dim: int, condition: Any, yes: Any, no: Any
    ) -> Background | None:
        which = self.operand(condition, node, dim)
        if which is None:
            return None
        chosen = self.operand(yes if which.value else no, node, dim)
        if chosen is None:
            return None
        return Background(chosen.value, _joined(which.spots, chosen.spots))

    def _where(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        if "self" not in given:
            return None
        return self._choice(node, dim, given["condition"], given["self"], given["other"])

    def _masked_fill(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        value = given["value"]
        return self._choice(node, dim, given["mask"], value, given["self"])

    def _softmax(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        value = node.meta["val"]
        found = self.of(given["self"], dim, node)
        whole = dim < value.dim() and given["dim"] % value.dim() == dim
        if found is None or not whole or found.value != -math.inf:
            return None
        return Background(0.0, found.spots)

    def _reduce(self, node: fx.Node, dim: int) -> Background | None:
        """Sums (or maxima) over other dimensions: their spots stand side by side."""
        given = arguments(node)
        source = given["self"]
        value = source.meta["val"]
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not dims or not isinstance(node.meta["val"], torch.Tensor):
            return None
        gone = sorted({d % value.dim() for d in dims})
        keep = bool(given.get("keepdim"))
        before = dim
        if not keep:
            for place in gone:
                before += place <= before
        if before in gone:
            return None
        found = self.of(source, before, node)
        if found is None or found.value != 0:
            return None
        spots = list(found.spots)
        for place in reversed(gone):
            size = value.shape[place]
            if spots and not isinstance(size, int):
                return None
            at = before - sum(p < before for p in gone if p > place)
            spots = [_beside(source, item, place, at, size) for item in spots]
            if place < before:
                pass
        if keep:
            for place in gone:
                spots = [item.then(aten.unsqueeze.default, place) for item in spots]
        return Background(found.value, tuple(spots))

    def _select(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        source = given["self"]
        place = given["dim"] % source.meta["val"].dim()
        before = dim + (place <= dim)
        found = self.of(source, before, node)
        if found is None or not found.spots:
            return found
        shape = [_size(source, j) for j in range(source.meta["val"].dim())]

        def pick(item: Spots) -> Spots:
            whole = list(shape)
            if before == len(whole):
                whole.append(item.count)
            else:
                whole[before] = item.count
            return item.then(aten.expand.default, whole).then(
                aten.select.int, place, given["index"]
            )

        return self._each(found, pick)


def _readers(aliases: set[fx.Node], writers: set[fx.Node]) -> set[fx.Node]:
    """Aliases that nothing writes to, made after all writing: they see what is there at last."""
    last = max(writers)
    return {alias for alias in aliases if alias > last}


def _turn(node: fx.Node) -> list[int] | None:
    names = ("permute", "transpose", "t", "mT", "movedim", "numpy_T", "swapaxes", "swapdims")
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]
    return order(node) if name in names else None


def _same_place(before: Sequence[Any], after: Sequence[Any], dim: int) -> int | None:
    """The dimension of a reshape's input that is dimension ``dim`` of its result, unchanged."""
    inner = math.prod(after[dim + 1 :])
    behind: Any = 1
    for place in reversed(range(len(before))):
        if same_size(before[place], after[dim]) and same_size(behind, inner):
            return place
        behind = behind * before[place]
    return None


def _size(node: fx.Node, dim: int) -> Any:
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else _Size(node, dim)


def _leading(item: Spots, count: int) -> Spots:
    for _ in range(count):
        item = item.then(aten.unsqueeze.default, 0)
    return item


def _alone(ids: fx.Node, at: fx.Node, dim: int) -> Spots:
    """Ids that stand for a whole row of experts, behind the last dimension."""
    lead = at.meta["val"].dim() - ids.meta["val"].dim()
    found = _leading(Spots(ids, (), 1, False), lead)
    return found.then(aten.unsqueeze.default, dim)


def _beside(source: fx.Node, item: Spots, place: int, dim: int, size: int) -> Spots:
    """Put the spots of one dimension side by side, and the dimension away."""
    rank = source.meta["val"].dim() + (dim == source.meta["val"].dim())
    raise AssertionError(rank)


_RULES: dict[str, Callable[[Backgrounds, fx.Node, int], Background | None]] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full",
                     "full_like", "new_full"), Backgrounds._constant),
    **dict.fromkeys(("to", "_to_copy", "type_as"), Backgrounds._cast),
    **dict.fromkeys(("scatter", "scatter_add"), Backgrounds._scatter),
    "one_hot": Backgrounds._one_hot,
    "eq": Backgrounds._eq,
    **dict.fromkeys(("mul", "multiply"), Backgrounds._mul),
    **dict.fromkeys(("div", "divide", "true_divide"), Backgrounds._div),
    **dict.fromkeys(("add", "sub", "subtract"), Backgrounds._add),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), Backgrounds._and),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), Backgrounds._or),
    "where": Backgrounds._where,
    "masked_fill": Backgrounds._masked_fill,
    **dict.fromkeys(("softmax", "_softmax"), Backgrounds._softmax),
    **dict.fromkeys(("sum", "amax", "any"), Backgrounds._reduce),
    "select": Backgrounds._select,
}  # fmt: skip

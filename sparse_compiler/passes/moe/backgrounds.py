"""What a tensor is everywhere but at a few indices, followed through a graph.

``zeros.scatter(1, ids, values)`` is 0 along dimension 1 but at ``ids``; so is what a mask of it
multiplies, and ``softmax`` of a tensor that is -inf but at ``ids``. ``Backgrounds`` follows such
facts: the *background*, one number, and the *spots*, at which anything may be.
It assumes that other values are finite: a product with 0 is 0.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.moe.axes import is_cast, is_view, keeps_shape, order, same_size
from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.passes.moe.spots import Size, Spots, size_at
from sparse_compiler.passes.moe.writes import Writes
from sparse_compiler.static import arguments, mutated_nodes

aten = torch.ops.aten
_MOST_DEPTH = 200


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

    Attributes:
        writes: the graph's writes in place.
        mutated: the nodes that are written to.

    Args:
        graph: the graph.
        index: if given, tensors are the ones of this expert, and what is described is the
            dimension behind their last one in which those of all experts would be stacked;
            literals that are ``index`` in a comparison stand for the experts.
    """

    def __init__(self, graph: fx.Graph, index: int | None = None) -> None:
        self._index = index
        self.writes = Writes(graph)
        self.mutated = mutated_nodes(graph)
        self._known: dict[tuple[fx.Node, int], Background | None] = {}
        self._depth = 0

    def of_expert(self, index: int) -> Backgrounds:
        """The same for the tensors of one expert."""
        found = copy.copy(self)
        found._index, found._known = index, {}
        return found

    def of(self, node: fx.Node, dim: int, at: fx.Node) -> Background | None:
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

    def settled(self, node: fx.Node, at: fx.Node) -> fx.Node | None:
        """The last of the operators that wrote to ``node`` before ``at``; ``node`` if none did.

        None where something wrote to a part of it, or to what it is a part of.
        """
        try:
            return self.writes.now(node, at)
        except Refused:
            return None

    def _find(self, node: fx.Node, dim: int) -> Background | None:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None
        name = str(node.target.overloadpacket.__name__).rstrip("_")
        rule = _RULES.get(name)
        if is_view(node):
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
        shape, whole = value.meta["val"].shape, at.meta["val"].shape
        lead = len(whole) - len(shape)
        found = self.of(value, max(dim - lead, 0), at)
        if found is None or not found.spots:
            return found
        if dim < len(whole) and (dim < lead or not same_size(shape[dim - lead], whole[dim])):
            return None  # one spot of it is every expert's
        return self._each(found, lambda item: _leading(item, lead))

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
        if call._schema.is_mutable or torch.Tag.nondeterministic_seeded in call.tags:
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
        if keeps_shape(node):
            return self.of(source, dim, node)
        turned = _turn(node)
        if turned is not None:
            whole = [*turned, len(turned)] if dim == len(turned) else turned
            found = self.of(source, whole[dim], node)
            return self._each(found, lambda item: item.permute(whole))
        if node.target in (aten.repeat.default, aten.repeat_interleave.self_int):
            return None
        virtual = dim == result.dim()
        expanding = node.target in (aten.expand.default, aten.expand_as.default)
        missing = result.dim() - value.dim()
        before = value.dim() if virtual else _same_place(value.shape, result.shape, dim)
        if expanding and not virtual:
            before = dim - missing
        if before is None or before < 0:
            return None
        found = self.of(source, before, node)
        if found is None or not found.spots:
            return found
        if not virtual and not same_size(value.shape[before], result.shape[dim]):
            return None
        if expanding:  # sizes of 1 stand for all: only new dimensions have to be there
            return self._each(found, lambda item: _leading(item, missing))
        shape = [size_at(node, j) for j in range(result.dim())]

        def reshape(item: Spots) -> Spots:
            want = _put(shape, dim, item.count)
            return item.expand(self._whole(source, before, item)).reshape(want)

        return self._each(found, reshape)

    @staticmethod
    def _whole(node: fx.Node, dim: int, item: Spots) -> list[int | Size]:
        """The shape of spots of a node that stand for no more than themselves."""
        shape = [size_at(node, j) for j in range(node.meta["val"].dim())]
        return _put(shape, dim, item.count)

    @staticmethod
    def _each(found: Background | None, change: Callable[[Spots], Spots]) -> Background | None:
        if found is None:
            return None
        return Background(found.value, tuple(change(item) for item in found.spots))

    # What the operators do.

    def _dropout(self, node: fx.Node, dim: int) -> Background | None:
        """Zeros stay zeros, whatever is dropped."""
        found = self.of(node.args[0], dim, node)  # type: ignore[arg-type]
        return found if found is not None and found.value == 0 else None

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
        given: dict[str, fx.Node] = arguments(node)
        target, index = given["self"], given["index"]
        found = self.of(target, dim, node)
        shape = target.meta["val"].shape
        if found is None or arguments(node)["dim"] % max(len(shape), 1) != dim or dim == len(shape):
            return None
        sizes = index.meta["val"].shape
        count = sizes[dim]
        same = all(same_size(a, b) for j, (a, b) in enumerate(zip(sizes, shape, strict=True))
                   if j != dim)  # fmt: skip
        if not same or not isinstance(count, int) or self.settled(index, node) is not index:
            return None
        spots = Spots.of(index, count, inside=True)
        return Background(found.value, _joined(found.spots, [spots]))

    def _one_hot(self, node: fx.Node, dim: int) -> Background | None:
        ids = node.args[0]
        assert isinstance(ids, fx.Node)
        if self.settled(ids, node) is not ids or dim != ids.meta["val"].dim():
            return None
        return Background(0, (Spots.of(ids, 1, inside=True).unsqueeze(dim),))

    def _eq(self, node: fx.Node, dim: int) -> Background | None:
        """Of ids with the numbers of the experts, or with one that stands for all."""
        for mine, other in (("self", "other"), ("other", "self")):
            ids, numbers = arguments(node)[mine], arguments(node)[other]
            if not isinstance(ids, fx.Node) or not self._is_ids(ids, node):
                continue
            shape = ids.meta["val"].shape
            lead = node.meta["val"].dim() - len(shape)
            found = _leading(Spots.of(ids, 1, inside=False), lead)
            if dim == node.meta["val"].dim():
                whole = isinstance(numbers, (int, float)) and numbers == self._index
                if whole and not isinstance(numbers, bool):
                    return Background(False, (found.unsqueeze(dim),))
                continue
            counts = isinstance(numbers, fx.Node) and self._counts(numbers, node, dim)
            if counts and (dim < lead or same_size(shape[dim - lead], 1)):
                return Background(False, (found,))
        return self._pointwise(node, dim)

    def _is_ids(self, ids: fx.Node, at: fx.Node) -> bool:
        dtype = ids.meta["val"].dtype
        return dtype in (torch.int64, torch.int32) and self.settled(ids, at) is ids

    def _counts(self, node: fx.Node, at: fx.Node, dim: int) -> bool:
        """Whether a node is 0, 1, 2, ... along ``dim`` of ``at`` and depends on nothing else."""
        shape = node.meta["val"].shape
        place = dim - (at.meta["val"].dim() - len(shape))
        reader = at
        while True:
            if self.settled(node, reader) is not node:  # it counted once
                return False
            if not (is_view(node) or (is_cast(node) and _counts_on(node))):
                break
            node, reader = node.args[0], node  # type: ignore[assignment]
        whole = place >= 0 and all(same_size(size, 1) for j, size in enumerate(shape) if j != place)
        if (
            not whole
            or node.op != "call_function"
            or not str(node.target).startswith("aten.arange")
        ):
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
            return Background(True, min(true, key=lambda side: side.count).spots)
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
        rank = source.meta["val"].dim()
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not dims or not isinstance(node.meta["val"], torch.Tensor):
            return None
        gone = sorted({d % rank for d in dims})
        kept = [d for d in range(rank + 1) if bool(given.get("keepdim")) or d not in gone]
        before = kept[dim]
        found = self.of(source, before, node)
        if before in gone or found is None or found.value != 0:
            return None
        spots = []
        for item in found.spots:
            for place in gone:
                wider = item.beside(place, before)
                if wider is None:
                    return None
                item = wider
            if not given.get("keepdim"):
                for place in reversed(gone):
                    item = item.select(place, 0)
            spots.append(item)
        return Background(found.value, tuple(spots))

    def _select(self, node: fx.Node, dim: int) -> Background | None:
        given = arguments(node)
        source = given["self"]
        place = given["dim"] % source.meta["val"].dim()
        found = self.of(source, dim + (place <= dim), node)
        return self._each(found, lambda item: item.select(place, given["index"]))


def _counts_on(node: fx.Node) -> bool:
    """Whether numbers of experts stay what they are in a conversion."""
    return node.meta["val"].dtype in (torch.int64, torch.int32, torch.float32, torch.float64)


def _put(shape: Sequence[int | Size], dim: int, size: int) -> list[int | Size]:
    """A shape with another size in one dimension, which may be the one behind the last."""
    return [*shape[:dim], size, *shape[dim + 1 :]]


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


def _leading(item: Spots, count: int) -> Spots:
    for _ in range(count):
        item = item.unsqueeze(0)
    return item


_RULES: dict[str, Callable[[Backgrounds, fx.Node, int], Background | None]] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full",
                     "full_like", "new_full"), Backgrounds._constant),
    **dict.fromkeys(("to", "_to_copy", "type_as"), Backgrounds._cast),
    **dict.fromkeys(("scatter", "scatter_add"), Backgrounds._scatter),
    "dropout": Backgrounds._dropout,
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

"""Slots of experts: a proof that no two tokens share one, read off a combine tensor.

Models with a capacity make a tensor [T, E, C] out of one-hot vectors: which slot of which expert a
token has, times its gate. It is a sum of *terms*, one for each choice, and each is a product of

- ``one_hot(expert)``, the choice, and comparisons that leave some of them out;
- ``one_hot(position)``, the slot, where the position is the running count of the choices of the
  same expert, ``cumsum(one_hot(expert))``, at the choice;
- gates, which do not depend on the slot.

Running counts of the choices of one expert are all different; those of a second choice have to
begin behind those of the first. So a slot has one token, and the sum over the slots of the term is
the product without the slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.moe.axes import (
    Axis,
    Layout,
    aligned,
    forward,
    fresh,
    is_cast,
    is_view,
    leaves,
    same_size,
)
from sparse_compiler.passes.moe.products import read_product
from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.passes.moe.writes import Writes
from sparse_compiler.static import arguments

aten = torch.ops.aten

_MULS = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar)
_ADDS = (aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar)
_SUBS = (aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar)
_LESS = (aten.lt.Scalar, aten.lt.Tensor, aten.le.Scalar, aten.less.Scalar)

UNPROVED = "it is not seen that no two tokens share a slot of an expert"


@dataclasses.dataclass(frozen=True)
class Part:
    """A factor of a term, in axes.

    Attributes:
        node: the tensor.
        layout: of its dimensions.
        inverse: whether the term is divided by it.
    """

    node: fx.Node
    layout: Layout
    inverse: bool = False

    def axes(self) -> list[Axis]:
        return [axis for dim in leaves(self.layout) for axis in dim]


@dataclasses.dataclass(frozen=True)
class Term:
    """One choice of each token: its expert, its slot, its gates.

    Attributes:
        choice: the one-hot vectors of the experts.
        gates: the other factors, without the slots.
        rows: axes that are summed over: several choices in one tensor.
    """

    choice: Part
    gates: tuple[Part, ...]
    rows: tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class _Running:
    """Running counts of choices.

    Attributes:
        counts: the operator that counts.
        start: the count of an expert's first choice.
        behind: other choices that are counted before, and the comparison that keeps those that
            are, with what it compares, if not all of them are.
    """

    counts: fx.Node
    start: float
    behind: dict[fx.Node, tuple[fx.Node, fx.Node] | None]


@dataclasses.dataclass(frozen=True)
class _Places:
    """What is known of the slots of one term: whose they are, what is left out, how they count."""

    choice: fx.Node
    dropped: frozenset[fx.Node]
    running: _Running

    def is_behind(self, other: _Places) -> bool:
        """Whether all its slots come after those of another term."""
        if other.choice not in self.running.behind or self.choice is other.choice:
            return False
        kept = self.running.behind[other.choice]
        first = kept is None or (kept[0] in other.dropped and kept[1] is other.running.counts)
        return first and self.running.start == other.running.start


class Slots:
    """Reads a combine tensor.

    Args:
        writes: the graph's writes in place.
        expert: the axis of the experts.
        slot: the axis of the slots.
        counted: the axes of the tokens that share slots.
    """

    def __init__(self, writes: Writes, expert: Axis, slot: Axis, counted: Sequence[Axis]) -> None:
        self._writes, self._expert, self._slot = writes, expert, slot
        self._counted = set(counted)

    def read(self, node: fx.Node, layout: Layout, reader: fx.Node) -> list[Term]:
        """The terms of a combine tensor.

        Raises:
            Refused: a slot may have more than one token.
        """
        found: list[Term] = []
        places: list[_Places] = []
        for parts, rows in self._terms(node, layout, reader, ()):
            term, place = self._term(parts, rows)
            found.append(term)
            places.append(place)
        for later, place in enumerate(places):
            for earlier in places[:later]:
                if not (place.is_behind(earlier) or earlier.is_behind(place)):
                    raise Refused(UNPROVED)
        return found

    def _behind(self, node: fx.Node, layout: Layout, reader: fx.Node) -> tuple[fx.Node, Layout]:
        """What a node is a view of, or the same numbers in another dtype, with its layout."""
        node = self._writes.now(node, reader)
        chain: list[fx.Node] = []
        while is_view(node) or (is_cast(node) and _keeps(node)):
            chain.append(node)
            node = self._writes.now(node.args[0], node)  # type: ignore[arg-type]
        if not chain:
            return node, leaves(layout)
        own = fresh(node)
        turned = forward(chain[::-1], own)
        if turned is None or len(turned) != len(layout) or not aligned(layout, turned):
            raise Refused(UNPROVED)
        return node, leaves(own)

    def _terms(
        self, node: fx.Node, layout: Layout, reader: fx.Node, rows: tuple[Axis, ...]
    ) -> list[tuple[list[Part], tuple[Axis, ...]]]:
        node, layout = self._behind(node, layout, reader)
        given = arguments(node) if node.op == "call_function" else {}
        if node.target in _ADDS and given.get("alpha", 1) == 1:
            sides = [given["self"], given["other"]]
            if all(isinstance(side, fx.Node) for side in sides):
                return [
                    term
                    for side in sides
                    for term in self._terms(side, _operand(side, node, layout), node, rows)
                ]
        if node.target is aten.sum.dim_IntList:
            inner, added = _summed(node, layout)
            return self._terms(given["self"], inner, node, (*rows, *added))
        return [(self._factors(node, layout, node), rows)]

    def _factors(self, node: fx.Node, layout: Layout, reader: fx.Node) -> list[Part]:
        """The factors of a product, behind views."""
        found: list[Part] = []
        waiting: list[tuple[fx.Node, Layout, fx.Node]] = [(node, layout, reader)]
        while waiting:
            item, has, at = waiting.pop()
            if item is not at:
                item, has = self._behind(item, has, at)
            given = arguments(item) if item.op == "call_function" else {}
            product = read_product(item)
            if item.target in _MULS and isinstance(given["other"], fx.Node):
                for side in (given["self"], given["other"]):
                    waiting.append((side, _operand(side, item, has), item))
            elif item.target is aten.div.Tensor and isinstance(given["other"], fx.Node):
                waiting.append((given["self"], _operand(given["self"], item, has), item))
                low, own = self._behind(given["other"], _operand(given["other"], item, has), item)
                found.append(Part(low, own, inverse=True))
            elif product is not None and not product.contracted and product.bias is None:
                named = dict(zip(product.out_letters, has, strict=True))
                for side, letters in (
                    (product.left, product.left_letters),
                    (product.right, product.right_letters),
                ):
                    waiting.append((side, tuple(named[a] for a in letters), item))
            else:
                found.append(Part(item, leaves(has)))
        return found

    def _term(self, parts: list[Part], rows: tuple[Axis, ...]) -> tuple[Term, _Places]:
        slots = [part for part in parts if self._slot in part.axes()]
        choices = [part for part in parts if self._is_choice(part)]
        if len(slots) != 1 or not choices or slots[0].inverse:
            raise Refused(UNPROVED)
        (slot,), choice = slots, choices[0]
        if any(part.node is not choice.node for part in choices):
            raise Refused(UNPROVED)
        if slot.node.target is not aten.one_hot.default or slot.layout[-1] != (self._slot,):
            raise Refused(UNPROVED)
        gates = tuple(part for part in parts if part is not slot and part not in choices)
        numbers = slot.node.args[0]
        assert isinstance(numbers, fx.Node)
        rows = leaves((rows,))[0]
        dropped = frozenset(part.node for part in gates if _is_bool(part.node))
        place = self._position(numbers, slot, choice, rows, dropped)
        return Term(choice, gates, rows), place

    def _is_choice(self, part: Part) -> bool:
        one_hot = part.node.target is aten.one_hot.default and not part.inverse
        return one_hot and leaves(part.layout)[-1] == (self._expert,)

    def _position(
        self,
        numbers: fx.Node,
        slot: Part,
        choice: Part,
        rows: tuple[Axis, ...],
        dropped: frozenset[fx.Node],
    ) -> _Places:
        """That the slot's number is the running count at the choice."""
        node, layout = self._behind(numbers, slot.layout[:-1], slot.node)
        shift = 0.0
        while node.target in (*_ADDS, *_SUBS) and isinstance(node.args[1], (int, float)):
            sign = -1 if node.target in _SUBS else 1
            shift += sign * arguments(node).get("alpha", 1) * node.args[1]
            node, layout = self._behind(node.args[0], layout, node)  # type: ignore[arg-type]
        if node.target is not aten.sum.dim_IntList:
            raise Refused(UNPROVED)
        inner, added = _summed(node, layout, self._expert)
        if list(added) != [self._expert]:
            raise Refused(UNPROVED)
        product, has = self._behind(arguments(node)["self"], inner, node)
        parts = self._factors(product, has, product)
        ours = [part for part in parts if self._same(part, choice)]
        left_out = {part.node for part in parts if _is_bool(part.node)}
        ranks = [part for part in parts if part.node not in left_out and part not in ours]
        if not ours or len(ranks) != 1 or any(part.inverse for part in parts):
            raise Refused(UNPROVED)
        if not left_out <= dropped:  # the slot of those would be the first one's
            raise Refused(UNPROVED)
        running = self._running(ranks[0], choice, rows)
        moved = dataclasses.replace(running, start=running.start + shift)
        return _Places(choice.node, dropped, moved)

    def _same(self, part: Part, choice: Part) -> bool:
        return part.node is choice.node and leaves(part.layout) == leaves(choice.layout)

    def _running(self, rank: Part, choice: Part, rows: tuple[Axis, ...] | None) -> _Running:
        """A running count: cumsum(choices), less 1 or the choice itself, behind other choices."""
        start = 1.0
        counts: list[fx.Node] = []
        behind: dict[fx.Node, tuple[fx.Node, fx.Node] | None] = {}
        waiting = [(rank.node, rank.layout, rank.node, 1)]
        while waiting:
            node, layout, reader, sign = waiting.pop()
            if node is not reader:
                node, layout = self._behind(node, layout, reader)
            given = arguments(node) if node.op == "call_function" else {}
            if node.target in (*_ADDS, *_SUBS) and given.get("alpha", 1) == 1:
                flip = -sign if node.target in _SUBS else sign
                waiting.append((given["self"], _operand(given["self"], node, layout), node, sign))
                if isinstance(given["other"], fx.Node):
                    side = _operand(given["other"], node, layout)
                    waiting.append((given["other"], side, node, flip))
                else:
                    start += flip * given["other"]
            elif node.target is aten.cumsum.default and sign == 1:
                self._counts(node, layout, choice, rows)
                counts.append(node)
            elif sign == -1 and self._same(Part(node, layout), choice):
                start -= 1
            elif node.target is aten.sum.dim_IntList and sign == 1:
                other, kept = self._all_of(node, layout)
                behind[other] = kept
            else:
                raise Refused(UNPROVED)
        if len(counts) != 1:
            raise Refused(UNPROVED)
        return _Running(counts[0], start, behind)

    def _counts(
        self, node: fx.Node, layout: Layout, choice: Part, rows: tuple[Axis, ...] | None
    ) -> None:
        """That a running sum is one of the choices, over all tokens that share slots."""
        given = arguments(node)
        dim = given["dim"] % len(layout)
        dtype = node.meta["val"].dtype
        if dtype in (torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16):
            raise Refused(f"positions are counted in {dtype}, which is not exact".replace(
                "torch.", ""))  # fmt: skip
        over = set(leaves(layout)[dim])
        base, own = self._behind(given["self"], layout, node)
        counts = self._same(Part(base, own), choice)
        if not counts:
            raise Refused(UNPROVED)
        if rows is not None and not over >= {*leaves((tuple(self._counted),))[0], *rows}:
            raise Refused(UNPROVED)

    def _all_of(
        self, node: fx.Node, layout: Layout
    ) -> tuple[fx.Node, tuple[fx.Node, fx.Node] | None]:
        """The choice whose tokens a sum counts, and the comparison that keeps the counted ones."""
        inner, added = _summed(node, layout)
        product, own = self._behind(arguments(node)["self"], inner, node)
        parts = self._factors(product, own, product)
        choices = [part for part in parts if self._is_choice(part)]
        if len(choices) != 1:
            raise Refused(UNPROVED)
        (choice,) = choices
        stay = {axis for dim in leaves(layout) for axis in dim} - {self._expert}
        counted = {leaf for axis in self._counted for leaf in axis.leaves()}
        summed = set(choice.axes()) - stay - {self._expert}
        if stay & counted or summed != set(leaves((added,))[0]):
            raise Refused(UNPROVED)
        kept = [self._kept(part, choice) for part in parts if part is not choice]
        if len(kept) > 1:
            raise Refused(UNPROVED)
        return choice.node, kept[0] if kept else None

    def _kept(self, part: Part, choice: Part) -> tuple[fx.Node, fx.Node]:
        """A comparison that leaves the first choices of each expert: running count < number."""
        node = part.node
        if node.target not in _LESS or isinstance(node.args[1], fx.Node) or part.inverse:
            raise Refused(UNPROVED)
        product, own = self._behind(node.args[0], part.layout, node)  # type: ignore[arg-type]
        ranks = [
            item for item in self._factors(product, own, product) if item.node is not choice.node
        ]
        if len(ranks) != 1 or ranks[0].inverse:
            raise Refused(UNPROVED)
        # That it is the count of all who share slots is seen where it makes positions.
        return node, self._running(ranks[0], choice, None).counts


def _keeps(node: fx.Node) -> bool:
    """Whether a conversion keeps whole numbers: anything but to bool."""
    return node.meta["val"].dtype is not torch.bool


def _is_bool(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype is torch.bool)


def _operand(side: Any, node: fx.Node, layout: Layout) -> Layout:
    """The layout of an operand that is broadcast to a node's."""
    if not isinstance(side, fx.Node):
        return ()
    shape = side.meta["val"].shape
    own = layout[len(layout) - len(shape) :]
    return tuple(() if same_size(size, 1) else axes for size, axes in zip(shape, own, strict=True))


def _summed(
    node: fx.Node, layout: Layout, axis: Axis | None = None
) -> tuple[Layout, tuple[Axis, ...]]:
    """The layout of what a sum adds up, with new axes (or this one) for what it sums over."""
    given = arguments(node)
    source = given["self"].meta["val"]
    if not given["dim"]:
        raise Refused(UNPROVED)
    dims = sorted({dim % source.dim() for dim in given["dim"]})
    if axis is not None and (len(dims) != 1 or not same_size(source.shape[dims[0]], axis.size)):
        raise Refused(UNPROVED)
    rest = iter(layout)
    found: list[tuple[Axis, ...]] = []
    added: list[Axis] = []
    for dim in range(source.dim()):
        if dim in dims:
            if given["keepdim"]:
                next(rest)
            if same_size(source.shape[dim], 1):
                found.append(())
                continue
            new = axis if axis is not None else Axis(source.shape[dim])
            added.append(new)
            found.append((new,))
        else:
            found.append(next(rest))
    return tuple(found), tuple(added)

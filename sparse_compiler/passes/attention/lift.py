"""The value of a node at symbolic indices, as an expression.

Lifting goes backward from a node through everything pointwise, through views (``lift_views``), and
through operators that make or pick elements (``lift_tensors``), and turns them into one scalar
function of (batch, head, query, key). ``gather(cumsum(diff(arange)))`` comes out as a constant.
What cannot be lifted is read: a *leaf*. A part that only reads tensors is read as one tensor, the
smallest there is, so that a score costs as few loads as possible.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes import pointwise
from sparse_compiler.passes.attention import lift_tensors, lift_views
from sparse_compiler.passes.attention.facts import GraphFacts
from sparse_compiler.passes.attention.indices import Indices
from sparse_compiler.passes.attention.leaves import LOADS, Leaf, is_plain
from sparse_compiler.passes.attention.lift_views import Index, aligned, schema_name
from sparse_compiler.passes.attention.reads import (
    covers,
    holds,
    is_choice,
    only_reads,
    rounded,
)
from sparse_compiler.passes.attention.symbols import sizes_of, symbolic
from sparse_compiler.passes.pointwise import NotLiftable, converted
from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import B, Expr, H, K, Q
from sparse_compiler.score.node import ZERO
from sparse_compiler.static import arguments

aten = torch.ops.aten

# Masks are shallow; what is deeper is a part of the model, and read.
_DEEPEST = 100

_NARROW = (torch.bfloat16, torch.float16)

# Through these the value of a learned bias keeps its gradient a plain sum.
_TRANSPARENT = ("add", "sub", "where", "masked_fill")


class Lifter:
    """Lifts the values of one attention's nodes.

    Args:
        facts: of its graph.
        indices: of its index expressions.
        target: where lifting ends: the product of queries and keys (or the softmax, to see what
            happens to the weights).
        product: the target's value, given the index it was reached at; ``S`` by default.
        end: the last node of the region; what is written to behind it does not matter.
        beside: another lifter, to number leaves together.

    Attributes:
        leaves: what the expressions load, by slot.
        meanings: what a load stands for that reads several tensors, or positions, as one.
        reached: the index at which the target was reached, None if it was not.
        factors: operators, each with a number that is known at run time only: what the target is
            multiplied or divided by where its value is said to be ``S``.
        dropout: probability of the dropout that was passed.
    """

    def __init__(
        self,
        facts: GraphFacts,
        indices: Indices,
        target: fx.Node,
        end: fx.Node,
        product: Callable[[Lifter, Index], Expr] | None = None,
        beside: Lifter | None = None,
    ) -> None:
        self.facts = facts
        self.indices = indices
        self.leaves: list[Leaf] = beside.leaves if beside else []
        self.meanings: dict[Expr, Expr] = beside.meanings if beside else {}
        self.reached: Index | None = None
        self.factors: list[tuple[Any, fx.Node]] = []
        self.dropout = 0.0
        self._target = target
        self._end = end
        self._product = product
        self._behind = _between(target, end)
        self._slots: dict[tuple[fx.Node, Index | None], int] = beside._slots if beside else {}
        self._known: dict[tuple[fx.Node, Index], Expr] = {}
        self._depth = 0

    def value(self, node: fx.Node, index: Index) -> Expr:
        """The element of ``node`` at ``index``.

        Raises:
            NotLiftable: the target's value cannot be followed, or a leaf cannot be read.
        """
        key = node, index
        if key not in self._known:
            self._depth += 1
            try:
                self._known[key] = self._value(node, index)
            finally:
                self._depth -= 1
        return self._known[key]

    def operand(self, value: Any, index: Index) -> Expr:
        """An operand of a pointwise operator: a number, or a tensor that broadcasts."""
        if isinstance(value, fx.Node):
            if isinstance(value.meta["val"], torch.Tensor):
                return self.value(value, aligned(value, index))
            return self.value(value, ())
        if isinstance(value, (bool, int, float)):
            return e.const(value)
        raise NotLiftable(f"it computes with {type(value).__name__}")

    def whole_division(
        self, build: Callable[[Any, Any], Expr], left: Expr, right: Expr, towards_zero: bool
    ) -> Expr:
        """Integer division or remainder, by what cannot be 0.

        Raises:
            NotLiftable: that cannot be told.
        """
        if not self.indices.not_negative(e.sub(right, 1)):
            raise NotLiftable("it divides integers by what may be zero")
        if towards_zero and not self.indices.not_negative(left):
            raise NotLiftable("it divides towards zero what may be negative")
        if right.op == "const":
            quotient, rest = self.indices.divide(left, symbolic(right.value))
            return quotient if build is e.floordiv else rest
        return build(left, right)

    def along(self, node: fx.Node, index: Index, dim: int) -> Expr:
        """The element of ``node`` at ``index``, which is the same all along ``dim``.

        Raises:
            NotLiftable: it is not, or that cannot be told.
        """
        others = (*index[:dim], *index[dim + 1 :])
        free = [x for x in (B, H, Q, K) if not any(i.depends_on(x.op) for i in others)]
        if not free:
            raise NotLiftable("it adds up along a dimension")
        known, self._known = self._known, {}
        try:
            with self.indices.counting(free[0], sizes_of(node)[dim]):
                value = self.value(node, (*index[:dim], free[0], *index[dim + 1 :]))
        finally:
            self._known = known
        if value.depends_on(free[0].op):
            raise NotLiftable("it adds up what differs along a dimension")
        return value

    def _value(self, node: fx.Node, index: Index) -> Expr:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return self._number(node, value)
        if node is self._target:
            return self._hit(index)
        if node in self._behind:
            return self._through(node, index)
        literal = self.facts.literal(node)
        if literal is not None:
            return converted(e.const(literal), value.dtype)
        if self.facts.is_learned(node):
            return self._learned(node, index)
        if self.facts.static.is_static(node) and schema_name(node) not in lift_tensors.MAKERS:
            return self._leaf(node, index)
        if self._depth > _DEEPEST:
            return self._leaf(node, index)
        try:
            lifted = self._through(node, index)
        except NotLiftable:
            return self._folded(node, index) or self._leaf(node, index)
        return self._settled(node, index, lifted)

    def _hit(self, index: Index) -> Expr:
        if self.reached not in (None, index):
            raise NotLiftable("a score depends on more than one product of a query and a key")
        self.reached = index
        return self._product(self, index) if self._product else e.S

    def _number(self, node: fx.Node, value: Any) -> Expr:
        """A number that is computed in the graph: a size, or the element of a tensor."""
        if isinstance(value, (torch.SymInt, bool, int, float)):
            return self.indices.size(value) if not isinstance(value, float) else e.const(value)
        if schema_name(node) == "item":
            return self.value(*self._only_element(node))
        if isinstance(value, torch.SymFloat):
            return self._leaf(node, ())
        raise NotLiftable(f"{node.name} is no number")

    def _only_element(self, node: fx.Node) -> tuple[fx.Node, Index]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source, (ZERO,) * source.meta["val"].dim()

    def _through(self, node: fx.Node, index: Index) -> Expr:
        """The value as an expression of the operator's operands."""
        name = schema_name(node)
        for operand in node.all_input_nodes:
            if self.facts.written_after(operand, self._end, reader=node):
                raise NotLiftable(f"{operand.name} is written to in place")
        scaled = self._scaled(node, name, index)
        if scaled is not None:
            return scaled
        moved = lift_views.source(self.indices, node, index)
        if moved is not None:
            return self.value(*moved)
        rule = pointwise.RULES.get(name) or lift_tensors.RULES.get(name)
        if rule is None:
            raise NotLiftable(f"{_spoken(node)} is not pointwise")
        given = arguments(node)
        if name == "dropout" and given["train"] and node in self._behind:
            if self.dropout:
                raise NotLiftable("it drops elements twice")
            self.dropout = float(given["p"])
            return self.value(given["input"], index)
        try:
            lifted = rule(self, node, given, index)
        except ValueError as error:  # the expression's own checks
            raise NotLiftable(f"{_spoken(node)} has no expression: {error}") from error
        dtype = node.meta["val"].dtype
        if dtype is torch.int32 and lifted.depends_on("load"):
            raise NotLiftable("it computes in int32, which may wrap around")
        return converted(lifted, dtype)

    def _scaled(self, node: fx.Node, name: str, index: Index) -> Expr | None:
        """The target times a number that is only known at run time: that is left to the query."""
        if node not in self._behind or name not in ("mul", "div"):
            return None
        left, right = node.args[:2]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        if not isinstance(right.meta["val"], torch.SymFloat):
            return None
        # Nothing else may see the target as it was before.
        early = (item for item in self._behind | {self._target} if item <= left)
        if any(len(item.users) > 1 for item in early) or self.value(left, index) is not e.S:
            return None
        self.factors.append((aten.mul.Tensor if name == "mul" else aten.div.Tensor, right))
        return e.S

    def scale(self, number: float | fx.Node) -> Expr:
        """``S`` times a number, which may be known at run time only."""
        if not isinstance(number, fx.Node):
            return e.mul(e.S, number)
        self.factors.append((aten.mul.Tensor, number))
        return e.S

    def _settled(self, node: fx.Node, index: Index, lifted: Expr) -> Expr:
        """The lifted value, or a load of the node if it only combines what tensors hold."""
        dtype = node.meta["val"].dtype
        if not lifted.depends_on("load"):
            if dtype in _NARROW:
                return rounded(lifted, dtype) or self._leaf(node, index)
            return lifted
        if dtype in _NARROW and (lifted.op != "load" or not holds(dtype, lifted.dtype)):
            if is_choice(lifted):
                return rounded(lifted, dtype) or lifted
            if lifted.op == "load" or schema_name(node) not in _TRANSPARENT:
                return self._leaf(node, index)
        if lifted.op == "load":
            square = lifted.depends_on("q") and lifted.depends_on("k")
            # Of an element for each query and key, the last view: keys may be contiguous in it.
            plain = is_plain(index) and is_plain(lifted.operands)
            if square and plain and lift_views.is_whole_view(node):
                return self._leaf(node, index)
            return lifted
        if is_choice(lifted):
            return lifted
        square = lifted.depends_on("q") and lifted.depends_on("k")
        known = all(self.leaves[x.slot].kind in ("static", "constant") for x in lifted.loads())
        # A buffer is recognised; what is computed from it in each call is not.
        if square and ((known and self.facts.kind(node) == "runtime") or not only_reads(lifted)):
            return lifted
        read = self._leaf(node, index)
        self.meanings.setdefault(read, lifted.substitute(self.meanings))
        # An element for each query and key is read only if one of the parts has as many.
        parts = lifted.loads() if square else (lifted,)
        return read if any(covers(part, read) for part in parts) else lifted

    def _folded(self, node: fx.Node, index: Index) -> Expr | None:
        """A constant tensor whose elements are all alike, or count up evenly."""
        value = self.facts.constant(node)
        if value is None or value.numel() == 0 or value.is_complex():
            return None
        first = value.flatten()[0]
        steps = [0] * value.dim()
        if value.dtype in (torch.int64, torch.int32):
            for dim, size in enumerate(value.shape):
                if size > 1:
                    second = value.select(dim, 1).flatten()[0]
                    steps[dim] = int(second - first)
        even = torch.full_like(value, first.item())
        for dim, step in enumerate(steps):
            count = torch.arange(value.shape[dim]).view([-1] + [1] * (value.dim() - dim - 1))
            even = even + step * count if step else even
        if not torch.equal(even, value):
            return None
        total = e.const(first.item())
        for step, at in zip(steps, index, strict=True):
            total = e.add(total, e.mul(at, step)) if step else total
        return total

    def _learned(self, node: fx.Node, index: Index) -> Expr:
        """A value with a gradient: a leaf that broadcasts, as close to its source as that goes."""
        through = schema_name(node) in _TRANSPARENT or lift_views.is_whole_view(node)
        if through or schema_name(node) in ("expand", "expand_as"):
            try:
                lifted = self._through(node, index)
                if lifted.op == "load" and lift_views.is_whole_view(node) and is_plain(index):
                    return self._leaf(node, index)
                if node.meta["val"].dtype not in _NARROW or lifted.op == "load":
                    return lifted
            except NotLiftable:
                pass
        if not is_plain(index):
            raise NotLiftable(f"{node.name}, which has a gradient, is read at computed positions")
        return self._leaf(node, index)

    def _leaf(self, node: fx.Node, index: Index) -> Expr:
        """A load of the node's element.

        Raises:
            NotLiftable: the node is written to afterwards, or of a dtype that cannot be loaded.
        """
        node = self.facts.first_like(node)
        value = node.meta["val"]
        if self.facts.written_after(node, self._end):
            raise NotLiftable(f"{node.name} is written to in place")
        if not isinstance(value, torch.Tensor):
            return e.load(self._slot(Leaf(node, "runtime")), "f64")
        if value.dtype not in LOADS:
            raise NotLiftable(f"{node.name} is {value.dtype}")
        if self.facts.is_learned(node):
            leaf = Leaf(node, "learned", index)
            index = tuple(x if x in index else ZERO for x in (B, H, Q, K))
        else:
            leaf = Leaf(node, self.facts.kind(node))
            index = self._inside(node, index)
        return e.load(self._slot(leaf), leaf.dtype, *index)

    def _inside(self, node: fx.Node, index: Index) -> Index:
        pairs = zip(index, sizes_of(node), strict=True)
        return tuple(self.indices.clamped(i, symbolic(size)) for i, size in pairs)

    def _slot(self, leaf: Leaf) -> int:
        key = leaf.node, leaf.order
        if key not in self._slots:
            self._slots[key] = len(self.leaves)
            self.leaves.append(leaf)
        return self._slots[key]


def _between(target: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes behind ``target`` that depend on it, up to ``end``."""
    found = {target}
    node = target.next
    while node.op != "root" and target is not end:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
        if node is end:
            break
        node = node.next
    found.discard(target)
    return found


def _spoken(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"{_spoken(node.args[0])}" if isinstance(node.args[0], fx.Node) else "getitem"
    return schema_name(node) or str(node.target)

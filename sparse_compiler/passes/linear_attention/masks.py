"""Reads masks of zeros and ones as products of conditions: causal ones by proof.

``tril(ones)``, ``position[None] <= position[:, None]``, ``~triu(ones, 1).bool()``, a buffer that
holds one of them, and conjunctions with the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparse_compiler.derived import PLAIN, has_version
from sparse_compiler.passes.linear_attention.indices import Index, NotMultilinear, same
from sparse_compiler.passes.linear_attention.network import Network, Term, leaf, multiplied
from sparse_compiler.passes.linear_attention.triangles import (
    Fact,
    band,
    below,
    comparison,
    complement,
    triangle_of,
)
from sparse_compiler.passes.linear_attention.views import CASTS, MOVES, VIEWS, view_of
from sparse_compiler.static import StaticValues, arguments, mutated_nodes

aten = torch.ops.aten


class MaskReader:
    """The masks of one graph.

    Args:
        static: the graph's static values.

    Attributes:
        facts: for each buffer that was recognised, by node, what it was found to hold.
        written: nodes that something writes to.
    """

    def __init__(self, static: StaticValues) -> None:
        self.facts: dict[fx.Node, Fact] = {}
        self.written = mutated_nodes(static.gm.graph)
        self._static = static

    def causal(self, node: Any) -> Network | None:
        """The mask as a network if it is causal (and maybe more), else None."""
        try:
            found = self.read(node, keep=True)
        except NotMultilinear:
            return None
        return found if any(term.causal for term in found.terms) else None

    def read(self, node: Any, *, keep: bool) -> Network:
        """The mask as a product of conditions: 1 where it is true (``keep``), or where it is not.

        Raises:
            NotMultilinear: it may hold other numbers than 0 and 1, or is no such product.
        """
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            raise NotMultilinear("a mask is no tensor")
        try:
            found = self._static_triangle(node, keep) or self._through(node, keep)
        except NotMultilinear:
            found = None
        if found is not None:
            return found
        if node.meta["val"].dtype is not torch.bool:
            raise NotMultilinear("a mask may hold other numbers than 0 and 1")
        return leaf(node, "keep" if keep else "drop")

    def is_zero(self, value: Any) -> bool:
        """Whether an operand is zero everywhere."""
        if not isinstance(value, fx.Node):
            return isinstance(value, (int, float)) and value == 0
        if value in self.written:
            return False
        if value.op == "get_attr" and "constant" in str(value.target):
            # A literal of the program, such as ``torch.tensor(0.0)``.
            known = self._static.leaf(value)
            return known is not None and known.numel() == 1 and known.item() == 0
        if value.target in _FILLED:
            return self.is_zero(arguments(value)[_FILLED[value.target]])
        if value.target in VIEWS or value.target in MOVES or value.target in CASTS:
            return self.is_zero(value.args[0])
        return value.target in _ZEROS

    def _through(self, node: fx.Node, keep: bool) -> Network | None:
        if node.op != "call_function" or node in self.written:
            return None
        if node.target in MOVES or node.target in CASTS:
            return self.read(node.args[0], keep=keep)
        if node.target in VIEWS:
            source = self.read(node.args[0], keep=keep)
            dims, names = view_of(node, source.dims)
            return Network(dims, source.renamed(names).terms)
        rule = _RULES.get(node.target)
        return None if rule is None else rule(self, node, keep)

    def _static_triangle(self, node: fx.Node, keep: bool) -> Network | None:
        """A mask that parameters and buffers decide, if it is a triangle now."""
        shape = node.meta["val"].shape
        if len(shape) < 2 or not same(shape[-1], shape[-2]) or same(shape[-1], 1):
            return None
        expression = self._static.expression(node)
        if expression is None or self._static.is_trainable(node):
            return None
        tensors = self._static.leaf_values(expression)
        if not all(type(tensor) in PLAIN and has_version(tensor) for tensor in tensors):
            return None
        triangle = triangle_of(self._static.value(node))
        if triangle is None:
            return None
        self.facts[node] = Fact(expression, *triangle)
        dims = leaf(node).dims
        (row,), (column,) = dims[-2:]
        name, diagonal = triangle
        kept = below(row, column, diagonal) if name == "tril" else below(column, row, -diagonal)
        return Network(dims, (Term(causal=(kept if keep else complement(kept),)),))


def _not(reader: MaskReader, node: fx.Node, keep: bool) -> Network:
    return reader.read(node.args[0], keep=not keep)


def _and(reader: MaskReader, node: fx.Node, keep: bool) -> Network:
    if not keep:
        raise NotMultilinear("a mask is no product of conditions")
    left, right = (reader.read(operand, keep=True) for operand in node.args[:2])
    return multiplied(left, right)


def _or(reader: MaskReader, node: fx.Node, keep: bool) -> Network:
    if keep:
        raise NotMultilinear("a mask is no product of conditions")
    left, right = (reader.read(operand, keep=False) for operand in node.args[:2])
    return multiplied(left, right)


def _constant(reader: MaskReader, node: fx.Node, keep: bool) -> Network:
    given = arguments(node)
    value = given["fill_value"] if "fill_value" in given else "ones" in str(node.target)
    if value not in (0, 1) or bool(value) is not keep:
        raise NotMultilinear("a mask keeps nothing")
    return Network(leaf(node).dims, (Term(),))


def _triangle(reader: MaskReader, node: fx.Node, keep: bool) -> Network:
    source = reader.read(node.args[0], keep=True)
    kept = band(node, source.dims)
    if keep:
        return Network(source.dims, tuple(t.times(Term(causal=(kept,))) for t in source.terms))
    if source.terms != (Term(),):
        raise NotMultilinear("a mask is no product of conditions")
    return Network(source.dims, (Term(causal=(complement(kept),)),))


def _compared(reader: MaskReader, node: fx.Node, keep: bool) -> Network:
    left, right = node.args[:2]
    name = str(node.target).split(".")[1]
    truth = _TRUTH.get((name, right)) if isinstance(right, int) else None
    if truth is not None:
        try:
            # Of something that is 0 or 1.
            return reader.read(left, keep=keep is truth)
        except NotMultilinear:
            pass
    if name in ("eq", "ne"):
        raise NotMultilinear("positions are compared for equality")
    dims, kept = comparison(name, left, right, reader.written)
    return Network(dims, (Term(causal=(kept if keep else complement(kept),)),))


def _one_minus(reader: MaskReader, node: fx.Node, keep: bool) -> Network:
    if node.args[1] != 1 or node.kwargs.get("alpha", 1) != 1:
        raise NotMultilinear("a mask may hold other numbers than 0 and 1")
    return reader.read(node.args[0], keep=not keep)


def _chosen(reader: MaskReader, node: fx.Node, keep: bool) -> Network:
    mask, yes, no = node.args[:3]
    if (yes, no) not in ((1, 0), (0, 1)):
        raise NotMultilinear("a mask may hold other numbers than 0 and 1")
    return reader.read(mask, keep=keep is bool(yes))


def _cut(reader: MaskReader, node: fx.Node, keep: bool) -> Network:
    """The first positions of a mask: a triangle stays one if both its dimensions are cut alike."""
    source: Any = node
    while source.target is aten.slice.Tensor:
        given = arguments(source)
        if given.get("start") not in (0, None) or given.get("step", 1) != 1:
            raise NotMultilinear("a part of a mask is cut out")
        source = source.args[0]
    whole = reader.read(source, keep=keep)
    names: dict[Index, tuple[Index, ...]] = {}
    for dim, size in zip(whole.dims, node.meta["val"].shape, strict=True):
        for index in dim:
            if len(dim) > 1 or same(size, 1):
                raise NotMultilinear("a part of a mask is cut out")
            if not same(index.size, size):
                names[index] = (Index(size),)
    (term,) = whole.terms
    if any(index in names for factor in term.factors for index in factor.indices):
        raise NotMultilinear("a part of a mask is cut out")
    cut = whole.renamed(names)
    if any(not same(c.row.size, c.column.size) for c in cut.terms[0].causal):
        raise NotMultilinear("a causal mask is not square")
    return cut


Rule = Callable[[MaskReader, fx.Node, bool], Network]

# Which comparisons with 0 or 1 are true where a mask is.
_TRUTH: dict[tuple[str, int], bool] = {
    ("eq", 0): False,
    ("eq", 1): True,
    ("ne", 0): True,
    ("ne", 1): False,
    ("gt", 0): True,
    ("ge", 1): True,
    ("lt", 1): False,
    ("le", 0): False,
}
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
# Operators that make a tensor of one number, and what the number is called.
_FILLED: dict[Any, str] = {
    aten.full.default: "fill_value",
    aten.full_like.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.scalar_tensor.default: "s",
}

_RULES: dict[Any, Rule] = {
    aten.bitwise_not.default: _not,
    aten.logical_not.default: _not,
    aten.bitwise_and.Tensor: _and,
    aten.logical_and.default: _and,
    aten.__and__.Tensor: _and,
    aten.bitwise_or.Tensor: _or,
    aten.logical_or.default: _or,
    aten.__or__.Tensor: _or,
    aten.mul.Tensor: _and,
    aten.ones.default: _constant,
    aten.ones_like.default: _constant,
    aten.new_ones.default: _constant,
    aten.full.default: _constant,
    aten.full_like.default: _constant,
    aten.new_full.default: _constant,
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    aten.rsub.Scalar: _one_minus,
    aten.where.Scalar: _chosen,
    aten.slice.Tensor: _cut,
    **{
        getattr(getattr(aten, name), kind): _compared
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind in ("Tensor", "Scalar")
    },
}

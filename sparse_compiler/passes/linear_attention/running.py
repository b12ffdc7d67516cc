"""Rules of sums, running sums and masks; see ``rules``."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.indices import Index, NotMultilinear, same
from sparse_compiler.passes.linear_attention.masks import MaskReader
from sparse_compiler.passes.linear_attention.network import Causal, Network, Term, multiplied
from sparse_compiler.passes.linear_attention.triangles import band
from sparse_compiler.static import arguments

aten = torch.ops.aten

PADS = (aten.constant_pad_nd.default, aten.pad.default)


class Reads(Protocol):
    """What rules need of the reader."""

    masks: MaskReader

    def operand(self, value: Any) -> Network:
        """An argument as a network."""
        ...

    def is_weight(self, node: fx.Node) -> bool:
        """Whether parameters decide its value."""
        ...


def _dims(node: fx.Node) -> list[int]:
    given = arguments(node)
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dims = given.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [dims] if isinstance(dims, int) else list(dims)


def sum_(reader: Reads, node: fx.Node) -> Network:
    """A sum along dimensions."""
    keepdim = bool(arguments(node).get("keepdim", False))
    return reader.operand(node.args[0]).summed(_dims(node), keepdim=keepdim)


def cumsum(reader: Reads, node: fx.Node) -> Network:
    """A running sum: a sum over the positions up to each."""
    source = reader.operand(node.args[0])
    place = int(arguments(node)["dim"]) % max(len(source.dims), 1)
    if not source.dims or not source.dims[place]:
        return source
    if len(source.dims[place]) > 1:
        raise NotMultilinear("a running sum goes along merged dimensions")
    (column,) = source.dims[place]
    row = Index(column.size)
    terms = []
    for term in source.terms:
        if any(column in (c.row, c.column) for c in term.causal):
            raise NotMultilinear("a running sum is summed again")
        summed = term.summed([column])
        if column not in summed.bound:
            raise NotMultilinear("a number is summed up")
        terms.append(dataclasses.replace(summed, causal=(*term.causal, Causal(row, column))))
    dims = (*source.dims[:place], (row,), *source.dims[place + 1 :])
    return Network(dims, tuple(terms), source.inside)


def _summed(reader: Reads, value: Any) -> Network:
    """An operand that is a sum of products: nothing else is worth masking in another way."""
    found = reader.operand(value)
    if not found.has_sum:
        raise NotMultilinear("no sum of products is masked")
    return found


def triangle(reader: Reads, node: fx.Node) -> Network:
    """``tril`` or ``triu`` of scores."""
    source = _summed(reader, node.args[0])
    kept = Term(causal=(band(node, source.dims),))
    terms = tuple(term.times(kept) for term in source.terms)
    return Network(source.dims, terms, source.inside)


def masked_fill(reader: Reads, node: fx.Node) -> Network:
    """Scores with zeros where a mask is true."""
    source, mask, value = node.args[:3]
    if not reader.masks.is_zero(value):
        raise NotMultilinear("masked scores are not zero")
    return multiplied(_summed(reader, source), reader.masks.read(mask, keep=False))


def where(reader: Reads, node: fx.Node) -> Network:
    """Scores where a mask is true or false, zeros elsewhere."""
    mask, yes, no = node.args[:3]
    if reader.masks.is_zero(no):
        return multiplied(_summed(reader, yes), reader.masks.read(mask, keep=True))
    if reader.masks.is_zero(yes):
        return multiplied(_summed(reader, no), reader.masks.read(mask, keep=False))
    raise NotMultilinear("masked scores are not zero")


def slice_(reader: Reads, node: fx.Node) -> Network:
    """The last position of a running sum is the sum; all but the last may be the sum before."""
    given = arguments(node)
    padded: Any = node.args[0]
    place = int(given.get("dim", 0)) % node.meta["val"].dim()
    size, left = padded.meta["val"].shape[place], node.meta["val"].shape[place]
    if same(left, size):
        return reader.operand(padded)
    start = given.get("start")
    if given.get("step", 1) != 1:
        raise NotMultilinear("a part is cut out")
    if start in (None, 0) and same(left, size - 1) and _padding(padded) == (place, 1, 0):
        source = _before(reader.operand(padded.args[0]), place)
        return Network(source.dims, source.terms, source.inside | {padded})
    if same(left, 1) and (start == -1 or same(start, size - 1)):
        return _last(reader.operand(padded), place, keepdim=True)
    raise NotMultilinear("a part is cut out")


def select(reader: Reads, node: fx.Node) -> Network:
    """The last position of a running sum, without its dimension."""
    source, given = reader.operand(node.args[0]), arguments(node)
    place = int(given["dim"]) % len(source.dims)
    size = node.args[0].meta["val"].shape[place]  # type: ignore[union-attr]
    if given["index"] != -1 and not same(given["index"], size - 1):
        raise NotMultilinear("a part is cut out")
    return _last(source, place, keepdim=False)


def pad(reader: Reads, node: fx.Node) -> Network:
    """A running sum moved by one position, a zero in front."""
    place, before, after = _padding(node) or (0, 0, 0)
    if (before, after) != (1, -1):
        raise NotMultilinear("a sum is padded")
    return _before(reader.operand(node.args[0]), place)


def _padding(node: Any) -> tuple[int, int, int] | None:
    """The only dimension that an operator pads with zeros, and by how much before and behind."""
    if not isinstance(node, fx.Node) or node.target not in PADS:
        return None
    given = arguments(node)
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
        return None
    pairs = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))
    padded = [place for place, pair in enumerate(pairs) if pair != (0, 0)]
    if len(padded) != 1:
        return None
    return (node.meta["val"].dim() - 1 - padded[0], *pairs[padded[0]])


def _before(source: Network, place: int) -> Network:
    """A running sum moved by one position: the sum of what comes before each."""
    terms = []
    for term in source.terms:
        (condition,) = _rows_of(term, source.dims[place]) or (None,)
        if condition is None or condition.strict:
            raise NotMultilinear("what is moved by a position is no running sum")
        others = (c for c in term.causal if c is not condition)
        strict = dataclasses.replace(condition, strict=True)
        terms.append(dataclasses.replace(term, causal=(*others, strict)))
    return Network(source.dims, tuple(terms), source.inside)


def _last(source: Network, place: int, *, keepdim: bool) -> Network:
    """A running sum at its last position."""
    terms = []
    for term in source.terms:
        conditions = _rows_of(term, source.dims[place])
        if any(condition.strict for condition in conditions):
            raise NotMultilinear("a part is cut out")
        kept = tuple(c for c in term.causal if c not in conditions)
        terms.append(dataclasses.replace(term, causal=kept))
    middle: tuple[tuple[Index, ...], ...] = ((),) if keepdim else ()
    dims = (*source.dims[:place], *middle, *source.dims[place + 1 :])
    return Network(dims, tuple(terms), source.inside)


def _rows_of(term: Term, row: tuple[Index, ...]) -> list[Causal]:
    """The conditions through which alone a term depends on ``row``."""
    if any(index in factor.indices for factor in term.factors for index in row):
        raise NotMultilinear("a part is cut out")
    if any(condition.column in row for condition in term.causal):
        raise NotMultilinear("a part is cut out")
    return [condition for condition in term.causal if condition.row in row]

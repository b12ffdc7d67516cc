"""One rule for each multilinear operator: the sum of products that it makes of its operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.linear_attention import running
from sparse_compiler.passes.linear_attention.indices import NotMultilinear, numel
from sparse_compiler.passes.linear_attention.network import (
    Network,
    Term,
    added,
    joined,
    leaf,
    multiplied,
)
from sparse_compiler.passes.linear_attention.running import Reads
from sparse_compiler.passes.linear_attention.views import CASTS
from sparse_compiler.static import arguments

aten = torch.ops.aten


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def _contraction(
    reader: Reads, operands: Sequence[Any], labels: Sequence[Sequence[Any]], out: Sequence[Any]
) -> Network:
    if any(isinstance(node, fx.Node) and reader.is_weight(node) for node in operands):
        raise NotMultilinear("one operand is a weight")
    networks = [reader.operand(node) for node in operands]
    # Of two sums the larger is taken apart: the other is likely to be queries, or values.
    sums = [place for place, network in enumerate(networks) if network.has_sum]
    sums.sort(key=lambda place: numel(i for dim in networks[place].dims for i in dim))
    for place in sums[:-1]:
        networks[place] = leaf(operands[place])
    return joined(networks, labels, out)


def _matmul(reader: Reads, node: fx.Node) -> Network:
    left, right = node.args[:2]
    ranks = [operand.meta["val"].dim() for operand in (left, right)]  # type: ignore[union-attr]
    batch: list[Any] = list(range(max(*ranks, 2) - 2))

    def names(rank: int, last: list[str], vector: list[str]) -> list[Any]:
        return vector if rank == 1 else batch[len(batch) - (rank - 2) :] + last

    a = names(ranks[0], ["m", "k"], ["k"])
    b = names(ranks[1], ["k", "n"], ["k"])
    out = batch + ["m"] * (ranks[0] > 1) + ["n"] * (ranks[1] > 1)
    return _contraction(reader, [left, right], [a, b], out)


def _baddbmm(reader: Reads, node: fx.Node) -> Network:
    given = arguments(node)
    scale = _number(given.get("alpha", 1))
    if given.get("beta", 1) != 0 or scale is None:
        raise NotMultilinear("something is added to the product")
    operands = [given["batch1"], given["batch2"]]
    return _contraction(reader, operands, ["bmk", "bkn"], "bmn").scaled(scale)


def _einsum(reader: Reads, node: fx.Node) -> Network:
    text, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if "->" not in text:
        raise NotMultilinear("an einsum leaves its result open")
    inputs, out = text.split("->")
    ranks = [operand.meta["val"].dim() for operand in operands]
    letters = inputs.split(",")
    extra = [rank - len(x) + 3 if "..." in x else 0 for rank, x in zip(ranks, letters, strict=True)]
    batch = list(range(max(extra)))

    def spelled(x: str, count: int) -> list[Any]:
        if "..." not in x:
            return list(x)
        before, after = x.split("...")
        return [*before, *batch[len(batch) - count :], *after]

    labels = [spelled(x, count) for x, count in zip(letters, extra, strict=True)]
    return _contraction(reader, operands, labels, spelled(out, len(batch)))


def _mul(reader: Reads, node: fx.Node) -> Network:
    left, right = node.args[:2]
    for one, other in ((left, right), (right, left)):
        number = _number(other)
        if number is not None:
            return reader.operand(one).scaled(number)
    networks = reader.operand(left), reader.operand(right)
    if all(network.has_sum for network in networks):
        raise NotMultilinear("two sums are multiplied")
    for network, (one, other) in zip(networks, ((left, right), (right, left)), strict=True):
        if network.has_sum and (mask := reader.masks.causal(other)) is not None:
            return multiplied(reader.operand(one), mask)
    return multiplied(*networks)


def _div(reader: Reads, node: fx.Node) -> Network:
    left, right = node.args[:2]
    if node.kwargs.get("rounding_mode") is not None:
        raise NotMultilinear("a division rounds")
    number = _number(right)
    if number is not None:
        if number == 0:
            raise NotMultilinear("something is divided by zero")
        return reader.operand(left).scaled(1 / number)
    if not isinstance(right, fx.Node):
        raise NotMultilinear("the divisor is no tensor")
    return multiplied(reader.operand(left), leaf(right, "over"))


def _add(reader: Reads, node: fx.Node, sign: float = 1.0) -> Network:
    left, right = node.args[:2]
    factor = _number(node.kwargs.get("alpha", 1))
    if factor is None:
        raise NotMultilinear("a factor of an addition is not known")
    networks = []
    for value in (left, right):
        number = _number(value)
        networks.append(reader.operand(value) if number is None else Network((), (Term(number),)))
    one, other = networks[0], networks[1].scaled(sign * factor)
    if not (one.has_sum or other.has_sum):
        raise NotMultilinear("no sum of products is added")
    total = added(one, other)
    return Network(total.dims, tuple(t for t in total.terms if t.scale != 0), total.inside)


def _sub(reader: Reads, node: fx.Node) -> Network:
    return _add(reader, node, -1.0)


def _same(reader: Reads, node: fx.Node) -> Network:
    return reader.operand(node.args[0])


def _cast(reader: Reads, node: fx.Node) -> Network:
    source = node.args[0]
    if not isinstance(source, fx.Node) or not source.meta["val"].is_floating_point():
        raise NotMultilinear("integers are converted")
    return reader.operand(source)


def _dropout(reader: Reads, node: fx.Node) -> Network:
    given = arguments(node)
    if given["train"] and given["p"] != 0:
        raise NotMultilinear("dropout is applied")
    return reader.operand(node.args[0])


Rule = Callable[[Reads, fx.Node], Network]

RULES: dict[Any, Rule] = {
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.mv.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.einsum.default: _einsum,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.sub.Scalar: _sub,
    aten.sum.dim_IntList: running.sum_,
    aten.sum.default: running.sum_,
    aten.cumsum.default: running.cumsum,
    aten.tril.default: running.triangle,
    aten.triu.default: running.triangle,
    aten.masked_fill.Scalar: running.masked_fill,
    aten.masked_fill.Tensor: running.masked_fill,
    aten.where.self: running.where,
    aten.where.ScalarOther: running.where,
    aten.where.ScalarSelf: running.where,
    **dict.fromkeys(CASTS, _cast),
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.dropout.default: _dropout,
    aten.slice.Tensor: running.slice_,
    aten.select.int: running.select,
    **dict.fromkeys(running.PADS, running.pad),
}

IN_PLACE: dict[str, Rule] = {
    "mul_": _mul,
    "div_": _div,
    "tril_": running.triangle,
    "triu_": running.triangle,
    "masked_fill_": running.masked_fill,
}

PRODUCTS = frozenset(
    {
        aten.matmul.default,
        aten.bmm.default,
        aten.mm.default,
        aten.mv.default,
        aten.baddbmm.default,
        aten.einsum.default,
    }
)
SUMS = frozenset({aten.sum.dim_IntList, aten.sum.default})
# Operators that may end a sum of products: others read their results as they are.
ENDS = PRODUCTS | SUMS | {aten.slice.Tensor, aten.select.int}

"""How models that run every expert combine the results: a sum over the experts, weighted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.moe.assemble import Factor, Mixture
from sparse_compiler.passes.moe.axes import (
    Axis,
    Layout,
    aligned,
    forward,
    fresh,
    is_cast,
    is_view,
    leaves,
    same_shape,
    source_of,
)
from sparse_compiler.passes.moe.expert import Experts
from sparse_compiler.passes.moe.products import read_product
from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.passes.moe.writes import Writes
from sparse_compiler.static import arguments

aten = torch.ops.aten

_MULS = (aten.mul.Tensor, aten.mul_.Tensor, aten.multiply.Tensor, aten.mul.Scalar)


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of all experts, as one tensor."""

    experts: tuple[Experts, ...]
    expert: Axis
    layout: Layout


# Reads a node, the result of all experts, for the operator that reads it.
Read = Callable[[fx.Node, fx.Node], Results | None]


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A product of factors: numbers, and tensors with who reads them."""

    node: fx.Node
    factors: tuple[tuple[fx.Node, fx.Node], ...]
    scale: float


def factors_of(node: fx.Node, writes: Writes) -> Weighted:
    """The factors of a product; a choice between a value and 0 is a product with its condition."""
    found: list[tuple[fx.Node, fx.Node]] = []
    scale = 1.0
    waiting: list[tuple[Any, fx.Node]] = [(node, node)]
    while waiting:
        item, reader = waiting.pop(0)
        if isinstance(item, (int, float)):
            scale *= item
            continue
        if not isinstance(item.meta.get("val"), torch.Tensor):
            return Weighted(node, (), 1.0)  # a size, say
        now = item if item is reader else writes.now(item, reader)
        given = arguments(now) if now.op == "call_function" else {}
        if now.target in _MULS:
            waiting[:0] = [(given["self"], now), (given["other"], now)]
        elif now.target is aten.where.ScalarOther and given["other"] == 0:
            waiting[:0] = [(given["self"], now), (given["condition"], now)]
        elif item is not reader and is_cast(now) and _wide(now):
            waiting.insert(0, (given["self"], now))
        else:
            found.append((now, reader))
    return Weighted(node, tuple(found), scale)


def _wide(node: fx.Node) -> bool:
    """Whether a conversion keeps floating-point numbers floating."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.meta["val"].is_floating_point() and node.meta["val"].is_floating_point()


def sums(gm: fx.GraphModule, read: Read, writes: Writes, spelling: str) -> Iterator[Mixture]:
    """Mixtures in graph order: sums of products, and products that are contracted."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        found = None
        try:
            if node.target is aten.sum.dim_IntList:
                found = _reduced(node, read, writes, spelling)
            elif read_product(node) is not None:
                found = _contracted(node, read, writes, spelling)
        except Refused:  # something is written to through a view: nothing is read there
            continue
        if found is not None:
            yield found


def behind_views(node: fx.Node, reader: fx.Node, writes: Writes) -> tuple[fx.Node, list[fx.Node]]:
    """What a node is a view or a conversion of, and these, the first one first."""
    chain: list[fx.Node] = []
    node = writes.now(node, reader)
    while is_view(node) or (is_cast(node) and _wide(node)):
        chain.append(node)
        node = writes.now(node.args[0], node)  # type: ignore[arg-type]
    return node, chain[::-1]


def _reduced(node: fx.Node, read: Read, writes: Writes, spelling: str) -> Mixture | None:
    """(results * gates).sum(dim)."""
    given = arguments(node)
    product, chain = behind_views(given["self"], node, writes)
    if product.target not in _MULS and product.target is not aten.where.ScalarOther:
        return None
    weighted = factors_of(product, writes)
    for place, (item, reader) in enumerate(weighted.factors):
        if not same_shape(item, product):
            continue
        results = read(item, reader)
        if results is None:
            continue
        others = [pair for at, pair in enumerate(weighted.factors) if at != place]
        factors = [factor_of(*pair, results.layout, writes) for pair in others]
        layout = reduced(node, forward(chain, results.layout), results.expert)
        if layout is None or any(factor is None for factor in factors):
            return None
        return Mixture(
            node=node,
            layout=layout,
            experts=results.experts,
            expert=results.expert,
            factors=tuple(factor for factor in factors if factor is not None),
            spelling=spelling,
            scale=weighted.scale,
        )
    return None


def reduced(node: fx.Node, layout: Layout | None, expert: Axis) -> Layout | None:
    """The layout of a sum over the experts and nothing else; None if it is another sum."""
    given = arguments(node)
    if layout is None or not given["dim"]:
        return None
    dims = {dim % len(layout) for dim in given["dim"]}
    resolved = leaves(layout)
    if [axis for dim in sorted(dims) for axis in resolved[dim]] != [expert]:
        return None
    if given["keepdim"]:
        return tuple(() if dim in dims else axes for dim, axes in enumerate(resolved))
    return tuple(axes for dim, axes in enumerate(resolved) if dim not in dims)


def factor_of(node: fx.Node, reader: fx.Node, whole: Layout, writes: Writes) -> Factor | None:
    """A factor of what has the layout ``whole``, or None if it is no gate of it."""
    base, chain = behind_views(node, reader, writes)
    layout = fresh(base)
    turned = forward(chain, layout)
    if turned is None or not aligned(whole, turned):
        return None
    return Factor(base, layout, chain[0] if chain else reader)


def _contracted(node: fx.Node, read: Read, writes: Writes, spelling: str) -> Mixture | None:
    """einsum("teo,te->to", results, gates), and the same as matmul or bmm."""
    product = read_product(node)
    assert product is not None
    for item in (product, product.turned()):
        if item.bias is not None:
            continue
        results = read(item.left, node)
        if results is None:
            continue
        gates, chain = behind_views(item.right, node, writes)
        layout = fresh(gates)
        turned = forward(chain, layout)
        axes = None if turned is None else item.axes(results.layout, turned)
        if axes is None or [x for a in item.contracted for x in axes[a]] != [results.expert]:
            return None
        return Mixture(
            node=node,
            layout=tuple(axes[a] for a in item.out_letters),
            experts=results.experts,
            expert=results.expert,
            factors=(Factor(gates, layout, chain[0] if chain else node),),
            spelling=spelling,
        )
    return None


def accounted(mixture: Mixture) -> bool:
    """Whether gates depend on tokens and experts only, and the sum on tokens and features."""
    first = mixture.experts[0]
    tokens, outputs = set(leaves((first.tokens,))[0]), set(first.outputs.leaves())
    for factor in mixture.factors:
        axes = _flat(factor.layout)
        if not set(axes) <= {*tokens, mixture.expert} or len(set(axes)) != len(axes):
            return False
    found = _flat(mixture.layout)
    return set(found) == tokens | outputs and len(found) == len(set(found))


def _flat(layout: Sequence[tuple[Axis, ...]]) -> list[Axis]:
    return [axis for dim in leaves(tuple(layout)) for axis in dim]


def source_node(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    return source_of(node)[0]

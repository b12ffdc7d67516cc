"""Linear layers whose weight is trained under a mask: sparse forward, sparse gradients.

``weight * mask``, ``torch.where(mask, weight, 0)`` and ``weight.masked_fill(mask, 0)`` say that
zeros are structure: gradients of masked weights are zero whatever happens. Then only kept weights
are read (``take``), multiplied, and given gradients. The mask is not trained; when it changes, its
layout is made anew, and fits as long as it keeps no more weights than before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparse_compiler.derived import derive, fitted
from sparse_compiler.formats import csr
from sparse_compiler.formats.cost import Decision, LinearProblem
from sparse_compiler.formats.masked import MaskLayout
from sparse_compiler.formats.masked import pack as pack_mask
from sparse_compiler.passes.base import PassContext, Rewrite
from sparse_compiler.passes.contraction import Contraction
from sparse_compiler.passes.verify import verifier
from sparse_compiler.region import Builder, Region, replace_region
from sparse_compiler.static import StaticValues

aten = torch.ops.aten
ops = torch.ops.sparse_compiler


@dataclasses.dataclass(frozen=True)
class MaskedWeight:
    """weight = dense * multiplier, with a multiplier that is not trained.

    Attributes:
        dense: the trained operand.
        mask: the static operand that holds the zeros.
        multiplier: from the mask's value to the multiplier (0 where the weight is masked).
        cast: dtype that the product is converted to (autocast), or None.
        transposed: whether the product is turned afterwards.
    """

    dense: fx.Node
    mask: fx.Node
    multiplier: Callable[[torch.Tensor], torch.Tensor]
    cast: torch.dtype | None = None
    transposed: bool = False

    def matrix(self, layer: Contraction, value: torch.Tensor) -> torch.Tensor:
        """Something of the dense operand's shape as the layer's [out_features, in_features]."""
        return layer.matrix(value.t() if self.transposed else value)

    def keeps(self, layer: Contraction, mask: torch.Tensor) -> torch.Tensor:
        """The multiplier [out_features, in_features] for this value of the mask."""
        return self.matrix(layer, self.multiplier(mask).to(self.dense.meta["val"].dtype))


def find_mask(weight: fx.Node, static: StaticValues) -> MaskedWeight | None:
    """The mask of a trainable weight, or None if its zeros are accidents."""
    node, cast, transposed = weight, None, False
    while node.op == "call_function" and node.target in _THROUGH:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.meta["val"].dtype != source.meta["val"].dtype:
            if cast is not None:
                return None
            cast = node.meta["val"].dtype
        if node.target in _TURNS and node.meta["val"].dim() == 2:
            transposed ^= _turns(node)
        node = source
    if node.op != "call_function" or node.meta["val"].dim() != 2:
        return None
    found = _read(node, static)
    if found is None:
        return None
    product, dense, mask = (n.meta["val"] for n in (node, found.dense, found.mask))
    if not product.shape == dense.shape == mask.shape or product.dtype != dense.dtype:
        return None
    return dataclasses.replace(found, cast=cast, transposed=transposed)


_TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)
_THROUGH = (*_TURNS, aten.to.dtype, aten._to_copy.default, aten.alias.default)


def _turns(node: fx.Node) -> bool:
    """Whether a transposition of a matrix, however spelled, swaps its two dimensions."""
    return node.target(torch.empty(2, 3, device="meta"), *node.args[1:]).shape[0] == 3  # type: ignore[operator]


def _fixed(node: Any, static: StaticValues) -> bool:
    return isinstance(node, fx.Node) and static.is_static(node) and not static.is_trainable(node)


def _read(node: fx.Node, static: StaticValues) -> MaskedWeight | None:
    if node.target is aten.mul.Tensor:
        left, right = node.args
        for dense, mask in ((left, right), (right, left)):
            if isinstance(dense, fx.Node) and _fixed(mask, static) and not _fixed(dense, static):
                return MaskedWeight(dense, mask, lambda value: value)  # type: ignore[arg-type]
    if node.target in (aten.where.self, aten.where.ScalarOther):
        mask, dense, other = node.args
        if _fixed(mask, static) and isinstance(dense, fx.Node) and _is_zero(other):
            return MaskedWeight(dense, mask, lambda value: value)  # type: ignore[arg-type]
    if node.target is aten.masked_fill.Scalar and _is_zero(node.args[2]):
        dense, mask = node.args[:2]
        if _fixed(mask, static) and isinstance(dense, fx.Node):
            return MaskedWeight(dense, mask, torch.logical_not)  # type: ignore[arg-type]
    return None


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def rewrite_masked(
    gm: fx.GraphModule,
    layer: Contraction,
    static: StaticValues,
    masked: MaskedWeight,
    decision: Decision,
    problem: LinearProblem,
    context: PassContext,
    rewrite: Rewrite,
) -> None:
    """Replace the layer by a sparse one that reads the dense weight's kept elements."""
    expression = static.expression(masked.mask)
    assert expression is not None and decision.format is not None
    group = csr.group_of(decision.format, problem.pattern)
    dense_shape = masked.dense.meta["val"].shape
    dtype = layer.weight.meta["val"].dtype

    def pack(value: torch.Tensor, like: MaskLayout | None = None) -> MaskLayout:
        keeps = masked.keeps(layer, value)
        places = masked.matrix(layer, torch.arange(dense_shape.numel()).view(dense_shape))
        return pack_mask(keeps, places, dtype, group=group, like=like)

    first = pack(static.value(masked.mask))  # type: ignore[arg-type]
    attributes: list[str] = []

    def build(builder: Builder, *inputs: fx.Node) -> fx.Node:
        nodes = {name: builder.constant(name, t) for name, t in first.tensors.items()}
        attributes.extend(str(node.target) for node in nodes.values())
        where = [nodes.pop(name) for name in ("index", "places", "source")]
        values = builder.call(ops.take.default, masked.dense, *where)
        values = builder.call(aten.mul.Tensor, values, nodes.pop("multiplier"))
        if masked.cast is not None:
            values = builder.call(aten.to.dtype, values, masked.cast)

        def product(x: fx.Node) -> fx.Node:
            return builder.call(
                ops.masked_linear_csr.default,
                x,
                values,
                nodes["columns"],
                nodes["segments"],
                *problem.pattern.shape,
                group,
                first.k_block,
                nodes["transposed_order"],
                nodes["transposed_columns"],
                nodes["transposed_segments"],
                first.transposed_k_block,
            )

        return layer.build(builder, product)

    replace_region(
        gm,
        Region.of([layer.node]),
        build,
        rule=f"masked_linear: {decision.format}",
        verify=verifier(gm, static, context, rewrite.target),
        fresh=True,
    )
    gm.meta.setdefault("derived", []).append(
        derive(
            attributes,
            expression,
            lambda value: list(_fitted(pack(value, first), first, dense_shape.numel()).values()),
            rewrite.target,
        )
    )
    rewrite.applied, rewrite.format = True, decision.format
    rewrite.packed_bytes = sum(t.numel() * t.itemsize for t in first.tensors.values())


def _fitted(new: MaskLayout, old: MaskLayout, outside: int) -> dict[str, torch.Tensor]:
    """The tensors of a changed mask in the sizes that the compiled code was made for."""
    # Filling points one past the end: it reads zero, and its gradient goes nowhere.
    end = old.tensors["index"].numel()
    fill = {"index": outside, "places": outside, "transposed_order": end}
    order = new.tensors["transposed_order"]
    short = order == new.tensors["index"].numel()
    tensors = {**new.tensors, "transposed_order": order.masked_fill(short, end)}
    return {
        name: fitted(tensor, old.tensors[name], fill.get(name, 0))
        for name, tensor in tensors.items()
    }

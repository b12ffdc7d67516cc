"""Which dimension of an operator's result is which dimension of its operands.

A channel axis is followed through a graph by these maps. ``Axis`` says where channels are in one
tensor: along ``dim``, whose positions read as [outer, units, span], so that a fused gate-and-up
projection has ``outer`` 2 and a flat [heads * head_dim] dimension has ``span`` head_dim.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.static import arguments

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Axis:
    """Where the channels are: along ``dim``, repeated ``outer`` times, each time all of them."""

    dim: int
    outer: int = 1


def _overloads(names: str) -> set[Any]:
    packets = [getattr(aten, name) for name in names.split() if hasattr(aten, name)]
    return {getattr(packet, name) for packet in packets for name in packet.overloads()}


# Elementwise; a finite input gives a finite result, and NaN gives NaN.
_POINTWISE = _overloads(
    "relu relu_ gelu gelu_ silu silu_ tanh tanh_ sigmoid sigmoid_ leaky_relu leaky_relu_ elu elu_ "
    "selu celu hardtanh hardtanh_ relu6 relu6_ hardswish hardswish_ hardsigmoid hardsigmoid_ mish "
    "softplus abs neg square erf sin cos clamp clamp_ clamp_min clamp_max add add_ sub mul mul_ "
    "contiguous clone alias detach detach_ _to_copy dropout dropout_ feature_dropout div"
)
_POINTWISE |= {aten.to.dtype, aten.to.dtype_layout, aten.pow.Tensor_Scalar}
_POINTWISE -= {target for target in _POINTWISE if target._schema.name.endswith("_out")}
_STRUCTURE = _overloads("permute transpose t unsqueeze squeeze select slice expand unbind")
_POOLS = _overloads("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d")
_POOLS |= _overloads("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
_POOLS |= {aten.mean.dim, aten.sum.dim_IntList}
_VIEWS = _overloads("view reshape _unsafe_view flatten unflatten")
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}

KINDS: dict[Any, str] = {
    **dict.fromkeys(_POINTWISE, "pointwise"),
    **dict.fromkeys(_STRUCTURE, "structure"),
    **dict.fromkeys(_POOLS, "pool"),
    **dict.fromkeys(_VIEWS, "view"),
    **dict.fromkeys(_overloads("chunk split split_with_sizes"), "pieces"),
    **dict.fromkeys(_overloads("softmax _softmax _safe_softmax"), "softmax"),
    **dict.fromkeys(_CONVOLUTIONS, "depthwise"),
    operator.getitem: "piece",
    aten.batch_norm.default: "batch_norm",
    aten.cat.default: "join",
    aten.repeat_interleave.self_int: "repeat",
    aten.scaled_dot_product_attention.default: "attention",
    aten.matmul.default: "product",
    aten.bmm.default: "product",
}


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a node's value; of the first piece, for a list of tensors. () if there is none."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_inplace(target: Any) -> bool:
    """Whether an operator writes to its first argument."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def refuse_operator(node: fx.Node) -> str | None:
    """Why channels cannot be followed through this call, whichever dimension they are in."""
    kind, given = KINDS.get(node.target), arguments(node)
    name = operator_name(node)
    if kind is None:
        if any(word in name for word in ("norm", "softmax")):
            return f"{name} mixes channels"
        return f"{name} is not known to keep channels apart"
    if given.get("training") or (given.get("train") and "dropout" in name):
        return f"{name} in training mode is random or counts statistics"
    if given.get("dropout_p"):
        return "attention with dropout is random"
    if name == "pow" and not given["exponent"] > 0:
        return "pow with a negative exponent makes an infinity of a zero"
    if name == "div" and (isinstance(given["other"], fx.Node) or given["other"] == 0):
        return "div by a tensor may make an infinity of a zero"
    if kind == "depthwise" and given["groups"] != shape(node.args[0])[1]:  # type: ignore[arg-type]
        return f"{name} with {given['groups']} groups is not cut"
    if is_inplace(node.target) and len(node.args[0].users) > 1:  # type: ignore[union-attr]
        return f"{node.args[0]} is written to in place and read elsewhere"
    return None


def operator_name(node: fx.Node) -> str:
    """``layer_norm`` for ``aten.layer_norm.default``."""
    target = node.target
    return target._schema.name.split("::")[-1] if hasattr(target, "_schema") else str(target)


def operand_axis(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    """The operand's channel axis, given the result's; None if it has none."""
    kind = KINDS[node.target]
    if kind == "piece":
        return axis
    if kind == "view":
        return view_axis(shape(node), shape(operand), axis)
    if kind == "pieces":
        count = _pieces(node, axis.dim)
        return None if count is None else Axis(axis.dim, axis.outer * count)
    found = [d for d, r in dim_map(node, operand).items() if r == axis.dim]
    return Axis(found[0], axis.outer) if found else None


def result_axis(node: fx.Node, operand: fx.Node, axis: Axis) -> Axis | None:
    """The result's channel axis, given an operand's; None if the channels are mixed."""
    kind = KINDS[node.target]
    if kind == "piece":
        return axis
    if kind == "view":
        return view_axis(shape(operand), shape(node), axis)
    if kind == "pieces":
        count = _pieces(node, axis.dim)
        if count is None or axis.outer % count:
            return None
        return Axis(axis.dim, axis.outer // count)
    dim = dim_map(node, operand).get(axis.dim)
    return None if dim is None else Axis(dim, axis.outer)


def _pieces(node: fx.Node, dim: int) -> int | None:
    """Into how many equal pieces a split cuts ``dim``: 1 if it cuts another dimension."""
    sizes = [tuple(piece.shape) for piece in node.meta["val"]]
    cut = arguments(node)["dim"] % len(sizes[0])
    if cut != dim:
        return 1
    return len(sizes) if len({size[dim] for size in sizes}) == 1 else None


def dim_map(node: fx.Node, operand: fx.Node) -> dict[int, int]:
    """Operand dimensions that go over into result dimensions with their channels apart."""
    kind, given = KINDS[node.target], arguments(node)
    have, result = shape(operand), shape(node)
    dims = range(len(have))
    name = operator_name(node)
    if kind in ("pointwise",) or name == "expand":
        shift = len(result) - len(have)
        return {d: d + shift for d in dims if _same(have[d], result[d + shift])}
    if kind in ("batch_norm", "depthwise"):
        return {1: 1} if operand is node.args[0] else {}
    if kind == "pool" and "dim" not in given:
        return {1: 1} if len(have) == len(result) and _channel_first(name, have) else {}
    if kind in ("attention", "product"):
        if len(have) != len(result):
            return {}
        masked = kind == "attention" and operand is given["attn_mask"]
        return {d: d for d in dims[:-2] if not masked or _same(have[d], result[d])}
    if kind in ("softmax", "join", "repeat"):
        moved = given["dim"]
        if kind == "repeat":
            return {d: d for d in dims} if moved is not None else {}
        return {d: d for d in dims if d != moved % len(have)}
    if name == "permute":
        return {source % len(have): d for d, source in enumerate(given["dims"])}
    if name in ("transpose", "t"):
        a, b = (given["dim0"], given["dim1"]) if name == "transpose" else (0, len(have) - 1)
        a, b = a % len(have), b % len(have)
        return {d: b if d == a else a if d == b else d for d in dims}
    if name == "slice":
        return {d: d for d in dims if d != given["dim"] % len(have)}
    if name == "unsqueeze":
        new = given["dim"] % len(result)
        return {d: d + (d >= new) for d in dims}
    return _without(_removed(node, have), len(have), bool(given.get("keepdim")))


def _removed(node: fx.Node, have: Sequence[Any]) -> list[int]:
    """Dimensions that a reduction, a selection or a squeeze takes away."""
    given, name = arguments(node), operator_name(node)
    if name == "squeeze" and "dim" not in given:
        return [d for d, size in enumerate(have) if _same(size, 1)]
    dims = given["dim"]
    dims = list(range(len(have))) if dims in (None, []) else dims
    listed = [d % len(have) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    return [d for d in listed if name != "squeeze" or _same(have[d], 1)]


def _without(removed: list[int], count: int, keep: bool) -> dict[int, int]:
    kept = [d for d in range(count) if d not in removed]
    return {d: d if keep else i for i, d in enumerate(kept)}


def _channel_first(name: str, have: Sequence[Any]) -> bool:
    return len(have) == int(name[-2]) + 2  # max_pool2d of [batch, channels, height, width]


def _same(a: Any, b: Any) -> bool:
    """Equal sizes, as far as is known without a guard."""
    return _expression(a) == _expression(b)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def view_axis(have: Sequence[Any], want: Sequence[Any], axis: Axis) -> Axis | None:
    """The channel axis after a view from sizes ``have`` to sizes ``want``."""
    segment = _segment([_expression(s) for s in have], [_expression(s) for s in want], axis.dim)
    if segment is None:
        return None
    first, targets = segment
    outer: Any = axis.outer
    for size in have[first : axis.dim]:
        outer = outer * _expression(size)
    for dim in targets:
        size = _expression(want[dim])
        if size == outer == 1:
            continue
        if not isinstance(size, int) or not isinstance(outer, int):
            return None
        if outer > 1 and outer % size == 0:
            outer //= size  # the dimension counts repetitions only
            continue
        return Axis(dim, outer) if size % outer == 0 else None
    return None


def _segment(have: list[Any], want: list[Any], dim: int) -> tuple[int, range] | None:
    """The shortest run of dimensions around ``dim`` that the view regroups.

    Returns its first dimension in ``have`` and its dimensions in ``want``.
    """
    i = j = 0
    while i < len(have) and j < len(want):
        first, second = i, j
        a, b = have[i], want[j]
        i, j = i + 1, j + 1
        while a != b:
            if _divides(a, b) and i < len(have):
                a, i = a * have[i], i + 1
            elif _divides(b, a) and j < len(want):
                b, j = b * want[j], j + 1
            else:
                return None
        # Trailing ones belong to the run that ends before them.
        while i < len(have) and have[i] == 1 and (j >= len(want) or want[j] != 1):
            i += 1
        while j < len(want) and want[j] == 1 and (i >= len(have) or have[i] != 1):
            j += 1
        if first <= dim < i:
            return first, range(second, j)
    return None


def _divides(a: Any, b: Any) -> bool:
    if a == 0:
        return False
    ratio = b / a if not isinstance(a, int) or not isinstance(b, int) else None
    return b % a == 0 if ratio is None else ratio.as_numer_denom()[1] == 1

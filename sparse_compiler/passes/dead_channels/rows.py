"""A single layer with zero rows: the other rows are computed and spread out by an index.

One zero row stays as the witness: its result is 0, or NaN for a row of x that is not finite, which
is what every dead output is, before its bias.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sparse_compiler.derived import PLAIN, Derived, DoesNotFit, derive, has_version
from sparse_compiler.passes.base import PassContext, Rewrite, Selector
from sparse_compiler.passes.dead_channels.cost import Gain, compare, rows_of, rows_to_judge
from sparse_compiler.passes.dead_channels.group import Layer, find_layers
from sparse_compiler.passes.dead_channels.weights import along
from sparse_compiler.passes.verify import verifier
from sparse_compiler.region import Builder, Region, replace_region
from sparse_compiler.static import StaticValues, combine

aten = torch.ops.aten
# Spreading out one element of the result: an indirect load and a store.
_NANOSECONDS = 1.0
_LAUNCH_MS = 0.01
# Sparser weights have kernels that skip zero rows without copying anything.
_LEAST_DENSITY = 0.6

ZerosAlong = Callable[[fx.Node, int, StaticValues], torch.Tensor]


def cut_rows(
    gm: fx.GraphModule,
    context: PassContext,
    zeros_along: ZerosAlong,
    least_share: float,
    alignment: int,
) -> None:
    """Find, check, rewrite."""
    static = StaticValues(gm, training=context.training)
    for layer in find_layers(gm, static).values():
        if len(layer.out_dims) != 1 or layer.geometry[:1] == ("convolution",):
            continue
        if str(layer.weight.target) in gm.meta.get("constants", ()):
            continue  # what is left of a group
        ((dim, w_dim),) = layer.out_dims.items()
        zero = zeros_along(layer.weight, w_dim, static)
        spare = int(zero.sum()) - 1
        if spare < max(1, least_share * len(zero)):
            continue
        rewrite = Rewrite("dead_channels", layer.name, layer.matrix_shape)
        rewrite.dtype = str(layer.weight.meta["val"].dtype).removeprefix("torch.")
        rewrite.sparsity = float(zero.float().mean())
        rewrite.pattern = f"{spare + 1} zero rows"
        context.rewrites.append(rewrite)
        try:
            _consider(gm, layer, zero, (dim, w_dim), static, context, rewrite, alignment)
        except Exception as error:
            context.failed(rewrite, error)


def _consider(
    gm: fx.GraphModule,
    layer: Layer,
    zero: torch.Tensor,
    dims: tuple[int, int],
    static: StaticValues,
    context: PassContext,
    rewrite: Rewrite,
    alignment: int,
) -> None:
    refusal = _refuse(layer, static)
    if refusal:
        rewrite.reason = refusal
        return
    value = static.value(layer.weight)
    assert value is not None
    density = float((value != 0).float().mean()) / max(1e-9, float((~zero).float().mean()))
    always = context.options.selection == "always"
    if density < _LEAST_DENSITY and not always:
        rewrite.reason = "its other rows are sparse, too: a sparse kernel skips zero rows by itself"
        return
    dead = zero.nonzero().flatten()
    count = len(zero)
    kept_count = count - len(dead) + 1
    kept_count = min(count, -(-kept_count // alignment) * alignment)
    removed = torch.zeros(count, dtype=torch.bool)
    removed[dead[len(dead) - (count - kept_count) :]] = True
    gain = _gain(context.selector, layer, kept_count / count)
    rewrite.baseline_ms, rewrite.sparse_ms = gain.before_ms, gain.after_ms
    rewrite.speedup, rewrite.rows = gain.speedup, gain.rows
    if not removed.any() or (not always and gain.speedup < context.options.min_speedup):
        rewrite.reason = gain.unknown or f"not faster: with the result spread out again, {gain}"
        return
    if context.out_of_fuel():
        rewrite.reason = "options['fuel'] is used up"
        return
    _rewrite(gm, layer, removed, int(dead[0]), dims, static, context, rewrite)
    rewrite.applied, rewrite.format = True, "smaller dense, spread out"
    rewrite.reason = f"{int(removed.sum())} of {count} rows are zero and were removed; {gain}"


def _refuse(layer: Layer, static: StaticValues) -> str | None:
    weight = layer.weight.meta["val"]
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"the weight is {weight.dtype}: not looked into"
    if layer.bias is not None and (
        not static.is_static(layer.bias) or layer.bias.meta["val"].dim() != 1
    ):
        return f"the bias of {layer.name} is not a parameter"
    for node in (layer.weight, layer.bias):
        expression = static.expression(node) if node is not None else None
        for tensor in static.leaf_values(expression) if expression is not None else ():
            if type(tensor) not in PLAIN:
                return f"a weight is a {type(tensor).__name__}, a tensor subclass"
            if not has_version(tensor):
                return (
                    "a weight is an inference tensor, whose changes cannot be seen: create the "
                    "model outside torch.inference_mode()"
                )
    reason = Region.of([layer.node]).why_not_movable(fresh=True)
    return f"its rows cannot be removed: {reason}" if reason else None


def _gain(selector: Selector, layer: Layer, share: float) -> Gain:
    gains = []
    for dynamic in rows_to_judge([layer]):
        known = rows_of(layer)
        rows = max(1, known if known is not None else dynamic or 1)
        spread = rows * layer.matrix_shape[0] * _NANOSECONDS * 1e-6 / torch.get_num_threads()
        times = compare(selector, layer, rows, share)
        after = times.after_ms + spread + _LAUNCH_MS
        gains.append(Gain(times.before_ms, after, (rows,), times.unknown, times.measured))
    return min(gains, key=lambda gain: (not gain.unknown, gain.speedup))


def _rewrite(
    gm: fx.GraphModule,
    layer: Layer,
    removed: torch.Tensor,
    witness: int,
    dims: tuple[int, int],
    static: StaticValues,
    context: PassContext,
    rewrite: Rewrite,
) -> None:
    dim, w_dim = dims
    kept = (~removed).nonzero().flatten()
    places = torch.zeros(len(removed), dtype=torch.long)
    places[kept] = torch.arange(len(kept))
    places[removed] = int((kept == witness).nonzero())
    records: list[Derived] = []

    def check(value: torch.Tensor) -> None:
        gone = [*removed.nonzero().flatten().tolist(), witness]
        if bool((along(value, w_dim)[gone] != 0).any()):
            raise DoesNotFit("a row that was removed is no longer zero")

    def small(value: torch.Tensor) -> torch.Tensor:
        check(value)
        return value.index_select(w_dim, kept.to(value.device)).contiguous()

    def small_bias(value: torch.Tensor) -> torch.Tensor:
        alive = (torch.arange(len(removed)) != witness).to(value.device)
        return torch.where(alive, value, 0)[kept.to(value.device)]

    def rest(value: torch.Tensor) -> torch.Tensor:
        dead = removed.clone()
        dead[witness] = True
        trailing = [1] * (layer.node.meta["val"].dim() - dim - 1)
        return torch.where(dead.to(value.device), value, 0).reshape(-1, *trailing)

    def build(builder: Builder, *inputs: fx.Node) -> fx.Node:
        def constant(name: str, source: fx.Node, make: Callable[[torch.Tensor], torch.Tensor]):  # type: ignore[no-untyped-def]
            value, expression = static.value(source), static.expression(source)
            assert value is not None and expression is not None
            node = builder.constant(name, make(value))
            records.append(
                derive(
                    [str(node.target)],
                    combine(make, [expression]),
                    lambda made: [made],
                    rewrite.target,
                )
            )
            return node

        swapped = {layer.weight: constant("rows", layer.weight, small)}
        if layer.bias is not None:
            swapped[layer.bias] = constant("bias", layer.bias, small_bias)
        args = fx.node.map_arg(layer.node.args, lambda node: swapped.get(node, node))
        kwargs = fx.node.map_arg(layer.node.kwargs, lambda node: swapped.get(node, node))
        y = builder.call(layer.node.target, *args, **kwargs)  # type: ignore[arg-type]
        device = layer.weight.meta["val"].device
        y = builder.call(
            aten.index_select.default, y, dim, builder.constant("places", places.to(device))
        )
        if layer.bias is not None:
            y = builder.call(aten.add.Tensor, y, constant("rest", layer.bias, rest))
        return y

    replace_region(
        gm,
        Region.of([layer.node]),
        build,
        rule="dead_channels: rows",
        fresh=True,
        verify=verifier(gm, static, context, rewrite.target),
    )
    gm.meta.setdefault("derived", []).extend(records)

"""What a smaller layer gains, by the roofline of ``formats/cost.py``."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from sparse_compiler.formats.cost import LinearProblem, dense_ms
from sparse_compiler.formats.pattern import Pattern
from sparse_compiler.passes.dead_channels.dims import shape
from sparse_compiler.passes.dead_channels.group import Group, Layer

# Row counts a layer with a dynamic number of rows is judged at.
_DYNAMIC_ROWS = (1, 16, 128, 1024)


@dataclasses.dataclass(frozen=True)
class Gain:
    """Estimated milliseconds before and after, at the number of rows where it helps least."""

    before_ms: float
    after_ms: float
    rows: tuple[int, ...] = ()

    @property
    def speedup(self) -> float:
        return self.before_ms / self.after_ms if self.after_ms else 1.0


def rows_of(layer: Layer) -> Any:
    """Rows of a layer's input: None if they are dynamic."""
    sizes = [size for d, size in enumerate(shape(layer.node)) if d not in layer.out_dims]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def layer_ms(layer: Layer, rows: int, outs: float = 1.0, ins: float = 1.0) -> float:
    """Time of a layer of which shares ``outs`` and ``ins`` are left."""
    out_features, in_features = layer.matrix_shape
    out_features, in_features = round(out_features * outs), round(in_features * ins)
    dtype = layer.weight.meta["val"].dtype
    problem = LinearProblem(
        out_features,
        in_features,
        (rows,),
        dtype if dtype is torch.bfloat16 else torch.float32,
        Pattern((out_features, in_features), out_features * in_features),
        threads=torch.get_num_threads(),
    )
    return dense_ms(problem, rows)


def rows_to_judge(layers: list[Layer]) -> tuple[int | None, ...]:
    """Numbers to put in for dynamic rows; None alone if there are none."""
    return _DYNAMIC_ROWS if any(rows_of(layer) is None for layer in layers) else (None,)


def group_gain(group: Group, removed: torch.Tensor) -> Gain:
    """The gain of cutting units out of all the group's layers."""
    layers = list({layer.node: layer for layer in (*group.writers, *group.readers)}.values())
    share = 1 - float(removed.float().mean())
    writers = {layer.node for layer in group.writers}
    readers = {layer.node for layer in group.readers}
    gains = []
    for dynamic in rows_to_judge(layers):
        before = after = 0.0
        for layer in layers:
            rows = rows_of(layer)
            count = max(1, rows if rows is not None else dynamic or 1)
            outs = share if layer.node in writers else 1.0
            ins = share if layer.node in readers else 1.0
            before += layer_ms(layer, count)
            after += layer_ms(layer, count, outs, ins)
        known = rows_of(layers[0])
        rows_judged = (max(1, known),) if known is not None else (dynamic or 1,)
        gains.append(Gain(before, after, rows_judged))
    return min(gains, key=lambda gain: gain.speedup)

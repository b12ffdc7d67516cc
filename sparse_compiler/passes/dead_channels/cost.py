"""What smaller layers gain: their products alone, measured or by the roofline."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from sparse_compiler.formats.cost import DYNAMIC_ROWS, Comparison, LinearProblem
from sparse_compiler.formats.pattern import Pattern
from sparse_compiler.passes.base import Selector
from sparse_compiler.passes.dead_channels.dims import shape
from sparse_compiler.passes.dead_channels.group import Group, Layer


@dataclasses.dataclass(frozen=True)
class Gain:
    """Milliseconds before and after, at the number of rows where it helps least."""

    before_ms: float
    after_ms: float
    rows: tuple[int, ...] = ()
    unknown: str = ""
    measured: bool = False

    @property
    def speedup(self) -> float:
        return self.before_ms / self.after_ms if self.after_ms else 1.0

    def __str__(self) -> str:
        how = "measured" if self.measured else "the roofline model expects"
        return self.unknown or f"{how} {self.speedup:.2f}x"


def rows_of(layer: Layer) -> Any:
    """Rows of a layer's input: None if they are dynamic."""
    sizes = [size for d, size in enumerate(shape(layer.node)) if d not in layer.out_dims]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def compare(
    selector: Selector, layer: Layer, rows: int, outs: float = 1.0, ins: float = 1.0
) -> Comparison:
    """Times of a layer as it is, and of one with shares ``outs`` and ``ins`` of it left."""
    out_features, in_features = layer.matrix_shape

    def problem(outs: float, ins: float) -> LinearProblem:
        shape = round(out_features * outs), round(in_features * ins)
        full = Pattern(shape, shape[0] * shape[1])
        dtype, threads = layer.weight.meta["val"].dtype, torch.get_num_threads()
        return LinearProblem(*shape, (rows,), dtype, full, threads=threads)

    return selector.compare(problem(1.0, 1.0), problem(outs, ins))


def rows_to_judge(layers: list[Layer]) -> tuple[int | None, ...]:
    """Numbers to put in for dynamic rows; None alone if there are none."""
    return DYNAMIC_ROWS if any(rows_of(layer) is None for layer in layers) else (None,)


def group_gain(selector: Selector, group: Group, removed: torch.Tensor) -> Gain:
    """The gain of cutting units out of all the group's layers."""
    layers = list({layer.node: layer for layer in (*group.writers, *group.readers)}.values())
    share = 1 - float(removed.float().mean())
    writers = {layer.node for layer in group.writers}
    readers = {layer.node for layer in group.readers}
    gains = []
    for dynamic in rows_to_judge(layers):
        found = []
        for layer in layers:
            rows = rows_of(layer)
            count = max(1, rows if rows is not None else dynamic or 1)
            outs = share if layer.node in writers else 1.0
            ins = share if layer.node in readers else 1.0
            found.append(compare(selector, layer, count, outs, ins))
        known = rows_of(layers[0])
        rows_judged = (max(1, known),) if known is not None else (dynamic or 1,)
        gains.append(
            Gain(
                sum(times.before_ms for times in found),
                sum(times.after_ms for times in found),
                rows_judged,
                next((times.unknown for times in found if times.unknown), ""),
                all(times.measured for times in found),
            )
        )
    return min(gains, key=lambda gain: (not gain.unknown, gain.speedup))

"""What attention without softmax costs as it is written, and re-associated.

Multiplications and bytes, at the rates of one core of an AVX-512 machine: the rewritten form is
judged by the rate it was measured to reach end to end, the original by what matrix products reach
alone, so that the comparison errs on the side of the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.indices import hint, numel
from sparse_compiler.passes.linear_attention.plan import (
    CHUNK,
    Chunked,
    TermPlan,
    contractions,
    indices_of,
)
from sparse_compiler.passes.linear_attention.views import VIEWS

aten = torch.ops.aten

# Multiply-adds a nanosecond.
_AS_WRITTEN = {torch.float32: 40.0, torch.bfloat16: 85.0}
_REWRITTEN = {torch.float32: 20.0, torch.bfloat16: 36.0}
# Bytes a nanosecond, of tensors that do not fit the caches.
_BYTES = 12.0
# A running sum takes so many nanoseconds an element: it is neither vectorised nor fused.
_RUNNING_SUM = 4.0
# Nanoseconds of each operator that does not depend on sizes.
_OVERHEAD = 6000.0

_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default)


def written_ms(nodes: Iterable[fx.Node]) -> float:
    """Time of the nodes that a rewrite removes, as Inductor compiles them."""
    total = 0.0
    fused: dict[int, float] = {}
    for node in nodes:
        value = node.meta["val"]
        elements = math.prod(hint(size) for size in value.shape)
        passes = 2 * elements * value.dtype.itemsize / _BYTES
        work = _work(node)
        if work is not None:
            total += max(work / _rate(_AS_WRITTEN, value.dtype), passes)
        elif node.target is aten.cumsum.default:
            total += elements * _RUNNING_SUM + passes
        elif node.target not in VIEWS:
            # Pointwise neighbours are fused: one pass for all that have one size.
            fused[elements] = passes
    return (total + sum(fused.values())) * 1e-6


def _work(node: fx.Node) -> int | None:
    """Multiplications of a matrix product, None for other operators."""
    if node.target in _PRODUCTS or node.target is aten.baddbmm.default:
        left: Any = node.args[1 if node.target is aten.baddbmm.default else 0]
        return _numel(node) * hint(left.meta["val"].shape[-1])
    if node.target is aten.einsum.default:
        return _einsum_work(node)
    return None


def _einsum_work(node: fx.Node) -> int:
    """Multiplications of the pairwise contractions, from left to right or along a path."""
    inputs, out = str(node.args[0]).replace(" ", "").split("->")
    operands: Any = node.args[1]
    sizes: dict[str, int] = {}
    live: list[set[str]] = []
    for text, operand in zip(inputs.split(","), operands, strict=True):
        shape = [hint(size) for size in operand.meta["val"].shape]
        before, _, after = text.partition("...")
        batch = len(shape) - len(before) - len(after)
        names = [*before, *(f"batch {batch - i}" for i in range(batch)), *after]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
        live.append(set(names))
    path: Any = node.kwargs.get("path") or [0, 1] * (len(live) - 1)
    wanted = {name for name in sizes if name in out or name.startswith("batch")}
    total = 0
    for one, other in zip(path[::2], path[1::2], strict=True):
        right, left = (live.pop(place) for place in sorted((one, other), reverse=True))
        total += math.prod(sizes[name] for name in left | right)
        made = (left | right) & wanted.union(*live)
        # Without a path the result is the left operand of the next step, with one it comes last.
        live.insert(0 if not node.kwargs.get("path") else len(live), made)
    return total


def written_work(nodes: Iterable[fx.Node]) -> int:
    """Multiplications of the nodes that a rewrite removes."""
    return sum(_work(node) or 0 for node in nodes)


def planned_work(plans: Iterable[TermPlan]) -> int:
    """Multiplications of the plans."""
    return sum(_planned(item, alone=True) for item in plans)


def _planned(item: TermPlan, *, alone: bool) -> int:
    if isinstance(item.core, Chunked):
        return _chunked_work(item.core, alone)
    return sum(numel(union) for union in contractions(item.core))


def rewritten_ms(plans: Sequence[TermPlan], dtype: torch.dtype) -> float:
    """Time of the plans, end to end."""
    total = 0.0
    alone = not any(isinstance(p.core, Chunked) and p.core.values for p in plans)
    for item in plans:
        operators = 10 if isinstance(item.core, Chunked) else 3
        total += _planned(item, alone=alone) / _rate(_REWRITTEN, dtype) + operators * _OVERHEAD
    return total * 1e-6


def _chunked_work(core: Chunked, alone: bool) -> int:
    everything = set(indices_of((*core.queries, *core.keys, *core.values)))
    taken = {core.causal.row, core.causal.column, *core.features}
    shared = set(indices_of((*core.queries, *core.keys)))
    own = {index for index in indices_of(core.values) if index not in shared}
    rows = numel(everything - taken - own) * hint(core.causal.row.size)
    chunks = hint(core.causal.row.size) / CHUNK
    features, values = numel(core.features), numel(own)
    state = features * values * (2 + min(chunks, 16 + chunks / 16) / CHUNK)
    # The scores inside a chunk are the same for the values and for the normaliser.
    scores = features if core.values or alone else 0
    return round(rows * (CHUNK * (scores + values) + state))


def _numel(node: fx.Node) -> int:
    return math.prod(hint(size) for size in node.meta["val"].shape)


def _rate(rates: dict[torch.dtype, float], dtype: torch.dtype) -> float:
    return rates.get(dtype, rates[torch.float32])

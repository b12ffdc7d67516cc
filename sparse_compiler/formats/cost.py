"""What a linear layer costs, dense and in each format: bytes moved and multiply-adds done.

The roofline decides where measuring is not wanted (``selection="model"``), when its time is spent,
and which formats are worth measuring at all. Times are in milliseconds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sparse_compiler.dispatch import MoeProblem, routed_ms, written_ms
from sparse_compiler.formats.pattern import Pattern
from sparse_compiler.score import cost as attention_cost
from sparse_compiler.score.cost import AttentionProblem

# Per core, of a current server core; only ratios between formats matter.
_GBYTES = 20.0
_GFLOPS = {torch.float32: 90.0, torch.bfloat16: 180.0}
# A dense GEMM on few rows reads its weight at about half the rate of a plain stream.
_SKINNY_READ = 0.5
# Below this no format has ever paid.
LEAST_SPARSITY = 0.3
# Rows, or tokens, at which something with a dynamic number of them is judged, besides the hint.
DYNAMIC_ROWS = (1, 16, 128, 1024)
# Rows up to which a dense weight may be streamed (``gemv``).
GEMV_ROWS = 4


@dataclasses.dataclass(frozen=True)
class LinearProblem:
    """y [rows, out_features] = x [rows, in_features] times a weight, to be decided.

    Attributes:
        rows: the numbers of rows to judge it at; several if the shape is dynamic.
        dynamic: whether other numbers of rows may come.
        threads: threads that run it.
        training: whether both gradients are computed as well.
    """

    out_features: int
    in_features: int
    rows: tuple[int, ...]
    dtype: torch.dtype
    pattern: Pattern
    dynamic: bool = False
    threads: int = 1
    training: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a selector decided: a format or dense, why, and the times behind it."""

    format: str | None
    reason: str
    speedup: float | None = None
    baseline_ms: float | None = None
    sparse_ms: float | None = None


def candidates(problem: LinearProblem) -> list[str]:
    """Formats that are legal for the weight and may pay, the most promising first.

    ``gemv`` is the dense weight where it lies, streamed past a few rows of the input.
    """
    pattern = problem.pattern
    if pattern.sparsity < LEAST_SPARSITY:
        return ["gemv"]
    if problem.training:  # bitmaps have no gradient kernels
        return ["block"] if pattern.block is not None and pattern.block[0] >= 4 else ["csr"]
    if pattern.block is not None and pattern.block[0] >= 4:
        return ["block", "csr"] if pattern.sparsity >= 0.6 else ["block"]
    if pattern.sparsity >= 0.75:
        return ["csr"]
    # Expanding a bitmap costs the same for one row and for eight.
    return ["bitmap", "csr"] if min(problem.rows) <= 8 else ["csr", "bitmap"]


def dense_ms(problem: LinearProblem, rows: int) -> float:
    """Roofline of the dense layer."""
    size = problem.dtype.itemsize
    weights = problem.out_features * problem.in_features
    rate = _GBYTES * (_SKINNY_READ if rows < 16 else 1.0)
    read = weights * size / (rate * problem.threads)
    flops = _GFLOPS.get(problem.dtype, _GFLOPS[torch.float32])
    work = 2 * rows * weights / (flops * problem.threads)
    return max(read, work) * 1e-6


def sparse_ms(problem: LinearProblem, rows: int, name: str) -> float:
    """Roofline of the layer in the format ``name``."""
    size = problem.dtype.itemsize
    weights = problem.out_features * problem.in_features
    kept = weights * problem.pattern.density
    if name == "gemv":
        kept, stored, efficiency = float(weights), float(weights * size), 0.8
    elif name == "bitmap":
        stored, efficiency = kept * size + weights / 8, 0.6
    elif name == "block":
        stored, efficiency = kept * (size + 0.5), 0.85
    else:
        stored, efficiency = kept * (size + 2.2), 0.6
    # Pairs of bfloat16 with one zero are computed, too.
    if problem.dtype is torch.bfloat16 and name in ("bitmap", "csr"):
        density = problem.pattern.density
        kept = weights * (1 - (1 - density) ** 2)
    lanes = max(rows, 4)
    read = stored / (_GBYTES * problem.threads)
    work = 2 * lanes * kept / (_GFLOPS[problem.dtype] * efficiency * problem.threads)
    return max(read, work) * 1e-6


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Milliseconds of a dense layer and of a smaller dense one.

    Attributes:
        unknown: why there are no times, if there are none.
        measured: whether the times were taken, not estimated.
    """

    before_ms: float = 0.0
    after_ms: float = 0.0
    unknown: str = ""
    measured: bool = False


class Roofline:
    """What selectors that do not measure know of dense layers."""

    def compare(self, before: LinearProblem, after: LinearProblem) -> Comparison:
        """See ``Selector``."""
        (rows,) = before.rows
        return Comparison(dense_ms(before, rows), dense_ms(after, rows))


@dataclasses.dataclass(frozen=True)
class ModelSelector(Roofline):
    """Decides by the roofline alone; the times in its decisions are estimates."""

    min_speedup: float = 1.05

    def choose(self, problem: LinearProblem, weight: torch.Tensor) -> Decision:
        """See ``Selector``; looks at the pattern only, not at ``weight``."""
        best: Decision | None = None
        for name in candidates(problem):
            ratios = [dense_ms(problem, m) / sparse_ms(problem, m, name) for m in problem.rows]
            worst = min(ratios)
            if best is None or worst > (best.speedup or 0):
                rows = problem.rows[ratios.index(worst)]
                best = Decision(
                    name,
                    f"the roofline model expects {worst:.2f}x at {rows} rows",
                    worst,
                    dense_ms(problem, rows),
                    sparse_ms(problem, rows, name),
                )
        assert best is not None and best.speedup is not None
        if best.speedup >= self.min_speedup:
            return best
        return dataclasses.replace(best, format=None, reason=f"not faster: {best.reason}")

    def attend(self, problem: AttentionProblem) -> Decision:
        """See ``Selector``."""
        dense, sparse = attention_cost.dense_ms(problem), attention_cost.sparse_ms(problem)
        ratio = dense / sparse
        reason = f"the roofline model expects {ratio:.2f}x"
        if ratio >= self.min_speedup:
            return Decision("tiles", reason, ratio, dense, sparse)
        return Decision(None, f"not faster: {reason}", ratio, dense, sparse)

    def race(self, key: str, estimate: tuple[float, float], runs: Any) -> Decision:
        """See ``Selector``; runs nothing."""
        before, after = estimate
        reason = f"the roofline model expects {before / after:.2f}x"
        if before / after >= self.min_speedup:
            return Decision("rewritten", reason, before / after, before, after)
        return Decision(None, f"not faster: {reason}", before / after, before, after)

    def dispatch(self, problem: MoeProblem) -> Decision:
        """See ``Selector``."""
        written, routed = written_ms(problem), routed_ms(problem)
        ratio = written / routed
        reason = f"the roofline model expects {ratio:.2f}x at {problem.tokens} tokens"
        if ratio >= self.min_speedup:
            return Decision("routed", reason, ratio, written, routed)
        return Decision(None, f"not faster: {reason}", ratio, written, routed)


@dataclasses.dataclass(frozen=True)
class AlwaysSelector(Roofline):
    """Takes the first legal format, whatever it costs (``selection="always"``)."""

    def choose(self, problem: LinearProblem, weight: torch.Tensor) -> Decision:
        """See ``Selector``."""
        return Decision(candidates(problem)[0], 'selection="always" measures nothing')

    def attend(self, problem: AttentionProblem) -> Decision:
        """See ``Selector``."""
        return Decision("tiles", 'selection="always" measures nothing')

    def dispatch(self, problem: MoeProblem) -> Decision:
        """See ``Selector``."""
        return Decision("routed", 'selection="always" measures nothing')

    def race(self, key: str, estimate: tuple[float, float], runs: Any) -> Decision:
        """See ``Selector``."""
        return Decision("rewritten", 'selection="always" measures nothing')

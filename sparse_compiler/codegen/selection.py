"""Selection by measurement: dense against each legal format, on this machine, at these sizes.

Weights are read from memory, not from cache, in a model of many layers; so each contestant runs
over enough copies of its weight to leave the last-level cache between two uses. Contestants take
turns and the best time of each counts: others on the machine can only add time. Results are cached
on disk by everything that decides them, and equal layers are measured once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sparse_compiler.codegen import attention_timing, cpp, inductor, moe_timing, native
from sparse_compiler.dispatch import MoeProblem
from sparse_compiler.formats import bitmap, csr, masked
from sparse_compiler.formats.cost import (
    Comparison,
    Decision,
    LinearProblem,
    candidates,
)
from sparse_compiler.memory import gathered
from sparse_compiler.passes.base import log
from sparse_compiler.score.cost import AttentionProblem

# Bytes of weights to cycle through, beyond the caches of common processors.
_COLD_BYTES = 80 * 2**20
_MOST_COPIES = 48
_ROUNDS = 7

_NO_TIME = (
    "no time was left to measure it: raise options['selection_budget'], or write "
    "selection='model' to decide by bytes and flops"
)

Run = Callable[[], None]
# Both contestants' runs, and what their times are multiplied by.
_Race = tuple[list[Run], list[Run], tuple[float, float]]


class MeasuringSelector:
    """Times dense against sparse; see the module's text.

    Args:
        min_speedup: least ratio, at every number of rows judged, for a rewrite to be kept.
        budget: seconds that may be spent on timing; afterwards layers stay dense.
    """

    def __init__(self, min_speedup: float, budget: float) -> None:
        self._min_speedup = min_speedup
        self._budget = budget

    def choose(self, problem: LinearProblem, weight: torch.Tensor) -> Decision:
        """See ``Selector``."""
        best: Decision | None = None
        for name in candidates(problem):
            times = []
            for rows in problem.rows:
                found = _cache().get(_key(problem, name, rows))
                if found is None:
                    if self._budget <= 0:
                        return Decision(None, _NO_TIME)
                    found, seconds = _measure(problem, name, rows, weight)
                    self._budget -= seconds
                    _cache().put(_key(problem, name, rows), found)
                times.append((found[0] / found[1], *found, rows))
            ratio, dense, sparse, rows = min(times)
            if best is None or ratio > (best.speedup or 0):
                best = Decision(
                    name, f"measured {ratio:.2f}x at {_rows(rows)}", ratio, dense, sparse
                )
        assert best is not None and best.speedup is not None
        if best.speedup >= self._min_speedup:
            return best
        why = (
            f"dense is faster or as fast: {best.format} {best.reason}, "
            f"{self._min_speedup:.2f}x is wanted"
        )
        if problem.dynamic:
            why += " (the number of rows is dynamic, so the worst one counts)"
        return Decision(None, why, best.speedup, best.baseline_ms, best.sparse_ms)

    def compare(self, before: LinearProblem, after: LinearProblem) -> Comparison:
        """See ``Selector``."""
        (rows,) = before.rows
        sizes = [before.out_features, before.in_features, after.out_features, after.in_features]
        key = json.dumps(["dense", *sizes, rows, str(before.dtype), before.threads])
        found = self._timed(key, lambda: (_random_runs(before), _random_runs(after), (1.0, 1.0)))
        if found is None:
            return Comparison(unknown=_NO_TIME)
        return Comparison(*found, measured=True)

    def attend(self, problem: AttentionProblem) -> Decision:
        """See ``Selector``."""

        def runs() -> _Race:
            dense, sparse, *scales = attention_timing.contestants(problem)
            return [dense], [sparse], (scales[0], scales[1])

        at = f"at {problem.queries} queries and {problem.keys} keys"
        return self._decision("tiles", self._timed(_attention_key(problem), runs), at)

    def race(
        self, key: str, estimate: tuple[float, float], runs: Callable[[], tuple[Run, Run]]
    ) -> Decision:
        """See ``Selector``."""

        def both() -> _Race:
            first, second = runs()
            return [first], [second], (1.0, 1.0)

        return self._decision("rewritten", self._timed(key, both), "")

    def dispatch(self, problem: MoeProblem) -> Decision:
        """See ``Selector``."""
        fields = dataclasses.asdict(dataclasses.replace(problem, dtype=torch.float32))
        key = json.dumps(["moe", str(problem.dtype), *map(str, fields.values())])

        def runs() -> _Race:
            written, routed, scale = moe_timing.contestants(problem)
            return [written], [routed], (scale, scale)

        return self._decision("routed", self._timed(key, runs), f"at {problem.tokens} tokens")

    def _timed(self, key: str, runs: Callable[[], _Race]) -> tuple[float, float] | None:
        """Milliseconds of two forms, from the cache or taken now; None if no time is left."""
        found = _cache().get(key)
        if found is None and self._budget > 0:
            first, second, scales = runs()
            (before, after), seconds = _race(first, second)
            found = before * scales[0], after * scales[1]
            self._budget -= seconds
            _cache().put(key, found)
        return found

    def _decision(self, format: str, times: tuple[float, float] | None, at: str) -> Decision:
        """The second form if it gains enough."""
        if times is None:
            return Decision(None, _NO_TIME)
        ratio = times[0] / times[1]
        reason = f"measured {ratio:.2f}x {at}".rstrip()
        if ratio >= self._min_speedup:
            return Decision(format, reason, ratio, *times)
        why = f"as it is written it is as fast: {reason}, {self._min_speedup:.2f}x is wanted"
        return Decision(None, why, ratio, *times)


def _attention_key(problem: AttentionProblem) -> str:
    """What decides the times of attention; maps of nearly one density share a measurement."""
    fields = dataclasses.asdict(
        dataclasses.replace(problem, kinds=torch.empty(0), leaves=(), dtype=torch.float32)
    )
    shares = (round(problem.density * 32), round(problem.partial * 32))
    for name in ("kinds", "leaves", "integers"):
        del fields[name]
    return json.dumps(["attention", *shares, str(problem.dtype), *map(str, fields.values())])


def _rows(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _key(problem: LinearProblem, name: str, rows: int) -> str:
    pattern = problem.pattern
    # Layers whose density differs by less than about 4 % share a measurement.
    bucket = round(math.log2(max(pattern.density, 2.0**-12)) * 16)
    block = pattern.block if name == "block" else None
    return json.dumps(
        [
            name,
            problem.out_features,
            problem.in_features,
            rows,
            str(problem.dtype),
            bucket,
            pattern.n_of_m,
            block,
            problem.training,
            problem.dynamic,  # decides the k-blocks
            problem.threads,
        ]
    )


def _measure(
    problem: LinearProblem, name: str, rows: int, weight: torch.Tensor
) -> tuple[tuple[float, float], float]:
    """Milliseconds of dense and sparse, and the seconds it took to time them."""
    weight = weight.detach().contiguous()
    x = torch.randn(rows, problem.in_features).to(problem.dtype)
    with torch.no_grad():
        dense = _dense_runs(problem, x, weight)
        best, seconds = _race(dense, _sparse_runs(problem, name, x, weight))
    log.debug("%s %s x%d: %.2fx", name, tuple(weight.shape), rows, best[0] / best[1])
    return best, seconds


def _race(left: list[Run], right: list[Run]) -> tuple[tuple[float, float], float]:
    """Best milliseconds of two contestants that take turns, and the seconds that took."""
    with torch.no_grad():
        for runs in (left, right):
            runs[0]()  # compiles the library, which is nobody's time
        started = time.perf_counter()
        times = [(_per_run(left), _per_run(right)) for _ in range(_ROUNDS)]
    seconds = time.perf_counter() - started
    return (min(a for a, _ in times), min(b for _, b in times)), seconds


def _random_runs(problem: LinearProblem) -> list[Run]:
    """A dense layer with random weights."""
    x = torch.randn(problem.rows[0], problem.in_features).to(problem.dtype)
    weight = torch.randn(problem.out_features, problem.in_features).to(problem.dtype)
    return _dense_runs(problem, x, weight)


def _per_run(runs: list[Run]) -> float:
    started = time.perf_counter()
    for run in runs:
        run()
    return (time.perf_counter() - started) * 1e3 / len(runs)


def _copies(nbytes: int, rows: int) -> int:
    # With many rows the weight's bytes hardly count.
    wanted = _COLD_BYTES // max(nbytes, 1) if rows <= 64 else 2
    return max(1, min(_MOST_COPIES, wanted))


def _dense_runs(problem: LinearProblem, x: torch.Tensor, weight: torch.Tensor) -> list[Run]:
    rows = x.shape[0]
    y = x.new_empty(rows, problem.out_features)
    copies = [weight.clone() for _ in range(_copies(weight.nbytes, rows))]

    if not problem.training:
        return [lambda w=w: torch.mm(x, w.t(), out=y) for w in copies]  # type: ignore[misc]
    grad, mask = torch.randn_like(y), (weight != 0).to(weight.dtype)

    def step(w: torch.Tensor) -> None:
        product = w * mask
        torch.mm(x, product.t())
        torch.mm(grad, product)
        torch.mm(grad.t(), x).mul_(mask)

    return [functools.partial(step, w) for w in copies]


def _sparse_runs(
    problem: LinearProblem, name: str, x: torch.Tensor, weight: torch.Tensor
) -> list[Run]:
    rows = x.shape[0]
    y = x.new_empty(rows, problem.out_features)
    packed: tuple[torch.Tensor, ...]
    if name == "gemv":
        packed = (weight,)

        def run(copy: tuple[torch.Tensor, ...]) -> Run:
            return lambda: native.linear("linear_dense", x, copy, y)
    elif name == "bitmap":
        layout, values = bitmap.pack(weight)
        packed = (values, layout.bits, layout.starts)

        def run(copy: tuple[torch.Tensor, ...]) -> Run:
            return lambda: native.linear("linear_bitmap", x, copy, y)
    else:
        group = csr.group_of(name, problem.pattern)
        judged = None if problem.training or problem.dynamic else rows
        blocked, values = csr.pack(weight, group=group, rows=judged)
        packed = (values, blocked.columns, blocked.segments)

        def run(copy: tuple[torch.Tensor, ...]) -> Run:
            def forward() -> None:
                native.linear(
                    "linear_csr",
                    x,
                    copy,
                    y,
                    group=group,
                    k_block=blocked.k_block,
                )

            if not problem.training:
                return forward
            return _training_run(x, y, weight, blocked, copy, forward)

    nbytes = sum(tensor.nbytes for tensor in packed)
    number = _copies(nbytes, rows)
    if name == "gemv":  # its weight stays where the model has it
        return [run((weight.clone(),)) for _ in range(number)]
    copies = gathered(packed * number)
    each = len(packed)
    return [run(tuple(copies[i : i + each])) for i in range(0, each * number, each)]


def _training_run(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    layout: csr.CsrLayout,
    packed: tuple[torch.Tensor, ...],
    forward: Run,
) -> Run:
    """Forward, both gradients, and moving the values from and to the dense parameter."""
    dense = weight.flatten()
    places = torch.arange(weight.numel()).view(weight.shape)
    mask = masked.pack(weight, places, weight.dtype, group=layout.group)
    order = mask.tensors["transposed_order"]
    values, turned = packed[0].clone(), torch.empty(order.numel(), dtype=weight.dtype)
    transposed = (turned, mask.tensors["transposed_columns"], mask.tensors["transposed_segments"])
    grad, grad_x, grad_dense = torch.randn_like(y), torch.empty_like(x), torch.empty_like(dense)
    sampled = torch.empty(values.numel())
    columns, segments = packed[1:]

    def run() -> None:
        native.take(dense, mask.tensors["index"], values)
        forward()
        native.take(values, order, turned)
        native.linear("linear_csr", grad, transposed, grad_x, k_block=mask.transposed_k_block)
        native.sampled(
            grad, x, columns, segments, sampled, group=layout.group, k_block=layout.k_block
        )
        grads = sampled.to(weight.dtype)
        native.put(grads, mask.tensors["places"], mask.tensors["source"], grad_dense)

    return run


class _DiskCache:
    """Measurements of this machine and these kernels, in one JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {}
        self._found: dict[str, list[float]] = found if isinstance(found, dict) else {}

    def get(self, key: str) -> tuple[float, float] | None:
        found = self._found.get(key)
        return (found[0], found[1]) if found else None

    def put(self, key: str, times: tuple[float, float]) -> None:
        self._found[key] = list(times)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Written aside and renamed: another process never reads half a file.
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, suffix=".tmp", delete=False
            ) as file:
                json.dump(self._found, file)
            os.replace(file.name, self._path)
        except OSError as error:
            log.info("measurements are not cached on disk: %s", error)


_caches: dict[Path, _DiskCache] = {}


def _cache() -> _DiskCache:
    isa = inductor.vector_isa()
    name = f"{platform.machine()}-{isa}-{cpp.digest()}-{torch.__version__}.json"
    path = inductor.cache_directory() / "sparse_compiler" / name
    return _caches.setdefault(path, _DiskCache(path))

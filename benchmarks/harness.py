"""The one harness of all benchmarks: interleaved timing, ratios, tables, result files.

How a figure comes about:

1. Every contestant is run until compiled and warm; a first time decides how many calls make a turn.
2. A round gives each contestant one turn; the order rotates from round to round. A turn is: a pause
   in which the worker threads of the previous contestant stop spinning, untimed calls (they wake
   this contestant's threads and restore its caches), then timed calls. The turn's figure is the
   median of its calls.
3. A contestant's time is the median over the rounds. A ratio is the median of the ratios *within*
   each round, given with its quartiles, so that slow drift of a shared machine cancels.
4. A round during which other processes used more than `MAX_OTHERS` cores does not count: after a
   second's pause it is repeated, until `PATIENCE_SECONDS` have gone into that
   (`TOTAL_PATIENCE_SECONDS` in a run); then rounds count as they come and the measurement is marked
   disturbed. Engines with spinning barriers lose a factor of 30 to one busy neighbour (DeepSparse,
   [1, 2048], 90 % zeros, 2 cores: 0.9 ms became 30 ms), so a disturbed ratio says nothing and is
   left out of every summary.

Caches: hot by default. The calls of a turn follow each other, so weights that fit the last-level
cache are read from there; dense fp32 weights of [8192, 2048] are 64 MiB and do not fit the 32 MiB
of a common server slice, their packed sparse form may. `flush=True` (`--cold`) overwrites a buffer
larger than the caches before every call, as the other layers of a large model would.
"""

import argparse
import dataclasses
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.machine import LoadMeter, describe, headline

RESULTS = Path(__file__).parent / "results"
ROUNDS = 7
TURN_SECONDS = 0.04
SETTLE_SECONDS = 0.02
MAX_OTHERS = 0.25
PATIENCE_SECONDS = 20.0
TOTAL_PATIENCE_SECONDS = 240.0
FLUSH_BYTES = 128 << 20


_patience = {"left": TOTAL_PATIENCE_SECONDS}


class Contestant(Protocol):
    """Something that can be timed: a callable here, or one in another process."""

    name: str

    def time(self, warmup: int, calls: int, flush: bool) -> list[float]:
        """Seconds of each of `calls` calls, after `warmup` untimed ones."""
        ...


class Local:
    """A contestant in this process."""

    _flush_buffer: torch.Tensor | None = None

    def __init__(self, name: str, call: Callable[[], object]) -> None:
        self.name = name
        self._call = call

    def time(self, warmup: int, calls: int, flush: bool) -> list[float]:
        for _ in range(warmup):
            self._call()
        seconds = []
        for _ in range(calls):
            if flush:
                self._flush()
            start = time.perf_counter()
            self._call()
            seconds.append(time.perf_counter() - start)
        return seconds

    @classmethod
    def _flush(cls) -> None:
        if cls._flush_buffer is None:
            cls._flush_buffer = torch.zeros(FLUSH_BYTES // 4)
        cls._flush_buffer.add_(1.0)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median over rounds, with the quartiles as spread."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Seconds per round of each contestant, and the cores others used during each round."""

    rounds: dict[str, list[float]]
    others: list[float]
    repeated: int

    @property
    def disturbed(self) -> bool:
        """Whether other processes kept the machine too busy for the figures to mean anything."""
        return statistics.median(self.others) > MAX_OTHERS

    def seconds(self, name: str) -> float:
        """Median seconds of contestant `name`."""
        return statistics.median(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> Ratio:
        """How many times faster `fast` is than `slow`."""
        ratios = [a / b for a, b in zip(self.rounds[slow], self.rounds[fast], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(statistics.median(ratios), low, high)

    def to_dict(self) -> dict[str, object]:
        return {
            "seconds_per_round": self.rounds,
            "others_cores_per_round": [round(x, 3) for x in self.others],
            "rounds_repeated": self.repeated,
            "disturbed": self.disturbed,
        }


def measure(
    contestants: Sequence[Contestant],
    rounds: int = ROUNDS,
    flush: bool = False,
) -> Measurement:
    """Times `contestants` against each other.

    Args:
        contestants: at least one; compiled and warmed up here.
        rounds: rounds that count; fewer than 7 only in tests.
        flush: empty the caches before every call.
    """
    plan: list[tuple[Contestant, int, int]] = []
    for contestant in contestants:
        probe = min(contestant.time(2, 2, flush))
        calls = min(40, max(1, math.ceil(TURN_SECONDS / probe)))
        plan.append((contestant, 1 if probe > TURN_SECONDS else 2, calls))
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    others: list[float] = []
    repeated, patience = 0, min(PATIENCE_SECONDS, _patience["left"])
    meter = LoadMeter()
    while len(others) < rounds:
        shift = (len(others) + repeated) % len(plan)
        turns = {}
        start = time.perf_counter()
        meter.lap()
        for contestant, warmup, calls in plan[shift:] + plan[:shift]:
            time.sleep(SETTLE_SECONDS)
            turns[contestant.name] = statistics.median(contestant.time(warmup, calls, flush))
        load = meter.lap()
        if load > MAX_OTHERS and patience > 0:
            repeated += 1
            time.sleep(1.0)
            spent = time.perf_counter() - start
            patience -= spent
            _patience["left"] -= spent
            continue
        others.append(load)
        for name, seconds in turns.items():
            times[name].append(seconds)
    return Measurement(times, others, repeated)


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean; NaN when there are no values."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def verdict(value: float | None, target: float | None) -> str:
    """How `value` stands to `target`: ">= 8.00 met", ">= 8.00 MISSED", "-" without one."""
    if target is None:
        return "-"
    if value is None:
        return f">= {target:.2f}"
    return f">= {target:.2f} {'met' if value >= target else 'MISSED'}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    add = parser.add_argument
    add("--quick", action="store_true", help="a selection that takes minutes")
    add("--rounds", type=int, default=ROUNDS, help="interleaved rounds that count")
    add("--keep", action="store_true", help="write the raw figures to results/, not results/local/")


class Table:
    """A Markdown table, printed row by row while it is being measured."""

    def __init__(self, title: str, columns: Sequence[str], widths: Sequence[int] | None = None):
        self.columns = list(columns)
        wanted = widths or [0] * len(columns)
        self._widths = [max(len(c), w) for c, w in zip(columns, wanted, strict=True)]
        self.machine = describe()
        self.rows: list[list[str]] = []
        print(f"\n## {title}\n{headline(self.machine)}\n")
        print(self._line(self.columns))
        print(self._line(["-" * width for width in self._widths]), flush=True)

    def _line(self, cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True))
        return f"| {' | '.join(padded)} |"

    def add(self, *cells: object) -> None:
        """Appends and prints one row."""
        row = [str(cell) for cell in cells]
        self.rows.append(row)
        print(self._line(row), flush=True)


def write_results(
    name: str,
    machine: dict[str, object],
    records: Sequence[dict[str, object]],
    keep: bool = False,
    **extra: object,
) -> Path:
    """Writes `<UTC date>-<name>.json`: machine, versions, and every raw figure.

    Args:
        name: which benchmark.
        machine: `Table.machine`.
        records: one per line of the table.
        keep: write to `results/`, which is under version control, instead of `results/local/`.
        extra: further facts about the whole run.

    Returns:
        The file, which is new: earlier results are never overwritten.
    """
    folder = RESULTS if keep else RESULTS / "local"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H%M%S")
    path = folder / f"{stamp}-{name}.json"
    content = {"benchmark": name, "machine": machine, **extra, "records": list(records)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nraw figures: {path.relative_to(RESULTS.parent.parent)}", flush=True)
    return path

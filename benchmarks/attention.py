"""Attention under masks, against Inductor and FlexAttention; `python -m benchmarks.attention`.

Five tables: forward (prefill and decoding), what a padding mask of ones costs, training, peak
memory; whole models are in `benchmarks.whole_models`. Contestants get the same function: the
mask is built in it, from `arange` and comparisons, as models do. FlexAttention is written by hand;
its time counts with the building of its block mask and without.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks import attention_cases as cases
from benchmarks import attention_memory, harness, targets
from benchmarks import attention_peers as peers
from benchmarks.attention_cases import Case
from benchmarks.attention_peers import Limits
from benchmarks.contestants import OURS, Unavailable

WINDOW = cases.window(256)
LONGFORMER = cases.longformer(256, 16)
# (case, spelling)
Line = tuple[Case, str]

DEFAULT: tuple[Line, ...] = (
    (Case(WINDOW, 4096), "sdpa"),
    (Case(WINDOW, 4096), "eager"),
    (Case(WINDOW, 4096, "bf16"), "sdpa"),
    (Case(WINDOW, 8192), "sdpa"),
    (Case(WINDOW, 65536), "sdpa"),
    (Case(cases.window(64), 512), "sdpa"),
    (Case(cases.documents(), 4096), "sdpa"),
    (Case(LONGFORMER, 4096), "sdpa"),
    (Case(cases.bigbird(), 4096), "sdpa"),
    (Case(cases.decode(1024), 32768, heads=32, kv_heads=8, queries=1), "sdpa"),
)
# What is padded with ones, and the same without a padding mask.
PADDED = (
    (Case(cases.padded(WINDOW, "window 256, padding of ones"), 4096), Case(WINDOW, 4096)),
    (Case(cases.padded(None, "padding of ones"), 2048), None),
)
TRAINING: tuple[Line, ...] = ((Case(WINDOW, 4096), "sdpa"),)
# FlexAttention, windows: for each dtype, the mask included.
AGAINST_FLEX = {"fp32": 1.6, "bf16": 2.5}
# Window 256, 8 heads of 64: Inductor's 274, 1043, 248 and 991 ms over 18, 36, 14 and 28 ms.
AGAINST_INDUCTOR = {
    ("fp32", 4096): 13.0,
    ("fp32", 8192): 1043 / 36,
    ("bf16", 4096): 248 / 14,
    ("bf16", 8192): 991 / 28,
}
TRAINING_TARGET = 6.0
PADDING_TARGET = 0.98


def full_grid() -> Iterable[Line]:
    """Every pattern, length, dtype and head size, in the sdpa spelling; some in the other."""
    for dtype in cases.DTYPES:
        for keys in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
            for width in (64, 256, 1024, 4096):
                if width < keys:
                    yield Case(cases.window(width), keys, dtype), "sdpa"
        for keys in (1024, 4096, 16384):
            for pattern in (
                *(cases.documents(), LONGFORMER, cases.bigbird(), cases.local(64)),
                *(cases.causal(), cases.padded(cases.causal(), "causal, padding of ones")),
            ):
                yield Case(pattern, keys, dtype), "sdpa"
        for head_dim in (32, 128, 256):
            yield Case(WINDOW, 4096, dtype, head_dim), "sdpa"
        yield Case(WINDOW, 4096, dtype, heads=32, kv_heads=8), "sdpa"
        for keys in (1024, 4096):
            yield Case(WINDOW, keys, dtype), "eager"
        for keys, width in ((4096, 256), (32768, 1024), (65536, 4096)):
            yield Case(cases.decode(width), keys, dtype, heads=32, kv_heads=8, queries=1), "sdpa"


def _target(case: Case) -> tuple[float, float | None]:
    """Against Inductor, and against FlexAttention with its mask."""
    windowed = case.pattern.name.startswith("window") and case.rows == case.keys >= 4096
    against_flex = AGAINST_FLEX[case.dtype] if windowed else None
    if case.pattern is not WINDOW or (case.heads, case.kv_heads, case.head_dim) != (8, 8, 64):
        return targets.NEVER_SLOWER, against_flex
    return AGAINST_INDUCTOR.get((case.dtype, case.keys), targets.NEVER_SLOWER), against_flex


def _ms(measured: harness.Measurement, name: str) -> str:
    return f"{measured.seconds(name) * 1e3:.2f}" if name in measured.rounds else "none"


def _ratio(measured: harness.Measurement, slow: str, target: float | None) -> tuple[str, str]:
    if slow not in measured.rounds or OURS not in measured.rounds:
        return "-", harness.verdict(None, target)
    ratio = measured.ratio(slow, OURS)
    return str(ratio), "disturbed" if measured.disturbed else harness.verdict(ratio.median, target)


def _contestants(
    line: Line, limits: Limits, said: list[Any], reasons: dict[str, str]
) -> list[harness.Contestant]:
    case, spelling = line
    calls: dict[str, peers.Call] = {}

    def flex() -> None:
        calls["flex"], calls["flex + mask"] = peers.flex(case)

    def one(name: str, call: peers.Call) -> None:
        calls[name] = call

    for name, make in (
        ("inductor", lambda: one("inductor", peers.inductor(case, spelling, limits))),
        ("flex", flex),
        (OURS, lambda: one(OURS, peers.sparse(case, spelling, limits, said))),
        ("dense", lambda: one("dense", peers.dense(case, limits))),
    ):
        try:
            make()
        except Exception as error:  # stays in the table, the others are still timed
            reasons[name] = _sentence(error)
    return [harness.Local(name, call) for name, call in calls.items()]


def _sentence(error: Exception) -> str:
    """What happened, without the wrapping of Dynamo."""
    inner: BaseException = error
    while inner.__cause__ is not None or hasattr(inner, "inner_exception"):
        inner = getattr(inner, "inner_exception", None) or inner.__cause__ or inner
    lines = str(inner).strip().splitlines() or [""]
    kind = "" if isinstance(inner, Unavailable) else f"{type(inner).__name__}: "
    return f"{kind}{lines[0]}"[:200]


class _Notes:
    """Why contestants have no figure, and what was said about ours; printed behind a table."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def add(self, case: Case, reasons: dict[str, str], verdict: str | None = None) -> None:
        for name, reason in reasons.items():
            self._lines[f"[no figure] {name}, {case.name}: {reason}"] = None
        if verdict is not None:
            self._lines[f"[{OURS}] {case.name}: {verdict}"] = None

    def print(self) -> None:
        print()
        for line in self._lines:
            print(line)


def forward(lines: Iterable[Line], limits: Limits, rounds: int, keep: bool) -> None:
    """Times one call of each contestant for each line."""
    columns = ["case", "kept", "spelling", "inductor ms", "flex ms", "flex + mask ms"]
    table = harness.Table(
        f"attention, forward, median of {rounds} interleaved rounds; the last column is the dense "
        "rate's time for the pairs that are kept, over ours",
        [
            *columns,
            f"{OURS} ms",
            "against inductor",
            "target",
            "against flex + mask",
            "target ",
            "of the dense rate",
        ],
        [48, 6, 8, 11, 8, 14, 9, 23, 17, 23, 15, 0],
    )
    records: list[dict[str, object]] = []
    notes = _Notes()
    for case, spelling in lines:
        torch._dynamo.reset()
        said, reasons = list[Any](), dict[str, str]()
        with torch.no_grad():
            contestants = _contestants((case, spelling), limits, said, reasons)
            measured = harness.measure(contestants, rounds)
        notes.add(case, reasons, peers.told(said))
        density = case.density()
        limit = "-"
        if {"dense", OURS} <= set(measured.rounds):
            limit = f"{measured.ratio('dense', OURS).median * density:.2f}"
        against_inductor, against_flex = _target(case)
        table.add(
            *(case.name, f"{density:.1%}", spelling),
            *(_ms(measured, name) for name in ("inductor", "flex", "flex + mask", OURS)),
            *_ratio(measured, "inductor", against_inductor),
            *_ratio(measured, "flex + mask", against_flex),
            limit,
        )
        facts = {"case": case.name, "spelling": spelling, "density": density}
        heard = {"verdict": peers.told(said), "without_figure": reasons}
        records.append({**facts, **heard, **measured.to_dict()})
    notes.print()
    harness.write_results("attention", table.machine, records, keep)


def padding(limits: Limits, rounds: int, keep: bool, scale: int = 1) -> None:
    """Times a padding mask of ones against no padding mask, both compiled by this project."""
    table = harness.Table(
        f"what a padding mask of ones costs, fp32, median of {rounds} interleaved rounds",
        ["case", "without ms", "with ms", "without / with", "target", "others"],
        [48, 10, 10, 23, 16, 0],
    )
    records: list[dict[str, object]] = []
    notes = _Notes()
    for padded, plain in PADDED:
        torch._dynamo.reset()
        padded, said = _shrunk(padded, scale), list[Any]()
        contestants: list[harness.Contestant] = []
        try:
            with torch.no_grad():
                if plain is None:
                    without = peers.dense(padded, limits)
                else:
                    without = peers.sparse(_shrunk(plain, scale), "sdpa", limits, [])
                ones = peers.sparse(padded, "sdpa", limits, said)
                contestants = [harness.Local("plain", without), harness.Local(OURS, ones)]
                measured = harness.measure(contestants, rounds)
        except Exception as error:  # stays in the table, the others are still timed
            notes.add(padded, {OURS: _sentence(error)})
            continue
        notes.add(padded, {}, peers.told(said))
        others = f"{statistics.median(measured.others):.2f}"
        times = (_ms(measured, "plain"), _ms(measured, OURS))
        table.add(padded.name, *times, *_ratio(measured, "plain", PADDING_TARGET), others)
        records.append({"case": padded.name, "verdict": peers.told(said), **measured.to_dict()})
    notes.print()
    harness.write_results("attention-padding", table.machine, records, keep)


def training(lines: Iterable[Line], limits: Limits, rounds: int, keep: bool) -> None:
    """Times forward and backward against Inductor; FlexAttention has no backward on CPUs."""
    table = harness.Table(
        f"attention, forward and backward, median of {rounds} interleaved rounds",
        ["case", "spelling", "inductor ms", f"{OURS} ms", "against inductor", "target", "others"],
        [48, 8, 11, 9, 23, 16, 0],
    )
    records: list[dict[str, object]] = []
    notes = _Notes()
    for case, spelling in lines:
        torch._dynamo.reset()
        contestants: list[harness.Contestant] = []
        reasons: dict[str, str] = {}
        want = None
        for backend in ("inductor", OURS):
            try:
                if want is None:
                    want = peers.training_step(case, spelling, "uncompiled", limits)()
                step = peers.training_step(case, spelling, backend, limits)
                peers.compare(case, step(), want)
                contestants.append(harness.Local(backend, step))
            except Exception as error:  # stays in the table, the others are still timed
                reasons[backend] = _sentence(error)
        del want
        notes.add(case, reasons)
        if not contestants:
            continue
        measured = harness.measure(contestants, rounds)
        target = TRAINING_TARGET if case.pattern is WINDOW else targets.NEVER_SLOWER
        others = f"{statistics.median(measured.others):.2f}"
        times = (_ms(measured, "inductor"), _ms(measured, OURS))
        table.add(case.name, spelling, *times, *_ratio(measured, "inductor", target), others)
        records.append({"case": case.name, "spelling": spelling, **measured.to_dict()})
    notes.print()
    harness.write_results("attention-training", table.machine, records, keep)


def memory(keep: bool, length: int = attention_memory.LENGTH) -> None:
    """Peak memory of a long sliding-window forward, compiled by this project."""
    table = harness.Table(
        f"peak memory, {length} tokens, window {attention_memory.WINDOW}, 8 heads of 64, fp32",
        ["backend", "before MiB", "peak MiB", "target", "s a call"],
        [8, 10, 10, 22, 0],
    )
    found = attention_memory.peak(OURS, length)
    limit = attention_memory.TARGET_MIB
    if "error" in found:
        table.add(OURS, "-", "none", f"<= {limit:.0f} MISSED", "-")
        print(f"\n[no figure] {OURS}: {found['error']}")
    else:
        met = "met" if found["peak_mib"] <= limit else "MISSED"
        sizes = (f"{found['before_mib']:.0f}", f"{found['peak_mib']:.0f}")
        table.add(OURS, *sizes, f"<= {limit:.0f} {met}", f"{found['seconds']:.2f}")
    harness.write_results("attention-memory", table.machine, [found], keep)


def _shrunk(case: Case, scale: int) -> Case:
    """The case with fewer keys, for trying out the benchmark itself."""
    return dataclasses.replace(case, keys=max(128, case.keys // scale)) if scale > 1 else case


def run(
    rounds: int = harness.ROUNDS, keep: bool = False, full: bool = False, scale: int = 1
) -> None:
    """Measures, prints and records everything about attention outside of models."""
    limits = Limits(20.0 if full else 2.0)
    lines: Sequence[Line] = list(full_grid()) if full else DEFAULT
    forward(((_shrunk(case, scale), s) for case, s in lines), limits, rounds, keep)
    padding(limits, rounds, keep, scale)
    train = list(TRAINING)
    if full:
        train += [(Case(WINDOW, n, d), "sdpa") for n in (1024, 8192) for d in cases.DTYPES]
        train += [(Case(p, 4096), "sdpa") for p in (cases.documents(), LONGFORMER, cases.bigbird())]
        train += [(Case(WINDOW, 4096), "eager"), (Case(WINDOW, 4096, "bf16"), "sdpa")]
    longer = Limits(2 * limits.seconds * 3.5)
    training(((_shrunk(case, scale), s) for case, s in train), longer, rounds, keep)
    memory(keep, attention_memory.LENGTH // scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    harness.add_arguments(parser)
    parser.add_argument("--full", action="store_true", help="the whole grid: hours")
    parser.add_argument("--shrink", type=int, default=1, help="divide lengths: a trial run")
    arguments = parser.parse_args()
    run(arguments.rounds, arguments.keep, arguments.full, arguments.shrink)


if __name__ == "__main__":
    main()

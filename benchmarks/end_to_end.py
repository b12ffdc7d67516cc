"""Whole models, dense and pruned: eager, Inductor and sparse; `python -m benchmarks.end_to_end`.

SmolLM2-135M-Instruct and all-MiniLM-L6-v2. Two tables: time of each phase (all contestants in one
process, interleaved, each with its own key-value cache), then compile time and peak memory (each
contestant alone in a fresh process with empty caches). Pruning is by magnitude without regard to
quality: the figures are about speed.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import harness, targets
from benchmarks.cold_start import cold_start
from benchmarks.contestants import OURS, Unavailable, require_backend
from benchmarks.models import DECODE_START, PREFILL_TOKENS, ModelUnavailable, load, phases

_CASES = (
    *(("smollm2", "dense"), ("smollm2", "2:4"), ("smollm2", "80 %")),
    *(("minilm", "dense"), ("minilm", "80 %")),
)
_COLD_CASES = (("smollm2", "dense"), ("smollm2", "2:4"), ("minilm", "80 %"))
_BACKENDS = ("eager", "inductor", OURS)
# fp32 sums in another order through 30 layers; measured between eager and Inductor: below 1e-4.
_TOLERANCE = 1e-3


def _forwards(model: torch.nn.Module) -> dict[str, Callable[..., object] | str]:
    """The forward of each backend, or the reason why there is none."""
    forwards: dict[str, Callable[..., object] | str] = {"eager": model}
    forwards["inductor"] = torch.compile(model, backend="inductor")
    try:
        require_backend()
        forwards[OURS] = torch.compile(model, backend=OURS)
    except Unavailable as reason:
        forwards[OURS] = str(reason)
    return forwards


def _warm(steps: dict[str, Callable[[], torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    """Compiles and checks all phases, in order: decoding needs what prefill left in the cache."""
    for phase, step in steps.items():
        y = step()
        reference = expected.setdefault(phase, y.clone())
        error = float((y - reference).abs().max() / reference.abs().max())
        if not error <= _TOLERANCE:
            raise Unavailable(f"WRONG RESULT: {phase} differs from eager by {error:.1e} (relative)")


def time_case(
    name: str, pruning: str, rounds: int, table: harness.Table, notes: dict[str, None]
) -> list[dict[str, object]]:
    """Times all phases of one model; adds a line each to `table`."""
    torch._dynamo.reset()
    model = load(name, pruning)
    steps: dict[str, dict[str, Callable[[], torch.Tensor]]] = {}
    expected: dict[str, torch.Tensor] = {}
    records: list[dict[str, object]] = []
    with torch.no_grad():
        for backend, forward in _forwards(model).items():
            try:
                if isinstance(forward, str):
                    raise Unavailable(forward)
                own = phases(name, model, forward)
                _warm(own, expected)
                steps[backend] = own
            except Exception as error:  # stays in the table, the others are still timed
                notes[f"{backend}, {name} {pruning}: {type(error).__name__}: {error}"] = None
        for phase in expected:
            contestants = [harness.Local(backend, own[phase]) for backend, own in steps.items()]
            measured = harness.measure(contestants, rounds)
            table.add(*_time_line(name, pruning, phase, measured))
            case = {"model": name, "pruning": pruning, "phase": phase}
            records.append({**case, **measured.to_dict()})
    del model, steps
    gc.collect()
    return records


def _time_line(name: str, pruning: str, phase: str, measured: harness.Measurement) -> list[str]:
    times = [
        f"{measured.seconds(backend) * 1e3:.2f}" if backend in measured.rounds else "none"
        for backend in _BACKENDS
    ]
    target = targets.END_TO_END.get((pruning, phase), targets.NEVER_SLOWER)
    ratio = measured.ratio("inductor", OURS) if OURS in measured.rounds else None
    rate = "-"
    if phase in ("decode", "prefill"):
        tokens = 1 if phase == "decode" else PREFILL_TOKENS
        best = OURS if ratio else "inductor"
        rate = f"{tokens / measured.seconds(best):.1f} ({best})"
    told = harness.verdict(ratio.median if ratio else None, target)
    told = "disturbed" if measured.disturbed else told
    others = f"{statistics.median(measured.others):.2f}"
    return [name, pruning, phase, *times, rate, str(ratio) if ratio else "-", told, others]


def _cold_line(name: str, pruning: str, runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    def seconds(run: dict[str, Any]) -> float:
        return sum(run["compile_seconds"].values())

    def median(backend: str, value: Callable[[dict[str, Any]], float]) -> float | None:
        good = [value(run) for run in runs[backend] if "error" not in run]
        return statistics.median(good) if good else None

    peer, ours = median("inductor", seconds), median(OURS, seconds)
    peer_peak, our_peak = (median(b, lambda run: run["peak_mib"]) for b in ("inductor", OURS))
    limit = targets.COMPILE_TIME_DENSE if pruning == "dense" else targets.COMPILE_TIME_SPARSE
    ratio, told = "-", f"<= {limit:.2f}"
    if peer and ours:
        ratio = f"{ours / peer:.2f}x"
        told += " met" if ours / peer <= limit else " MISSED"
    values = [f"{v:.1f}" if v else "none" for v in (peer, ours)]
    peaks = [f"{v:.0f}" if v else "none" for v in (peer_peak, our_peak)]
    return [name, pruning, *values, ratio, told, *peaks]


def cold_starts(repeats: int, keep: bool, cases: Sequence[tuple[str, str]]) -> None:
    """Compile time and peak memory, alternating between the backends."""
    columns = ["model", "pruning", "inductor s", f"{OURS} s", f"{OURS} / inductor", "target"]
    table = harness.Table(
        f"compile time (all phases, cold caches) and peak memory, {repeats} run(s) each",
        [*columns, "inductor peak MiB", f"{OURS} peak MiB"],
        [7, 7, 10, 8, 17, 16, 0, 0],
    )
    records: list[dict[str, object]] = []
    notes: dict[str, None] = {}
    for name, pruning in cases:
        runs: dict[str, list[dict[str, Any]]] = {"inductor": [], OURS: []}
        for _ in range(repeats):
            for backend, results in runs.items():
                try:
                    if backend == OURS:
                        require_backend()
                    results.append(cold_start(name, pruning, backend))
                except Unavailable as reason:
                    results.append({"error": str(reason)})
                if "error" in results[-1]:
                    notes[f"{backend}, {name} {pruning}: {results[-1]['error']}"] = None
        table.add(*_cold_line(name, pruning, runs))
        records.append({"model": name, "pruning": pruning, "runs": runs})
    for note in notes:
        print(f"[no figure] {note}")
    harness.write_results("cold-start", table.machine, records, keep)


def run(
    rounds: int = harness.ROUNDS,
    repeats: int = 3,
    keep: bool = False,
    models: Sequence[str] = ("smollm2", "minilm"),
    cold: bool = True,
) -> None:
    """Measures, prints and records everything about the whole `models`."""
    columns = ["model", "pruning", "phase", *(f"{b} ms" for b in _BACKENDS), "tokens/s"]
    table = harness.Table(
        f"end to end, fp32, batch 1: prefill of {PREFILL_TOKENS} tokens; one decoded token from "
        f"{DECODE_START} cached on (static cache); median of {rounds} interleaved rounds",
        [*columns, f"{OURS} against inductor", "target", "cores used by others"],
        [7, 7, 13, 8, 11, 9, 17, 23, 16, 0],
    )
    records: list[dict[str, object]] = []
    notes: dict[str, None] = {}
    for name, pruning in (case for case in _CASES if case[0] in models):
        try:
            records += time_case(name, pruning, rounds, table, notes)
        except ModelUnavailable as reason:
            notes[f"{name}: {reason}"] = None
    print()
    for note in notes:
        print(f"[no figure] {note}")
    harness.write_results("end-to-end", table.machine, records, keep)
    if cold:
        cold_starts(repeats, keep, [case for case in _COLD_CASES if case[0] in models])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    harness.add_arguments(parser)
    parser.add_argument("--models", default="smollm2,minilm", help="comma-separated")
    parser.add_argument("--no-cold", action="store_true", help="leave out compile time and memory")
    arguments = parser.parse_args()
    repeats = 1 if arguments.quick else 3
    models = arguments.models.split(",")
    run(arguments.rounds, repeats, arguments.keep, models, not arguments.no_cold)


if __name__ == "__main__":
    main()

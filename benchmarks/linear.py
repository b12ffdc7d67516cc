"""Linear layers, [rows, in] x [out, in] + bias: `python -m benchmarks.linear --help`.

Every contestant gets the same pruned weight, and its result is compared with float64 before it is
timed. Compiling is not part of any time in this table (`end_to_end.py` measures that).
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks import harness, targets
from benchmarks.cells import Cell, add_arguments, selected_cells
from benchmarks.contestants import (
    OURS,
    DeepSparse,
    Unavailable,
    eager,
    inductor,
    inductor_frozen,
    sparse,
)
from benchmarks.patterns import keep_mask

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LOCAL = {"eager": eager, "inductor": inductor, "inductor-frozen": inductor_frozen, OURS: sparse}
_DEFAULT_PEERS = ("inductor", "deepsparse", OURS)
_Make = Callable[[torch.nn.Linear, torch.Tensor], tuple[harness.Contestant, float]]


def make_layer(cell: Cell) -> tuple[torch.nn.Linear, torch.Tensor]:
    """The pruned layer and its input; the same for the same cell."""
    torch.manual_seed(0)
    out_features, in_features = cell.shape
    layer = torch.nn.Linear(in_features, out_features).requires_grad_(False)
    if cell.zeros:
        layer.weight.mul_(keep_mask(layer.weight, cell.pattern, cell.zeros))
    x = torch.randn(cell.rows, in_features)
    return layer.to(_DTYPES[cell.dtype]).eval(), x.to(_DTYPES[cell.dtype])


def run_cell(
    cell: Cell, makers: dict[str, _Make], rounds: int, flush: bool
) -> tuple[harness.Measurement | None, dict[str, str], dict[str, float]]:
    """Compiles and times all contestants of one cell.

    Returns:
        The measurement (None if nobody can run), the reason of each contestant that cannot, and the
        seconds each took to compile.
    """
    torch._dynamo.reset()
    layer, x = make_layer(cell)
    contestants, reasons, compile_seconds = [], {}, {}
    with torch.no_grad():
        for name, make in makers.items():
            try:
                contestant, compile_seconds[name] = make(layer, x)
                contestants.append(contestant)
            except Unavailable as reason:
                reasons[name] = str(reason)
            except (
                Exception
            ) as error:  # one failing cell must not end the run; it stays in the table
                reasons[name] = f"FAILED: {type(error).__name__}: {str(error).strip()[:200]}"
        measured = harness.measure(contestants, rounds, flush) if contestants else None
    gc.collect()
    return measured, reasons, compile_seconds


class _Summary:
    """Ratios of all cells against each peer, and how many targets were met."""

    def __init__(self) -> None:
        self.ratios: dict[str, list[float]] = {}
        self.met: dict[str, int] = {}
        self.disturbed = 0

    def add(self, peer: str, ratio: float, target: float) -> None:
        self.ratios.setdefault(peer, []).append(ratio)
        self.met[peer] = self.met.get(peer, 0) + (ratio >= target)

    def print(self) -> None:
        for peer, ratios in self.ratios.items():
            mean = harness.geometric_mean(ratios)
            goal = targets.DEEPSPARSE_GEOMETRIC_MEAN if peer == "deepsparse" else None
            told = f", target {harness.verdict(mean, goal)}" if goal else ""
            cells = f"{self.met[peer]} of {len(ratios)} cells meet their target"
            print(f"geometric mean against {peer}: {mean:.2f}x{told}; {cells}")
        if self.disturbed:
            print(f"{self.disturbed} ratios left out: other processes kept the machine busy")


def run(
    cells: Sequence[Cell],
    peers: Sequence[str] = _DEFAULT_PEERS,
    rounds: int = harness.ROUNDS,
    flush: bool = False,
    keep: bool = False,
) -> None:
    """Measures `cells`, prints the table and the summary, writes the raw figures."""
    deepsparse = DeepSparse()
    makers: dict[str, _Make] = {
        name: deepsparse if name == "deepsparse" else _LOCAL[name] for name in peers
    }
    versions = {"deepsparse": deepsparse.state} if "deepsparse" in peers else {}
    others = [name for name in peers if name != OURS]
    labels = {
        name: f"DeepSparse {versions[name].split(':')[0]}"
        if name == "deepsparse"
        else f"{name} {torch.__version__}"
        for name in others
    }
    columns = ["out x in", "dtype", "pattern", "zeros", "rows", f"{OURS} ms"]
    for name in others:
        columns += [f"{labels[name]} ms", f"against {name}", "target"]
    caches = "caches emptied before every call" if flush else "caches hot"
    table = harness.Table(
        f"linear, {caches}, median of {rounds} interleaved rounds",
        [*columns, "cores used by others"],
        [9, 5, 12, 5, 4, 8, *([9, 21, 16] * len(others)), 0],
    )
    records: list[dict[str, object]] = []
    notes: dict[str, None] = {}
    summary = _Summary()
    try:
        for cell in cells:
            measured, reasons, compile_seconds = run_cell(cell, makers, rounds, flush)
            for note in (f"{name}: {reason}" for name, reason in reasons.items()):
                if note not in notes:
                    print(f"[no figure] {note}", file=sys.stderr, flush=True)
                notes[note] = None
            table.add(*_line(cell, measured, reasons, others, summary))
            records.append(
                {
                    **cell._asdict(),
                    "target_against_inductor": targets.linear_target(*cell),
                    "compile_seconds": compile_seconds,
                    "without_figure": reasons,
                    **(measured.to_dict() if measured else {}),
                }
            )
    finally:
        deepsparse.close()
        print()
        summary.print()
        for note in notes:
            print(f"[no figure] {note}")
        facts = {"peers": versions, "caches": caches}
        harness.write_results("linear", table.machine, records, keep, **facts)


def _line(
    cell: Cell,
    measured: harness.Measurement | None,
    reasons: dict[str, str],
    others: Sequence[str],
    summary: _Summary,
) -> list[str]:
    def time_of(name: str) -> str:
        if measured and name in measured.rounds:
            return f"{measured.seconds(name) * 1e3:.3f}"
        return "WRONG" if "WRONG" in reasons.get(name, "") else "none"

    shape = "x".join(map(str, cell.shape))
    line = [shape, cell.dtype, cell.pattern, f"{cell.zeros:.0%}", str(cell.rows), time_of(OURS)]
    for name in others:
        target = targets.linear_target(*cell)
        if name == "deepsparse":
            target = targets.DEEPSPARSE_EACH_CELL
        if measured and name in measured.rounds and OURS in measured.rounds:
            ratio = measured.ratio(name, OURS)
            if measured.disturbed:
                summary.disturbed += 1
                line += [time_of(name), str(ratio), "disturbed"]
                continue
            summary.add(name, ratio.median, target)
            line += [time_of(name), str(ratio), harness.verdict(ratio.median, target)]
        else:
            line += [time_of(name), "-", harness.verdict(None, target)]
    return [*line, f"{statistics.median(measured.others):.2f}" if measured else "-"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    harness.add_arguments(parser)
    parser.add_argument("--cold", action="store_true", help="empty the caches before every call")
    names = [*_LOCAL, "deepsparse"]
    parser.add_argument(
        "--contestants",
        default=",".join(_DEFAULT_PEERS),
        help=f"comma-separated, of {', '.join(names)}",
    )
    arguments = parser.parse_args()
    peers = arguments.contestants.split(",")
    unknown = set(peers) - set(names)
    if unknown:
        parser.error(
            f"unknown contestants {', '.join(sorted(unknown))}: choose of {', '.join(names)}"
        )
    run(selected_cells(arguments), peers, arguments.rounds, arguments.cold, arguments.keep)


if __name__ == "__main__":
    main()

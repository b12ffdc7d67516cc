"""All benchmarks: `python -m benchmarks` (40 minutes), or with `--full` (hours)."""

import argparse
import time

from benchmarks import (
    attention,
    end_to_end,
    harness,
    linear,
    linear_attention,
    moe,
    training,
    whole_models,
)
from benchmarks.cells import DTYPES, PATTERNS, ROWS, SHAPES, ZEROS, grid, quick_cells

_ALL = ("linear", "training", "attention", "linear_attention", "moe", "whole_models", "end_to_end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    harness.add_arguments(parser)
    parser.add_argument("--full", action="store_true", help="the whole grids")
    parser.add_argument("--only", default=",".join(_ALL), help="comma-separated")
    arguments = parser.parse_args()
    if arguments.full and arguments.quick:
        parser.error("--full and --quick contradict each other")
    names = arguments.only.split(",")
    start = time.perf_counter()
    if "linear" in names:
        cells = grid(SHAPES, DTYPES, PATTERNS, ZEROS, ROWS) if arguments.full else quick_cells()
        linear.run(list(cells), rounds=arguments.rounds, keep=arguments.keep)
    if "training" in names:
        training.run(arguments.rounds, arguments.keep)
    if "attention" in names:
        attention.run(arguments.rounds, arguments.keep, arguments.full)
    if "linear_attention" in names:
        linear_attention.run(arguments.rounds, arguments.keep)
    if "moe" in names:
        moe.run(arguments.rounds, arguments.keep, not arguments.full)
    if "whole_models" in names:
        whole_models.run(arguments.rounds, arguments.keep, arguments.full)
    if "end_to_end" in names:
        repeats = 3 if arguments.full else 1
        end_to_end.run(arguments.rounds, repeats, arguments.keep)
    print(f"\nall benchmarks: {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

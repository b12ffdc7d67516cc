"""All benchmarks: `python -m benchmarks` (20 minutes), or with `--full` (hours)."""

import argparse
import time

from benchmarks import end_to_end, harness, linear, training
from benchmarks.cells import DTYPES, PATTERNS, ROWS, SHAPES, ZEROS, grid, quick_cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    harness.add_arguments(parser)
    parser.add_argument("--full", action="store_true", help="the whole grid of linear layers")
    parser.add_argument("--only", default="linear,end_to_end,training", help="comma-separated")
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
    if "end_to_end" in names:
        repeats = 3 if arguments.full else 1
        end_to_end.run(arguments.rounds, repeats, arguments.keep)
    print(f"\nall benchmarks: {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

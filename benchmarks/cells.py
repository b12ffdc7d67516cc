"""Which linear layers are measured: the grid, the quick selection, the options that narrow them."""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

SHAPES = ("8192x2048", "2048x8192", "1000x777")
ROWS = (1, 4, 16, 64, 512, 2048)
ZEROS = (0.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 98.0)
BLOCK_ZEROS = (80.0, 90.0)
PATTERNS = ("unstructured", "2:4", "4x1", "16x16", "32x32", "64x64")
DTYPES = ("fp32", "bf16")


class Cell(NamedTuple):
    """One line of the table; `shape` is (out_features, in_features), `zeros` a fraction."""

    shape: tuple[int, int]
    dtype: str
    pattern: str
    zeros: float
    rows: int


def parse_shape(text: str) -> tuple[int, int]:
    """ "8192x2048" as (8192, 2048)."""
    out_features, in_features = (int(side) for side in text.split("x"))
    return out_features, in_features


def grid(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    patterns: Sequence[str],
    zeros: Sequence[float],
    rows: Sequence[int],
) -> Iterator[Cell]:
    """The product of all axes; N:M has its own density, blocks take `BLOCK_ZEROS` of `zeros`."""
    for shape, dtype, pattern in itertools.product(shapes, dtypes, patterns):
        if ":" in pattern:
            kept, group = (int(part) for part in pattern.split(":"))
            percentages: Sequence[float] = (100 * (1 - kept / group),)
        elif pattern == "unstructured":
            percentages = zeros
        else:
            percentages = [z for z in zeros if z in BLOCK_ZEROS]
        for percent, m in itertools.product(percentages, rows):
            yield Cell(parse_shape(shape), dtype, pattern, percent / 100, m)


def quick_cells() -> Iterator[Cell]:
    """Every cell that has a target of its own, and a few of each other kind: about 60."""
    main, wide, odd = SHAPES
    free = ("unstructured",)
    yield from grid([main], ["fp32"], free, (0, 50, 80, 90, 95), (1, 16, 64, 512))
    yield from grid([main], ["fp32"], free, (80,), (4,))
    yield from grid([main], ["fp32"], free, (90,), (2048,))
    yield from grid([main], ["fp32"], free, (98,), (1, 64))
    yield from grid([main], ["fp32"], ["2:4"], (), (1, 16, 64))
    yield from grid([main], DTYPES, ["16x16", "64x64"], (90,), (64, 512))
    yield from grid([main], ["fp32"], ["4x1"], (80,), (64,))
    yield from grid([main], ["fp32"], ["32x32"], (80,), (512,))
    yield from grid([main], ["bf16"], free, (0, 50), (1,))
    yield from grid([main], ["bf16"], free, (90,), (1, 16, 128, 512))
    yield from grid([wide, odd], ["fp32"], free, (60, 90), (1, 16, 512))


def _list_of(kind: type) -> Callable[[str], list[Any]]:
    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose cells: comma-separated lists."""
    add = parser.add_argument
    add("--shapes", type=_list_of(str), help=f"out x in features; default {','.join(SHAPES)}")
    add("--dtype", type=_list_of(str), help="fp32, bf16; default both")
    add("--patterns", type=_list_of(str), help=f"any N:M or RxC; default {','.join(PATTERNS)}")
    add("--zeros", type=_list_of(float), help="percent; default 0 to 98")
    add("--rows", type=_list_of(int), help=f"default {','.join(map(str, ROWS))}")


def selected_cells(arguments: argparse.Namespace) -> list[Cell]:
    """The cells asked for: the grid over the given axes, or the quick cells that lie in it."""
    if not arguments.quick:
        axes = (arguments.shapes or SHAPES, arguments.dtype or DTYPES)
        zeros, rows = arguments.zeros or ZEROS, arguments.rows or ROWS
        return list(grid(*axes, arguments.patterns or PATTERNS, zeros, rows))
    shapes = arguments.shapes and [parse_shape(shape) for shape in arguments.shapes]
    zeros = arguments.zeros and [percent / 100 for percent in arguments.zeros]
    wanted = (shapes, arguments.dtype, arguments.patterns, zeros, arguments.rows)
    return [
        cell
        for cell in quick_cells()
        if all(
            values is None or value in values for value, values in zip(cell, wanted, strict=True)
        )
    ]

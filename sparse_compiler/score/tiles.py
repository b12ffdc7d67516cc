"""Which tiles of the score matrix a mask leaves empty, and in which it changes nothing.

``classify`` proves things about tiles of 64 queries and 64 keys, in O(tiles + positions), without
evaluating the score (``grid``). A tile is

- EMPTY if no score in it can be above ``DEAD`` while |s| <= ``S_BOUND``: its weights are 0 in
  float32 unless a whole row is as low, which kernels check (``fill_of`` says what to check);
- FULL if every mask condition holds everywhere in it and every additive mask is 0: the score is
  ``full_score`` there;
- OPEN if everything that leaves decide keeps, and only conditions on indices may mask: the score is
  ``open_score`` there, so that a padding mask of ones costs nothing inside of a window;
- PARTIAL if none of these can be shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sparse_compiler.score.bounds import Certain, disjoin, join
from sparse_compiler.score.expr import Expr, parse
from sparse_compiler.score.fill import DEAD, Fill, fill_of
from sparse_compiler.score.grid import BLOCK_K, BLOCK_Q, Grid
from sparse_compiler.score.intervals import S_BOUND, Ranges
from sparse_compiler.score.masks import (
    Plan,
    conditions,
    full_score,
    kept_score,
    open_score,
    plan,
)

EMPTY, PARTIAL, FULL, OPEN = 0, 1, 2, 3

# Tiles, and elements of leaves that q and k both index, that are looked at together.
_TILES, _ELEMENTS = 2**18, 2**24
_LARGEST = torch.finfo(torch.float32).max
_ROUNDING = 2.0**-20


def classify(
    score: Expr | str,
    leaves: Sequence[torch.Tensor],
    ints: Sequence[int],
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    device: torch.device | None = None,
) -> torch.Tensor:
    """The kind of every tile.

    Args:
        score: a float expression, or its text.
        leaves: what ``load`` reads, by slot.
        ints: the runtime integers.
        batch: B.
        heads: H.
        queries: M.
        keys: N.
        device: of the result; that of the first leaf by default.

    Returns:
        uint8 [B or 1, H or 1, ceil(M / 64), ceil(N / 64)], contiguous; 1 where the score does not
        depend on b (on h).

    Raises:
        ValueError: the score is not a float expression.
    """
    expr = parse(score) if isinstance(score, str) else score
    known = plan(expr)
    if device is None and leaves:
        device = leaves[0].device
    batch, heads = (n if expr.depends_on(x) else 1 for n, x in ((batch, "b"), (heads, "h")))
    rows, columns = -(-queries // BLOCK_Q), -(-keys // BLOCK_K)
    shape = (batch, heads, rows, columns)
    if not known.analysed or not math.prod(shape):
        return torch.full(shape, PARTIAL, dtype=torch.uint8, device=device)
    measured = Ranges(leaves, ints, (batch, heads, queries, keys))
    step = max(1, _TILES // (batch * heads * columns))
    if known.elementwise:
        step = min(step, max(1, _ELEMENTS // (batch * heads * keys * BLOCK_Q)))
    found: list[torch.Tensor] = []
    grid: Grid | None = None
    with torch.no_grad():
        for row in range(0, rows, step):
            last = min(row + step, rows)
            span = range(row * BLOCK_Q, min(last * BLOCK_Q, queries))
            grid = Grid(
                leaves,
                ints,
                (range(batch), range(heads), span, range(keys)),
                known.static,
                measured,
                grid,
                device,
            )
            part = (batch, heads, last - row, columns)
            dead, full = _Dead(grid, known)(expr, DEAD), _full(grid, known, known.conditions)
            lesser = known.loaded if full is not True and open_score(expr) is not None else None
            rest = PARTIAL if lesser is None else _opened(_full(grid, known, lesser))
            kinds = _kinds(dead, full, rest)
            if isinstance(kinds, int):
                found.append(torch.full(part, kinds, dtype=torch.uint8, device=device))
            else:
                found.append(kinds.expand(part))
    return (found[0] if len(found) == 1 else torch.cat(found, 2)).contiguous()


def fractions(kinds: torch.Tensor) -> tuple[float, float, float]:
    """Which fractions of the tiles are EMPTY, PARTIAL or OPEN, and FULL."""
    if not kinds.numel():
        return 0.0, 0.0, 0.0
    empty, full = (float((kinds == kind).sum()) / kinds.numel() for kind in (EMPTY, FULL))
    return empty, 1.0 - empty - full, full


def density(kinds: torch.Tensor) -> float:
    """The fraction of tiles that have to be computed; 1 if there are none."""
    return 1.0 - fractions(kinds)[0]


def _opened(loaded: Certain) -> torch.Tensor | int:
    """OPEN where all that leaves decide keeps, PARTIAL elsewhere."""
    if isinstance(loaded, bool):
        return OPEN if loaded else PARTIAL
    return loaded.to(torch.uint8) * (OPEN - PARTIAL) + PARTIAL


def _kinds(dead: Certain, full: Certain, rest: torch.Tensor | int) -> torch.Tensor | int:
    """FULL or ``rest`` where not EMPTY."""
    if isinstance(dead, bool) and dead:
        return EMPTY
    kinds: torch.Tensor | int
    if isinstance(full, bool):
        kinds = FULL if full else rest
    else:
        kinds = torch.where(full, FULL, rest).to(torch.uint8)
    if isinstance(dead, bool):
        return kinds
    return (~dead).to(torch.uint8) * kinds


def _full(grid: Grid, known: Plan, conditions: Sequence[tuple[Expr, bool]]) -> Certain:
    """Where these conditions keep and all additive masks are 0."""
    total: Certain = True
    for condition, keep in conditions:
        yes, no = grid.truth(condition)
        total = join(total, yes if keep else no)
    for addition in known.additions:
        low, high = grid.interval(addition)
        total = join(total, join(low == 0, high == 0))
    return total


class _Dead:
    """Where a score is at most some limit in the whole tile, looked into no further than needed."""

    def __init__(self, grid: Grid, known: Plan) -> None:
        self._grid = grid
        self._additions = known.additions
        self._known: dict[tuple[Expr, float], Certain] = {}

    def __call__(self, expr: Expr, limit: float) -> Certain:
        found = self._known.get((expr, limit))
        if found is None:
            low, high = self._grid.static.ends(expr)
            found = high <= limit
            if not found and not low > limit:
                found = self._decide(expr, limit)
            self._known[expr, limit] = found
        return found

    def _decide(self, expr: Expr, limit: float) -> Certain:
        operands = expr.operands
        if expr.op == "where":
            yes, no = self(operands[1], limit), self(operands[2], limit)
            if yes is False and no is False:
                return False
            first, second = self._grid.truth(operands[0])
            certain = disjoin(join(first, yes), join(second, no))
            return disjoin(certain, join(yes, no))
        if expr.op == "max":
            return join(self(operands[0], limit), self(operands[1], limit))
        if expr.op == "mul" and operands[1].op == "const" and 0 < operands[1].value < math.inf:
            return self(operands[0], limit / operands[1].value)
        if expr.op == "add":
            found = self._of_sum(expr, limit)
            if found is not None:
                return found
        # A bias is rarely low anywhere: one look at all of it is cheaper than one a tile.
        whole = expr.op == "load" and expr.depends_on("q") and expr.depends_on("k")
        if whole and expr not in self._additions and self._grid.measured.ends(expr)[0] > limit:
            return False
        return self._grid.interval(expr)[1] <= limit

    def _of_sum(self, expr: Expr, limit: float) -> Certain | None:
        """Of a sum of which one term has a bound everywhere; None if neither has."""
        found: list[Certain] = []
        for one, other in (expr.operands, expr.operands[::-1]):
            if self._grid.static.ends(other)[0] > limit:
                continue  # not low enough by itself
            for ranges in (self._grid.static, self._grid.measured):
                high = ranges.ends(one)[1]
                if high < math.inf:  # and so a number
                    # Next to a large bound the limit is lost to rounding: leave room for that.
                    rest = limit - high - abs(high) * _ROUNDING
                    # Even with -inf the sum is low only if the other one is not infinite.
                    found.append(self(other, _LARGEST if high == -math.inf else rest))
                    break
        return disjoin(found[0], found[-1]) if found else None


__all__ = [
    "BLOCK_K",
    "BLOCK_Q",
    "DEAD",
    "EMPTY",
    "FULL",
    "OPEN",
    "PARTIAL",
    "S_BOUND",
    "Fill",
    "classify",
    "conditions",
    "density",
    "fill_of",
    "fractions",
    "full_score",
    "kept_score",
    "open_score",
]

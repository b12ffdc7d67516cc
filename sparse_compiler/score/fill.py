"""What a score puts where its mask leaves a pair out, and so what kernels have to check."""

from __future__ import annotations

import dataclasses
import functools
import math

from sparse_compiler.score.intervals import Ranges
from sparse_compiler.score.masks import plan
from sparse_compiler.score.node import Expr

# exp(DEAD - x) is 0 in float32 for every x that a row with an ordinary score can have as its sum.
DEAD = -5000.0

# A fill this low swallows whatever is added to it.
_SWALLOWS = -1e30
# Sums are rounded: what is nearly low enough counts as low.
_ROUNDING = 2.0**-20
# Constants above this are no masks.
_NEAR = -10.0


@dataclasses.dataclass(frozen=True)
class Fill:
    """What a score puts where its mask leaves a pair out.

    Attributes:
        finite: EMPTY tiles may hold finite scores: rows without any other have to be checked.
        needs_bound: and that they are EMPTY holds only for |s| <= S_BOUND: a finite fill is added.
        skippable: whether a tile can be EMPTY at all.
        near_miss: the lowest constant that looks like a mask and is not low enough, such as Swin's
            -100, whose weight exp(-100) is not 0; None if there is none.
    """

    finite: bool
    needs_bound: bool
    skippable: bool
    near_miss: float | None


@functools.lru_cache(maxsize=256)
def fill_of(score: Expr) -> Fill:
    """What the score puts where its mask leaves a pair out."""
    found = plan(score)
    kinds = _Low(found.static).kinds(score, DEAD) if found.analysed else frozenset()
    near = [
        float(node.value)
        for mask in score.walk()
        if mask.op == "where" and mask.type == "float"
        for node in mask.operands[1:]
        if node.op == "const" and DEAD < node.value <= _NEAR
    ]
    return Fill(
        finite=bool(kinds - {"infinite"}),
        needs_bound="bound" in kinds,
        skippable=bool(kinds),
        near_miss=min(near, default=None),
    )


class _Low:
    """How the scores of a whole tile can be low.

    As -inf (``"infinite"``), as a finite number that swallows what is added to it (``"huge"``) or
    does not (``"finite"``), which may hold for bounded s only (``"bound"``).
    """

    def __init__(self, static: Ranges) -> None:
        self._static = static
        self._known: dict[tuple[Expr, float], frozenset[str]] = {}

    def kinds(self, expr: Expr, limit: float) -> frozenset[str]:
        """How ``expr`` can be at most ``limit`` in a whole tile; more rather than less."""
        found = self._known.get((expr, limit))
        if found is None:
            found = self._known[expr, limit] = self._kinds(expr, limit)
        return found

    def _kinds(self, expr: Expr, limit: float) -> frozenset[str]:
        low, high = self._static.ends(expr)
        if low > limit or (_same_everywhere(expr) and high > limit):
            return frozenset()
        if expr.op == "const":
            kind = "infinite" if low == -math.inf else "huge" if low <= _SWALLOWS else "finite"
            return frozenset([kind])
        if expr.op == "where":
            return frozenset().union(*(self.kinds(item, limit) for item in expr.operands[1:]))
        if expr.op == "add":
            found = self._of_sum(expr, limit)
            if found is not None:
                return found
        if expr.op == "mul" and expr.operands[1].op == "const":
            factor = expr.operands[1].value
            if 0 < factor < math.inf:
                return self.kinds(expr.operands[0], limit / factor)
        if expr.op == "max":
            left, right = (self.kinds(item, limit) for item in expr.operands)
            if not left or not right:
                return frozenset()
            return (left | right) - ({"infinite"} - (left & right))
        return frozenset(["infinite", "finite", *(["bound"] if expr.depends_on("s") else [])])

    def _of_sum(self, expr: Expr, limit: float) -> frozenset[str] | None:
        """Of a sum of which one part is the same in every tile; None if that has no bound."""
        terms = _terms(expr)
        varying = [term for term in terms if not _same_everywhere(term)]
        fixed = sum(self._static.ends(term)[1] for term in terms if term not in varying)
        limit -= fixed - abs(fixed) * _ROUNDING
        if not math.isfinite(limit) or limit >= 0:
            return None
        # If the sum is low, one of its terms is.
        share = limit / max(len(varying), 1)
        found = frozenset().union(*(self.kinds(term, share) for term in varying))
        if "finite" in found and expr.depends_on("s"):
            found |= {"bound"}
        return found


def _terms(expr: Expr) -> list[Expr]:
    """The terms of nested additions."""
    found: list[Expr] = []
    waiting = [expr]
    while waiting:
        node = waiting.pop()
        if node.op == "add":
            waiting.extend(node.operands)
        else:
            found.append(node)
    return found


def _same_everywhere(expr: Expr) -> bool:
    """Whether no tile's values differ from another one's but for s."""
    return not any(expr.depends_on(name) for name in ("bhqk", "int", "load"))

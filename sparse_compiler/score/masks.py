"""What a score's masks are: their conditions, and the score where all of them keep a pair."""

from __future__ import annotations

import dataclasses
import functools

from sparse_compiler.score.intervals import Ranges
from sparse_compiler.score.logic import FILL
from sparse_compiler.score.node import FALSE, TRUE, Expr

# Expressions nested deeper than this are not analysed.
_DEEPEST = 100


@dataclasses.dataclass(frozen=True)
class Plan:
    """What has to be found out about a tile; made once a score.

    Attributes:
        conditions: bool expressions, and which of their values keeps a pair.
        additions: float expressions that are 0 where an additive mask keeps a pair.
        kept: the score where all conditions keep.
        full: and where all additions are 0.
        open: the score where only what leaves decide keeps: conditions on indices are still in it.
        loaded: as ``conditions``, of those only, as small as they come.
        static: what holds for any leaves.
        elementwise: whether q and k both index a leaf, of which then every element is read.
        analysed: False of an expression nested too deeply: all of its tiles are partial.
    """

    conditions: tuple[tuple[Expr, bool], ...]
    additions: tuple[Expr, ...]
    kept: Expr
    full: Expr
    open: Expr
    loaded: tuple[tuple[Expr, bool], ...]
    static: Ranges
    elementwise: bool
    analysed: bool = True


def conditions(score: Expr) -> tuple[tuple[Expr, bool], ...]:
    """The conditions of a score's masks, each with the value that keeps a pair."""
    return plan(score).conditions


def full_score(score: Expr) -> Expr:
    """The score in FULL tiles: every mask condition keeps, every additive mask is 0."""
    return plan(score).full


def kept_score(score: Expr) -> Expr:
    """The score where every mask condition keeps; additive masks are still in it.

    In FULL tiles it equals ``full_score``, and it has the right derivatives by loaded values.
    """
    return plan(score).kept


@functools.lru_cache(maxsize=256)
def plan(score: Expr) -> Plan:
    """The plan for a score.

    Raises:
        ValueError: the score is not a float.
    """
    if score.type != "float":
        raise ValueError(f"a score is a float, not {score.type}: {score}")
    static = Ranges()
    if _depth(score) > _DEEPEST:
        return Plan((), (), score, score, score, (), static, False, analysed=False)
    found: dict[tuple[Expr, bool], None] = {}
    branches: dict[Expr, Expr] = {}
    for node in score.walk():
        keep = _keeps(node, static)
        if keep is not None:
            found[node.operands[0], keep] = None
            branches[node] = node.operands[1 if keep else 2]
    # Masks nest: what is kept may hold further masks.
    kept = score
    while True:
        inside = {node: branches[node] for node in kept.walk() if node in branches}
        if not inside:
            break
        kept = kept.substitute(inside)
    additions = {node: place for node in kept.walk() if (place := _additive(node)) is not None}
    full = kept.substitute({node: node.operands[1 - place] for node, place in additions.items()})
    loaded: dict[tuple[Expr, bool], None] = {}
    assumed: dict[Expr, Expr] = dict.fromkeys(additions)  # type: ignore[assignment]
    for node, place in additions.items():
        assumed[node] = node.operands[1 - place]
    for condition, keep in found:
        parts = [part for part in _parts(condition, keep) if part.depends_on("load")]
        loaded.update(dict.fromkeys((part, keep) for part in parts))
        if parts:
            known = dict.fromkeys(parts, TRUE if keep else FALSE)
            assumed[condition] = condition.substitute(known)
    elementwise = any(node.depends_on("q") and node.depends_on("k") for node in score.loads())
    return Plan(
        tuple(found),
        tuple(dict.fromkeys(node.operands[place] for node, place in additions.items())),
        kept,
        full,
        score.substitute(assumed),
        tuple(loaded),
        static,
        elementwise,
    )


def open_score(score: Expr) -> Expr | None:
    """The score in OPEN tiles, where all that leaves decide keeps and indices may mask.

    None if it is no simpler than the score, or the score of FULL tiles.
    """
    found = plan(score)
    if found.open in (found.full, score) or found.open.depends_on("load"):
        return None
    return found.open


def _parts(condition: Expr, keep: bool) -> list[Expr]:
    """What has to hold together for a condition to keep a pair."""
    if condition.op != ("and" if keep else "or"):
        return [condition]
    return [part for item in condition.operands for part in _parts(item, keep)]


def _depth(expr: Expr) -> int:
    """The number of operators on top of each other; a chain of the same one counts once."""
    depth: dict[Expr, int] = {}
    for node in expr.walk():
        inner = (
            depth[item] - (node.op == item.op and node.op in ("and", "or"))
            for item in node.operands
        )
        depth[node] = 1 + max(inner, default=0)
    return depth[expr]


def _keeps(node: Expr, static: Ranges) -> bool | None:
    """Which value of its condition keeps a pair, if a ``where`` is a mask; None if it is not."""
    if node.op != "where" or node.type != "float" or node.operands[0].depends_on("s"):
        return None
    yes, no = (
        not item.depends_on("s") and static.ends(item)[1] <= FILL for item in node.operands[1:]
    )
    return None if yes == no else bool(no)


def _additive(node: Expr) -> int | None:
    """Which operand of an addition to s is a mask made of loaded numbers, None if none is.

    A mask is the same for all heads, which a bias seldom is.
    """
    if node.op != "add" or not node.depends_on("s"):
        return None
    for place, item in enumerate(node.operands):
        if not item.depends_on("s") and not item.depends_on("h") and _reads_numbers(item):
            return place
    return None


def _reads_numbers(expr: Expr) -> bool:
    """Whether the value, not just a condition in it, comes from a leaf."""
    seen: set[Expr] = set()
    waiting = [expr]
    while waiting:
        node = waiting.pop()
        if node.op == "load":
            return True
        if node not in seen:
            seen.add(node)
            waiting.extend(item for item in node.operands if item.type != "bool")
    return False

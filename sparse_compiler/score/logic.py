"""Builders of truth values: comparisons, and/or/not/xor, and the choice ``where``, simplified.

Negations are pushed down to comparisons and loads, comparisons of integers are in the normal form
of ``affine``, and a ``where`` between a score and a fill has the fill last.
"""

from __future__ import annotations

import functools

from sparse_compiler.score.affine import Comparison, bounds, compare, distance
from sparse_compiler.score.arithmetic import Operand, as_expr, promoted
from sparse_compiler.score.node import FALSE, TRUE, ZERO, Expr, const

# A constant as low as this, or lower, is a fill: it marks what a mask leaves out.
FILL = -1000.0

# Branches of a `where` that are larger than this are not compared at a special index.
_SMALL = 64


def lt(left: Operand, right: Operand) -> Expr:
    """``left < right``."""
    return _compared("lt", left, right)


def le(left: Operand, right: Operand) -> Expr:
    """``left <= right``."""
    return _compared("le", left, right)


def gt(left: Operand, right: Operand) -> Expr:
    """``left > right``."""
    return _compared("gt", left, right)


def ge(left: Operand, right: Operand) -> Expr:
    """``left >= right``."""
    return _compared("ge", left, right)


def eq(left: Operand, right: Operand) -> Expr:
    """``left == right``; of two bools, whether both or neither hold."""
    left, right = as_expr(left), as_expr(right)
    if left.type == right.type == "bool":
        return not_(xor(left, right))
    return _compared("eq", left, right)


def ne(left: Operand, right: Operand) -> Expr:
    """``left != right``; of two bools, ``xor``."""
    left, right = as_expr(left), as_expr(right)
    if left.type == right.type == "bool":
        return xor(left, right)
    return _compared("ne", left, right)


def _compared(op: str, left: Operand, right: Operand) -> Expr:
    left, right = promoted(left, right)
    for one, other in ((left, right), (right, left)):
        if one.op == "where" and other.op == "const":
            condition, yes, no = one.operands
            if yes.op == no.op == "const":
                sides = ((yes, right), (no, right)) if one is left else ((left, yes), (left, no))
                return where(condition, *(_compared(op, *pair) for pair in sides))
    if left.type == "int":
        found = compare(op, left, right)
        within = distance(found)
        if within is None:
            return found
        inside, op, bound = within
        if op == "le":
            return and_(le(inside, bound), ge(inside, -bound))
        return or_(ge(inside, bound), le(inside, -bound))
    if left.op == right.op == "const":
        return const(_holds(op, left.value, right.value))
    return Expr(op, (left, right))


def _holds(op: str, left: float, right: float) -> bool:
    tests = {
        "lt": left < right,
        "le": left <= right,
        "gt": left > right,
        "ge": left >= right,
        "eq": left == right,
        "ne": left != right,
    }
    return tests[op]


def not_(operand: Operand) -> Expr:
    """The opposite of a bool."""
    return _negated(_bool(operand))


@functools.lru_cache(maxsize=4096)
def _negated(operand: Expr) -> Expr:
    if operand.op == "const":
        return const(not operand.value)
    if operand.op == "not":
        return operand.operands[0]
    if operand.op in ("and", "or"):
        opposite = or_ if operand.op == "and" else and_
        return opposite(*(_negated(item) for item in parts(operand.op, operand)))
    if operand.op == "where":
        condition, yes, no = operand.operands
        return where(condition, _negated(yes), _negated(no))
    if operand.op in ("eq", "ne"):
        return Expr("ne" if operand.op == "eq" else "eq", operand.args)
    comparison = Comparison.of(operand)
    return comparison.negated().expr() if comparison else Expr("not", (operand,))


def and_(*operands: Operand) -> Expr:
    """Whether all of the bools hold."""
    return _joined("and", operands)


def or_(*operands: Operand) -> Expr:
    """Whether one of the bools holds."""
    return _joined("or", operands)


def xor(left: Operand, right: Operand) -> Expr:
    """Whether exactly one of two bools holds."""
    left, right = _bool(left), _bool(right)
    for one, other in ((left, right), (right, left)):
        if one.op == "const":
            return not_(other) if one.value else other
        if _implies(one, other):
            return and_(other, not_(one))
    if left is not_(right):
        return TRUE
    return Expr("xor", (left, right))


def where(condition: Operand, yes: Operand, no: Operand) -> Expr:
    """``yes`` where the bool ``condition`` holds, else ``no``."""
    condition, yes, no = _bool(condition), as_expr(yes), as_expr(no)
    if yes.type != no.type:
        yes, no = promoted(yes, no)
    yes, no = _inside(condition, yes, True), _inside(condition, no, False)
    if condition.op == "const":
        return yes if condition.value else no
    if yes is no:
        return yes
    if yes.type == "bool":
        return _bool_choice(condition, yes, no)
    fills = is_fill(yes) - is_fill(no)
    if fills > 0 or (not fills and condition.op in ("not", "ne")):
        condition, yes, no = not_(condition), no, yes
    same = _at_zero(condition, yes, no)
    if same is not None:
        return same
    if yes.op == "where" and yes.operands[2] is no:
        return where(and_(condition, yes.operands[0]), yes.operands[1], no)
    if no.op == "where" and no.operands[1] is yes:
        return where(or_(condition, no.operands[0]), yes, no.operands[2])
    return Expr("where", (condition, yes, no))


def is_fill(expr: Expr) -> bool:
    """Whether it is a constant so low that it marks what a mask leaves out."""
    return expr.op == "const" and expr.type == "float" and expr.value <= FILL


def _bool(operand: Operand) -> Expr:
    operand = as_expr(operand)
    return operand if operand.type == "bool" else _compared("ne", operand, 0)


def _inside(condition: Expr, branch: Expr, holds: bool) -> Expr:
    """A branch of a ``where``, itself one with the same condition, as it is inside."""
    if branch.op == "where" and branch.operands[0] is condition:
        return branch.operands[1 if holds else 2]
    return branch


def _bool_choice(condition: Expr, yes: Expr, no: Expr) -> Expr:
    if yes is TRUE:
        return or_(condition, no)
    if yes is FALSE:
        return and_(not_(condition), no)
    if no is TRUE:
        return or_(not_(condition), yes)
    if no is FALSE:
        return and_(condition, yes)
    return Expr("where", (condition, yes, no))


def _at_zero(condition: Expr, yes: Expr, no: Expr) -> Expr | None:
    """The branch that is right everywhere, if the other one is only for an index of 0.

    ``where(k < 1, -1, k - 1)`` is ``k - 1``.
    """
    found = Comparison.of(condition)
    if found is None or len(found.terms) != 1:
        return None
    term, factor = found.terms[0]
    if factor != 1 or bounds(term)[0] < 0:
        return None
    if (found.op, found.bound) in (("le", 0), ("eq", 0)):
        special, general = yes, no
    elif (found.op, found.bound) in (("ge", 1), ("ne", 0)):
        special, general = no, yes
    else:
        return None
    if max(sum(1 for _ in branch.walk()) for branch in (special, general)) > _SMALL:
        return None
    zero = {term: ZERO}
    return general if special.substitute(zero) is general.substitute(zero) else None


def _implies(one: Expr, other: Expr) -> bool:
    """Whether ``other`` holds wherever ``one`` does; False where it cannot be told."""
    if one is other:
        return True
    first, second = Comparison.of(one), Comparison.of(other)
    return first is not None and second is not None and first.implies(second)


def _joined(op: str, operands: tuple[Operand, ...]) -> Expr:
    """Conjunction or disjunction of distinct operands, none of which another one makes idle."""
    neutral, absorbing = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
    first, *others = (_bool(operand) for operand in operands)
    kept = _Kept(op)
    if first.op == op:  # what an expression joins already has been through this
        for item in parts(op, first):
            kept.insert(item)
    else:
        others.insert(0, first)
    for operand in others:
        for item in parts(op, operand):
            if item is neutral or kept.implies(item):
                continue
            if item is absorbing or kept.excludes(item):
                return absorbing
            kept.drop_implied(item)
            kept.insert(item)
    total: Expr | None = None
    for item in kept.items:
        total = item if total is None else Expr(op, (total, item))
    return neutral if total is None else total


class _Kept:
    """Operands of a conjunction or disjunction; comparisons of the same terms are found at once."""

    def __init__(self, op: str) -> None:
        self._and = op == "and"
        self.items: dict[Expr, None] = {}
        self._alike: dict[object, list[tuple[Expr, Comparison]]] = {}

    def insert(self, item: Expr) -> None:
        self.items[item] = None
        found = Comparison.of(item)
        if found is not None:
            self._alike.setdefault(found.terms, []).append((item, found))

    def implies(self, item: Expr) -> bool:
        """Whether ``item`` adds nothing."""
        if item in self.items:
            return True
        new = Comparison.of(item)
        alike = self._alike.get(new.terms, ()) if new else ()
        return any(old.implies(new) if self._and else new.implies(old) for _, old in alike if new)

    def drop_implied(self, item: Expr) -> None:
        """Take out what ``item`` makes idle."""
        new = Comparison.of(item)
        alike = self._alike.get(new.terms, []) if new else []
        idle = [
            pair
            for pair in alike
            if new and (new.implies(pair[1]) if self._and else pair[1].implies(new))
        ]
        for pair in idle:
            alike.remove(pair)
            del self.items[pair[0]]

    def excludes(self, item: Expr) -> bool:
        """Whether ``item`` decides the whole: never together, or (of ``or``) always one of them."""
        new = Comparison.of(item)
        if new is None:
            # The opposite of an "or" is an "and", which is no operand of an "and".
            return item.op not in ("and", "or") and _negated(item) in self.items
        alike = self._alike.get(new.terms, ())
        opposite = new.negated()
        if self._and:
            return any(old.implies(opposite) for _, old in alike)
        return any(opposite.implies(old) for _, old in alike)


def parts(op: str, expr: Expr) -> list[Expr]:
    """The operands of nested ``and`` (or ``or``), left to right; of anything else, itself."""
    found: list[Expr] = []
    waiting = [expr]
    while waiting:
        item = waiting.pop()
        if item.op == op:
            waiting.extend(reversed(item.operands))
        else:
            found.append(item)
    return found

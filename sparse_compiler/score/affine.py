"""Normal forms of integer expressions: sums of terms with constant coefficients.

``q - k + 3`` however it was spelled is one expression, and so is ``k <= q``: comparisons of
integers become ``sum <= constant`` or ``sum >= constant``. What is equal then compares equal.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from sparse_compiler.score.node import FALSE, TRUE, ZERO, Expr, const

_INDICES = ("b", "h", "q", "k")


@dataclasses.dataclass(frozen=True)
class Affine:
    """``sum(coefficient * term) + constant``; terms are in a fixed order, no coefficient is 0."""

    terms: tuple[tuple[Expr, int], ...]
    constant: int

    @staticmethod
    def of(expr: Expr) -> Affine:
        """The int expression as a sum; at worst one term, itself."""
        found: dict[Expr, int] = {}
        constant = 0
        waiting = [(expr, 1)]
        while waiting:
            node, factor = waiting.pop()
            if node.op == "const":
                constant += factor * node.value
            elif node.op in ("add", "sub"):
                left, right = node.operands
                waiting.append((right, factor if node.op == "add" else -factor))
                waiting.append((left, factor))
            elif node.op == "neg":
                waiting.append((node.operands[0], -factor))
            elif node.op == "mul" and node.operands[1].op == "const":
                waiting.append((node.operands[0], factor * node.operands[1].value))
            else:
                found[node] = found.get(node, 0) + factor
        terms = [(term, factor) for term, factor in found.items() if factor]
        terms.sort(key=lambda item: _rank(item[0]))
        return Affine(tuple(terms), constant)

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        """``self + factor * other``."""
        found = dict(self.terms)
        for term, coefficient in other.terms:
            found[term] = found.get(term, 0) + factor * coefficient
        terms = [(term, number) for term, number in found.items() if number]
        terms.sort(key=lambda item: _rank(item[0]))
        return Affine(tuple(terms), self.constant + factor * other.constant)

    def scaled(self, factor: int) -> Affine:
        """``factor * self``."""
        return Affine((), 0).plus(self, factor)

    def expr(self) -> Expr:
        """The sum as an expression: positive terms, then negative ones, then the constant."""
        total: Expr | None = None
        for term, factor in sorted(self.terms, key=lambda item: item[1] < 0):
            size = abs(factor) if total is not None else factor
            part = term if size == 1 else _times(term, size)
            op = "add" if factor > 0 else "sub"
            total = part if total is None else Expr(op, (total, part))
        if total is None:
            return const(self.constant)
        if self.constant:
            op = "add" if self.constant > 0 else "sub"
            total = Expr(op, (total, const(abs(self.constant))))
        return total

    def bounds(self, depth: int = 8) -> tuple[float, float]:
        """The least and greatest value it can have; infinite where nothing is known."""
        low = high = float(self.constant)
        for term, factor in self.terms:
            ends = [factor * end for end in bounds(term, depth)]
            low, high = low + min(ends), high + max(ends)
        return low, high


def _times(term: Expr, factor: int) -> Expr:
    return Expr("neg", (term,)) if factor == -1 else Expr("mul", (term, const(factor)))


def _rank(term: Expr) -> tuple[bool, int, int, int]:
    """What depends on fewer of the indices first, then in the order b, h, q, k."""
    index = _INDICES.index(term.op) if term.op in _INDICES else len(_INDICES)
    return term.depends_on("k"), term.uses, index, term.digest


def bounds(expr: Expr, depth: int = 8) -> tuple[float, float]:
    """The least and greatest value that an int expression can be shown to have.

    Indices are not negative. Of runtime integers and loaded values nothing is known, nor of what
    lies more than ``depth`` operators down.
    """
    if expr.op in _INDICES:
        return 0, math.inf
    if expr.op == "const":
        return expr.value, expr.value
    inside = [bounds(item, depth - 1) for item in expr.operands if item.type == "int" and depth]
    if not inside:
        return -math.inf, math.inf
    low, high = inside[0]
    if expr.op in ("floordiv", "mod") and inside[1][0] > 0 and expr.operands[1].op == "const":
        size = expr.operands[1].value
        if expr.op == "mod":
            return 0, size - 1
        return low // size if low > -math.inf else low, high // size if high < math.inf else high
    if expr.op in ("min", "max"):
        pick = min if expr.op == "min" else max
        return pick(low, inside[1][0]), pick(high, inside[1][1])
    if expr.op == "where":
        return min(low, inside[1][0]), max(high, inside[1][1])
    if expr.op == "abs":
        return (0 if low <= 0 <= high else min(abs(low), abs(high))), max(abs(low), abs(high))
    if expr.op in ("add", "sub", "neg", "mul"):
        sum_ = Affine.of(expr)
        if sum_.terms != ((expr, 1),):
            return sum_.bounds(depth - 1)
    return -math.inf, math.inf


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``terms <op> bound`` of integers, where op is ``le``, ``ge``, ``eq`` or ``ne``.

    The first term's coefficient is positive, and the coefficients have no common divisor.
    """

    terms: tuple[tuple[Expr, int], ...]
    op: str
    bound: int

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(expr: Expr) -> Comparison | None:
        """The comparison that an expression built by ``compare`` stands for, else None."""
        if expr.op not in ("lt", "le", "gt", "ge", "eq", "ne") or expr.operands[0].type != "int":
            return None
        found = _normal(expr.op, *expr.operands)
        return found if isinstance(found, Comparison) else None

    def expr(self) -> Expr:
        """The comparison as an expression; of two terms with nothing else, ``(le k q)``."""
        factors = [factor for _, factor in self.terms]
        if factors == [1, -1]:
            (first, _), (second, _) = self.terms
            if self.op in ("eq", "ne") and self.bound == 0:
                return Expr(self.op, (first, second))
            if self.op == "ge" and self.bound in (0, 1):
                return Expr("lt" if self.bound else "le", (second, first))
            if self.op == "le" and self.bound in (0, -1):
                return Expr("lt" if self.bound else "le", (first, second))
        return Expr(self.op, (Affine(self.terms, 0).expr(), const(self.bound)))

    def negated(self) -> Comparison:
        """The comparison that holds where this one does not."""
        if self.op in ("eq", "ne"):
            return Comparison(self.terms, "ne" if self.op == "eq" else "eq", self.bound)
        step = 1 if self.op == "le" else -1
        return Comparison(self.terms, "ge" if self.op == "le" else "le", self.bound + step)

    def implies(self, other: Comparison) -> bool:
        """Whether ``other`` holds wherever this one does; False where it cannot be told."""
        if self.terms != other.terms:
            return False
        if self.op == "eq":
            return other.holds(self.bound)
        if other.op == "ne":
            return not self.holds(other.bound)
        if self.op == "le" and other.op == "le":
            return self.bound <= other.bound
        if self.op == "ge" and other.op == "ge":
            return self.bound >= other.bound
        return False

    def holds(self, value: int) -> bool:
        """Whether it holds where the terms add up to ``value``."""
        tests = {
            "le": value <= self.bound,
            "ge": value >= self.bound,
            "eq": value == self.bound,
            "ne": value != self.bound,
        }
        return tests[self.op]


def compare(op: str, left: Expr, right: Expr) -> Expr:
    """``left <op> right`` of integers, in normal form."""
    found = _normal(op, left, right)
    if isinstance(found, bool):
        return TRUE if found else FALSE
    return found.expr()


def distance(expr: Expr) -> tuple[Expr, str, int] | None:
    """``(x, op, bound)`` of a comparison ``|x| <= bound`` or ``|x| >= bound``, None of others."""
    found = Comparison.of(expr)
    if found is None or found.op not in ("le", "ge") or len(found.terms) != 1:
        return None
    term, factor = found.terms[0]
    if term.op != "abs" or factor != 1:
        return None
    return term.operands[0], found.op, found.bound


def _normal(op: str, left: Expr, right: Expr) -> Comparison | bool:
    sum_ = Affine.of(left).plus(Affine.of(right), -1)
    bound = -sum_.constant
    if op in ("lt", "gt"):
        op, bound = ("le", bound - 1) if op == "lt" else ("ge", bound + 1)
    if not sum_.terms:
        return Comparison((), op, bound).holds(0)
    divisor = math.gcd(*(factor for _, factor in sum_.terms))
    if sum_.terms[0][1] < 0:
        divisor = -divisor
        op, bound = {"le": "ge", "ge": "le"}.get(op, op), bound
    terms = tuple((term, factor // divisor) for term, factor in sum_.terms)
    if op in ("eq", "ne") and bound % divisor:
        return op == "ne"
    # The sum is a multiple of the divisor: round towards what it can reach.
    bound = bound // divisor if op != "ge" else -(-bound // divisor)
    low, high = Affine(terms, 0).bounds()
    known = _decided(op, bound, low, high)
    return Comparison(terms, op, bound) if known is None else known


def _decided(op: str, bound: int, low: float, high: float) -> bool | None:
    """What a comparison says of any value between ``low`` and ``high``, None if it depends."""
    if op in ("eq", "ne"):
        outside = bound < low or bound > high
        return (op == "ne") if outside else None
    if op == "le":
        return True if high <= bound else False if low > bound else None
    return True if low >= bound else False if high < bound else None


def floor_division(op: str, left: Expr, size: int) -> Expr:
    """``left // size`` or ``left % size`` for a positive ``size``."""
    if size == 1:
        return left if op == "floordiv" else ZERO
    sum_ = Affine.of(left)
    whole = Affine(
        tuple((term, f // size) for term, f in sum_.terms if f % size == 0), sum_.constant // size
    )
    rest = Affine(tuple((term, f) for term, f in sum_.terms if f % size), sum_.constant % size)
    low, high = rest.bounds()
    inside = rest.expr()
    if low >= 0 and high < size:
        return whole.expr() if op == "floordiv" else inside
    if op == "floordiv":
        if inside.op == "floordiv" and inside.operands[1].op == "const":
            inner, divisor = inside.operands
            if divisor.value > 0:
                inside, size = inner, size * divisor.value
        return whole.plus(Affine.of(Expr("floordiv", (inside, const(size))))).expr()
    return Expr("mod", (inside, const(size)))

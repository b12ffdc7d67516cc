"""What the value of a score expression can be, found by interval arithmetic (``bounds``)."""

from __future__ import annotations

import abc
import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from sparse_compiler.score import bounds
from sparse_compiler.score.affine import Affine
from sparse_compiler.score.bounds import EITHER, UNKNOWN, Bound, Interval, Truth
from sparse_compiler.score.evaluate import Evaluator
from sparse_compiler.score.logic import parts
from sparse_compiler.score.node import Expr

# |s| is taken not to exceed this; kernels check it where it matters.
S_BOUND = 4096.0

_LARGEST_FACTOR = 2**12


class Intervals(abc.ABC):
    """Intervals and truths of expressions, found once for each distinct one.

    Subclasses say what leaves can be, in ``leaf`` and ``leaf_truth``.
    """

    def __init__(self) -> None:
        self._intervals: dict[Expr, Interval] = {}
        self._truths: dict[Expr, Truth] = {}

    @abc.abstractmethod
    def leaf(self, expr: Expr) -> Interval | None:
        """What an int or float expression can be, None to find out from its operands."""

    @abc.abstractmethod
    def leaf_truth(self, expr: Expr) -> Truth | None:
        """What is known of a bool expression, None to find out from its operands."""

    def careful(self, expr: Expr) -> bool:
        """Whether operands of ``expr`` may be infinite, so that it may not be a number."""
        return True

    def interval(self, expr: Expr) -> Interval:
        """The interval of an int or float expression."""
        found = self._intervals.get(expr)
        if found is None:
            if expr.op == "const":
                found = (float(expr.value),) * 2
            else:
                found = self.leaf(expr) or self._sum(expr) or self._combined(expr)
            if expr.type == "float":
                found = _rounded(found[0]), _rounded(found[1])
            self._intervals[expr] = found
        return found

    def truth(self, expr: Expr) -> Truth:
        """What is known of a bool expression."""
        found = self._truths.get(expr)
        if found is None:
            if expr.op == "const":
                found = expr.value, not expr.value
            else:
                found = self.leaf_truth(expr) or self._decided(expr)
            self._truths[expr] = found
        return found

    def total(self, parts_: Sequence[Part]) -> Interval:
        """The interval of a sum of parts."""
        total: Interval | None = None
        for part in parts_:
            ends = self._part(part)
            total = ends if total is None else (total[0] + ends[0], total[1] + ends[1])
        return total or (0.0, 0.0)

    def _part(self, part: Part) -> Interval:
        if part.whole is part.terms[0][0]:
            return self.interval(part.whole)
        found = self._intervals.get(part.whole) or self.leaf(part.whole)
        if found is None:
            found = 0.0, 0.0
            for term, factor in part.terms:
                ends = bounds.scaled(self.interval(term), float(factor))
                found = found[0] + ends[0], found[1] + ends[1]
            if any(abs(factor) > _LARGEST_FACTOR for _, factor in part.terms):
                found = bounds.limited(found)
        self._intervals[part.whole] = found
        return found

    def _sum(self, expr: Expr) -> Interval | None:
        """The interval of a sum of ints, exact in what depends on one of q and k alone."""
        if expr.type != "int" or expr.op not in ("add", "sub", "neg", "mul"):
            return None
        sum_ = Affine.of(expr)
        if sum_.terms == ((expr, 1),):
            return None
        low, high = self.total(split(sum_.terms))
        return low + sum_.constant, high + sum_.constant

    def _combined(self, expr: Expr) -> Interval:
        op, operands = expr.op, expr.operands
        dtype = torch.float32 if expr.type == "float" else torch.float64
        if op == "where":
            yes, no = (self.interval(item) for item in operands[1:])
            return bounds.chosen(self.truth(operands[0]), yes, no, dtype)
        if operands and operands[0].type == "bool":  # as an int or a float
            return bounds.chosen(self.truth(operands[0]), (1.0, 1.0), (0.0, 0.0), dtype)
        ends = [self.interval(item) for item in operands]
        if op == "sub":
            op, ends[1] = "add", bounds.negated(ends[1])
        if op == "add":
            return bounds.added(ends[0], ends[1], self.careful(expr))
        if op == "mul":
            found = bounds.multiplied(ends[0], ends[1], self.careful(expr))
            return found if expr.type == "float" else bounds.limited(found)
        if op not in bounds.RULES or (op in ("floordiv", "mod") and expr.type == "float"):
            return UNKNOWN
        return bounds.RULES[op](*ends)

    def _decided(self, expr: Expr) -> Truth:
        op, operands = expr.op, expr.operands
        if op in ("and", "or"):
            # Flat, because a mask can be a chain of very many.
            found = [self.truth(item) for item in parts(op, expr)]
            total = found[0]
            for item in found[1:]:
                total = bounds.both(total, item) if op == "and" else bounds.either(total, item)
            return total
        if op == "not":
            yes, no = self.truth(operands[0])
            return no, yes
        if op == "xor":
            return bounds.exclusive(*(self.truth(item) for item in operands))
        if op == "where":
            return bounds.decided(*(self.truth(item) for item in operands))
        return self.compared(expr) if op in bounds.TESTS else EITHER

    def compared(self, expr: Expr) -> Truth:
        """What is known of a comparison of numbers."""
        return bounds.TESTS[expr.op](*(self.interval(item) for item in expr.operands))


def _rounded(end: Bound) -> Bound:
    """A number as kernels round it; tensors are float32 already."""
    return end if isinstance(end, torch.Tensor) else ctypes.c_float(end).value


@dataclasses.dataclass(frozen=True)
class Part:
    """Terms of a sum of ints that depend on the same ones of q and k, and their sum."""

    terms: tuple[tuple[Expr, int], ...]
    whole: Expr


@functools.lru_cache(maxsize=4096)
def split(terms: tuple[tuple[Expr, int], ...]) -> tuple[Part, ...]:
    """The terms that depend on q but not k, on k but not q, on neither; each other one alone."""
    groups: dict[Any, list[tuple[Expr, int]]] = {}
    for term, factor in terms:
        row, column = term.depends_on("q"), term.depends_on("k")
        groups.setdefault(term if row and column else (row, column), []).append((term, factor))
    return tuple(Part(tuple(group), Affine(tuple(group), 0).expr()) for group in groups.values())


class Ranges(Intervals):
    """Intervals over all of the score matrix, whatever its size if that is not given.

    Args:
        leaves: what ``load`` reads; without them nothing is known of loaded values.
        ints: the runtime integers, None if they are not known.
        sizes: of b, h, q and k.
    """

    def __init__(
        self,
        leaves: Sequence[torch.Tensor] | None = None,
        ints: Sequence[int] | None = None,
        sizes: Sequence[int] = (2**31,) * 4,
    ) -> None:
        super().__init__()
        self._ints = ints
        self._sizes = sizes
        self._reads = None
        if leaves is not None and ints is not None:
            self._reads = Evaluator(leaves, ints, [range(size) for size in sizes])

    def ends(self, expr: Expr) -> tuple[float, float]:
        """The interval of an int or float expression, as numbers."""
        low, high = self.interval(expr)
        return float(low), float(high)

    def leaf(self, expr: Expr) -> Interval | None:
        if expr.op in ("b", "h", "q", "k"):
            return 0.0, float(self._sizes["bhqk".index(expr.op)] - 1)
        if expr.op == "s":
            return -S_BOUND, S_BOUND
        if expr.op == "int":
            return UNKNOWN if self._ints is None else (float(self._ints[expr.slot]),) * 2
        if expr.op != "load":
            return None
        read = None if self._reads is None else self._reads.region(expr)
        if read is None or not read.numel():
            return UNKNOWN
        low, high = (float(end) for end in torch.aminmax(read))
        return (low, high) if expr.type == "float" else bounds.limited((low, high))

    def leaf_truth(self, expr: Expr) -> Truth | None:
        return EITHER if expr.op == "load" else None

"""Arithmetic of indices: how views join and split them, and what is known of their range.

An index is an int expression in b, h, q, k and runtime integers. Views flatten indices and take
them apart again; here the parts are remembered, so that ``(b * H + h) // H`` is ``b`` although no
expression knows how many heads there are, and sizes may be symbolic throughout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from sparse_compiler.passes.attention.symbols import Integer, Symbols, symbolic
from sparse_compiler.passes.pointwise import NotLiftable
from sparse_compiler.score.affine import Affine
from sparse_compiler.score.expr import Expr, add, const, floordiv, integer, max_, min_, mod, mul
from sparse_compiler.score.node import ZERO


class Indices:
    """The index expressions of one attention.

    Args:
        symbols: of its graph.
        extents: how many values each of the indices ``B``, ``H``, ``Q``, ``K`` takes.

    Attributes:
        integers: the runtime integers that expressions refer to by place.
    """

    def __init__(self, symbols: Symbols, extents: Mapping[Expr, sympy.Expr]) -> None:
        self.integers: list[Integer] = []
        self.extents = dict(extents)
        self._symbols = symbols
        self._places: dict[sympy.Symbol, int] = {}
        self._parts: dict[Expr, list[tuple[Expr, Expr, sympy.Expr]]] = {}
        self._wholes: dict[tuple[Expr, Expr, sympy.Expr], Expr] = {}
        self._inside: set[tuple[Expr, sympy.Expr]] = set()

    def atom(self, index: Expr) -> Expr:
        """The index, or 0 if it takes one value only."""
        return ZERO if self.extents[index] == 1 else index

    @contextlib.contextmanager
    def counting(self, index: Expr, size: sympy.Expr) -> Iterator[None]:
        """Inside, ``index`` takes ``size`` values; what is found out is forgotten again."""
        before = self.extents, self._parts, self._wholes, self._inside
        self.extents = {**self.extents, index: size}
        other = {
            whole: parts for whole, parts in self._parts.items() if index not in whole.leaves()
        }
        self._parts = {whole: list(parts) for whole, parts in other.items()}
        self._wholes = {part: whole for part, whole in self._wholes.items() if whole in other}
        self._inside = {fact for fact in self._inside if not fact[0].depends_on(index.op)}
        try:
            yield
        finally:
            self.extents, self._parts, self._wholes, self._inside = before

    def size(self, size: int | torch.SymInt | sympy.Expr) -> Expr:
        """A size as an int expression.

        Raises:
            NotLiftable: it is symbolic and not polynomial.
        """
        value = symbolic(size)
        if value.is_Integer:
            return const(int(value))
        if value.is_Symbol:
            place = self._places.get(value)
            if place is None:
                place = self._places[value] = len(self.integers)
                self.integers.append(self._symbols.source(value))
            return integer(place)
        parts = [self.size(part) for part in value.args]
        if value.is_Add or value.is_Mul:
            total = parts[0]
            for part in parts[1:]:
                total = add(total, part) if value.is_Add else mul(total, part)
            return total
        if isinstance(value, (FloorDiv, Mod, PythonMod)):
            return (floordiv if isinstance(value, FloorDiv) else mod)(*parts)
        if isinstance(value, sympy.Pow) and value.exp.is_Integer and value.exp > 0:
            total = parts[0]
            for _ in range(int(value.exp) - 1):
                total = mul(total, parts[0])
            return total
        if value.func.__name__ in ("Max", "Min"):
            total = parts[0]
            for part in parts[1:]:
                total = (max_ if value.func.__name__ == "Max" else min_)(total, part)
            return total
        raise NotLiftable(f"the size {value} is computed in a way that has no expression")

    def join(self, parts: Sequence[Expr], sizes: Sequence[sympy.Expr]) -> Expr:
        """One index into the flattened dimensions, row-major."""
        whole = ZERO
        for part, size in zip(parts, sizes, strict=True):
            whole = self._join(whole, part, size)
        return whole

    def _join(self, left: Expr, right: Expr, size: sympy.Expr) -> Expr:
        """``left * size + right``."""
        if size == 1:
            return left
        if left is ZERO:
            return right
        whole = self._wholes.get((left, right, size))
        if whole is None:
            whole = add(mul(left, self.size(size)), right)
            # An index of a branch that is not taken may be out of range: then nothing is known.
            if self.below(right, size):
                self._remember(whole, left, right, size)
        return whole

    def _remember(self, whole: Expr, left: Expr, right: Expr, size: sympy.Expr) -> None:
        self._wholes[left, right, size] = whole
        self._parts.setdefault(whole, []).append((left, right, size))

    def split(self, whole: Expr, sizes: Sequence[sympy.Expr]) -> tuple[Expr, ...]:
        """The indices into dimensions of these sizes, from one into the flattened ones."""
        parts: list[Expr] = []
        many = [place for place, size in enumerate(sizes) if size != 1]
        for place in reversed(range(len(sizes))):
            if place not in many:
                parts.append(ZERO)
            elif place == many[0]:
                parts.append(whole)
            else:
                whole, part = self.divide(whole, sizes[place])
                parts.append(part)
        return tuple(reversed(parts))

    def divide(self, whole: Expr, size: sympy.Expr) -> tuple[Expr, Expr]:
        """``whole // size`` and ``whole % size``, for a positive size."""
        if size == 1:
            return whole, ZERO
        if self.below(whole, size):
            return ZERO, whole
        for left, right, inner in self._parts.get(whole, ()):
            if inner == size:
                return left, right
            if (ratio := sympy.cancel(size / inner)).is_integer:
                quotient, rest = self.divide(left, ratio)
                return quotient, self._join(rest, right, inner)
            if (ratio := sympy.cancel(inner / size)).is_integer:
                quotient, rest = self.divide(right, size)
                return self._join(left, quotient, ratio), rest
        quotient, rest = self._divide(whole, size)
        self._remember(whole, quotient, rest, size)
        return quotient, rest

    def _divide(self, whole: Expr, size: sympy.Expr) -> tuple[Expr, Expr]:
        if size.is_Integer:
            number = int(size)
            sum_ = Affine.of(whole)
            exact = tuple((term, f // number) for term, f in sum_.terms if f % number == 0)
            others = tuple((term, f) for term, f in sum_.terms if f % number)
            rest = Affine(others, sum_.constant % number).expr()
            if self.below(rest, size):
                return Affine(exact, sum_.constant // number).expr(), rest
        divisor = self.size(size)
        return floordiv(whole, divisor), mod(whole, divisor)

    def below(self, index: Expr, size: sympy.Expr | int) -> bool:
        """Whether ``0 <= index < size`` can be shown."""
        return (index, size) in self._inside or (
            self.not_negative(index) and self.less(index, size)
        )

    def less(self, index: Expr, size: sympy.Expr | int) -> bool:
        """Whether ``index < size`` can be shown."""
        high = self.range(index)[1]
        return high is not None and self._symbols.not_negative(symbolic(size) - 1 - high)

    def not_negative(self, index: Expr) -> bool:
        """Whether ``0 <= index`` can be shown."""
        low = self.range(index)[0]
        return low is not None and self._symbols.not_negative(low)

    def part_of(self, index: Expr, size: sympy.Expr, source: Expr, whole: sympy.Expr) -> Expr:
        """``source``, where a slice of ``size`` elements out of ``whole`` has its ``index``.

        Whoever cuts a slice has checked that it lies inside.
        """
        if source.operands and self.below(index, size):
            self._inside.add((source, whole))
        return source

    def clamped(self, index: Expr, size: sympy.Expr) -> Expr:
        """The index itself where it is in the range of a dimension, else the nearest that is.

        Branches of a ``where`` that are not taken are evaluated all the same.
        """
        if (index, size) in self._inside:
            return index
        if not self.not_negative(index):
            index = max_(index, 0)
        if not self.less(index, size):
            index = min_(index, self.size(size - 1))
        return index

    def range(self, expr: Expr) -> tuple[sympy.Expr | None, sympy.Expr | None]:
        """The least and greatest value an int expression can have; None where nothing is known."""
        sum_ = Affine.of(expr)
        low: sympy.Expr | None = sympy.Integer(sum_.constant)
        high = low
        for term, factor in sum_.terms:
            ends = self._range(term)
            if factor < 0:
                ends = ends[1], ends[0]
            low = None if low is None or ends[0] is None else low + factor * ends[0]
            high = None if high is None or ends[1] is None else high + factor * ends[1]
        return low, high

    def _range(self, term: Expr) -> tuple[sympy.Expr | None, sympy.Expr | None]:
        if term in self.extents:
            return sympy.Integer(0), self.extents[term] - 1
        if term.op == "int":
            symbol = next((s for s, place in self._places.items() if place == term.slot), None)
            return symbol, symbol
        if term.op in ("min", "max", "where"):
            lows, highs = zip(*(self.range(e) for e in term.operands[-2:]), strict=True)
            low = self._least(lows) if term.op != "max" else _known(lows, sympy.Max)
            high = self._greatest(highs) if term.op != "min" else _known(highs, sympy.Min)
            return low, high
        if term.op in ("floordiv", "mod"):
            return self._range_of_division(term)
        if term.op == "mul":
            (low, high), (low2, high2) = (self.range(e) for e in term.operands)
            if low is None or low2 is None or high is None or high2 is None:
                return None, None
            if self._symbols.not_negative(low) and self._symbols.not_negative(low2):
                return low * low2, high * high2
        if term.op == "abs":
            low, high = self.range(term.operands[0])
            negative = None if low is None else -low
            return sympy.Integer(0), self._greatest((negative, high))
        return None, None

    def _range_of_division(self, term: Expr) -> tuple[sympy.Expr | None, sympy.Expr | None]:
        whole, divisor = term.operands
        least, size = self.range(divisor)
        if least is None or least != size or not self._symbols.not_negative(size - 1):
            return None, None
        low, high = self.range(whole)
        if term.op == "mod":
            return sympy.Integer(0), size - 1
        low = sympy.Integer(0) if low is not None and self._symbols.not_negative(low) else None
        if high is None:
            return low, None
        if high.is_Integer and size.is_Integer:
            return low, high // size
        ratio = sympy.cancel((high + 1) / size)
        return low, ratio - 1 if ratio.is_integer else None

    def _least(self, values: Sequence[sympy.Expr | None]) -> sympy.Expr | None:
        """The value that none of the others is below, if that can be told."""
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        below = (one for one in known if all(self._symbols.not_negative(v - one) for v in known))
        return next(below, None)

    def _greatest(self, values: Sequence[sympy.Expr | None]) -> sympy.Expr | None:
        """The value that none of the others is above, if that can be told."""
        least = self._least([None if value is None else -value for value in values])
        return None if least is None else -least


def _known(values: Iterable[sympy.Expr | None], best: Any) -> sympy.Expr | None:
    """The best of several bounds that all hold."""
    found = [value for value in values if value is not None]
    numbers = [value for value in found if value.is_Integer]
    return best(*numbers) if numbers else found[0] if found else None

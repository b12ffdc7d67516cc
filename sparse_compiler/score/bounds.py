"""Arithmetic of intervals and of truths that are only partly known.

An interval is a pair of bounds, Python floats or tensors that broadcast. **NaN bounds mean that
nothing is known**, not even that the value is a number: comparisons with NaN are false, so nothing
follows from them. Either both bounds are NaN or neither is. A truth is a pair, too: whether
something certainly holds, and whether it certainly does not.

Integers are bounded in float64, where sums of what is below ``LARGEST`` are exact. Floats are
bounded in float32: rounding is monotonic, so rounded bounds hold for values that were computed in
float32 by the same operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from sparse_compiler.score.arithmetic import folded

Bound = float | torch.Tensor
Interval = tuple[Bound, Bound]
Certain = bool | torch.Tensor
Truth = tuple[Certain, Certain]

UNKNOWN: Interval = (math.nan, math.nan)
EITHER: Truth = (False, False)

# Integers that are not smaller than this are unknown: sums and small multiples stay exact.
LARGEST = 2.0**40


def join(left: Certain, right: Certain) -> Certain:
    """``left and right``."""
    if isinstance(left, bool):
        return right if left else False
    if isinstance(right, bool):
        return left if right else False
    return left & right


def disjoin(left: Certain, right: Certain) -> Certain:
    """``left or right``."""
    if isinstance(left, bool):
        return True if left else right
    if isinstance(right, bool):
        return True if right else left
    return left | right


def both(left: Truth, right: Truth) -> Truth:
    """Truth of a conjunction."""
    return join(left[0], right[0]), disjoin(left[1], right[1])


def either(left: Truth, right: Truth) -> Truth:
    """Truth of a disjunction."""
    return disjoin(left[0], right[0]), join(left[1], right[1])


def exclusive(left: Truth, right: Truth) -> Truth:
    """Truth of ``xor``."""
    yes = disjoin(join(left[0], right[1]), join(left[1], right[0]))
    return yes, disjoin(join(left[0], right[0]), join(left[1], right[1]))


def decided(condition: Truth, yes: Truth, no: Truth) -> Truth:
    """Truth of a ``where`` between bools."""
    first, second = (
        disjoin(disjoin(join(condition[0], y), join(condition[1], n)), join(y, n))
        for y, n in zip(yes, no, strict=True)
    )
    return first, second


def chosen(truth: Truth, yes: Interval, no: Interval, dtype: torch.dtype) -> Interval:
    """Interval of a ``where`` between numbers, which are bounded in ``dtype``."""
    if truth[0] is True:
        return yes
    if truth[1] is True:
        return no
    low, high = minimum(yes[0], no[0]), maximum(yes[1], no[1])
    for certain, (first, last) in zip(truth, (yes, no), strict=True):
        if isinstance(certain, torch.Tensor):
            low, high = _pick(certain, first, low, dtype), _pick(certain, last, high, dtype)
    return low, high


def _pick(condition: torch.Tensor, one: Bound, other: Bound, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(one, torch.Tensor) and not isinstance(other, torch.Tensor):
        one = torch.as_tensor(one, dtype=dtype, device=condition.device)
    return torch.where(condition, one, other)


def minimum(left: Bound, right: Bound) -> Bound:
    """The smaller one, NaN if one of them is."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.minimum(left, right)
    if isinstance(left, torch.Tensor):
        return right if math.isnan(right) else left.clamp(max=right)
    if isinstance(right, torch.Tensor):
        return minimum(right, left)
    return math.nan if math.isnan(left) or math.isnan(right) else min(left, right)


def maximum(left: Bound, right: Bound) -> Bound:
    """The larger one, NaN if one of them is."""
    return -minimum(-left, -right)


def negated(x: Interval) -> Interval:
    """Interval of ``-x``."""
    return -x[1], -x[0]


def _is_nan(x: Bound) -> Certain:
    return torch.isnan(x) if isinstance(x, torch.Tensor) else math.isnan(x)


def _is_infinite(x: Bound) -> Certain:
    return torch.isinf(x) if isinstance(x, torch.Tensor) else math.isinf(x)


def _has_zero(x: Interval) -> Certain:
    return join(x[0] <= 0, x[1] >= 0)


def _unless(bad: Certain, x: Interval) -> Interval:
    """The interval where ``bad`` does not hold, unknown where it does."""
    if isinstance(bad, bool):
        return UNKNOWN if bad else x
    dtype = next((end.dtype for end in x if isinstance(end, torch.Tensor)), torch.float32)
    return _pick(bad, math.nan, x[0], dtype), _pick(bad, math.nan, x[1], dtype)


def limited(x: Interval) -> Interval:
    """An interval of integers, unknown where it is too large to compute with."""
    return _unless(disjoin(x[0] <= -LARGEST, x[1] >= LARGEST), x)


def added(x: Interval, y: Interval, careful: bool = True) -> Interval:
    """Interval of ``x + y``; ``careful`` if opposite infinities may meet."""
    total = x[0] + y[0], x[1] + y[1]
    if not careful:
        return total
    return _unless(disjoin(_is_nan(x[0] + y[1]), _is_nan(x[1] + y[0])), total)


def scaled(x: Interval, factor: float) -> Interval:
    """Interval of ``x * factor``, a finite number other than 0."""
    ends = x[0] * factor, x[1] * factor
    return ends if factor > 0 else (ends[1], ends[0])


def multiplied(x: Interval, y: Interval, careful: bool = True) -> Interval:
    """Interval of ``x * y``; ``careful`` if a zero and an infinity may meet."""
    for one, (factor, same) in ((x, y), (y, x)):
        if isinstance(factor, float) and factor == same and factor and math.isfinite(factor):
            return scaled(one, factor)
    low, high = _extremes([a * b for a in x for b in y])
    if not careful:
        return low, high
    bad = disjoin(_is_nan(low), _is_nan(high))
    for one, other in ((x, y), (y, x)):
        infinite = disjoin(_is_infinite(other[0]), _is_infinite(other[1]))
        bad = disjoin(bad, join(_has_zero(one), infinite))
    return _unless(bad, (low, high))


def _extremes(values: list[Bound]) -> Interval:
    low = high = values[0]
    for value in values[1:]:
        low, high = minimum(low, value), maximum(high, value)
    return low, high


def _divided(x: Interval, y: Interval) -> Interval:
    zero = _has_zero(y)
    if zero is True or any(isinstance(end, float) and end == 0 for end in y):
        return UNKNOWN
    low, high = _extremes([a / b for a in x for b in y])
    bad = disjoin(zero, disjoin(_is_nan(low), _is_nan(high)))
    return _unless(bad, (low, high))


def _floored(x: Interval, y: Interval) -> Interval:
    """Of integers, by one positive number."""
    size = y[0]
    if not isinstance(size, float) or size != y[1] or size <= 0:
        return UNKNOWN

    def floor(end: Bound) -> Bound:
        if isinstance(end, torch.Tensor):
            return torch.div(end, size, rounding_mode="floor")
        return end // size if math.isfinite(end) else end

    return floor(x[0]), floor(x[1])


def _remainder(x: Interval, y: Interval) -> Interval:
    """Of integers, by one positive number."""
    size = y[0]
    if not isinstance(size, float) or size != y[1] or size <= 0:
        return UNKNOWN
    first, last = _floored(x, y)
    same = first == last  # not so of what is unknown, which has a remainder nevertheless
    low, high = x[0] - first * size, x[1] - first * size
    if isinstance(same, torch.Tensor):
        return _pick(same, low, 0.0, torch.float64), _pick(same, high, size - 1, torch.float64)
    return (low, high) if same and math.isfinite(x[0]) else (0.0, size - 1)


def _rising(op: str, low: float) -> Callable[[Interval], Interval]:
    """The rule of a function that rises from ``low`` on and means nothing below it.

    Kernels compute it in their own way: the bounds leave room for some units in the last place.
    """

    def apply(end: Bound) -> Bound:
        if isinstance(end, torch.Tensor):
            return getattr(torch, op)(end)
        found = folded(op, [end])
        return math.nan if found is None else float(found)

    def rule(x: Interval) -> Interval:
        ends = apply(x[0]), apply(x[1])
        room = [minimum(maximum(end, -end), 1e30) * 2.0**-18 + 1e-30 for end in ends]
        inside = x[0] >= low
        outside = ~inside if isinstance(inside, torch.Tensor) else not inside
        return _unless(outside, (ends[0] - room[0], ends[1] + room[1]))

    return rule


def to_float(x: Interval) -> Interval:
    """Bounds of integers as those of floats."""
    low, high = (end.float() if isinstance(end, torch.Tensor) else end for end in x)
    return low, high


def _to_int(x: Interval) -> Interval:
    """Rounded towards 0."""

    def truncate(end: Bound) -> Bound:
        if isinstance(end, torch.Tensor):
            return end.double().trunc()
        return float(math.trunc(end)) if math.isfinite(end) else math.nan

    return limited((truncate(x[0]), truncate(x[1])))


def _less(x: Interval, y: Interval) -> Truth:
    return x[1] < y[0], x[0] >= y[1]


def _at_most(x: Interval, y: Interval) -> Truth:
    return x[1] <= y[0], x[0] > y[1]


def _equal(x: Interval, y: Interval) -> Truth:
    return join(x[0] == y[1], x[1] == y[0]), disjoin(x[1] < y[0], x[0] > y[1])


TESTS: dict[str, Callable[[Interval, Interval], Truth]] = {
    "lt": _less,
    "le": _at_most,
    "gt": lambda x, y: _less(y, x),
    "ge": lambda x, y: _at_most(y, x),
    "eq": _equal,
    "ne": lambda x, y: (_equal(x, y)[1], _equal(x, y)[0]),
}

# op: the interval of its result; operators that are not here have their own functions above.
RULES: dict[str, Callable[..., Interval]] = {
    "neg": negated,
    "div": _divided,
    "floordiv": _floored,
    "mod": _remainder,
    "abs": lambda x: (maximum(maximum(x[0], -x[1]), 0.0), maximum(-x[0], x[1])),
    "min": lambda x, y: (minimum(x[0], y[0]), minimum(x[1], y[1])),
    "max": lambda x, y: (maximum(x[0], y[0]), maximum(x[1], y[1])),
    "relu": lambda x: (maximum(x[0], 0.0), maximum(x[1], 0.0)),
    "exp": _rising("exp", -math.inf),
    "log": _rising("log", 0.0),
    "tanh": _rising("tanh", -math.inf),
    "erf": _rising("erf", -math.inf),
    "sigmoid": _rising("sigmoid", -math.inf),
    "sqrt": _rising("sqrt", 0.0),
    "to_float": to_float,
    "to_int": _to_int,
}

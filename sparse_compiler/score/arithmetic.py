"""Builders of numbers: arithmetic, float functions, conversions and loads, simplified.

Python numbers are taken wherever an expression is. Operands of two types are converted as PyTorch
does, bool to int to float. Floats are re-associated only where they depend on ``s``, which no
index can depend on: a threshold computed from indices keeps its rounding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

from sparse_compiler.score.affine import Affine, floor_division
from sparse_compiler.score.node import Expr, Number, const

Operand: TypeAlias = Expr | Number

_FOLDED: dict[str, Callable[..., Number]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
    "pow": math.pow,
    "abs": abs,
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "erf": math.erf,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x)),
    "sqrt": math.sqrt,
    "reciprocal": lambda x: 1 / x,
    "to_float": float,
    "to_int": int,
}


def as_expr(operand: Operand) -> Expr:
    """An expression as it is, a Python number as a constant."""
    return operand if isinstance(operand, Expr) else const(operand)


def promoted(*operands: Operand) -> tuple[Expr, ...]:
    """The operands in the one type that PyTorch would compute in; at least int."""
    exprs = [as_expr(operand) for operand in operands]
    if any(item.type == "float" for item in exprs):
        return tuple(to_float(item) for item in exprs)
    return tuple(to_int(item) for item in exprs)


def add(left: Operand, right: Operand) -> Expr:
    """``left + right``; of bools as integers."""
    left, right = promoted(left, right)
    if left.type == "int":
        return _total(Affine.of(left).plus(Affine.of(right)))
    left, right = _constant_last(left, right)
    if _is(right, 0.0):
        return left
    return _spread("add", left, right) or Expr("add", (left, right))


def sub(left: Operand, right: Operand) -> Expr:
    """``left - right``."""
    left, right = promoted(left, right)
    if left.type == "int":
        return _total(Affine.of(left).plus(Affine.of(right), -1))
    if _is(right, 0.0):
        return left
    if right.op == "const":
        return add(left, -right.value)
    return _spread("sub", left, right) or Expr("sub", (left, right))


def mul(left: Operand, right: Operand) -> Expr:
    """``left * right``."""
    left, right = promoted(left, right)
    left, right = _constant_last(left, right)
    if left.type == "int":
        if right.op == "const":
            return _total(Affine.of(left).scaled(right.value))
        return Expr("mul", (left, right) if left.digest < right.digest else (right, left))
    if _is(right, 1.0):
        return left
    if right.op == "const" and left.op == "mul" and left.depends_on("s"):
        inner, factor = left.operands
        if factor.op == "const" and _ordinary(factor.value * right.value):
            return mul(inner, factor.value * right.value)
    return _spread("mul", left, right) or Expr("mul", (left, right))


def div(left: Operand, right: Operand) -> Expr:
    """True division; the result is a float."""
    left, right = to_float(left), to_float(right)
    if right.op == "const" and right.value and _ordinary(1 / right.value):
        exact = abs(math.frexp(right.value)[0]) == 0.5
        if exact or left.depends_on("s"):
            return mul(left, 1 / right.value)
    return _spread("div", left, right) or Expr("div", (left, right))


def floordiv(left: Operand, right: Operand) -> Expr:
    """Division rounded towards minus infinity, of ints or floats."""
    left, right = promoted(left, right)
    if left.type == "int" and right.op == "const" and right.value > 0:
        return floor_division("floordiv", left, right.value)
    return _spread("floordiv", left, right) or Expr("floordiv", (left, right))


def mod(left: Operand, right: Operand) -> Expr:
    """The remainder of ``floordiv``: it has the sign of ``right``."""
    left, right = promoted(left, right)
    if left.type == "int" and right.op == "const" and right.value > 0:
        return floor_division("mod", left, right.value)
    return _spread("mod", left, right) or Expr("mod", (left, right))


def neg(operand: Operand) -> Expr:
    """``-operand``."""
    (operand,) = promoted(operand)
    return mul(operand, -1 if operand.type == "int" else -1.0)


def abs_(operand: Operand) -> Expr:
    """The absolute value."""
    (operand,) = promoted(operand)
    if operand.op == "const":
        return const(abs(operand.value))
    if operand.op == "abs":
        return operand
    if operand.type == "int":
        sum_ = Affine.of(operand)
        if sum_.bounds()[0] >= 0:
            return operand
        negative = sum_.terms[0][1] < 0  # |k - q| is |q - k|
        return Expr("abs", ((sum_.scaled(-1) if negative else sum_).expr(),))
    return _spread("abs", operand) or Expr("abs", (operand,))


def min_(left: Operand, right: Operand) -> Expr:
    """The smaller one; NaN if one of them is."""
    return _extreme("min", left, right)


def max_(left: Operand, right: Operand) -> Expr:
    """The larger one; NaN if one of them is."""
    return _extreme("max", left, right)


def _extreme(op: str, left: Operand, right: Operand) -> Expr:
    left, right = promoted(left, right)
    if left is right:
        return left
    if left.type == "int":
        low, high = Affine.of(left).plus(Affine.of(right), -1).bounds()
        if low >= 0 or high <= 0:
            return left if (low >= 0) == (op == "max") else right
    left, right = _constant_last(left, right)
    return _spread(op, left, right) or Expr(op, (left, right))


def pow_(base: Operand, exponent: Operand) -> Expr:
    """``base`` to a constant power, as floats.

    Raises:
        ValueError: the exponent is not a constant.
    """
    base, exponent = to_float(base), to_float(exponent)
    if exponent.op != "const":
        raise ValueError("only constant exponents")
    simple = {0.5: sqrt, -1.0: reciprocal, 1.0: to_float, 2.0: lambda x: mul(x, x)}
    if exponent.value in simple:
        return simple[exponent.value](base)
    return _spread("pow", base, exponent) or Expr("pow", (base, exponent))


def exp(operand: Operand) -> Expr:
    """The exponential, of a float."""
    return _function("exp", operand)


def log(operand: Operand) -> Expr:
    """The natural logarithm, of a float."""
    return _function("log", operand)


def tanh(operand: Operand) -> Expr:
    """The hyperbolic tangent, of a float."""
    return _function("tanh", operand)


def erf(operand: Operand) -> Expr:
    """The error function, of a float."""
    return _function("erf", operand)


def sigmoid(operand: Operand) -> Expr:
    """The logistic function, of a float."""
    return _function("sigmoid", operand)


def sqrt(operand: Operand) -> Expr:
    """The square root, of a float."""
    return _function("sqrt", operand)


def reciprocal(operand: Operand) -> Expr:
    """``1 / operand``, of a float."""
    return _function("reciprocal", operand)


def relu(operand: Operand) -> Expr:
    """The larger one of a float and 0."""
    return _function("relu", operand)


def _function(op: str, operand: Operand) -> Expr:
    operand = to_float(operand)
    return _spread(op, operand) or Expr(op, (operand,))


def to_float(operand: Operand) -> Expr:
    """A float of the same value; true is 1."""
    operand = as_expr(operand)
    if operand.type == "float":
        return operand
    if operand.type == "bool":
        return _choice(operand, 1.0, 0.0)
    return _spread("to_float", operand) or Expr("to_float", (operand,))


def to_int(operand: Operand) -> Expr:
    """An int: floats are rounded towards 0, true is 1."""
    operand = as_expr(operand)
    if operand.type == "int":
        return operand
    if operand.type == "bool":
        return _choice(operand, 1, 0)
    if operand.op == "to_float":  # exact: no index reaches 2**24
        return operand.operands[0]
    return _spread("to_int", operand) or Expr("to_int", (operand,))


def to_bool(operand: Operand) -> Expr:
    """Whether it is not 0 (NaN is not 0)."""
    from sparse_compiler.score.logic import ne  # it imports this module

    operand = as_expr(operand)
    return operand if operand.type == "bool" else ne(operand, 0)


def load(slot: int, dtype: str, *indices: Operand) -> Expr:
    """The element of the ``slot``-th leaf tensor at ``indices``, one a dimension.

    ``dtype`` is one of ``bool u8 i8 i16 i32 i64 bf16 f16 f32 f64``.

    Raises:
        ValueError: another dtype, or an index that is not an int.
    """
    return Expr("load", (slot, dtype, *(as_expr(index) for index in indices)))


def _choice(condition: Expr, yes: Number, no: Number) -> Expr:
    from sparse_compiler.score.logic import where  # it imports this module

    return where(condition, yes, no)


def _constant_last(left: Expr, right: Expr) -> tuple[Expr, Expr]:
    return (right, left) if left.op == "const" else (left, right)


def _total(sum_: Affine) -> Expr:
    """The sum; of one choice between constants, a choice between the sums."""
    if len(sum_.terms) == 1 and sum_.terms[0][0].op == "where":
        ((term, factor),) = sum_.terms
        condition, yes, no = term.operands
        if yes.op == no.op == "const":
            values = (factor * item.value + sum_.constant for item in (yes, no))
            return _choice(condition, *values)
    return sum_.expr()


def _is(expr: Expr, value: float) -> bool:
    return expr.op == "const" and expr.value == value


def _ordinary(value: float) -> bool:
    """Whether float32 holds it to full precision."""
    return 2.0**-126 <= abs(value) < 2.0**127


def _spread(op: str, *operands: Expr) -> Expr | None:
    """``op`` of constants, or of constants and one choice between constants, else None."""
    choices = {item for item in operands if item.op != "const"}
    if not choices:
        value = folded(op, [item.value for item in operands])
        return None if value is None else const(value)
    choice = choices.pop()
    if choices or choice.op != "where":
        return None
    condition, *branches = choice.operands
    if any(branch.op != "const" for branch in branches):
        return None
    values: list[Number] = []
    for branch in branches:
        value = folded(op, [(branch if item is choice else item).value for item in operands])
        if value is None:
            return None
        values.append(value)
    return _choice(condition, *values)


def folded(op: str, values: Sequence[Number]) -> Number | None:
    """``op`` of constants as PyTorch computes it; None where it does not (integers over 0)."""
    if op == "relu":
        op, values = "max", (values[0], 0.0)
    if op in ("min", "max") and any(math.isnan(value) for value in values):
        return math.nan
    if op == "to_int" and not math.isfinite(values[0]):
        return None
    try:
        return _FOLDED[op](*values)
    except OverflowError:
        return math.inf
    except ValueError:  # a logarithm or a root of what has none
        return -math.inf if op == "log" and values[0] == 0 else math.nan
    except ZeroDivisionError:
        if not isinstance(values[-1], float):
            return None
        top = 1.0 if op == "reciprocal" else values[0]
        if op == "mod" or top == 0 or math.isnan(top):
            return math.nan
        return math.copysign(math.inf, top) * math.copysign(1.0, values[-1])

"""Derivatives of score expressions, as expressions: what backward kernels compute with."""

from __future__ import annotations

import math
from collections.abc import Callable

from sparse_compiler.score.expr import (
    Expr,
    add,
    const,
    div,
    exp,
    gt,
    le,
    lt,
    mul,
    neg,
    pow_,
    sub,
    where,
)


def derivative(expr: Expr, variable: Expr) -> Expr:
    """The derivative of a float expression by ``S``, or by one of its ``load`` nodes.

    Conditions, integers and floor operations do not change with the variable, and where a function
    has a kink the derivative is that of one side (0 for ``relu`` and ``abs`` at 0, as PyTorch).
    """
    zero, one = const(0.0), const(1.0)
    slope: dict[Expr, Expr] = {}
    for node in expr.walk():
        if node is variable:
            slope[node] = one
        elif node.type != "float" or node.op not in _RULES:
            slope[node] = zero
        else:
            inner = [slope[item] for item in node.operands]
            changes = any(item is not zero for item in inner)
            slope[node] = _RULES[node.op](node, *inner) if changes else zero
    return slope[expr]


def _scaled(slope: Expr, factor: Expr) -> Expr:
    """``slope * factor``; 0 even if the factor is not finite."""
    if slope.op == "const" and slope.value == 0:
        return slope
    return mul(factor, slope)


def _product(node: Expr, left: Expr, right: Expr) -> Expr:
    x, y = node.operands
    return add(_scaled(left, y), _scaled(right, x))


def _quotient(node: Expr, left: Expr, right: Expr) -> Expr:
    x, y = node.operands
    top = left if right.op == "const" and right.value == 0 else sub(left, _scaled(right, div(x, y)))
    return div(top, y)


def _absolute(node: Expr, slope: Expr) -> Expr:
    (x,) = node.operands
    return where(gt(x, 0.0), slope, where(lt(x, 0.0), neg(slope), 0.0))


def _power(node: Expr, slope: Expr, _: Expr) -> Expr:
    x, exponent = node.operands
    return _scaled(slope, mul(pow_(x, exponent.value - 1), exponent))


_RULES: dict[str, Callable[..., Expr]] = {
    "add": lambda node, x, y: add(x, y),
    "sub": lambda node, x, y: sub(x, y),
    "neg": lambda node, x: neg(x),
    "mul": _product,
    "div": _quotient,
    "where": lambda node, _, x, y: where(node.operands[0], x, y),
    "min": lambda node, x, y: where(le(*node.operands), x, y),
    "max": lambda node, x, y: where(le(*node.operands), y, x),
    "mod": lambda node, x, _: x,
    "abs": _absolute,
    "exp": lambda node, x: _scaled(x, node),
    "log": lambda node, x: div(x, node.operands[0]),
    "tanh": lambda node, x: _scaled(x, sub(1.0, mul(node, node))),
    "erf": lambda node, x: _scaled(
        x, mul(exp(neg(mul(node.operands[0], node.operands[0]))), 2 / math.sqrt(math.pi))
    ),
    "sigmoid": lambda node, x: _scaled(x, mul(node, sub(1.0, node))),
    "sqrt": lambda node, x: div(mul(x, 0.5), node),
    "reciprocal": lambda node, x: _scaled(x, neg(mul(node, node))),
    "pow": _power,
    "relu": lambda node, x: where(gt(node.operands[0], 0.0), x, 0.0),
}

"""Score expressions: the one module to build, read and write them with.

An attention's score is a scalar function of (batch, head, query, key) and of the raw product
``S`` of the query and the key::

    causal = le(K, Q)
    score = where(and_(causal, load(0, "bool", B, K)), mul(S, 0.125), -math.inf)
    to_text(score)  # "(where (and (le k q) (load 0 bool b k)) (mul s 0.125) -inf)"

Builders simplify as they build, so equal functions are often the same object; integers follow
PyTorch (floor division, remainder with the divisor's sign).
"""

from __future__ import annotations

from sparse_compiler.score.arithmetic import (
    abs_,
    add,
    div,
    erf,
    exp,
    floordiv,
    load,
    log,
    max_,
    min_,
    mod,
    mul,
    neg,
    pow_,
    reciprocal,
    relu,
    sigmoid,
    sqrt,
    sub,
    tanh,
    to_bool,
    to_float,
    to_int,
)
from sparse_compiler.score.logic import and_, eq, ge, gt, le, lt, ne, not_, or_, where, xor
from sparse_compiler.score.node import FALSE, TRUE, B, Expr, H, K, Q, S, const, integer
from sparse_compiler.score.text import parse, to_text

_BUILDERS = {
    "add": add,
    "sub": sub,
    "mul": mul,
    "div": div,
    "floordiv": floordiv,
    "mod": mod,
    "neg": neg,
    "abs": abs_,
    "min": min_,
    "max": max_,
    "lt": lt,
    "le": le,
    "gt": gt,
    "ge": ge,
    "eq": eq,
    "ne": ne,
    "and": and_,
    "or": or_,
    "not": not_,
    "xor": xor,
    "where": where,
    "exp": exp,
    "log": log,
    "tanh": tanh,
    "erf": erf,
    "sigmoid": sigmoid,
    "sqrt": sqrt,
    "reciprocal": reciprocal,
    "pow": pow_,
    "relu": relu,
    "to_float": to_float,
    "to_int": to_int,
    "to_bool": to_bool,
    "load": load,
}


def build(op: str, *args: object) -> Expr:
    """The node ``op`` of ``args``, simplified: what the builder of that name returns.

    Raises:
        ValueError: an unknown operator, or operands it does not take.
    """
    builder = _BUILDERS.get(op)
    if builder is None:
        return Expr(op, args)  # type: ignore[arg-type]
    return builder(*args)  # type: ignore[operator]


__all__ = [
    "FALSE",
    "TRUE",
    "B",
    "Expr",
    "H",
    "K",
    "Q",
    "S",
    "abs_",
    "add",
    "and_",
    "build",
    "const",
    "div",
    "eq",
    "erf",
    "exp",
    "floordiv",
    "ge",
    "gt",
    "integer",
    "le",
    "load",
    "log",
    "lt",
    "max_",
    "min_",
    "mod",
    "mul",
    "ne",
    "neg",
    "not_",
    "or_",
    "parse",
    "pow_",
    "reciprocal",
    "relu",
    "sigmoid",
    "sqrt",
    "sub",
    "tanh",
    "to_bool",
    "to_float",
    "to_int",
    "to_text",
    "where",
    "xor",
]

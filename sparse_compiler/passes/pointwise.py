"""Pointwise operators as expressions: arithmetic, comparisons, logic, choices and conversions.

``RULES`` has one rule for each operator, by its name. A rule asks a *reader* for its operands: what
a node's value is (of which indices, of which tensors) is the reader's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import Expr

Index = tuple[Expr, ...]
Given = dict[str, Any]
Rule = Callable[["Reader", fx.Node, Given, Index], Expr]


class NotLiftable(Exception):
    """A value has no form as an expression; the message is a sentence."""


class Reader(Protocol):
    """What the rules ask for their operands."""

    def value(self, node: fx.Node, index: Index) -> Expr:
        """The element of ``node`` at ``index``."""
        ...

    def operand(self, value: Any, index: Index) -> Expr:
        """An operand of a pointwise operator: a number, or a tensor that broadcasts."""
        ...

    def whole_division(
        self,
        build: Callable[[Any, Any], Expr],
        left: Expr,
        right: Expr,
        towards_zero: bool,
    ) -> Expr:
        """Integer division or remainder (``build`` says which)."""
        ...


# Types in which PyTorch computes as expressions do: no sum of theirs wraps around.
_INTS = (torch.int64, torch.int32)


def converted(value: Expr, dtype: torch.dtype) -> Expr:
    """A value as an element of ``dtype``; rounding to a narrower float is not modelled here.

    Raises:
        NotLiftable: expressions have no such conversion.
    """
    if dtype is torch.bool:
        return e.to_bool(value)
    if dtype.is_floating_point:
        return e.to_float(value)
    if value.type == "float" and value.op != "const" and not _is_whole(value):
        # Whether a float is rounded to one integer or the next may depend on its last bit.
        raise NotLiftable("it rounds computed numbers to integers")
    if dtype not in _INTS and value.type != "bool":
        raise NotLiftable(f"it computes in {dtype}")
    return e.to_int(value)


def _is_whole(value: Expr) -> bool:
    """Whether a float is a sum or product of small integers, so that it is exact."""
    return all(
        node.op in ("add", "sub", "mul", "neg", "to_float", "where", "min", "max", "abs")
        or node.type != "float"
        or (node.op == "const" and float(node.value).is_integer())
        for node in value.walk()
    )


def _two(build: Callable[[Any, Any], Expr], left: str = "self", right: str = "other") -> Rule:
    def rule(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
        return build(reader.operand(given[left], index), reader.operand(given[right], index))

    return rule


def _one(build: Callable[[Any], Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
        return build(reader.operand(given["self"], index))

    return rule


def _sum(sign: int, reverse: bool = False) -> Rule:
    def rule(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
        left = reader.operand(given["self"], index)
        right = reader.operand(given["other"], index)
        if reverse:
            left, right = right, left
        if given.get("alpha", 1) != 1:
            if reverse:
                raise NotLiftable("it scales what it subtracts from")
            right = e.mul(right, reader.operand(given["alpha"], index))
        if node.meta["val"].dtype is torch.bool:
            return e.or_(left, right)
        return e.add(left, right) if sign > 0 else e.sub(left, right)

    return rule


def _mul(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    left, right = (reader.operand(given[name], index) for name in ("self", "other"))
    if left.type == right.type == "bool":
        return e.and_(left, right)
    return e.mul(left, right)


def _div(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    left, right = (reader.operand(given[name], index) for name in ("self", "other"))
    mode = given.get("rounding_mode")
    if mode is None:
        return e.div(left, right)
    return _whole_division(reader, e.floordiv, left, right, towards_zero=mode == "trunc")


def _floor_divide(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    left, right = (reader.operand(given[name], index) for name in ("self", "other"))
    return _whole_division(reader, e.floordiv, left, right)


def _remainder(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    left, right = (reader.operand(given[name], index) for name in ("self", "other"))
    return _whole_division(reader, e.mod, left, right)


def _fmod(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    left, right = (reader.operand(given[name], index) for name in ("self", "other"))
    return _whole_division(reader, e.mod, left, right, towards_zero=True)


def _whole_division(
    reader: Reader,
    build: Callable[[Any, Any], Expr],
    left: Expr,
    right: Expr,
    towards_zero: bool = False,
) -> Expr:
    if "float" in (left.type, right.type):
        raise NotLiftable("it rounds computed numbers to integers")
    return reader.whole_division(build, e.to_int(left), e.to_int(right), towards_zero)


def _clamp(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    value = reader.operand(given["self"], index)
    if given.get("min") is not None:
        value = e.max_(value, reader.operand(given["min"], index))
    if given.get("max") is not None:
        value = e.min_(value, reader.operand(given["max"], index))
    return value


def _extreme(build: Callable[[Any, Any], Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
        if "other" not in given:
            raise NotLiftable("it takes an extreme over a dimension")
        return build(reader.operand(given["self"], index), reader.operand(given["other"], index))

    return rule


def _bitwise(logical: Callable[..., Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
        values = [reader.operand(given[n], index) for n in ("self", "other") if n in given]
        if any(value.type != "bool" for value in values):
            raise NotLiftable("it works on the bits of integers")
        return logical(*values)

    return rule


def _logical(logical: Callable[..., Expr]) -> Rule:
    def rule(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
        values = (reader.operand(given[n], index) for n in ("self", "other") if n in given)
        return logical(*(e.to_bool(value) for value in values))

    return rule


def _where(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    if "self" not in given:
        raise NotLiftable("it lists the places where something holds")
    condition = reader.operand(given["condition"], index)
    return e.where(
        condition, reader.operand(given["self"], index), reader.operand(given["other"], index)
    )


def _masked_fill(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    fill = given["value"]
    value = reader.value(fill, ()) if isinstance(fill, fx.Node) else reader.operand(fill, index)
    kept = reader.operand(given["self"], index)
    return e.where(reader.operand(given["mask"], index), value, kept)


def _pow(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    exponent = given["exponent"]
    if not isinstance(exponent, (int, float)):
        raise NotLiftable("it raises to a power that is not known")
    base = reader.operand(given["self"], index)
    if base.type != "float":
        if exponent == 2:
            return e.mul(base, base)
        raise NotLiftable("it raises integers to a power")
    return e.pow_(base, exponent)


def _rsqrt(value: Expr) -> Expr:
    return e.reciprocal(e.sqrt(value))


def _isinf(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    value = reader.operand(given["self"], index)
    if value.type != "float":
        return e.FALSE
    return e.eq(e.abs_(value), math.inf)


def _cast(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    return reader.operand(given["self"], index)  # the result's dtype does the rest


def _dropout(reader: Reader, node: fx.Node, given: Given, index: Index) -> Expr:
    if given["train"] and given["p"]:
        raise NotLiftable("it drops elements at random")
    return reader.operand(given["input"], index)


_AND, _OR, _XOR, _NOT = e.and_, e.or_, e.xor, e.not_
RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "__iadd__"), _sum(1)),
    **dict.fromkeys(("sub", "subtract"), _sum(-1)),
    "rsub": _sum(-1, reverse=True),
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "fmod": _fmod,
    **dict.fromkeys(("neg", "negative"), _one(e.neg)),
    **dict.fromkeys(("abs", "absolute"), _one(e.abs_)),
    **dict.fromkeys(("maximum", "max"), _extreme(e.max_)),
    **dict.fromkeys(("minimum", "min"), _extreme(e.min_)),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), _clamp),
    **dict.fromkeys(("lt", "less"), _two(e.lt)),
    **dict.fromkeys(("le", "less_equal"), _two(e.le)),
    **dict.fromkeys(("gt", "greater"), _two(e.gt)),
    **dict.fromkeys(("ge", "greater_equal"), _two(e.ge)),
    "eq": _two(e.eq),
    **dict.fromkeys(("ne", "not_equal"), _two(e.ne)),
    **dict.fromkeys(("bitwise_and", "__and__", "__iand__"), _bitwise(_AND)),
    **dict.fromkeys(("bitwise_or", "__or__", "__ior__"), _bitwise(_OR)),
    **dict.fromkeys(("bitwise_xor", "__xor__", "__ixor__"), _bitwise(_XOR)),
    "bitwise_not": _bitwise(_NOT),
    "logical_and": _logical(_AND),
    "logical_or": _logical(_OR),
    "logical_xor": _logical(_XOR),
    "logical_not": _logical(_NOT),
    "where": _where,
    "masked_fill": _masked_fill,
    "exp": _one(e.exp),
    "log": _one(e.log),
    "tanh": _one(e.tanh),
    "sigmoid": _one(e.sigmoid),
    "sqrt": _one(e.sqrt),
    "rsqrt": _one(_rsqrt),
    "reciprocal": _one(e.reciprocal),
    "relu": _one(e.relu),
    "square": _one(lambda value: e.mul(value, value)),
    "pow": _pow,
    "isinf": _isinf,
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    "dropout": _dropout,
}

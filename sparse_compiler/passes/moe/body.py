"""What an expert does between its linear layers, as an expression of their results, the *parts*.

Read backwards from the second linear layer's input: every operator on the way is pointwise, and
depends on the parts and on literals alone. Numbers are computed in float32, so a cast to a narrower
float and back, which only rounds, is passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.passes.moe.writes import Writes
from sparse_compiler.passes.pointwise import RULES, Given, Index, NotLiftable, Rule, converted
from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import Expr, K
from sparse_compiler.static import StaticValues, arguments

aten = torch.ops.aten

Leaf = Callable[[fx.Node], "Expr | None"]

# Pointwise, so that a model's whole depth is never in it.
_MOST_NODES = 200
_SQRT_HALF = math.sqrt(0.5)


def part(place: int) -> Expr:
    """The part of this number, as an expression."""
    return e.load(place, "f32", K)


def read_body(
    result: fx.Node,
    leaf: Leaf,
    static: StaticValues,
    reader: fx.Node | None = None,
    writes: Writes | None = None,
) -> tuple[Expr, frozenset[fx.Node]]:
    """The expression of a node's value in the parts.

    Args:
        result: the node, the second linear layer's input.
        leaf: says which expression a node is: ``part(0)`` for the first linear layer's result,
            and None for what is no part.
        static: the graph's static values.
        reader: where the value is read, to know what was written in place before; ``result``
            itself if there is nothing of the kind behind it.
        writes: the graph's, for who reads many bodies of one graph.

    Returns:
        The expression, and the nodes between the parts and ``result``, with ``result``.

    Raises:
        Refused: the sentence says what cannot be read.
    """
    body = _Body(result, leaf, static, writes or Writes(static.gm.graph))
    try:
        found = body.value(result if reader is None else body.writes.now(result, reader), ())
    except NotLiftable as error:
        raise Refused(f"between its linear layers an expert is not pointwise: {error}") from error
    if not found.loads():
        raise Refused("the second linear layers do not depend on the first")
    return e.to_float(found), frozenset(body.nodes)


class _Body:
    """A reader of values, see ``pointwise.Reader``."""

    def __init__(self, result: fx.Node, leaf: Leaf, static: StaticValues, writes: Writes) -> None:
        self.nodes: set[fx.Node] = set()
        self.writes = writes
        self._reading = result
        self._leaf = leaf
        self._static = static
        self._known: dict[fx.Node, Expr] = {}

    def value(self, node: fx.Node, index: Index) -> Expr:
        """The node's value, the same expression for all elements."""
        known = self._known.get(node)
        if known is None:
            known = self._known[node] = self._value(node)
        return known

    def operand(self, value: Any, index: Index) -> Expr:
        """An operand of a pointwise operator."""
        if isinstance(value, fx.Node):
            return self.value(self.writes.now(value, self._reading), ())
        if isinstance(value, (bool, int, float)):
            return e.const(value)
        raise NotLiftable(f"it computes with {type(value).__name__}")

    def whole_division(
        self, build: Callable[[Any, Any], Expr], left: Expr, right: Expr, towards_zero: bool
    ) -> Expr:
        """No part is an integer."""
        raise NotLiftable("it divides integers")

    def _value(self, node: fx.Node) -> Expr:
        leaf = self._leaf(node)
        if leaf is not None:
            return leaf
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return _number(node, value)
        literal = _literal(node)
        if literal is not None:
            self.nodes.add(node)
            return converted(e.const(literal), value.dtype)
        if len(self.nodes) > _MOST_NODES:
            raise NotLiftable(f"it takes more than {_MOST_NODES} operators")
        return self._through(node, value.dtype)

    def _through(self, node: fx.Node, dtype: torch.dtype) -> Expr:
        name = schema_name(node)
        rule = _ACTIVATIONS.get(name) or RULES.get(name)
        if node.op != "call_function" or self._static.is_static(node):
            raise NotLiftable(f"it reads {_origin(node, self._static)}")
        if name.startswith("rand") or (rule is None and _is_random(node)):
            raise NotLiftable(f"{name} is random")
        if rule is None:
            raise NotLiftable(f"{name or node.target} is not pointwise")
        given = arguments(node)
        if name == "dropout" and given["train"] and given["p"]:
            raise NotLiftable("dropout in training is random, each expert's elements of its own")
        self.nodes.add(node)
        before, self._reading = self._reading, node
        try:
            found = rule(self, node, given, ())
        except ValueError as error:  # the expression's own checks
            raise NotLiftable(f"{name} has no expression: {error}") from error
        finally:
            self._reading = before
        return converted(found, dtype)


def _number(node: fx.Node, value: Any) -> Expr:
    """A number that the graph computes: a literal, or one that Dynamo made a symbol.

    A float of the model's own (a limit, a slope) is the same in each call: reading it as a number
    makes the graph guard on it.
    """
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        if value.node.hint is None:
            raise NotLiftable("it computes with a number that is known at run time only")
        value = float(value) if isinstance(value, torch.SymFloat) else bool(value)
    if isinstance(value, (bool, int, float)):
        return e.const(value)
    raise NotLiftable("it computes with a size, or a number that is known at run time only")


def _literal(node: fx.Node) -> float | None:
    """The one number that all elements of a new tensor are, or None."""
    name = schema_name(node)
    if name in ("full", "full_like", "new_full"):
        fill = arguments(node)["fill_value"]
        return fill if isinstance(fill, (bool, int, float)) else None
    if name == "scalar_tensor":
        number = arguments(node)["s"]
        return number if isinstance(number, (bool, int, float)) else None
    plain = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
    return plain.get(name)


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in target.tags
    )


def _origin(node: fx.Node, static: StaticValues) -> str:
    if static.leaf(node) is not None:
        return f"the tensor {static.name(node)}"
    return "a tensor of the model's own" if static.is_static(node) else f"{node.name}"


def _one(build: Callable[[Expr], Expr]) -> Rule:
    def rule(reader: Any, node: fx.Node, given: Given, index: Index) -> Expr:
        return build(e.to_float(reader.operand(given["self"], index)))

    return rule


def _silu(x: Expr) -> Expr:
    return e.mul(x, e.sigmoid(x))


def _gelu(reader: Any, node: fx.Node, given: Given, index: Index) -> Expr:
    x = reader.operand(given["self"], index)
    if given["approximate"] == "tanh":
        cubed = e.add(x, e.mul(e.mul(e.mul(x, x), x), 0.044715))
        inner = e.tanh(e.mul(cubed, math.sqrt(2 / math.pi)))
    else:
        inner = e.erf(e.mul(x, _SQRT_HALF))
    return e.mul(e.mul(x, 0.5), e.add(inner, 1.0))


def _log1p_exp(x: Expr) -> Expr:
    """log(1 + exp(x)), for any x: no exponential of what is positive."""
    return e.add(e.relu(x), e.log(e.add(e.exp(e.neg(e.abs_(x))), 1.0)))


def _softplus(reader: Any, node: fx.Node, given: Given, index: Index) -> Expr:
    x = reader.operand(given["self"], index)
    beta, threshold = given["beta"], given["threshold"]
    scaled = e.mul(x, float(beta))
    smooth = e.mul(_log1p_exp(scaled), 1 / float(beta))
    return e.where(e.gt(scaled, float(threshold)), x, smooth)


def _mish(x: Expr) -> Expr:
    return e.mul(x, e.tanh(_log1p_exp(x)))


def _leaky_relu(reader: Any, node: fx.Node, given: Given, index: Index) -> Expr:
    x = reader.operand(given["self"], index)
    slope = reader.operand(given["negative_slope"], index)
    return e.where(e.gt(x, 0.0), x, e.mul(x, slope))


def _hardsigmoid(x: Expr) -> Expr:
    return e.mul(e.min_(e.max_(e.add(x, 3.0), 0.0), 6.0), 1 / 6)


def _hardtanh(reader: Any, node: fx.Node, given: Given, index: Index) -> Expr:
    x = reader.operand(given["self"], index)
    low, high = (reader.operand(given[name], index) for name in ("min_val", "max_val"))
    return e.min_(e.max_(x, e.to_float(low)), e.to_float(high))


def _expm1(x: Expr) -> Expr:
    """exp(x) - 1, without cancellation: tanh(x / 2) * (exp(x) + 1)."""
    return e.mul(e.tanh(e.mul(x, 0.5)), e.add(e.exp(x), 1.0))


def _exponential_linear(x: Expr, alpha: float, scale: float, inner: float) -> Expr:
    below = e.mul(_expm1(e.mul(e.min_(x, 0.0), inner)), alpha * scale)
    return e.where(e.gt(x, 0.0), e.mul(x, scale), below)


def _elu(reader: Any, node: fx.Node, given: Given, index: Index) -> Expr:
    x = reader.operand(given["self"], index)
    scales = (float(given[name]) for name in ("alpha", "scale", "input_scale"))
    return _exponential_linear(x, *scales)


def _selu(x: Expr) -> Expr:
    return _exponential_linear(x, 1.6732632423543772, 1.0507009873554805, 1.0)


def _celu(reader: Any, node: fx.Node, given: Given, index: Index) -> Expr:
    alpha = float(given["alpha"])
    return _exponential_linear(reader.operand(given["self"], index), alpha, 1.0, 1 / alpha)


def _contiguous(reader: Any, node: fx.Node, given: Given, index: Index) -> Expr:
    return reader.operand(given["self"], index)


_ACTIVATIONS: dict[str, Rule] = {
    "silu": _one(_silu),
    "gelu": _gelu,
    "softplus": _softplus,
    "mish": _one(_mish),
    "leaky_relu": _leaky_relu,
    "hardswish": _one(lambda x: e.mul(x, _hardsigmoid(x))),
    "hardsigmoid": _one(_hardsigmoid),
    "hardtanh": _hardtanh,
    "relu6": _one(lambda x: e.min_(e.relu(x), 6.0)),
    "elu": _elu,
    "selu": _one(_selu),
    "celu": _celu,
    "erf": _one(e.erf),
    "expm1": _one(_expm1),
    "log_sigmoid": _one(lambda x: e.neg(_log1p_exp(e.neg(x)))),
    "softsign": _one(lambda x: e.div(x, e.add(e.abs_(x), 1.0))),
    "tanhshrink": _one(lambda x: e.sub(x, e.tanh(x))),
    **dict.fromkeys(("contiguous", "clone", "alias"), _contiguous),
}

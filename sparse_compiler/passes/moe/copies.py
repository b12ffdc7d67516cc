"""Copies of the tokens, one for each of their choices."""

from __future__ import annotations

import sympy
from torch import fx

from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.attention.symbols import sizes_of
from sparse_compiler.passes.moe.routing import Routing
from sparse_compiler.static import arguments


def repeated(routing: Routing, node: fx.Node) -> tuple[fx.Node, sympy.Expr, bool]:
    """(tokens, K or T, whether by choice) of copies [T * K, D] of tokens; else K is 1."""
    name = schema_name(node)
    source = routing.operand(node, "self")
    if not isinstance(source, fx.Node):
        return node, sympy.Integer(1), False
    before, after = sizes_of(source), sizes_of(node)
    if name == "repeat_interleave" and arguments(node)["dim"] == 0:
        times = arguments(node)["repeats"]
        if isinstance(times, int) and len(before) == 2:
            return source, sympy.Integer(times), False
    if name == "repeat" and len(before) == 2 and before[1] == after[1]:
        return source, before[0], True
    wide = name in ("view", "reshape", "flatten", "_unsafe_view") and len(before) == 3
    if wide and len(after) == 2 and before[2] == after[1] and schema_name(source) == "expand":
        return _expanded(routing, source) or (node, sympy.Integer(1), False)
    return node, sympy.Integer(1), False


def _expanded(routing: Routing, node: fx.Node) -> tuple[fx.Node, sympy.Expr, bool] | None:
    """Of ``x.unsqueeze(0 or 1).expand(...)`` with three dimensions."""
    narrow = routing.operand(node, "self")
    if not isinstance(narrow, fx.Node) or schema_name(narrow) not in ("unsqueeze", "view"):
        return None
    x = routing.operand(narrow, "self")
    before, after = sizes_of(narrow), sizes_of(node)
    if not isinstance(x, fx.Node) or len(sizes_of(x)) != 2 or len(before) != 3:
        return None
    if before == [sizes_of(x)[0], sympy.Integer(1), sizes_of(x)[1]] and before[0] == after[0]:
        return x, after[1], False
    if before == [sympy.Integer(1), *sizes_of(x)] and before[1] == after[1]:
        return x, after[1], True
    return None

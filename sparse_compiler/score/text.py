"""Expressions as text: S-expressions that read back as exactly the same expression.

``(where (and (le k q) (load 0 bool b k)) (mul s 0.125) -inf)``. Floats are written so that they
read back exactly. Where sharing would make the tree form large, shared parts are named:
``(let (%0 (sub q k)) (%1 (abs %0)) (add %0 %1))``.
"""

from __future__ import annotations

import functools
import re

from sparse_compiler.score.node import ARITY, Arg, Expr, const

# Trees of up to so many nodes are written out, shared or not.
_TREE = 256

_TOKEN = re.compile(r"[()]|[^\s()]+")


def to_text(expr: Expr) -> str:
    """The expression as an S-expression; ``parse`` reads it back."""
    order = list(expr.walk())
    size: dict[Expr, int] = {}
    readers: dict[Expr, int] = dict.fromkeys(order, 0)
    for node in order:
        size[node] = 1 + sum(size[item] for item in node.operands)
        for item in node.operands:
            readers[item] += 1
    share = size[expr] > _TREE
    names: list[str] = []
    written: dict[Expr, str] = {}
    for node in order:
        text = _write(node, written)
        if share and readers[node] > 1 and node.operands:
            name = f"%{len(names)}"
            names.append(f"({name} {text})")
            text = name
        written[node] = text
    return f"(let {' '.join(names)} {written[expr]})" if names else written[expr]


def _write(node: Expr, written: dict[Expr, str]) -> str:
    if node.op == "const":
        value = node.value
        return ("true" if value else "false") if isinstance(value, bool) else repr(value)
    if not node.args:
        return node.op
    parts = (written[arg] if isinstance(arg, Expr) else str(arg) for arg in node.args)
    return f"({' '.join((node.op, *parts))})"


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Expr:
    """The expression that ``to_text`` wrote; nothing is simplified.

    Raises:
        ValueError: the text is no expression.
    """
    bound: dict[str, Expr] = {}
    stack: list[list[Arg]] = [[]]
    for token in _TOKEN.findall(text):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) < 2:
                raise ValueError(f"an unmatched ')' in {text!r}")
            closed = _closed(stack.pop(), bound)
            if closed is not None:
                stack[-1].append(closed)
        else:
            stack[-1].append(bound.get(token, token))
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"not one expression: {text!r}")
    return _operand(stack[0][0])


def _closed(items: list[Arg], bound: dict[str, Expr]) -> Expr | None:
    """What a list in parentheses means; None for a binding, which ``bound`` then holds."""
    if not items or not isinstance(items[0], str):
        raise ValueError("a list begins with its operator")
    op, *rest = items
    assert isinstance(op, str)
    if op == "let":
        return _operand(rest[-1]) if rest else _operand("")
    if op.startswith("%"):
        if len(rest) != 1:
            raise ValueError(f"{op} names one expression")
        bound[op] = _operand(rest[0])
        return None
    if op == "int" and len(rest) == 1:
        return Expr("int", (int(str(rest[0])),))
    if op == "load" and len(rest) >= 2:
        indices = (_operand(item) for item in rest[2:])
        return Expr("load", (int(str(rest[0])), str(rest[1]), *indices))
    return Expr(op, tuple(_operand(item) for item in rest))


def _operand(item: Arg) -> Expr:
    if isinstance(item, Expr):
        return item
    word = str(item)
    if word in ("true", "false"):
        return const(word == "true")
    if ARITY.get(word) == 0:
        return Expr(word)
    try:
        return const(int(word))
    except ValueError:
        return const(float(word))  # raises ValueError in turn

"""The score expression: what an attention's softmax sees at (batch, head, query, key).

Expressions are immutable and *interned*: building the same structure twice gives the same object,
so comparing and hashing are free however large an expression is, and shared parts are shared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

Arg: TypeAlias = "Expr | int | float | bool | str"
Number: TypeAlias = int | float | bool

# What a leaf tensor's elements are stored as, and what they are in an expression.
LOAD_TYPES = {
    "bool": "bool",
    **dict.fromkeys(("u8", "i8", "i16", "i32", "i64"), "int"),
    **dict.fromkeys(("bf16", "f16", "f32", "f64"), "float"),
}

_INDICES = ("b", "h", "q", "k")
_ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "neg", "abs", "min", "max")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_LOGIC = ("and", "or", "not", "xor")
_FLOAT = ("div", "exp", "log", "tanh", "erf", "sigmoid", "sqrt", "reciprocal", "pow", "relu")
_CASTS = {"to_float": "float", "to_int": "int", "to_bool": "bool"}
_TWO = ("add", "sub", "mul", "div", "floordiv", "mod", "min", "max", "and", "or", "xor", "pow")

# op: number of operands, of those whose operands are all expressions.
ARITY: Mapping[str, int] = {
    **dict.fromkeys((*_INDICES, "s"), 0),
    **dict.fromkeys((*_ARITHMETIC, *_LOGIC, *_FLOAT, *_CASTS), 1),
    **dict.fromkeys((*_TWO, *_COMPARISONS), 2),
    "where": 3,
}

# What an expression reads, as bits.
_USES = {name: 1 << i for i, name in enumerate((*_INDICES, "s", "int", "load"))}

_interned: weakref.WeakValueDictionary[Any, Expr] = weakref.WeakValueDictionary()
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True, init=False, eq=False, repr=False)
class Expr:
    """A node: an operator and its operands. Made with the functions of ``score.expr``.

    Attributes:
        op: the operator, such as ``"add"``; leaves are ``b h q k s const int load``.
        args: the arguments. ``const`` holds its value, ``int`` its place among the runtime
            integers, ``load`` its slot, the dtype's name, and one integer expression a dimension.
        operands: the arguments that are expressions (the indices of a ``load``).
        type: ``"bool"``, ``"int"`` or ``"float"``.
        uses: what the value depends on, as bits; ask ``depends_on``.
        digest: a number that depends on the structure alone, the same in every process.

    Raises:
        ValueError: an unknown operator, or operands it does not take.
    """

    op: str
    args: tuple[Arg, ...]
    operands: tuple[Expr, ...]
    type: str
    uses: int
    digest: int

    def __new__(cls, op: str, args: tuple[Arg, ...] = ()) -> Expr:
        # 1, 1.0 and True are equal in Python, and NaN is not equal to itself.
        key = (op, type(args[0]), repr(args[0])) if op == "const" else (op, args)
        with _lock:
            self = _interned.get(key)
            if self is None:
                self = super().__new__(cls)
                object.__setattr__(self, "op", op)
                object.__setattr__(self, "args", args)
                operands = tuple(arg for arg in args if isinstance(arg, Expr))
                object.__setattr__(self, "operands", operands)
                object.__setattr__(self, "type", _type(op, args))
                object.__setattr__(self, "uses", _uses(op, args))
                object.__setattr__(self, "digest", _digest(op, args))
                _interned[key] = self
        return self

    def __reduce__(self) -> Any:
        from sparse_compiler.score.text import parse, to_text  # they import this module

        return parse, (to_text(self),)

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: Any) -> Expr:
        return self

    def __repr__(self) -> str:
        from sparse_compiler.score.text import to_text  # it imports this module

        return to_text(self)

    @property
    def value(self) -> Any:
        """The value of a ``const``."""
        assert self.op == "const"
        return self.args[0]

    @property
    def slot(self) -> int:
        """Which leaf tensor a ``load`` reads, or which runtime integer an ``int`` is."""
        assert self.op in ("load", "int") and isinstance(self.args[0], int)
        return self.args[0]

    @property
    def dtype(self) -> str:
        """The name of the dtype that a ``load`` reads, such as ``"f32"``."""
        assert self.op == "load" and isinstance(self.args[1], str)
        return self.args[1]

    def depends_on(self, name: str) -> bool:
        """Whether the value depends on ``name``: an index, ``"s"``, any ``"int"``, any ``"load"``.

        Several indices can be asked for at once: ``"qk"`` is either of them.
        """
        if name not in _USES:
            return any(self.uses & _USES[letter] for letter in name)
        return bool(self.uses & _USES[name])

    def walk(self) -> Iterator[Expr]:
        """Every distinct node once, operands before what uses them; the last one is this."""
        seen: set[Expr] = set()
        waiting: list[tuple[Expr, bool]] = [(self, False)]
        while waiting:
            node, ready = waiting.pop()
            if ready:
                yield node
            elif node not in seen:
                seen.add(node)
                waiting.append((node, True))
                waiting.extend((item, False) for item in reversed(node.operands))

    def leaves(self) -> tuple[Expr, ...]:
        """The distinct ``b h q k s int load`` nodes, in the order of ``walk``."""
        return tuple(node for node in self.walk() if node.op in _USES)

    def loads(self) -> tuple[Expr, ...]:
        """The distinct ``load`` nodes, in the order of ``walk``."""
        return tuple(node for node in self.walk() if node.op == "load")

    def substitute(self, replacements: Mapping[Expr, Expr]) -> Expr:
        """This expression with nodes replaced, and simplified again on the way up.

        A replaced node's operands are not looked at, nor is what replaces it.
        """
        from sparse_compiler.score.expr import build  # it imports this module

        new: dict[Expr, Expr] = dict(replacements)
        for node in self.walk():
            if node not in new:
                changed = any(new[item] is not item for item in node.operands)
                args = (new[arg] if isinstance(arg, Expr) else arg for arg in node.args)
                new[node] = build(node.op, *args) if changed else node
        return new[self]


def _type(op: str, args: tuple[Arg, ...]) -> str:
    if op == "const":
        kinds = {bool: "bool", int: "int", float: "float"}
        if len(args) != 1 or type(args[0]) not in kinds:
            raise ValueError(f"a const holds one bool, int or float, not {args!r}")
        return kinds[type(args[0])]
    if op == "int":
        if len(args) != 1 or not isinstance(args[0], int):
            raise ValueError(f"an int takes its place among the runtime integers, not {args!r}")
        return "int"
    if op == "load":
        return _load_type(args)
    if op not in ARITY:
        raise ValueError(f"unknown operator {op!r}; the operators are {', '.join(ARITY)}")
    kinds_of = [arg.type for arg in args if isinstance(arg, Expr)]
    if len(args) != ARITY[op] or len(kinds_of) != len(args):
        raise ValueError(f"{op} takes {ARITY[op]} expressions, not {args!r}")
    if op in _LOGIC and set(kinds_of) != {"bool"}:
        raise ValueError(f"{op} takes bool expressions, not {', '.join(kinds_of)}")
    if op in _FLOAT and set(kinds_of) != {"float"}:
        raise ValueError(f"{op} takes float expressions, not {', '.join(kinds_of)}")
    if op == "where" and (kinds_of[0] != "bool" or kinds_of[1] != kinds_of[2]):
        raise ValueError(f"where takes a bool and two of one type, not {', '.join(kinds_of)}")
    if op in (*_ARITHMETIC, *_COMPARISONS) and (len(set(kinds_of)) > 1 or "bool" in kinds_of):
        raise ValueError(f"{op} takes ints or floats of one type, not {', '.join(kinds_of)}")
    if op in _CASTS:
        return _CASTS[op]
    if op in _INDICES:
        return "int"
    if op == "s":
        return "float"
    return "bool" if op in (*_COMPARISONS, *_LOGIC) else kinds_of[-1]


def _load_type(args: tuple[Arg, ...]) -> str:
    if len(args) < 2 or not isinstance(args[0], int) or args[1] not in LOAD_TYPES:
        raise ValueError(f"a load takes a slot, one of {', '.join(LOAD_TYPES)}, and indices")
    if not all(isinstance(arg, Expr) and arg.type == "int" for arg in args[2:]):
        raise ValueError(f"the indices of a load are int expressions, not {args[2:]!r}")
    return LOAD_TYPES[str(args[1])]


def _uses(op: str, args: tuple[Arg, ...]) -> int:
    bits = _USES.get(op, 0)
    for arg in args:
        if isinstance(arg, Expr):
            bits |= arg.uses
    return bits


def _digest(op: str, args: tuple[Arg, ...]) -> int:
    parts = [f"{arg.digest:x}" if isinstance(arg, Expr) else repr(arg) for arg in args]
    text = " ".join((op, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


B, H, Q, K, S = (Expr(name) for name in ("b", "h", "q", "k", "s"))


def const(value: Number) -> Expr:
    """A literal; a bool, an int and a float are different constants."""
    return Expr("const", (value,))


def integer(place: int) -> Expr:
    """The runtime integer at ``place``: nothing is known about its sign."""
    return Expr("int", (place,))


TRUE, FALSE = const(True), const(False)
ZERO, ONE = const(0), const(1)

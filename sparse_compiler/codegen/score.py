"""A score expression as a C++ functor: what the attention kernels call on tiles that are not empty.

One statement for each distinct sub-expression. What does not depend on the key is a scalar, which
the compiler moves out of the loop over keys; the rest are vectors of keys (``cpp/score.h``).
Integers are 32 bits wide where that provably suffices: indices have at most 28 bits, so that sums
and small multiples fit, and whatever comes out of memory is 64 bits wide unless it was stored in
fewer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from sparse_compiler.score.derivative import derivative
from sparse_compiler.score.expr import Expr, K, S, add, build, const, load, parse
from sparse_compiler.score.fill import fill_of
from sparse_compiler.score.masks import full_score, kept_score, open_score

_INDEX_BITS = 28
_INDICES = {"b": "b", "h": "h", "q": "q", "k": "k"}
_C_TYPES = {
    "bool": "bool",
    "u8": "uint8_t",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "f32": "float",
    "f64": "double",
    "bf16": "uint16_t",
}
_STORED_BITS = {"bool": 1, "u8": 8, "i8": 8, "i16": 16, "i32": 32, "i64": 64}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
# Operators of two numbers that have no vector form.
_LANEWISE = {"floordiv": "floor_div(x, y)", "mod": "floor_mod(x, y)", "pow": "std::pow(x, y)"}
# Float functions: the C++ name for a scalar, and for a vector where there is one.
_FUNCTIONS = {
    "exp": ("std::exp", "exp<VL>"),
    "tanh": ("tanh_", "tanh_"),
    "erf": ("std::erf", "erf_"),
    "sigmoid": ("sigmoid", "sigmoid"),
    "log": ("std::log", None),
    "sqrt": ("std::sqrt", None),
}


@dataclasses.dataclass(frozen=True)
class Value:
    """A C++ expression: its text, its kind and whether it is a vector of keys.

    Attributes:
        text: a name or a literal.
        kind: ``"bool"``, ``"int"`` or ``"float"``.
        vector: one value for each key, or one for all.
        bits: width that an integer may need, its sign not counted.
    """

    text: str
    kind: str
    vector: bool
    bits: int = 0

    @property
    def wide(self) -> bool:
        return self.bits > 31

    def as_float(self) -> str:
        """As a float of its own shape."""
        if self.kind == "float":
            return self.text
        if self.vector:
            return f"to_float({self.text})" if self.kind == "int" else f"to_float(-{self.text})"
        return f"float({self.text})"

    def as_int(self) -> str:
        """As an integer of its own shape."""
        return f"(-{self.text})" if self.kind == "bool" and self.vector else self.text


@dataclasses.dataclass(frozen=True)
class Functor:
    """A generated ``struct Score`` and what has to be put into it.

    Attributes:
        source: the C++ text.
        ranks: number of dimensions of each leaf.
        trivial: on full tiles the score is a multiple of s.
    """

    source: str
    ranks: tuple[int, ...]
    trivial: bool


@functools.lru_cache(maxsize=256)
def functor(text: str, grad_leaf: int = -1) -> Functor:
    """The functor of a score.

    Args:
        text: the score, as operators carry it.
        grad_leaf: the leaf whose gradient is wanted, -1 for none.
    """
    score = parse(text)
    full = full_score(score)
    loads = {load.slot: load for load in score.loads()}
    slots = range(max(loads, default=-1) + 1)
    ranks = tuple(len(loads[slot].operands) if slot in loads else 0 for slot in slots)
    leaves = [
        f"  sc::Leaf<{_C_TYPES[loads[slot].dtype]}, {ranks[slot]}> leaf{slot};"
        for slot in slots
        if slot in loads
    ]
    scale, open_ = _scale(full), open_score(score)
    fill = fill_of(score)
    bodies = [
        _method("forward", score, full),
        _method("slope", derivative(score, S), derivative(full, S)),
    ]
    if grad_leaf >= 0:
        # A leaf that is 0 in full tiles still has a gradient there.
        wanted, kept = loads[grad_leaf], kept_score(score)
        bodies.append(_method("leaf_slope", derivative(score, wanted), derivative(kept, wanted)))
    else:
        bodies.append(_method("leaf_slope", const(0.0), const(0.0)))
    lines = [
        "struct Score {",
        f"  static constexpr bool trivial = {_bool(scale is not None)};",
        f"  static constexpr float scale = {_float(scale or 0.0)};",
        f"  static constexpr bool finite_fill = {_bool(fill.finite)};",
        f"  static constexpr bool needs_bound = {_bool(fill.needs_bound)};",
        f"  static constexpr bool leaf_grad = {_bool(grad_leaf >= 0)};",
        *leaves,
        f"  static constexpr bool has_open = {_bool(open_ is not None)};",
        "  const int64_t* integer;",
        *bodies,
        *([] if open_ is None else [_plain("open", open_)]),
        "};",
    ]
    return Functor("\n".join(lines), ranks, scale is not None)


@functools.lru_cache(maxsize=256)
def body_functor(text: str, parts: int) -> str:
    """``struct Body`` of an expert's body: its value and its slopes, vectors of hidden units.

    Args:
        text: an expression in ``load(p, "f32", K)``, the parts, as operators carry it.
        parts: 1 or 2.
    """
    body = parse(text)
    arguments = "sc::vf<sc::VL> part0, sc::vf<sc::VL> part1"
    values = {
        "forward": body,
        **{f"slope{p}": derivative(body, load(p, "f32", K)) for p in range(parts)},
    }
    lines = ["struct Body {"]
    for name, value in values.items():
        lines += [
            f"  __attribute__((always_inline)) inline sc::vf<sc::VL> {name}({arguments}) const {{",
            "    using namespace sc;",
            *_PartEmitter().body(value),
            "  }",
        ]
    return "\n".join([*lines, "};"])


def _scale(full: Expr) -> float | None:
    """c, if the score is c * s."""
    if full is S:
        return 1.0
    if full.op in ("mul", "div") and full.operands[0] is S and full.operands[1].op == "const":
        factor = float(full.operands[1].value)
        return factor if full.op == "mul" else 1.0 / factor
    return None


def _plain(name: str, score: Expr) -> str:
    return "\n".join(
        [
            f"  __attribute__((always_inline)) inline sc::vf<sc::VL> {name}(sc::vf<sc::VL> s,"
            " int64_t b, int64_t h, int64_t q, int64_t k, int count) const {",
            "    using namespace sc;",
            *_Emitter().body(score),
            "  }",
        ]
    )


def _method(name: str, partial: Expr, full: Expr) -> str:
    return "\n".join(
        [
            "  template <bool FULL>",
            f"  __attribute__((always_inline)) inline sc::vf<sc::VL> {name}(sc::vf<sc::VL> s,"
            " int64_t b, int64_t h, int64_t q, int64_t k, int count) const {",
            "    using namespace sc;",
            "    if constexpr (FULL) {",
            *_Emitter().body(full),
            "    } else {",
            *_Emitter().body(partial),
            "    }",
            "  }",
        ]
    )


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _float(value: float) -> str:
    if math.isnan(value):
        return "std::numeric_limits<float>::quiet_NaN()"
    if math.isinf(value) or abs(value) > 3.4028234663852886e38:
        return ("-" if value < 0 else "") + "std::numeric_limits<float>::infinity()"
    return f"{value!r}f" if "e" in repr(value) or "." in repr(value) else f"{value!r}.0f"


class _Emitter:
    """Statements for one expression."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._known: dict[Expr, Value] = {}

    def body(self, score: Expr) -> list[str]:
        result = self._value(score)
        self._lines.append(f"return as_vf({result.as_float()});")
        return [f"      {line}" for line in self._lines]

    def _value(self, expression: Expr) -> Value:
        for node in expression.walk():  # operands first
            if node not in self._known:
                self._known[node] = self._emit(node)
        return self._known[expression]

    def _name(self, text: str, kind: str, vector: bool, bits: int = 0) -> Value:
        name = f"t{len(self._lines)}"
        self._lines.append(f"const auto {name} = {text};")
        return Value(name, kind, vector, bits)

    def _emit(self, node: Expr) -> Value:
        op = node.op
        if op == "const":
            return self._const(node.value)
        if op == "s":
            return Value("s", "float", True)
        if op == "k":
            return self._name("as_vi(k) + lanes()", "int", True, _INDEX_BITS)
        if op in _INDICES:
            return Value(_INDICES[op], "int", False, _INDEX_BITS)
        if op == "int":
            return Value(f"integer[{node.slot}]", "int", False, 63)
        if op == "load":
            return self._load(node)
        args = [self._known[operand] for operand in node.operands]
        if op in _COMPARE:
            return self._compare(_COMPARE[op], *args)
        if op in _LOGIC:
            return self._logic(_LOGIC[op], *args)
        if op == "not":
            (x,) = args
            return self._name(f"{'~' if x.vector else '!'}{x.text}", "bool", x.vector)
        if op == "where":
            return self._where(*args)
        if op in ("to_float", "to_int", "to_bool"):
            return self._cast(op, *args)
        if node.type == "float":
            return self._float_op(node, args)
        return self._int_op(op, args)

    def _const(self, value: object) -> Value:
        if isinstance(value, bool):
            return Value(_bool(value), "bool", False)
        if isinstance(value, int):
            return Value(f"int64_t({value}LL)", "int", False, max(abs(value).bit_length(), 1))
        return Value(_float(float(value)), "float", False)  # type: ignore[arg-type]

    def _lift(self, value: Value, kind: str, vector: bool, wide: bool) -> str:
        """A value in the form that an operator over these operands takes."""
        if kind == "float":
            text = value.as_float()
            return f"as_vf({text})" if vector else text
        if kind == "bool":
            return f"as_vm({value.text})" if vector else value.text
        text = value.as_int()
        if not vector:
            return f"int64_t({text})"
        return f"as_vl({text})" if wide else f"as_vi({text})"

    def _common(self, args: Sequence[Value]) -> tuple[str, bool, bool]:
        kinds = {value.kind for value in args}
        kind = "float" if "float" in kinds else "int" if "int" in kinds else "bool"
        vector = any(value.vector for value in args)
        return kind, vector, any(value.wide for value in args)

    def _compare(self, sign: str, left: Value, right: Value) -> Value:
        kind, vector, wide = self._common((left, right))
        if kind == "bool":
            kind = "int"
        a, b = (self._lift(x, kind, vector, wide) for x in (left, right))
        text = f"{a} {sign} {b}"
        if vector:
            text = f"narrow({text})" if kind == "int" and wide else f"vm({text})"
        return self._name(text, "bool", vector)

    def _logic(self, sign: str, left: Value, right: Value) -> Value:
        vector = left.vector or right.vector
        a, b = (self._lift(x, "bool", vector, False) for x in (left, right))
        return self._name(f"{a} {sign} {b}", "bool", vector)

    def _where(self, condition: Value, yes: Value, no: Value) -> Value:
        kind, vector, wide = self._common((yes, no))
        bits = max(yes.bits, no.bits)
        if not condition.vector and not vector:
            a, b = (self._lift(x, kind, False, wide) for x in (yes, no))
            return self._name(f"{condition.text} ? {a} : {b}", kind, False, bits)
        a, b = (self._lift(x, kind, True, wide) for x in (yes, no))
        return self._name(f"select(as_vm({condition.text}), {a}, {b})", kind, True, bits)

    def _cast(self, op: str, value: Value) -> Value:
        if op == "to_float":
            return self._name(value.as_float(), "float", value.vector)
        if op == "to_bool":
            if value.kind == "bool":
                return value
            zero = Value("0.0f" if value.kind == "float" else "int64_t(0)", value.kind, False, 1)
            return self._compare("!=", value, zero)
        if value.kind != "float":
            return self._name(value.as_int(), "int", value.vector, max(value.bits, 1))
        if value.vector:
            return self._name(f"__builtin_convertvector({value.text}, vl)", "int", True, 63)
        return self._name(f"int64_t({value.text})", "int", False, 63)

    def _float_op(self, node: Expr, args: list[Value]) -> Value:
        op, vector = node.op, any(value.vector for value in args)
        texts = [self._lift(value, "float", vector, False) for value in args]
        if op in _INFIX:
            return self._name(f"{texts[0]} {_INFIX[op]} {texts[1]}", "float", vector)
        if op in ("min", "max"):
            return self._name(f"{op}imum({texts[0]}, {texts[1]})", "float", vector)
        if op in _FUNCTIONS:
            scalar, wide = _FUNCTIONS[op]
            if not vector:
                return self._name(f"{scalar}({texts[0]})", "float", False)
            if wide is not None:
                return self._name(f"{wide}({texts[0]})", "float", True)
            return self._name(
                f"each({texts[0]}, [](float x) {{ return {scalar}(x); }})", "float", True
            )
        if op == "neg":
            return self._name(f"-{texts[0]}", "float", vector)
        if op == "reciprocal":
            return self._name(f"1.0f / {texts[0]}", "float", vector)
        if op == "relu":
            zero = self._lift(Value("0.0f", "float", False), "float", vector, False)
            return self._name(f"maximum({texts[0]}, {zero})", "float", vector)
        if op == "abs":
            if vector:
                return self._name(f"{texts[0]} < 0.f ? -{texts[0]} : {texts[0]}", "float", True)
            return self._name(f"std::fabs({texts[0]})", "float", False)
        body = _LANEWISE[op]
        function = f"[](float x, float y) {{ return float({body}); }}"
        text = (
            f"each({texts[0]}, {texts[1]}, {function})"
            if vector
            else f"({function})({texts[0]}, {texts[1]})"
        )
        return self._name(text, "float", vector)

    def _int_op(self, op: str, args: list[Value]) -> Value:
        vector = any(value.vector for value in args)
        bits = [value.bits or 1 for value in args]
        if op in ("add", "sub"):
            needed = max(bits) + 1
        elif op == "mul":
            needed = sum(bits)
        else:
            needed = max(bits)
        needed = min(needed, 63)
        wide = needed > 31 or any(value.wide for value in args)
        texts = [self._lift(value, "int", vector, wide) for value in args]
        if op in _INFIX and op != "div":
            return self._name(f"{texts[0]} {_INFIX[op]} {texts[1]}", "int", vector, needed)
        if op == "neg":
            return self._name(f"-{texts[0]}", "int", vector, needed)
        if op == "abs":
            return self._name(f"{texts[0]} < 0 ? -{texts[0]} : {texts[0]}", "int", vector, needed)
        if op in ("min", "max"):
            sign = "<" if op == "min" else ">"
            text = f"{texts[0]} {sign} {texts[1]} ? {texts[0]} : {texts[1]}"
            return self._name(text, "int", vector, needed)
        function = _LANEWISE[op].removesuffix("(x, y)")
        if not vector:
            return self._name(f"{function}({texts[0]}, {texts[1]})", "int", False, needed)
        body = f"[](int64_t x, int64_t y) {{ return {function}(x, y); }}"
        return self._name(f"each({texts[0]}, {texts[1]}, {body})", "int", True, needed)

    def _load(self, node: Expr) -> Value:
        slot, dtype, index = node.slot, node.dtype, node.operands
        where = [self._known[operand] for operand in index]
        kind = "bool" if dtype == "bool" else "int" if dtype in _STORED_BITS else "float"
        bits = min(_STORED_BITS.get(dtype, 0), 63) if kind == "int" else 0
        leaf = f"leaf{slot}"
        if not any(value.vector for value in where):
            terms = [
                f"{leaf}.within({value.as_int()}, {leaf}.size[{d}]) * {leaf}.stride[{d}]"
                for d, value in enumerate(where)
            ]
            return self._name(
                f"element({leaf}.data + {' + '.join(terms) or '0'})", kind, False, bits
            )
        outer = where[:-1]
        rest = _behind_key(index[-1])
        if rest is not None and not any(value.vector for value in outer):
            row = f"{leaf}.row({', '.join(value.as_int() for value in outer)})"
            first = f"k + {self._value(rest).as_int()}"
            return self._name(f"load_row({leaf}, {row}, {first}, count)", kind, True, bits)
        terms = [
            f"{leaf}.within({value.as_int()}{'[i]' if value.vector else ''}, {leaf}.size[{d}])"
            f" * {leaf}.stride[{d}]"
            for d, value in enumerate(where)
        ]
        body = f"[&](int i) {{ return {' + '.join(terms)}; }}"
        return self._name(f"gather({leaf}, count, {body})", kind, True, bits)


class _PartEmitter(_Emitter):
    """Of expert bodies: what is loaded are the functor's arguments, at its own hidden units."""

    def _emit(self, node: Expr) -> Value:
        return Value("0", "int", True) if node is K else super()._emit(node)

    def _load(self, node: Expr) -> Value:
        return Value(f"part{node.slot}", "float", True)


def _behind_key(index: Expr) -> Expr | None:
    """What an index adds to the key, or None if it is not the key plus something fixed."""
    if not index.depends_on("k"):
        return None
    if index.op == "k":
        return const(0)
    if index.op not in ("add", "sub"):
        return None
    left, right = index.operands
    if not right.depends_on("k"):
        rest = _behind_key(left)
        return None if rest is None else build(index.op, rest, right)
    if index.op == "add" and not left.depends_on("k"):
        rest = _behind_key(right)
        return None if rest is None else add(left, rest)
    return None

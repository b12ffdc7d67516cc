"""Random score expressions as users' models spell them, not simplified, and leaves for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from sparse_compiler.score.expr import Expr, build, const, integer, to_text

BATCH, HEADS = 2, 2
# The runtime integers that expressions may read.
INTS = (5, 70)
FILLS = (-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4, -100.0)


def raw(op: str, *args: object) -> Expr:
    """A node as it is."""
    return Expr(
        op, tuple(const(a) if type(a) in (int, float) and op != "load" else a for a in args)
    )


def rebuilt(expr: Expr) -> Expr:
    """The expression built again, bottom up, by the simplifying builders."""
    new: dict[Expr, Expr] = {}
    for node in expr.walk():
        args = [new[arg] if isinstance(arg, Expr) else arg for arg in node.args]
        new[node] = build(node.op, *args) if node.op != "const" else node
    return new[expr]


def tensors(seed: int, queries: int, keys: int) -> list[torch.Tensor]:
    """Leaves 0 to 6: paddings [B, N] and a mask [M, N] (bool), documents [B, max] and a table
    [32] (i64), an additive mask [B, M, N], slopes [H] and one number a position [B, max] (f32)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    size = max(queries, keys)
    # Whole runs are padded or masked, so that whole tiles are.
    padding = torch.arange(keys) < (random(BATCH, 1) * 1.5 * keys)
    mask = random(-(-queries // 50), -(-keys // 50)) < 0.5
    mask = mask.repeat_interleave(50, 0).repeat_interleave(50, 1)[:queries, :keys]
    documents = (random(BATCH, size) < 0.02).long().cumsum(1)
    table = (random(32) * 5).long()
    fill = FILLS[int(random(()) * len(FILLS))]
    additive = torch.where(mask.expand(BATCH, -1, -1) & padding[:, None], 0.0, fill)
    slopes = 2.0 ** -(1 + 4 * random(HEADS))
    numbers = (random(BATCH, size) * 6).round() / 10
    return [padding, mask, documents, table, additive.contiguous(), slopes, numbers]


_INDEX = st.sampled_from([raw("q"), raw("k"), raw("q"), raw("k"), raw("b"), raw("h"), integer(0)])
_SMALL = st.integers(-4, 4)
_SIZE = st.sampled_from([1, 2, 3, 7, 16, 50, 64, 100, 128])
_SHIFT = st.sampled_from([-100, -64, -3, -1, 0, 1, 5, 63, 64, 130])


def _short(strategy: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    """The strategy by another name: Hypothesis prints the whole of what others are made of."""

    @st.composite
    def expressions(draw: st.DrawFn) -> Expr:
        return draw(strategy)

    return expressions()


def _clamped(index: Expr, size: int) -> Expr:
    return raw("max", raw("min", index, size), 0)


def _integers(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "sub", "min", "max"]), inner, inner).map(
            lambda x: raw(*x)
        ),
        st.tuples(st.sampled_from(["add", "sub", "min", "max"]), inner, _SHIFT).map(
            lambda x: raw(*x)
        ),
        st.tuples(inner, _SMALL).map(lambda x: raw("mul", *x)),
        st.tuples(st.sampled_from(["floordiv", "mod"]), inner, _SIZE).map(lambda x: raw(*x)),
        st.tuples(st.sampled_from(["abs", "neg"]), inner).map(lambda x: raw(*x)),
        inner.map(lambda x: raw("load", 3, "i64", _clamped(x, 31))),
        st.tuples(st.sampled_from(["q", "k"]), st.sampled_from([0, 1])).map(
            lambda x: raw("load", 2, "i64", raw("b"), raw("add", raw(x[0]), x[1]))
        ),
        st.tuples(_INDEX, _SHIFT, inner, inner).map(
            lambda x: raw("where", raw("lt", x[0], x[1]), x[2], x[3])
        ),
    )


INTEGERS = _short(st.recursive(st.one_of(_INDEX, _SHIFT.map(const)), _integers, max_leaves=6))

_COMPARED = st.tuples(
    st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), INTEGERS, st.one_of(INTEGERS, _SHIFT)
).map(lambda x: raw(*x))
_NUMBER = st.one_of(
    st.sampled_from(["q", "k"]).map(lambda x: raw("load", 6, "f32", raw("b"), raw(x))),
    st.tuples(INTEGERS, st.sampled_from([0.1, -0.3, 1.0])).map(
        lambda x: raw("mul", raw("to_float", x[0]), x[1])
    ),
    st.sampled_from([0.1, 0.3, 7.7]).map(const),
    st.just(raw("load", 5, "f32", raw("h"))),
)


def _floats(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.one_of(
        st.tuples(st.sampled_from(["add", "sub", "mul", "div", "min", "max"]), inner, inner).map(
            lambda x: raw(*x)
        ),
        st.tuples(
            st.sampled_from(["exp", "log", "sqrt", "tanh", "sigmoid", "relu", "abs", "reciprocal"]),
            inner,
        ).map(lambda x: raw(*x)),
    )


_FLOATS = _short(st.recursive(_NUMBER, _floats, max_leaves=4))
_COMPARED_FLOATS = st.tuples(
    st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), _FLOATS, _FLOATS
).map(lambda x: raw(*x))
_NAMED = st.sampled_from(
    [
        raw("le", raw("k"), raw("q")),
        raw("lt", raw("sub", raw("q"), raw("k")), 40),
        raw("load", 0, "bool", raw("b"), raw("k")),
        raw("load", 1, "bool", raw("q"), raw("k")),
        raw("load", 1, "bool", raw("mul", raw("floordiv", raw("q"), 64), 1), raw("k")),
        raw(
            "eq",
            raw("load", 2, "i64", raw("b"), raw("q")),
            raw("load", 2, "i64", raw("b"), raw("k")),
        ),
    ]
)


def _bools(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    return st.one_of(
        st.tuples(st.sampled_from(["and", "and", "or", "xor"]), inner, inner).map(
            lambda x: raw(*x)
        ),
        inner.map(lambda x: raw("not", x)),
        st.tuples(inner, inner, inner).map(lambda x: raw("where", *x)),
        inner.map(lambda x: raw("ne", raw("to_int", x), 0)),
    )


BOOLS = st.recursive(st.one_of(_COMPARED, _COMPARED_FLOATS, _NAMED, _NAMED), _bools, max_leaves=5)

_SCALED = st.sampled_from([raw("s"), raw("mul", raw("s"), 0.125), raw("div", raw("s"), 8.0)])
_FILL = st.sampled_from(FILLS)


def _scores(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    distance = raw("to_float", raw("sub", raw("k"), raw("q")))
    alibi = raw("mul", raw("load", 5, "f32", raw("h")), distance)
    additive = raw("load", 4, "f32", raw("b"), raw("q"), raw("k"))
    return st.one_of(
        st.tuples(BOOLS, inner, _FILL).map(lambda x: raw("where", *x)),
        st.tuples(BOOLS, _FILL, inner).map(lambda x: raw("where", *x)),
        st.tuples(inner, BOOLS, _FILL).map(
            lambda x: raw("add", x[0], raw("where", x[1], 0.0, x[2]))
        ),
        st.tuples(inner, BOOLS, _FILL).map(
            lambda x: raw("add", x[0], raw("mul", raw("sub", 1.0, raw("to_float", x[1])), -1e4))
        ),
        st.tuples(inner, BOOLS).map(lambda x: raw("add", x[0], raw("log", raw("to_float", x[1])))),
        inner.map(lambda x: raw("add", x, additive)),
        inner.map(lambda x: raw("add", x, alibi)),
        st.tuples(inner, _FLOATS).map(lambda x: raw("add", *x)),
        st.tuples(inner, _FLOATS).map(lambda x: raw("add", x[0], raw("mul", x[1], -1e4))),
        st.tuples(inner, _FLOATS).map(lambda x: raw("add", x[0], raw("mul", x[1], additive))),
        st.tuples(BOOLS, inner, inner).map(lambda x: raw("where", *x)),
        inner.map(lambda x: raw("mul", raw("tanh", raw("div", x, 30.0)), 30.0)),
        inner.map(lambda x: raw("max", x, FILLS[1])),
        st.tuples(inner, INTEGERS).map(lambda x: raw("sub", x[0], raw("to_float", x[1]))),
    )


_SCORES = st.recursive(_SCALED, _scores, max_leaves=4)


@st.composite
def scores(draw: st.DrawFn) -> str:
    """A float score, as text: that is what a failure should print."""
    return to_text(draw(_SCORES))


@st.composite
def conditions(draw: st.DrawFn) -> str:
    """A bool expression, as text."""
    return to_text(draw(BOOLS))


@st.composite
def integers(draw: st.DrawFn) -> str:
    """An int expression, as text."""
    return to_text(draw(INTEGERS))


SIZES = st.sampled_from([(1, 200), (130, 130), (64, 192), (70, 150), (200, 100)])


def products(queries: int, keys: int, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Raw products: ordinary ones, and the largest that are allowed for."""
    shape = (BATCH, HEADS, queries, keys)
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(shape, generator=generator, dtype=dtype) * 8
    return [
        ordinary,
        torch.full(shape, 4096.0, dtype=dtype),
        torch.full(shape, -4096.0, dtype=dtype),
    ]

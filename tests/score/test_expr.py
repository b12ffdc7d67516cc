"""Building, simplifying, printing and reading score expressions."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_scores import (
    INTS,
    SIZES,
    conditions,
    integers,
    products,
    raw,
    rebuilt,
    scores,
    tensors,
)

from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import (
    FALSE,
    TRUE,
    B,
    Expr,
    H,
    K,
    Q,
    S,
    abs_,
    add,
    and_,
    build,
    const,
    div,
    eq,
    exp,
    floordiv,
    ge,
    gt,
    integer,
    le,
    load,
    log,
    lt,
    max_,
    min_,
    mod,
    mul,
    ne,
    neg,
    not_,
    or_,
    parse,
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
    to_text,
    where,
    xor,
)

INF = math.inf
PADDING = load(0, "bool", B, K)


def test_text_is_as_documented():
    score = where(and_(le(K, Q), PADDING), mul(S, 0.125), -INF)
    assert to_text(score) == "(where (and (le k q) (load 0 bool b k)) (mul s 0.125) -inf)"
    assert repr(score) == to_text(score)


@settings(max_examples=100)
@given(st.one_of(scores(), conditions(), integers()))
def test_text_round_trip(text):
    expr = parse(text)
    assert to_text(expr) == text
    assert parse(to_text(rebuilt(expr))) is rebuilt(expr)


@pytest.mark.parametrize(
    "value",
    [0, -7, 2**62, True, False, 0.1, -0.0, 1e-300, INF, -INF, torch.finfo(torch.float32).min],
)
def test_constants_keep_type_and_value(value):
    again = parse(to_text(const(value))).value
    assert type(again) is type(value) and repr(again) == repr(value)
    assert const(value) is const(value)


def test_constants_of_other_types_are_others():
    assert len({const(1), const(1.0), const(True), const(0.0), const(-0.0)}) == 5
    assert parse("nan") is const(math.nan)


@pytest.mark.parametrize(
    "text",
    [
        *("", "(", ")", "()", "q k", "word", "(add q)", "(add q k k)", "(frobnicate q)"),
        *("(add q 1.0)", "(not q)", "(where q s s)", "(exp q)", "(int x)"),
        *("(load 0 f128 q)", "(load 0 f32 1.5)"),
    ],
)
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)


def test_equal_structures_are_one_object():
    expr = add(mul(S, 0.5), to_float(sub(Q, K)))
    assert expr is add(mul(S, 0.5), to_float(sub(Q, K)))
    assert copy.deepcopy(expr) is expr and copy.copy(expr) is expr
    assert pickle.loads(pickle.dumps(expr)) is expr
    with pytest.raises(AttributeError):
        expr.op = "sub"


def test_order_does_not_depend_on_the_process():
    """Terms that commute are ordered by their structure: texts can be keys of caches on disk."""
    assert Q.digest == 3113518941435925557
    terms = [load(i, "i64", index) for i in range(4) for index in (Q, K)]
    one, other = const(0), const(0)
    for term in terms:
        one = add(one, term)
    for term in reversed(terms):
        other = add(other, term)
    assert one is other


def test_sharing_stays_cheap():
    expr = S
    for i in range(500):
        expr = add(expr, expr) if i % 2 else tanh(mul(expr, expr))
    assert sum(1 for _ in expr.walk()) < 1500
    text = to_text(expr)
    assert len(text) < 40_000 and text.startswith("(let (%0 ")
    assert parse(text) is expr
    replaced = expr.substitute({S: load(0, "f32", Q, K)})
    assert not replaced.depends_on("s")
    mask = TRUE
    for i in range(800):
        mask = and_(mask, or_(load(i, "bool", Q), le(K, i)))
    assert not_(not_(mask)) is mask


def test_walk_leaves_and_dependences():
    expr = where(le(K, add(Q, integer(1))), add(S, load(3, "f32", H, load(2, "i64", B, Q))), -INF)
    order = list(expr.walk())
    assert len(order) == len(set(order)) and order[-1] is expr
    assert all(order.index(item) < order.index(node) for node in order for item in node.operands)
    assert set(expr.leaves()) == {K, Q, B, H, S, integer(1), *expr.loads()}
    assert [(node.slot, node.dtype) for node in expr.loads()] == [(2, "i64"), (3, "f32")]
    assert expr.depends_on("s") and expr.depends_on("int") and expr.depends_on("load")
    assert le(K, Q).depends_on("bk") and not le(K, Q).depends_on("bh")


def test_substitute_simplifies_and_does_not_look_again():
    assert le(K, Q).substitute({K: Q}) is TRUE
    assert sub(Q, K).substitute({Q: K, K: Q}) is sub(K, Q)
    condition = and_(le(K, Q), PADDING)
    assert condition.substitute({PADDING: TRUE}) is le(K, Q)


X, Y, Z = (load(i, "i64", Q, K) for i in (5, 6, 7))
U = load(4, "f32", K)
C, D = load(1, "bool", Q), load(2, "bool", K)

# Pairs that are the same expression when built.
SAME = {
    "affine": (add(sub(Q, K), 3), sub(Q, sub(K, 3))),
    "terms cancel": (sub(add(Q, X), add(X, K)), sub(Q, K)),
    "coefficients": (add(Q, add(Q, Q)), mul(Q, 3)),
    "distributes": (mul(add(Q, 2), 4), add(mul(Q, 4), 8)),
    "nothing left": (sub(X, X), const(0)),
    "negated": (neg(sub(Q, K)), sub(K, Q)),
    "commutes": (add(X, Y), add(Y, X)),
    "product commutes": (mul(X, Y), mul(Y, X)),
    "absolute": (abs_(sub(K, Q)), abs_(sub(Q, K))),
    "not negative": (abs_(Q), Q),
    "min of ordered": (min_(Q, add(Q, 3)), Q),
    "max of a bound": (max_(Q, -1), Q),
    "le and ge": (le(K, Q), ge(Q, K)),
    "lt": (lt(K, Q), not_(ge(K, Q))),
    "window": (lt(sub(Q, K), 256), gt(K, sub(Q, 256))),
    "halved": (le(mul(Q, 2), add(mul(K, 2), 1)), le(Q, K)),
    "never equal": (eq(mul(Q, 2), add(mul(K, 2), 1)), FALSE),
    "reflexive": (le(X, X), TRUE),
    "index is not negative": (ge(Q, 0), TRUE),
    "index below 0": (lt(add(Q, 1), 1), FALSE),
    "remainder is small": (lt(mod(sub(Q, K), 8), 8), TRUE),
    "local": (le(abs_(sub(Q, K)), 3), and_(le(sub(Q, K), 3), ge(sub(Q, K), -3))),
    "remainder of a multiple": (mod(add(mul(Q, 8), mod(K, 8)), 8), mod(K, 8)),
    "quotient of a multiple": (floordiv(add(mul(Q, 8), mod(K, 8)), 8), Q),
    "quotient twice": (floordiv(floordiv(Q, 4), 3), floordiv(Q, 12)),
    "divided by 1": (add(floordiv(X, 1), mod(X, 1)), X),
    "not not": (not_(not_(C)), C),
    "de Morgan": (not_(and_(C, D)), or_(not_(C), not_(D))),
    "and flat": (and_(C, and_(D, C)), and_(C, D)),
    "contradiction": (and_(C, not_(C)), FALSE),
    "excluded middle": (or_(C, not_(C)), TRUE),
    "empty range": (and_(ge(X, 5), le(X, 4)), FALSE),
    "full range": (or_(ge(X, 5), le(X, 4)), TRUE),
    "tighter bound": (and_(le(X, 5), le(X, 3)), le(X, 3)),
    "looser bound": (or_(le(X, 5), le(X, 3)), le(X, 5)),
    "band of two triangles": (
        xor(le(K, Q), le(K, sub(Q, 256))),
        and_(le(K, Q), le(sub(Q, K), 255)),
    ),
    "xor with itself": (xor(C, C), FALSE),
    "equal truths": (eq(C, TRUE), C),
    "where of equals": (where(C, X, X), X),
    "where of truths": (where(C, TRUE, FALSE), C),
    "where not": (where(not_(C), 1.0, U), where(C, U, 1.0)),
    "fill last": (where(gt(K, Q), -INF, S), where(le(K, Q), S, -INF)),
    "where nested": (where(C, where(D, S, -INF), -INF), where(and_(C, D), S, -INF)),
    "where inside itself": (where(C, where(C, S, U), 0.0), where(C, S, 0.0)),
    "previous position": (where(lt(K, 1), -1, sub(K, 1)), sub(K, 1)),
    "difference of positions": (sub(K, where(lt(K, 1), sub(K, 1), sub(K, 1))), const(1)),
    "truth as a number": (ne(to_int(C), 0), C),
    "inverted mask": (
        mul(sub(1.0, to_float(C)), -1e4),
        where(C, mul(const(0.0), -1e4), const(-1e4)),
    ),
    "int mask": (eq(sub(1, to_int(C)), 0), C),
    "scales": (mul(mul(S, 0.5), 0.25), mul(S, 0.125)),
    "divided by a scale": (div(S, 8.0), mul(S, 0.125)),
    "plus nothing": (add(mul(U, 1.0), 0.0), U),
    "folded": (add(mul(const(2.0), 3.0), exp(const(0.0))), const(7.0)),
    "as a float and back": (to_int(to_float(X)), X),
    "a number as a truth": (to_bool(X), ne(X, 0)),
    "square root": (pow_(U, 0.5), sqrt(U)),
    "square": (pow_(U, 2), mul(U, U)),
}


@pytest.mark.parametrize("name", SAME)
def test_normal_forms(name):
    one, other = SAME[name]
    assert one is other, f"{one} and {other}"


def test_types_are_promoted():
    assert add(Q, 1.0).type == "float" and add(Q, 1.0) is add(to_float(Q), 1.0)
    assert add(C, 1).type == "int" and div(Q, K).type == "float"
    assert lt(C, 1).type == "bool" and where(C, Q, 0.5).type == "float"
    assert load(0, "u8", Q).type == "int" and load(0, "bf16", Q).type == "float"


def test_thresholds_keep_their_rounding():
    """A division by 49 is not a multiplication by its inverse: 49 * (1 / 49) is below 1."""
    assert div(to_float(K), 49.0).op == "div"
    assert div(to_float(K), 64.0) is mul(to_float(K), 0.015625)
    assert add(mul(mul(to_float(K), 0.1), 3.0), 0.0).operands[1] is const(3.0)


@settings(max_examples=80)
@given(st.one_of(scores(), conditions(), integers()), SIZES, st.integers(0, 5))
def test_simplification_keeps_values(text, sizes, seed):
    expr = parse(text)
    leaves = tensors(seed, *sizes)
    s = products(*sizes, torch.float64)[0]
    one, other = (evaluate(e, s, leaves, INTS, *s.shape) for e in (expr, rebuilt(expr)))
    if expr.type == "float":
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, equal_nan=True)
    else:
        assert torch.equal(one, other)


def test_build_is_the_builder_of_that_name():
    assert build("add", Q, 1) is add(Q, 1)
    assert build("load", 0, "bool", Q) is load(0, "bool", Q)
    assert build("q") is Q and build("const", 3) is const(3)
    with pytest.raises(ValueError, match="unknown operator"):
        build("frobnicate", Q)
    with pytest.raises(ValueError, match="constant exponents"):
        pow_(U, U)


# Constants in every operator: what it folds to is what PyTorch computes.
_FOLDS = {
    "two": (add, sub, mul, div, floordiv, mod, min_, max_),
    "one": (neg, abs_, exp, log, tanh, sigmoid, sqrt, reciprocal, relu, to_int),
}
_VALUES = (0.0, -0.0, 1.5, -2.0, 7.0, 800.0, INF, -INF, math.nan)


@pytest.mark.parametrize("left", _VALUES)
def test_folding_is_what_pytorch_computes(left):
    shape = (1, 1, 1, 1)
    s = torch.full(shape, left, dtype=torch.float64)
    for builder in _FOLDS["one"]:
        if builder is to_int and not math.isfinite(left):
            continue
        folded, computed = builder(const(left)), evaluate(builder(S), s, (), (), *shape)
        assert folded.op == "const"
        torch.testing.assert_close(
            torch.tensor(float(folded.value)), computed.float().view(()), equal_nan=True
        )
    for builder in _FOLDS["two"]:
        for right in _VALUES:
            value = load(0, "f64")
            leaf = torch.tensor(right, dtype=torch.float64)
            folded = builder(const(left), const(right))
            computed = evaluate(builder(S, value), s, [leaf], (), *shape)
            assert folded.op == "const"
            torch.testing.assert_close(
                torch.tensor(float(folded.value)),
                computed.float().view(()),
                equal_nan=True,
                msg=f"{builder.__name__} {left} {right}",
            )


def test_integers_over_zero_are_left_alone():
    assert floordiv(const(3), const(0)).op == "floordiv"
    never = where(eq(X, 0), 0, floordiv(Q, X))
    leaf = torch.zeros(3, 3, dtype=torch.long)
    leaves = [leaf] * 6
    s = torch.zeros(1, 1, 3, 3)
    assert not evaluate(never, s, leaves, (), 1, 1, 3, 3).any()
    assert raw("floordiv", Expr("q"), 0).type == "int"

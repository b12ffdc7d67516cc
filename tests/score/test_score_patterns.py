"""Names of masks, and proofs of the simplest ones."""

import math

import pytest
import torch

from sparse_compiler.score.expr import (
    B,
    H,
    K,
    Q,
    S,
    abs_,
    add,
    and_,
    const,
    div,
    eq,
    floordiv,
    ge,
    integer,
    le,
    load,
    lt,
    max_,
    min_,
    mod,
    mul,
    or_,
    sub,
    tanh,
    to_float,
    where,
)
from sparse_compiler.score.patterns import Causal, describe, is_causal, keep_condition, mask_only

INF = math.inf
LOWEST = torch.finfo(torch.float32).min
SCALED = mul(S, 0.125)
CAUSAL = le(K, Q)
DISTANCE = sub(Q, K)
PADDING = load(0, "bool", B, K)
SAME = eq(load(1, "i64", B, Q), load(1, "i64", B, K))
LOCAL = le(abs_(DISTANCE), 16)


def masked(keep):
    return where(keep, SCALED, -INF)


NAMES = {
    "no mask": SCALED,
    "causal": masked(CAUSAL),
    "anti-causal": masked(ge(K, Q)),
    "causal with an offset": masked(le(K, add(Q, integer(0)))),
    "causal & sliding window 256": masked(and_(CAUSAL, lt(DISTANCE, 256))),
    "causal with an offset & sliding window 64": masked(
        and_(le(K, add(Q, integer(0))), lt(sub(add(Q, integer(0)), K), 64))
    ),
    "causal & sliding window 256 & padding": masked(and_(CAUSAL, lt(DISTANCE, 256), PADDING)),
    "local window 16 to either side": masked(LOCAL),
    "causal & padding": add(add(SCALED, where(CAUSAL, 0.0, LOWEST)), where(PADDING, 0.0, LOWEST)),
    "causal & same document": masked(and_(CAUSAL, SAME)),
    "causal & chunks of 8192": masked(and_(CAUSAL, eq(floordiv(Q, 8192), floordiv(K, 8192)))),
    "prefix LM": masked(or_(CAUSAL, lt(K, load(1, "i64", B)))),
    "(local window 16 to either side | global tokens)": masked(or_(LOCAL, lt(K, 4), lt(Q, 4))),
    "causal & sliding window 64 & dilated 4": masked(
        and_(CAUSAL, eq(mod(DISTANCE, 4), 0), lt(DISTANCE, 64))
    ),
    "causal & (at most 15 back | strided 16)": masked(
        and_(CAUSAL, or_(lt(DISTANCE, 16), eq(mod(DISTANCE, 16), 0)))
    ),
    "(causal & sliding window 512 | same document)": masked(
        or_(and_(CAUSAL, lt(DISTANCE, 512)), SAME)
    ),
    "mask of blocks of 64": masked(load(0, "bool", floordiv(Q, 64), floordiv(K, 64))),
    "a mask tensor": masked(load(0, "bool", Q, K)),
    "additive mask tensor": add(SCALED, load(0, "f32", B, Q, K)),
    "additive padding": add(SCALED, mul(sub(1.0, to_float(load(0, "i64", B, K))), -1e4)),
    "keys up to 9": masked(lt(K, 10)),
    "causal, soft-cap 50": where(CAUSAL, mul(tanh(div(SCALED, 50.0)), 50.0), -INF),
    "causal, ALiBi": where(CAUSAL, add(SCALED, mul(load(0, "f32", H), to_float(sub(K, Q)))), -INF),
    "no mask, bias of each head and key": add(S, load(0, "f32", H, const(0), K)),
    "causal, bias tensor": add(add(SCALED, load(0, "f32", H, Q, K)), where(CAUSAL, 0.0, -INF)),
    "no mask, relative-position bias": add(
        SCALED, load(0, "f32", min_(max_(add(DISTANCE, 8), 0), 16), H)
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_describe(name):
    assert describe(NAMES[name]) == name


def test_masks_in_memory_are_looked_at():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0] = True
    assert describe(NAMES["mask of blocks of 64"], [mask]) == "mask of blocks of 64 (25% kept)"


@pytest.mark.parametrize(
    "score",
    [
        masked(CAUSAL),
        where(CAUSAL, SCALED, LOWEST),
        add(SCALED, where(CAUSAL, 0.0, LOWEST)),
        mul(add(S, where(CAUSAL, 0.0, -INF)), 0.125),
        where(lt(Q, K), -INF, div(S, 8.0)),
    ],
    ids=str,
)
def test_causal_is_proved(score):
    assert is_causal(score) == Causal(0.125, const(0))
    assert mask_only(score) == 0.125


def test_causal_with_an_offset():
    assert is_causal(masked(le(K, add(Q, 3)))) == Causal(0.125, const(3))
    assert is_causal(masked(le(K, add(Q, integer(1))))) == Causal(0.125, integer(1))


@pytest.mark.parametrize(
    "score",
    [
        SCALED,
        NAMES["causal & padding"],
        NAMES["causal & sliding window 256"],
        NAMES["causal, soft-cap 50"],
        NAMES["anti-causal"],
        add(masked(CAUSAL), load(0, "f32", B, Q, K)),
        where(CAUSAL, SCALED, -1e4),  # not low enough whatever s is
        where(CAUSAL, SCALED, mul(S, -INF)),
        masked(le(K, mul(Q, 2))),
        masked(le(K, add(Q, load(0, "i64", B)))),
        max_(masked(CAUSAL), -1e9),
    ],
    ids=str,
)
def test_what_is_not_just_causal(score):
    assert is_causal(score) is None


def test_mask_only():
    assert mask_only(SCALED) == 0.125 and mask_only(S) == 1.0
    assert mask_only(NAMES["additive padding"]) == 0.125
    assert mask_only(NAMES["causal, soft-cap 50"]) is None
    assert mask_only(NAMES["causal, ALiBi"]) is None
    assert keep_condition(NAMES["causal & padding"]) is and_(CAUSAL, PADDING)

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

# One query of a static cache, at a position that a tensor of one element holds.
POSITION = load(0, "i64", const(0))
# One query of a dynamic cache that keeps a window: its keys begin at `first`.
SEEN = integer(0)
FIRST = max_(sub(SEEN, 31), 0)
# Queries whose positions are an input.
POSITION_IDS = load(0, "i64", Q)
# BigBird's blocks.
ROW, COLUMN = floordiv(Q, 16), floordiv(K, 16)
NEAR = and_(le(sub(ROW, COLUMN), 1), le(sub(COLUMN, ROW), 1))
EDGE = or_(eq(ROW, 0), eq(ROW, 10))

POSITIONS = {
    "keys up to a position": masked(le(K, POSITION)),
    "keys from a position": masked(ge(K, sub(POSITION, 31))),
    "keys up to a position & padding": masked(and_(le(K, POSITION), PADDING)),
    "sliding window 32 up to a position": masked(
        and_(le(add(K, FIRST), SEEN), lt(sub(SEEN, add(K, FIRST)), 32))
    ),
    "sliding window 64 up to a position": masked(and_(le(K, POSITION), lt(sub(POSITION, K), 64))),
    "keys up to a position & chunk of 48 at a position": masked(
        and_(le(K, POSITION), eq(floordiv(K, 48), floordiv(POSITION, 48)))
    ),
    "keys up to a position & chunk of 8 at a position": masked(
        and_(
            le(K, POSITION),
            eq(floordiv(add(K, load(1, "i64", B)), 8), floordiv(add(SEEN, load(1, "i64", B)), 8)),
        )
    ),
    "padding": masked(lt(K, load(0, "i64", B))),
    "padded queries": masked(lt(Q, load(0, "i64", B))),
    "causal in position ids": masked(le(K, POSITION_IDS)),
    "causal in position ids & padding": masked(and_(le(K, load(1, "i64", Q)), PADDING)),
    "causal & sliding window 32 in position ids": masked(
        and_(le(K, POSITION_IDS), lt(sub(POSITION_IDS, K), 32))
    ),
    "local window 8 to either side in position ids": masked(
        and_(
            le(sub(load(0, "i64", B, Q), load(1, "i64", B, K)), 8),
            ge(sub(load(0, "i64", B, Q), load(1, "i64", B, K)), -8),
        )
    ),
    "causal & same document": masked(and_(CAUSAL, eq(load(0, "i64", B, Q), load(1, "i64", B, K)))),
    "chunks of 48": masked(eq(floordiv(add(Q, 70), 48), floordiv(add(K, 23), 48))),
    "causal in blocks of 16": masked(le(COLUMN, ROW)),
    "(local window 1 to either side in blocks of 16 | global blocks of 16)": masked(
        or_(NEAR, EDGE, eq(COLUMN, 0), eq(COLUMN, 10))
    ),
    "no mask, some pairs count 3 times": add(SCALED, where(eq(COLUMN, 0), math.log(3), 0.0)),
    "no mask, distance bias": add(SCALED, where(le(abs_(DISTANCE), 3), 0.5, 0.0)),
}


@pytest.mark.parametrize("name", NAMES)
def test_describe(name):
    assert describe(NAMES[name]) == name


@pytest.mark.parametrize("name", POSITIONS)
def test_describe_positions(name):
    assert describe(POSITIONS[name]) == name


def test_keys_from_before_the_first_query():
    score = masked(and_(le(sub(K, Q), 70), lt(sub(Q, K), 10)))
    assert describe(score) == "at most 70 ahead & sliding window 80"
    assert describe(score, earlier=70) == "causal with an offset & sliding window 80"
    assert describe(score, earlier=60) == "at most 70 ahead & sliding window 80"
    assert describe(masked(CAUSAL), earlier=70) == "causal"


def bigbird_blocks(blocks):
    """What BigBird's blocks see without the random ones."""
    i, j = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    edge = (i == 0) | (i == blocks - 1) | (j == 0) | (j == blocks - 1)
    return edge | ((i - j).abs() <= 1)


@pytest.mark.parametrize(
    ("random", "name"),
    [
        ((), "global and window blocks of 16 (50% kept)"),
        ((4, 2, 7), "global, window and random blocks of 16 (51% kept)"),
    ],
)
def test_blocks_are_named_for_what_they_are(random, name):
    mask = bigbird_blocks(12)[None].repeat(2, 1, 1)
    for row in random:
        mask[1, row, (row + 5) % 12] = True
    score = masked(load(0, "bool", H, ROW, COLUMN))
    assert describe(score, [mask]) == name
    assert describe(score, [None]) == "mask of blocks of 16"


@pytest.mark.parametrize("spoil", [lambda x: x[:, ::2], lambda x: x | True, lambda x: x & False])
def test_blocks_of_no_such_kind(spoil):
    name = describe(masked(load(0, "bool", H, ROW, COLUMN)), [spoil(bigbird_blocks(12)[None])])
    assert name.startswith("mask of blocks of 16 (")


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

"""What is said about a tile is true of each of its elements; of common masks, nothing is missed."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_scores import BATCH, HEADS, INTS, SIZES, products, rebuilt, scores, tensors

from sparse_compiler.score import tiles
from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import (
    B,
    Expr,
    H,
    K,
    Q,
    S,
    abs_,
    add,
    and_,
    const,
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
    mod,
    mul,
    or_,
    parse,
    sub,
    tanh,
    to_float,
    to_text,
    where,
)
from sparse_compiler.score.tiles import (
    EMPTY,
    FULL,
    OPEN,
    PARTIAL,
    classify,
    fill_of,
    full_score,
    open_score,
)

INF = math.inf


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The tensors are so small that threads only cost time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LOWEST = torch.finfo(torch.float32).min


def spread(kinds: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """The kind of the tile that each element is in."""
    wide = kinds.repeat_interleave(64, 2).repeat_interleave(64, 3)
    return wide[:, :, :queries, :keys].expand(BATCH, HEADS, -1, -1)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding: constants are multiplied together when a score is built again."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


def check_sound(score: Expr, leaves: list[torch.Tensor], queries: int, keys: int) -> None:
    sizes = (BATCH, HEADS, queries, keys)
    kinds = classify(score, leaves, INTS, *sizes)
    assert kinds.dtype == torch.uint8 and kinds.is_contiguous()
    assert kinds.shape[:2] == (
        BATCH if score.depends_on("b") else 1,
        HEADS if score.depends_on("h") else 1,
    )
    where_ = spread(kinds, queries, keys)
    for s in products(queries, keys, torch.float32):
        values = evaluate(score, s, leaves, INTS, *sizes)
        assert bool((values <= tiles.DEAD + 0.01)[where_ == EMPTY].all()), "EMPTY is not empty"
        full = evaluate(full_score(score), s, leaves, INTS, *sizes)
        kept = evaluate(tiles.kept_score(score), s, leaves, INTS, *sizes)
        inside = where_ == FULL
        assert close(values[inside], full[inside]), "FULL is not full"
        assert close(values[inside], kept[inside])
        opened = open_score(score)
        assert opened is not None or not bool((kinds == OPEN).any())
        if opened is not None:
            less = evaluate(opened, s, leaves, INTS, *sizes)
            assert close(values[where_ == OPEN], less[where_ == OPEN]), "OPEN is not open"
        if not fill_of(score).finite:
            assert bool((values == -INF)[where_ == EMPTY].all()), "a finite fill was not announced"
    assert fill_of(score).skippable or not bool((kinds == EMPTY).any())


@settings(max_examples=150)
@given(scores(), SIZES, st.integers(0, 9))
def test_kinds_are_sound(score, sizes, seed):
    check_sound(rebuilt(parse(score)), tensors(seed, *sizes), *sizes)


@settings(max_examples=50)
@given(scores(), SIZES, st.integers(0, 9))
def test_kinds_are_sound_without_simplification(score, sizes, seed):
    check_sound(parse(score), tensors(seed, *sizes), *sizes)


@settings(max_examples=50)
@given(scores(), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 9))
def test_special_values_in_leaves(score, value, seed):
    leaves = tensors(seed, 130, 150)
    leaves[4][0, 70:, 3] = value
    leaves[5][1] = value
    leaves[6][1, 100:] = value
    score = rebuilt(parse(score))
    kinds = spread(classify(score, leaves, INTS, BATCH, HEADS, 130, 150), 130, 150)
    s = products(130, 150, torch.float32)[0]
    values = evaluate(score, s, leaves, INTS, BATCH, HEADS, 130, 150)
    full = evaluate(full_score(score), s, leaves, INTS, BATCH, HEADS, 130, 150)
    assert bool((values <= tiles.DEAD + 0.01)[kinds == EMPTY].all())
    assert close(values[kinds == FULL], full[kinds == FULL])


def exact_kinds(score: Expr, keep: torch.Tensor) -> torch.Tensor:
    """The kinds of tiles of a mask [B, H, M, N] that a look at every element gives."""
    pads = (0, -keep.shape[3] % 64, 0, -keep.shape[2] % 64)

    def pooled(some: torch.Tensor) -> torch.Tensor:
        wide = torch.nn.functional.pad(some.float(), pads)
        return wide.unflatten(3, (-1, 64)).unflatten(2, (-1, 64)).amax((3, 5)) > 0

    kinds = torch.full_like(pooled(keep), PARTIAL, dtype=torch.uint8)
    kinds[~pooled(keep)] = EMPTY
    kinds[~pooled(~keep)] = FULL
    return kinds[: BATCH if score.depends_on("b") else 1, : HEADS if score.depends_on("h") else 1]


def unopened(kinds: torch.Tensor) -> torch.Tensor:
    """OPEN tiles as the partial ones that they are."""
    return torch.where(kinds == OPEN, PARTIAL, kinds)


CAUSAL = le(K, Q)
DISTANCE = sub(Q, K)
PADDING = load(0, "bool", B, K)
SAME = eq(load(2, "i64", B, Q), load(2, "i64", B, K))
LOCAL = le(abs_(DISTANCE), 20)

# Masks of which everything is found that there is to find.
MASKS = {
    "nothing": const(True),
    "causal": CAUSAL,
    "strictly causal": lt(K, Q),
    "causal with an offset": le(K, add(Q, integer(1))),
    "anti-causal": ge(K, Q),
    "window": and_(CAUSAL, lt(DISTANCE, 100)),
    "narrow window": and_(CAUSAL, lt(DISTANCE, 3)),
    "window of one tile": and_(CAUSAL, lt(DISTANCE, 64)),
    "local": LOCAL,
    "padding": PADDING,
    "causal and padding": and_(CAUSAL, PADDING),
    "documents": SAME,
    "causal documents": and_(CAUSAL, SAME),
    "prefix": or_(CAUSAL, lt(K, load(3, "i64", B))),
    "chunks": eq(floordiv(Q, 100), floordiv(K, 100)),
    "causal chunks": and_(CAUSAL, eq(floordiv(Q, 64), floordiv(K, 64))),
    "local and global": or_(LOCAL, lt(K, 5), lt(Q, 5)),
    "local and chosen tokens": or_(LOCAL, load(0, "bool", B, K)),
    "mask tensor": load(1, "bool", Q, K),
    "mask of blocks": load(1, "bool", floordiv(Q, 64), floordiv(K, 64)),
    "mask of small blocks": load(1, "bool", floordiv(Q, 16), floordiv(K, 32)),
    "strided": eq(mod(DISTANCE, 200), 0),
    "heads": le(mul(K, add(H, 1)), Q),
}
# How a score says what its mask is.
FORMS = {
    "where": lambda keep: where(keep, mul(S, 0.125), -INF),
    "where finite": lambda keep: where(keep, mul(S, 0.125), LOWEST),
    "additive": lambda keep: add(mul(S, 0.125), where(keep, 0.0, LOWEST)),
    "additive infinite": lambda keep: mul(add(S, where(keep, 0.0, -INF)), 0.125),
    "from floats": lambda keep: add(mul(S, 0.125), mul(sub(1.0, to_float(keep)), -1e9)),
    "soft-capped": lambda keep: where(keep, mul(tanh(mul(S, 0.01)), 50.0), -INF),
    "clamped": lambda keep: max_(add(S, where(keep, 0.0, -INF)), LOWEST),
}


def mask_leaves(seed: int, queries: int, keys: int) -> list[torch.Tensor]:
    leaves = tensors(seed, queries, keys)
    leaves[3] = torch.tensor([30, 100])
    leaves[2] = torch.arange(max(queries, keys)) // torch.tensor([[40], [64]])
    return leaves


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MASKS)
def test_common_masks_are_exact(name, form):
    keep, score = MASKS[name], FORMS[form](MASKS[name])
    for sizes in ((200, 200), (130, 256), (1, 200)):
        leaves = mask_leaves(1, *sizes)
        nothing = torch.zeros(BATCH, HEADS, *sizes)
        values = evaluate(keep, nothing, leaves, INTS, *nothing.shape)
        kinds = classify(to_text(score), leaves, INTS, *nothing.shape)
        assert torch.equal(unopened(kinds), exact_kinds(score, values)), sizes
    check_sound(score, leaves, *sizes)


def test_a_padding_mask_of_ones_leaves_a_window_to_its_indices():
    inside = and_(CAUSAL, lt(DISTANCE, 100))
    masked = where(and_(PADDING, inside), mul(S, 0.125), -INF)
    alone = where(inside, mul(S, 0.125), -INF)
    assert open_score(masked) is alone and open_score(alone) is None
    assert open_score(where(PADDING, S, -INF)) is None  # that is the score of full tiles
    ones = torch.ones(BATCH, 300, dtype=torch.bool)
    kinds = classify(masked, [ones], INTS, BATCH, HEADS, 300, 300)
    assert not bool((kinds == PARTIAL).any()) and bool((kinds == OPEN).any())
    assert torch.equal(unopened(kinds)[:1], classify(alone, [], INTS, BATCH, HEADS, 300, 300))
    ones[0, 130] = False
    kinds = classify(masked, [ones], INTS, BATCH, HEADS, 300, 300)
    assert bool((kinds[0, 0, 2:, 2] != OPEN).all()) and kinds[1, 0, 2, 2].item() == OPEN
    added = add(mul(S, 0.125), where(PADDING, 0.0, -INF))
    assert open_score(where(inside, added, -INF)) is alone


def test_additive_mask_tensors():
    leaves = tensors(0, 200, 200)
    leaves[1] = (torch.arange(200) % 130)[:, None] >= torch.arange(200)
    leaves[4] = torch.where(leaves[1], 0.0, -INF).expand(BATCH, -1, -1).contiguous()
    score = add(mul(S, 0.125), load(4, "f32", B, Q, K))
    kinds = classify(score, leaves, INTS, BATCH, HEADS, 200, 200)
    keep = leaves[1].expand(BATCH, HEADS, -1, -1)
    assert torch.equal(unopened(kinds), exact_kinds(score, keep))
    leaves[4] = leaves[4].to(torch.bfloat16)
    half = add(mul(S, 0.125), load(4, "bf16", B, Q, K))
    assert torch.equal(classify(half, leaves, INTS, BATCH, HEADS, 200, 200), kinds)
    # Zeros that are -100 leave nothing empty: their weight is not 0.
    leaves[4] = torch.where(leaves[1], 0.0, -100.0).expand(BATCH, -1, -1).contiguous()
    kinds = classify(score, leaves, INTS, BATCH, HEADS, 200, 200)
    assert not bool((kinds == EMPTY).any()) and bool((kinds == FULL).any())


def test_integer_masks_from_memory():
    """``(1 - attention_mask) * -10000`` of integers: their values decide."""
    attended = (torch.arange(200) < torch.tensor([[70], [150]])).long()
    score = add(S, mul(sub(1.0, to_float(load(0, "i64", B, K))), -10000.0))
    kinds = classify(score, [attended], (), BATCH, HEADS, 10, 200)
    keep = attended.bool()[:, None, None].expand(-1, HEADS, 10, -1)
    assert torch.equal(unopened(kinds), exact_kinds(score, keep))
    assert full_score(score) is S
    kinds = classify(score, [attended * 2], (), BATCH, HEADS, 10, 200)
    assert not bool((kinds == FULL).any())


def test_biases_stay_in_full_tiles():
    bias = load(0, "f32", H, Q, K)
    score = add(add(mul(S, 0.125), bias), where(CAUSAL, 0.0, -INF))
    assert full_score(score) is add(mul(S, 0.125), bias)
    kinds = classify(score, [torch.randn(2, 200, 200)], (), 1, 2, 200, 200)
    assert torch.equal(kinds[:, :1], classify(FORMS["where"](CAUSAL), [], (), 1, 1, 200, 200))
    # A bias that is a mask itself.
    low = torch.zeros(2, 200, 200)
    low[1, :, 100:] = -INF
    kinds = classify(add(S, bias), [low], (), 1, 2, 200, 200)

    assert bool((kinds[0, 1, :, 2:] == EMPTY).all())


def test_steep_alibi_is_empty_far_away():
    distance = to_float(sub(K, Q))
    score = where(CAUSAL, add(S, mul(load(0, "f32", H), distance)), -INF)
    kinds = classify(score, [torch.tensor([0.5, 64.0])], (), 1, 2, 512, 512)
    assert kinds[0, 0, 7].tolist() == [FULL] * 7 + [PARTIAL]
    assert kinds[0, 1, 7].tolist() == [EMPTY] * 4 + [FULL] * 3 + [PARTIAL]
    assert fill_of(score).finite and fill_of(score).needs_bound


@pytest.mark.parametrize(
    ("score", "finite", "needs_bound", "skippable", "near_miss"),
    [
        (mul(S, 0.125), False, False, False, None),
        (where(CAUSAL, S, -INF), False, False, True, None),
        (add(S, where(CAUSAL, 0.0, -INF)), False, False, True, None),
        (where(CAUSAL, S, -1e9), True, False, True, None),
        (add(S, where(CAUSAL, 0.0, -1e9)), True, True, True, None),
        (add(S, where(CAUSAL, 0.0, LOWEST)), True, False, True, None),
        (add(add(S, where(CAUSAL, 0.0, -INF)), where(PADDING, 0.0, -1e4)), True, True, True, None),
        (max_(where(CAUSAL, S, -INF), LOWEST), True, False, True, None),
        (where(CAUSAL, S, -100.0), False, False, False, -100.0),
        (add(S, where(CAUSAL, 0.0, -100.0)), False, False, False, -100.0),
        (where(CAUSAL, S, -5001.0), True, False, True, None),
        (where(CAUSAL, S, -4999.0), False, False, False, -4999.0),
        (add(S, load(0, "f32", B, Q, K)), True, True, True, None),
        (mul(S, 100.0), False, False, False, None),
    ],
)
def test_fill_of(score, finite, needs_bound, skippable, near_miss):
    fill = fill_of(score)
    found = (fill.finite, fill.needs_bound, fill.skippable, fill.near_miss)
    assert found == (finite, needs_bound, skippable, near_miss)


def test_conditions_that_contradict_each_other():
    other = Expr("not", (CAUSAL,))
    never = Expr("where", (other, Expr("where", (other, const(-INF), S)), const(-INF)))
    kinds = classify(never, [], (), 1, 1, 128, 128)
    assert not bool((kinds == FULL).any())


def test_nan_is_neither_empty_nor_full():
    mask = torch.full((1, 64, 192), -INF)
    mask[0, :, 64:128] = 0
    score = add(S, load(0, "f32", B, Q, K))
    assert classify(score, [mask], (), 1, 1, 64, 192).flatten().tolist() == [EMPTY, FULL, EMPTY]
    mask[0, 3, ::64] = math.nan
    assert classify(score, [mask], (), 1, 1, 64, 192).flatten().tolist() == [PARTIAL] * 3
    # The smaller one of NaN and a low number is NaN.
    slopes = torch.tensor([math.nan])
    lower = add(S, Expr("min", (load(0, "f32", H), const(-1e9))))
    assert classify(lower, [slopes], (), 1, 1, 64, 64).item() != EMPTY


def test_infinities_that_cancel_are_not_empty():
    one = torch.full((1, 64, 64), -INF)
    other = torch.full((1, 64, 64), INF)
    score = add(add(S, load(0, "f32", B, Q, K)), load(1, "f32", B, Q, K))
    assert classify(score, [one, other], (), 1, 1, 64, 64).item() == PARTIAL
    product = add(S, mul(load(0, "f32", B, Q, K), load(1, "f32", B, Q, K)))
    assert classify(product, [one, torch.zeros(1, 64, 64)], (), 1, 1, 64, 64).item() == PARTIAL


def test_functions_that_kernels_round_differently_decide_nothing_close():
    """exp(log(7)) may or may not be 7."""
    seven = exp(log(to_float(add(mul(Q, 0), add(K, 7)))))
    score = where(le(seven, 7.0 + 63), S, -INF)
    assert classify(score, [], (), 1, 1, 1, 64).item() == PARTIAL
    assert classify(where(le(seven, 7.1 + 63), S, -INF), [], (), 1, 1, 1, 64).item() == FULL


def test_large_floats_that_cancel_are_not_empty():
    """3.4e38 + s - 3.4e38 is about 0, however low the last term is."""
    mask = torch.full((1, 64, 64), LOWEST)
    read = load(0, "f32", B, Q, K)
    score = add(add(S, mul(read, -1.0)), read)
    assert classify(score, [mask], (), 1, 1, 64, 64).item() != EMPTY


def test_large_integers_are_not_mixed_up():
    """Two ids that are one double precision number are not the same document."""
    ids = torch.tensor([[2**53, 2**53 + 1]]).repeat_interleave(64, 1)
    score = FORMS["where"](eq(load(0, "i64", B, Q), load(0, "i64", B, K)))
    kinds = classify(score, [ids], (), 1, 1, 128, 128)
    assert not bool((kinds[0, 0].flatten()[1:3] == FULL).any())
    big = torch.tensor([[2**62, -(2**62)]]).repeat_interleave(64, 1)
    ordered = FORMS["where"](gt(mul(load(0, "i64", B, Q), 2), sub(load(0, "i64", B, K), 1)))
    check_sound(ordered, [big.expand(BATCH, -1)], 128, 128)


@example(to_text(FORMS["where"](CAUSAL)))
@settings(max_examples=20)
@given(scores())
def test_parts_are_classified_as_the_whole(text):
    """However many tiles are looked at together, their kinds are the same."""
    leaves = tensors(3, 200, 150)
    whole = classify(text, leaves, INTS, BATCH, HEADS, 200, 150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_TILES", 1)
        assert torch.equal(classify(text, leaves, INTS, BATCH, HEADS, 200, 150), whole)


def test_no_tiles():
    assert classify(S, [], (), 1, 1, 0, 10).shape == (1, 1, 0, 1)
    assert tiles.density(classify(S, [], (), 1, 1, 0, 10)) == 1.0
    with pytest.raises(ValueError, match="a score is a float"):
        classify(CAUSAL, [], (), 1, 1, 64, 64)


def test_fractions():
    kinds = classify(FORMS["where"](CAUSAL), [], (), 1, 1, 256, 256)
    assert tiles.fractions(kinds) == (6 / 16, 4 / 16, 6 / 16)
    assert tiles.density(kinds) == 10 / 16


def test_deep_expressions_are_partial():
    score = S
    for _ in range(2000):
        score = tanh(add(score, 1.0))
    assert classify(score, [], (), 1, 1, 64, 64).item() == PARTIAL
    assert not fill_of(score).skippable


def test_long_chains_are_looked_at():
    """A mask that lists its global tokens one by one."""
    tokens = or_(LOCAL, *(eq(K, 3 * i) for i in range(400)))
    kinds = classify(FORMS["where"](tokens), [], (), 1, 1, 64, 4096)
    assert kinds[0, 0, 0, 20:].tolist() == [EMPTY] * 44

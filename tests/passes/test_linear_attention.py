"""Attention without softmax: every spelling, against float64 eager; and what is left alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers import compiled, count, listening
from tests.passes.linear_attention_spellings import (
    ALL_KEYS,
    CAUSAL,
    CHUNK,
    FEATURES,
    Model,
    assert_same,
    divided_after,
    einsum_normalised,
    elu,
    featured,
    inputs,
    linearized,
    mask_filled,
    mask_multiplied,
    matmul,
    padded_and_causal,
    plus_one,
    relu,
    running_sums,
    running_sums_before,
    running_sums_summed,
    the_only,
    tril,
)


@pytest.mark.parametrize("spelling", ALL_KEYS, ids=lambda f: f.__name__)
def test_all_keys(spelling):
    function = featured(spelling, elu)
    args = inputs(50)
    graph, rewrites = linearized(function, *args)
    rewrite = the_only(rewrites)
    assert rewrite.applied and rewrite.pattern == "all keys" and rewrite.format == "reordered"
    assert rewrite.kind == "linear_attention" and rewrite.shape == (6, 50, 50, 8, 12)
    assert_same(graph, function, args)
    assert not any(
        node.meta["val"].numel() >= 6 * 50 * 50
        for node in graph.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    )


@pytest.mark.parametrize("spelling", CAUSAL, ids=lambda f: f.__name__)
def test_causal(spelling):
    function = featured(spelling, elu)
    args = inputs(200)
    graph, rewrites = linearized(function, *args)
    rewrite = the_only(rewrites)
    assert rewrite.applied and rewrite.pattern == "causal" and rewrite.format == "chunks of 64"
    assert rewrite.shape == (6, 200, 200, 8, 12)
    assert_same(graph, function, args)
    assert not any(
        node.meta["val"].numel() >= 6 * 200 * min(200, 8 * 12)
        for node in graph.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    )


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("spelling", [einsum_normalised, mask_filled, running_sums])
def test_feature_maps_are_left_alone(spelling, features):
    function = featured(spelling, features)
    args = inputs(300, 4, 6, batch=1, heads=2)
    graph, rewrites = linearized(function, *args)
    assert the_only(rewrites).applied
    assert_same(graph, function, args)


@settings(max_examples=25)
@given(
    spelling=st.sampled_from(CAUSAL),
    features=st.sampled_from([elu, relu]),
    n=st.one_of(st.integers(66, 400), st.sampled_from([64, 128, 65, 127, 3136, 4000])),
    d=st.integers(2, 9),
    e=st.integers(2, 9),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
)
def test_causal_of_any_size(spelling, features, n, d, e, batch, heads):
    heads = 1 if n > 1000 else heads
    function = featured(spelling, features)
    args = inputs(n, d, e, batch=batch, heads=heads)
    graph, rewrites = linearized(function, *args, verify=False)
    assert the_only(rewrites).applied
    assert_same(graph, function, args)


@settings(max_examples=25)
@given(
    spelling=st.sampled_from(ALL_KEYS),
    n=st.integers(40, 90),
    keys=st.integers(40, 90),
    d=st.integers(2, 6),
    e=st.integers(2, 6),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
)
def test_all_keys_of_any_size(spelling, n, keys, d, e, batch, heads):
    function = featured(spelling, elu)
    args = inputs(n, d, e, batch=batch, heads=heads, keys=keys)
    graph, rewrites = linearized(function, *args, verify=False)
    assert the_only(rewrites).applied
    assert_same(graph, function, args)


@pytest.mark.parametrize("n", [1, 2, 5, 33, 63])
@pytest.mark.parametrize("spelling", CAUSAL, ids=lambda f: f.__name__)
def test_fewer_positions_than_a_chunk(spelling, n):
    function = featured(spelling, elu)
    args = inputs(n)
    graph, _ = linearized(function, *args)
    assert_same(graph, function, args)


@pytest.mark.parametrize(
    "spelling",
    [tril, mask_filled, padded_and_causal, running_sums, running_sums_before, divided_after],
)
def test_dynamic_lengths(spelling):
    function = featured(spelling, elu)
    n, b = torch.export.Dim("n", min=2, max=8192), torch.export.Dim("b", min=2, max=64)
    graph, rewrites = linearized(Three(function), *inputs(200), dynamic=({0: b, 2: n},) * 3)
    assert the_only(rewrites).applied
    for length, batch in ((2, 2), (63, 3), (64, 2), (65, 2), (200, 5), (1024, 2), (3333, 2)):
        args = inputs(length, batch=batch)
        want, got = function(*args), graph(*args)
        assert (want - got).abs().max() <= 1e-12 * want.abs().max()


class Three(nn.Module):
    """Three inputs by name, which is how ``torch.export`` takes dynamic shapes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v):
        return self.function(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", [tril, mask_filled, running_sums, matmul, einsum_normalised])
def test_rounding_is_that_of_eager(spelling, dtype):
    function = featured(spelling, elu)
    args = inputs(1000, 32, 32, batch=1, dtype=dtype)
    graph, rewrites = linearized(function, *args, verify=False)
    assert the_only(rewrites).applied and the_only(rewrites).dtype == str(dtype)[6:]
    exact = function(*(x.double() for x in args))
    got, eager = (f(*args).double() - exact for f in (graph, function))
    scale = exact.abs().max()
    assert got.abs().max() <= 3 * eager.abs().max() + 2 * torch.finfo(dtype).eps * scale
    assert got.square().mean() <= 9 * eager.square().mean() + (torch.finfo(dtype).eps * scale) ** 2


def test_mixed_precision_computes_in_the_wider_dtype():
    def function(q, k, v):
        scores = (elu(q) @ elu(k).mT).float()
        return torch.tril(scores) @ v.float()

    args = inputs(300, dtype=torch.bfloat16)
    graph, rewrites = linearized(function, *args, verify=False)
    assert the_only(rewrites).applied
    exact = function(*(x.double() for x in args))
    features = [elu(x).double() for x in args[:2]]
    exact = torch.tril(features[0] @ features[1].mT) @ args[2].double()
    assert (graph(*args) - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_a_number_is_not_summed_over_a_dynamic_dimension():
    function = featured(plus_one, elu)
    n = torch.export.Dim("n", min=2, max=8192)
    graph, rewrites = linearized(Three(function), *inputs(200), dynamic=({2: n},) * 3)
    assert not the_only(rewrites).applied
    args = inputs(90)
    assert torch.equal(graph(*args), function(*args))


def test_shared_keys_stay_shared():
    def function(q, k, v):
        k, v = (x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(2, 6, *x.shape[2:]) for x in (k, v))
        return torch.tril(q @ k.mT) @ v

    q, k, v = inputs(200, heads=6)[0], *inputs(200, heads=2)[1:]
    graph, rewrites = linearized(function, q, k, v)
    assert the_only(rewrites).applied
    assert_same(graph, function, (q, k, v))


def test_scores_of_one_head_serve_all():
    def function(q, k, v):
        return torch.einsum("bij,bhje->bhie", torch.einsum("bid,bjd->bij", q[:, 0], k[:, 0]), v)

    args = inputs(150)
    graph, rewrites = linearized(function, *args)
    assert the_only(rewrites).applied
    assert_same(graph, function, args)


def test_scores_are_computed_once():
    """The normaliser shares the scores inside the chunks with the output."""
    graph, _ = linearized(mask_filled, *inputs(256))
    tensors = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta]
    shapes = [tuple(x.shape) for x in tensors if isinstance(x, torch.Tensor)]
    assert shapes.count((2, 3, 4, CHUNK, CHUNK)) == 2  # the product, and its lower triangle


def test_a_state_is_carried_from_one_piece_to_the_next():
    """Causal Performer on CPUs: pieces of the sequence, running sums over each."""

    def function(q, k, v):
        keys, states, pieces = 0, 0, []
        for a, b, c in zip(*(x.chunk(3, dim=-2) for x in (q, k, v)), strict=True):
            keys = keys + b.cumsum(dim=-2)
            inverse = 1.0 / torch.einsum("...nd,...nd->...n", a, keys.type_as(a) + 1e-6)
            context = torch.einsum("...nd,...ne->...nde", b, c)
            states = states + context.cumsum(dim=-3)
            pieces.append(torch.einsum("...nde,...nd,...n->...ne", states, a, inverse))
            keys, states = keys[:, :, -1:], states[:, :, -1:]
        return torch.cat(pieces, dim=-2)

    function = featured(function, elu)
    args = inputs(500)
    graph, rewrites = linearized(function, *args)
    assert len(rewrites) == 3 and all(rewrite.applied for rewrite in rewrites)
    assert count(graph, "cumsum") == 0
    assert_same(graph, function, args)


# ---- what is left alone, and why


def through(change):
    return lambda q, k, v: change(q @ k.mT) @ v


def decayed(q, k, v):
    position = torch.arange(q.shape[-2])
    distance = position[:, None] - position[None]
    return (q @ k.mT) * (0.9**distance).tril() @ v


REFUSALS = {
    "the scores go through relu, which does not commute with the sum over the keys": [
        through(F.relu),
        through(lambda s: F.relu(s * 0.3).tril()),
        lambda q, k, v: F.relu(q @ k.mT).div(q.shape[-2]).flatten(0, 1) @ v.flatten(0, 1),
    ],
    "the scores go through exp, which does not commute with the sum over the keys": [
        through(torch.exp)
    ],
    "the scores go through pow, which does not commute with the sum over the keys": [
        through(lambda s: s**2)
    ],
    "the scores go through mul, which does not commute with the sum over the keys": [
        through(lambda s: s * s)
    ],
    "the scores go through masked_fill, which does not commute with the sum over the keys": [
        through(lambda s: s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, -1.0))
    ],
    "dropout is applied to the scores: each has to be drawn on its own": [
        through(lambda s: F.dropout(s, 0.1, training=True)),
        through(lambda s: F.dropout(s.tril() / 4, 0.1, training=True)),
    ],
    "matmul is also used by output: it has to be computed anyway": [
        lambda q, k, v: ((s := q @ k.mT) @ v, s),
    ],
    "matmul is also used by amax: it has to be computed anyway": [
        lambda q, k, v: (s := q @ k.mT) @ v + s.amax(-1, keepdim=True),
    ],
    "the scores are multiplied by tril, which depends on the query and on the key": [decayed],
    "it is linear already: keys times values are summed first, O(n d e)": [
        lambda q, k, v: q @ (k.mT @ v),
        lambda q, k, v: torch.einsum(
            "bhnd,bhde,bhn->bhne",
            q,
            torch.einsum("bhnd,bhne->bhde", k, v),
            1 / torch.einsum("bhnd,bhd->bhn", q, k.sum(2)),
        ),
    ],
}


@pytest.mark.parametrize(
    ("reason", "function"),
    [(reason, function) for reason, functions in REFUSALS.items() for function in functions],
)
def test_refusals(reason, function):
    args = inputs(100)
    _, rewrites = linearized(function, *args)
    rewrite = the_only(rewrites)
    assert rewrite.reason == reason and not rewrite.applied and rewrite.format == "dense"


@pytest.mark.parametrize(
    "function",
    [
        through(lambda s: s.softmax(-1)),
        through(lambda s: (s / 8).masked_fill(s < 0, -torch.inf).softmax(-1)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: q[..., :1, :] @ k.mT @ v,  # one query: as cheap as it gets
        lambda q, k, v: q * 2 + v.sum(-1, keepdim=True),
    ],
)
def test_other_models_are_no_candidates(function):
    _, rewrites = linearized(function, *inputs(100))
    assert rewrites == []


def test_layers_are_no_attention():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(*s)) for s in ((8, 99), (99, 8)))
            self.experts = nn.Parameter(torch.randn(4, 8, 99))

        def forward(self, x, chosen):
            picked = self.experts[chosen]
            return x @ self.up @ self.down + F.silu(torch.bmm(x, picked)) @ picked.mT

    _, rewrites = linearized(Layers(), torch.randn(2, 64, 8), torch.tensor([1, 3]))
    assert rewrites == []


def test_float16_sums_overflow():
    _, rewrites = linearized(matmul, *inputs(100, dtype=torch.float16))
    assert the_only(rewrites).reason == (
        "in float16 sums over all keys may overflow: use bfloat16 or float32"
    )


def test_buckets_are_linear_already():
    def function(q, k, v):
        q, k, v = (x.unflatten(2, (-1, 20)) for x in (q, k, v))
        context = torch.einsum("bhund,bhune->bhude", k, v).cumsum(-3)
        context = F.pad(context, (0, 0, 0, 0, 1, 0))[:, :, :-1]
        return torch.einsum("bhund,bhude->bhune", q, context).flatten(2, 3)

    _, rewrites = linearized(function, *inputs(100))
    assert the_only(rewrites).reason.startswith("it is linear already")


def test_scores_that_others_overwrite():
    def function(q, k, v):
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        scores.mul_(0.5).masked_fill_(torch.ones(q.shape[-2], q.shape[-2]).tril() == 0, 0.0)
        return torch.einsum("bhij,bhje->bhie", scores, v)

    args = inputs(150)
    graph, rewrites = linearized(function, *args)
    assert the_only(rewrites).applied
    want = function(*args)
    assert (graph(*args) - want).abs().max() <= 1e-12 * want.abs().max()


def test_queries_that_are_overwritten():
    def function(q, k, v):
        q = q * 2
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        q.zero_()
        return torch.einsum("bhij,bhje->bhie", scores, v), q

    args = inputs(100)
    graph, rewrites = linearized(function, *args)
    assert the_only(rewrites).reason == "mul, which it reads, is written to in place"
    assert torch.equal(graph(*args)[0], function(*args)[0])


def test_scores_overwritten_through_a_view():
    def function(q, k, v):
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        scores.view(-1)[5:].zero_()
        return torch.einsum("bhij,bhje->bhie", scores, v)

    args = inputs(100)
    graph, _ = linearized(function, *args)
    assert torch.equal(graph(*args), function(*args))


# ---- numbers that are not finite


@pytest.mark.parametrize("spelling", [matmul, tril, mask_multiplied, running_sums_summed])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(spelling, which, value):
    args = inputs(300)
    args[which][0, 1, 170, 3] = value
    graph, rewrites = linearized(spelling, *args)
    assert the_only(rewrites).applied
    want, got = spelling(*args), graph(*args)
    assert not (got.isfinite() & ~want.isfinite()).any()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    assert got[others].isfinite().all()


# ---- decisions


def test_short_sequences_stay_as_they_are():
    for n, applied in ((80, False), (2048, True)):
        args = inputs(n, 32, 32, batch=1, heads=4, dtype=torch.float32)
        _, rewrites = linearized(mask_filled, *args, selection="model", verify=False)
        rewrite = the_only(rewrites)
        assert rewrite.applied is applied and "the roofline model expects" in rewrite.reason
        assert rewrite.speedup == pytest.approx(rewrite.baseline_ms / rewrite.sparse_ms)
        assert rewrite.spelling == "matmul, masked_fill, sum, div, matmul"


@pytest.mark.parametrize("spelling", [mask_filled, running_sums])
def test_both_forms_are_timed(spelling):
    args = inputs(1024, 32, 32, batch=1, heads=2, dtype=torch.float32)
    graph, rewrites = linearized(spelling, *args, selection="measure", verify=False)
    rewrite = the_only(rewrites)
    assert rewrite.applied and rewrite.reason.startswith("measured ")
    assert rewrite.speedup == pytest.approx(rewrite.baseline_ms / rewrite.sparse_ms)
    torch.testing.assert_close(graph(*args), spelling(*args), rtol=1e-3, atol=1e-2)


def test_without_time_to_measure_nothing_is_changed():
    args = inputs(1000, 32, 24, batch=1, heads=2, dtype=torch.float32)
    graph, rewrites = linearized(
        mask_filled, *args, selection="measure", selection_budget=0.0, verify=False
    )
    assert not the_only(rewrites).applied
    assert the_only(rewrites).reason.startswith("no time was left to measure it")
    assert not graph.meta.get("edits")


def test_fuel():
    def two(q, k, v):
        return tril(q, k, tril(q, k, v))

    _, rewrites = linearized(two, *inputs(100), fuel=1)
    assert [rewrite.applied for rewrite in rewrites] == [True, False]
    assert rewrites[1].reason == "options['fuel'] is used up"


# ---- compiled


@pytest.fixture
def qkv():
    return [x.requires_grad_() for x in inputs(150, dtype=torch.float32)]


@pytest.mark.parametrize("spelling", [mask_filled, running_sums])
def test_compiled_and_trained(spelling, qkv):
    function = featured(spelling, elu)
    with listening() as records:
        got = compiled(Model(function))(*qkv)
    assert [r.applied for record in records for r in record.rewrites] == [True]
    want = function(*qkv)
    direction = torch.randn_like(want)
    pairs = zip(
        (got, *torch.autograd.grad(got, qkv, direction)),
        (want, *torch.autograd.grad(want, qkv, direction)),
        strict=True,
    )
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_results_larger_than_all_factors():
    args = inputs(81, 2, 5, keys=40, batch=1, heads=1)
    graph, rewrites = linearized(matmul, *args)
    assert the_only(rewrites).applied
    assert_same(graph, matmul, args)


@pytest.mark.slow
def test_compiled_with_dynamic_lengths():
    function = featured(mask_filled, elu)
    model = compiled(Model(function), passes=["linear_attention"])
    torch._dynamo.reset()
    with torch.no_grad(), listening() as records:
        for n in (150, 200, 333, 70):
            args = inputs(n, dtype=torch.float32)
            torch.testing.assert_close(model(*args), function(*args), rtol=1e-4, atol=1e-5)
    assert len(records) == 2  # static, then dynamic


def test_a_mask_that_changes_is_noticed():
    def function(q, k, v, bias):
        return (q @ k.mT).masked_fill(bias == 0, 0.0) @ v

    args = inputs(150, dtype=torch.float32)
    model = Model(function, bias=torch.tril(torch.ones(150, 150)))
    fast = compiled(model)
    with torch.no_grad(), listening() as records:
        torch.testing.assert_close(fast(*args), model(*args), rtol=1e-4, atol=1e-4)
        assert [r.applied for r in records[0].rewrites] == [True]
        model.bias[149, 3] = 0
        torch.testing.assert_close(fast(*args), model(*args), rtol=1e-4, atol=1e-4)


def test_linear_attention_transformer():
    package = pytest.importorskip("linear_attention_transformer")
    torch.manual_seed(0)
    for causal, applied in ((True, True), (False, False)):
        model = package.LinearAttentionTransformer(
            dim=32, heads=2, depth=2, max_seq_len=128, causal=causal
        ).eval()
        x = torch.randn(1, 128, 32)
        with torch.no_grad():
            graph, rewrites = linearized(model, x, verify=False)
            torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-4)
        assert [rewrite.applied for rewrite in rewrites] == [applied] * 2

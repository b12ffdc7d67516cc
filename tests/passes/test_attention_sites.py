"""Attention is found however it is written, and refused with a sentence where it is not one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_graphs import Heads, X, all_sites, noise, only_site, refusal, traced
from torch import nn

from sparse_compiler.canonical import canonicalize
from sparse_compiler.passes.attention.site import Site, find_sites
from sparse_compiler.score.expr import to_text
from sparse_compiler.static import StaticValues

SCALE = 1 / math.sqrt(8)
LOWEST = torch.finfo(torch.float32).min
T = torch.Tensor
MIXING = noise(4, 4)
WEIGHT = noise(5, 32)


def causal(length: int) -> T:
    return torch.ones(length, length, dtype=torch.bool).tril()


def repeat_kv(x: T, times: int) -> T:
    batch, heads, length, channels = x.shape
    x = x[:, :, None].expand(batch, heads, times, length, channels)
    return x.reshape(batch, heads * times, length, channels)


# Spellings of plain attention with a scale of 1/8: each gives (mul s 0.125).
def after(q: T, k: T, v: T) -> T:
    return torch.matmul(q, k.transpose(-2, -1)).mul(0.125).softmax(-1) @ v


def divided(q: T, k: T, v: T) -> T:
    return F.softmax(torch.matmul(q, k.mT) / 8, -1).matmul(v)


def query_scaled(q: T, k: T, v: T) -> T:
    return torch.softmax((q * 0.125) @ k.transpose(2, 3), dim=-1) @ v


def key_scaled(q: T, k: T, v: T) -> T:
    return torch.softmax(q @ (k.transpose(2, 3) / 8), dim=-1) @ v


def both_scaled(q: T, k: T, v: T) -> T:
    return torch.softmax((q * 0.25) @ (k * 0.5).transpose(2, 3), dim=-1) @ v


def einsum(q: T, k: T, v: T) -> T:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.125
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def einsum_ellipsis(q: T, k: T, v: T) -> T:
    scores = torch.einsum("...id,...jd->...ij", q * 0.125, k)
    return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


def einsum_positions_first(q: T, k: T, v: T) -> T:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.125
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).transpose(1, 2)


def keys_first(q: T, k: T, v: T) -> T:
    return (k @ q.mT * 0.125).transpose(-1, -2).softmax(-1) @ v


def keys_down(q: T, k: T, v: T) -> T:
    """Scores [..., keys, queries], their softmax over the keys, and values from the left."""
    return (v.mT @ (k @ q.mT * 0.125).softmax(-2)).mT


def batched(q: T, k: T, v: T) -> T:
    q, k, v = (x.reshape(8, 10, 8) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.125).softmax(-1), v).view(2, 4, 10, 8)


def batched_with_views(q: T, k: T, v: T) -> T:
    """As BLOOM does: rank 3 for the products, rank 4 for the softmax."""
    q, k, v = (x.reshape(8, 10, 8) for x in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(8, 10, 10), q, k.mT, beta=0, alpha=0.125)
    weights = scores.view(2, 4, 10, 10).softmax(-1).view(8, 10, 10)
    return torch.bmm(weights, v).view(2, 4, 10, 8)


def converted(q: T, k: T, v: T) -> T:
    scores = (q.float() @ k.float().mT) * 0.125
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def by_hand(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.125
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True) @ v


def by_hand_unsqueezed(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.125
    powers = (scores - scores.max(-1)[0].unsqueeze(-1)).exp()
    return powers / powers.sum(-1).unsqueeze(-1) @ v


def by_logarithms(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.125
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def of_log_softmax(q: T, k: T, v: T) -> T:
    return (q @ k.mT * 0.125).log_softmax(-1).exp() @ v


def safe(q: T, k: T, v: T) -> T:
    scores = q @ k.mT * 0.125
    return (scores - scores.max(-1, keepdim=True).values.detach()).softmax(-1) @ v


def in_place(q: T, k: T, v: T) -> T:
    q, k, v = (x.reshape(8, 10, 8) for x in (q, k, v))
    scores = torch.bmm(q, k.mT)
    scores *= 0.25
    scores /= 2
    return (scores.softmax(-1) @ v).view(2, 4, 10, 8)


def fused(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, scale=0.125)


PLAIN = [
    after, divided, query_scaled, key_scaled, both_scaled, einsum, einsum_ellipsis,
    einsum_positions_first, keys_first, keys_down, batched, batched_with_views, converted, by_hand,
    by_hand_unsqueezed, by_logarithms, of_log_softmax, safe, in_place, fused,
]  # fmt: skip


@pytest.mark.parametrize("attend", PLAIN, ids=lambda f: f.__name__)
def test_spellings_of_plain_attention(attend: Callable[..., T]) -> None:
    site = only_site(Heads(attend), X)
    assert to_text(site.score) == "(mul s 0.125)"
    assert (site.batch, site.heads, site.kv_heads) == (2, 4, 4)
    assert (site.queries, site.keys, site.head_dim, site.value_dim) == (10, 10, 8, 8)
    assert not site.leaves and not site.integers and site.sink is None and not site.repeats


@pytest.mark.parametrize("attend", [after, einsum, batched_with_views, fused])
def test_bfloat16(attend: Callable[..., T]) -> None:
    site = only_site(Heads(attend), X.bfloat16())
    assert site.dtype is torch.bfloat16
    assert to_text(site.score) == "(mul s 0.125)"


@pytest.mark.parametrize("attend", [after, einsum_positions_first, fused, by_hand])
def test_dynamic_shapes(attend: Callable[..., T]) -> None:
    site = only_site(Heads(attend), X, dynamic=True)
    assert site.leaves == () or site.leaves[0].dtype == "f64"  # a scale that Dynamo made an input
    assert isinstance(site.queries, torch.SymInt) and int(site.queries.node.hint) == 10


def test_queries_and_keys_of_different_number() -> None:
    def attend(q: T, k: T, v: T) -> T:
        return (q[:, :, -3:] @ k.mT).softmax(-1) @ v

    site = only_site(Heads(attend), X)
    assert (site.queries, site.keys) == (3, 10)


@pytest.mark.parametrize("length", [1, 10])
def test_one_query(length: int) -> None:
    def attend(q: T, k: T, v: T) -> T:
        mask = torch.arange(k.shape[2]) <= 4
        return (q[:, :, -1:] @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v

    site = only_site(Heads(attend), X[:, :length])
    assert site.queries == 1 and site.keys == length


def test_one_matrix() -> None:
    def attend(x: T) -> T:
        return (x @ x.sin().t()).softmax(-1) @ x.cos()

    site = only_site(attend, X[0])
    assert (site.batch, site.heads, site.queries, site.head_dim) == (1, 1, 10, 32)


def test_learned_queries() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = nn.Parameter(noise(1, 3, 32))

        def forward(self, x: T) -> T:
            q = self.latents.expand(x.shape[0], -1, -1)
            return (q @ x.mT).softmax(-1) @ x

    site = only_site(Pool(), X)
    assert (site.batch, site.heads, site.queries, site.keys) == (2, 1, 3, 10)


def test_more_than_two_leading_dimensions() -> None:
    def attend(x: T) -> T:  # axial: rows are a batch of their own
        x = x.view(2, 5, 2, 2, 16).transpose(2, 3)
        return (x @ x.sin().mT).softmax(-1) @ x

    site = only_site(attend, X)
    assert (site.batch, site.heads, site.queries) == (10, 2, 2)


# Keys and values with fewer heads.
def repeated(q: T, k: T, v: T) -> T:
    return (q @ repeat_kv(k, 2).mT).softmax(-1) @ repeat_kv(v, 2)


def interleaved(q: T, k: T, v: T) -> T:
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def interleaved_fused(q: T, k: T, v: T) -> T:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def grouped_flag(q: T, k: T, v: T) -> T:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True)


def grouped(q: T, k: T, v: T) -> T:
    """Groups as a dimension of their own."""
    q = q.unflatten(1, (2, 2))
    weights = (q @ k.unsqueeze(2).mT).softmax(-1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def grouped_einsum(q: T, k: T, v: T) -> T:
    q = q.reshape(2, 2, 2, 10, 8)
    weights = torch.einsum("bngid,bnjd->bngij", q, k).softmax(-1)
    return torch.einsum("bngij,bnjd->bngid", weights, v).reshape(2, 4, 10, 8)


@pytest.mark.parametrize(
    ("attend", "repeats"),
    [
        (repeated, True),
        (interleaved, True),
        (interleaved_fused, True),
        (grouped_flag, False),
        (grouped, False),
        (grouped_einsum, False),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_grouped_queries(attend: Callable[..., T], repeats: bool) -> None:
    site = only_site(Heads(attend, kv_heads=2), X)
    assert to_text(site.score) == "s"
    assert (site.heads, site.kv_heads, site.repeats) == (4, 2, repeats)


def test_one_key_head_that_broadcasts() -> None:
    site = only_site(Heads(after, kv_heads=1), X)
    assert (site.heads, site.kv_heads) == (4, 1)


def test_heads_that_repeat_in_another_order_stay_as_they_are() -> None:
    def attend(q: T, k: T, v: T) -> T:
        return (q @ k.repeat(1, 2, 1, 1).mT).softmax(-1) @ v.repeat(1, 2, 1, 1)

    assert only_site(Heads(attend, kv_heads=2), X).kv_heads == 4


# Masks and scores.
def test_fill_of_masked_scores() -> None:
    def attend(q: T, k: T, v: T) -> T:
        scores = q @ k.mT / math.sqrt(8)
        return scores.masked_fill(~causal(10), -math.inf).softmax(-1) @ v

    site = only_site(Heads(attend), X)
    assert to_text(site.score) == f"(where (le k q) (mul s {SCALE!r}) -inf)"
    assert site.empty_row == "nan"
    assert site.spelling == "matmul, div, masked_fill, softmax, matmul"


def test_soft_cap() -> None:
    def attend(q: T, k: T, v: T) -> T:
        scores = torch.tanh(q @ k.mT * 0.5 / 50.0) * 50.0
        return torch.where(causal(10), scores, -1e9).softmax(-1) @ v

    score = to_text(only_site(Heads(attend), X).score)
    assert score == "(where (le k q) (mul (tanh (mul s 0.01)) 50.0) -1000000000.0)"


def test_alibi() -> None:
    def attend(q: T, k: T, v: T) -> T:
        slopes = torch.pow(2.0, -torch.arange(1, 5) * 2.0)
        distance = torch.arange(10)[None, :] - torch.arange(10)[:, None]
        scores = q @ k.mT + slopes[:, None, None] * distance
        return scores.masked_fill(distance > 0, -math.inf).softmax(-1) @ v

    site = only_site(Heads(attend), X)
    score = "(where (le k q) (add s (mul (load 0 f32 h) (to_float (sub k q)))) -inf)"
    assert to_text(site.score) == score
    assert [leaf.kind for leaf in site.leaves] == ["constant"]


def test_padding_and_causal_mask_in_one_call() -> None:
    def attend(q: T, k: T, v: T, keep: T) -> T:
        mask = causal(10) & keep.bool()[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    keep = torch.ones(2, 10, dtype=torch.long)
    keep[1, :4] = 0
    site = only_site(Heads(attend), X, keep)
    assert to_text(site.score) == f"(where (and (le k q) (load 0 bool b k)) (mul s {SCALE!r}) -inf)"
    assert site.empty_row == "zero" and site.spelling == "sdpa with a bool mask"


def test_float_mask_of_old_models() -> None:
    """(1 - mask) * finfo.min, expanded or not: one row of floats."""

    def attend(q: T, k: T, v: T, keep: T) -> T:
        bias = (1.0 - keep[:, None, None, :].float()) * LOWEST
        return (q @ k.mT + bias).softmax(-1) @ v

    keep = torch.ones(2, 10, dtype=torch.long)
    keep[1, :4] = 0
    site = only_site(Heads(attend), X, keep)
    assert to_text(site.score) == "(add s (load 0 f32 b 0 0 k))"
    assert site.leaves[0].node.meta["val"].numel() == 20


def test_is_causal_is_aligned_at_the_top() -> None:
    def attend(q: T, k: T, v: T) -> T:
        return F.scaled_dot_product_attention(q[:, :, :4], k, v, is_causal=True)

    site = only_site(Heads(attend), X)
    assert to_text(site.score) == f"(where (le k q) (mul s {SCALE!r}) -inf)"
    assert site.spelling == "sdpa with is_causal"


def test_fused_with_three_dimensions() -> None:
    def attend(q: T, k: T, v: T) -> T:
        q, k, v = (x.reshape(8, 10, 8) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).view(2, 4, 10, 8)

    site = only_site(Heads(attend), X)
    assert (site.batch, site.heads) == (2, 4)


def test_fused_mask_that_has_fewer_dimensions() -> None:
    def attend(q: T, k: T, v: T, mask: T) -> T:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

    site = only_site(Heads(attend), X, noise(10, 10))
    assert to_text(site.score) == "(add s (load 0 f32 q k))"
    assert site.spelling == "sdpa with a float mask"


def test_masked_again_behind_the_softmax() -> None:
    """Rows that are masked all over give 0, whatever the scores were filled with."""

    def attend(q: T, k: T, v: T, keep: T) -> T:
        gone = (keep == 0)[:, None, None, :]
        weights = (q @ k.mT).masked_fill(gone, LOWEST).softmax(-1).masked_fill(gone, 0.0)
        return weights @ v

    keep = torch.ones(2, 10, dtype=torch.long)
    keep[1] = 0
    site = only_site(Heads(attend), X, keep)
    assert site.empty_row == "zero"
    assert to_text(site.score) == "(where (not (load 0 bool b k)) s -inf)"


@pytest.mark.parametrize("first", [False, True])
def test_sinks(first: bool) -> None:
    class Sinks(Heads):
        def __init__(self) -> None:
            super().__init__(self.run)
            self.sinks = nn.Parameter(noise(4))

        def run(self, q: T, k: T, v: T) -> T:
            scores = (q @ k.mT * 0.5).masked_fill(~causal(10), LOWEST)
            sinks = self.sinks.reshape(1, -1, 1, 1).expand(2, -1, 10, -1)
            columns = torch.cat([sinks, scores] if first else [scores, sinks], -1)
            columns = columns - columns.max(-1, keepdim=True).values
            weights = columns.softmax(-1, dtype=columns.dtype)
            return (weights[..., 1:] if first else weights[..., :-1]) @ v

    site = only_site(Sinks(), X)
    assert to_text(site.score) == f"(where (le k q) (mul s 0.5) {LOWEST!r})"
    assert site.sink is not None and tuple(site.sink.node.meta["val"].shape) == (4,)


def test_dropout_in_training() -> None:
    def attend(q: T, k: T, v: T) -> T:
        return F.dropout((q @ k.mT).softmax(-1), 0.25) @ v

    assert only_site(Heads(attend), X, training=True).dropout == 0.25


def test_dropout_that_does_nothing() -> None:
    def attend(q: T, k: T, v: T) -> T:
        return F.dropout((q @ k.mT).softmax(-1), 0.25, training=False) @ v

    assert only_site(Heads(attend), X).dropout == 0


class Biased(Heads):
    """A learned bias for each distance, as T5 and Swin have one."""

    def __init__(self, masked: bool) -> None:
        super().__init__(self.run)
        self.table = nn.Parameter(noise(19, 4))
        self.masked = masked

    def run(self, q: T, k: T, v: T) -> T:
        place = torch.arange(10)
        bias = self.table[place[None, :] - place[:, None] + 9].permute(2, 0, 1).unsqueeze(0)
        if self.masked:
            bias = bias.masked_fill(~causal(10), LOWEST)
        return (q @ k.mT + bias).softmax(-1) @ v


def test_learned_bias_in_training() -> None:
    site = only_site(Biased(masked=False), X, training=True)
    assert to_text(site.score) == "(add s (load 0 f32 0 h q k))"
    assert site.grad_leaf == 0 and site.leaves[0].kind == "learned"


def test_mask_around_a_learned_bias() -> None:
    site = only_site(Biased(masked=True), X, training=True)
    assert to_text(site.score) == f"(add s (where (le k q) (load 0 f32 0 h q k) {LOWEST!r}))"
    assert tuple(site.leaves[0].node.meta["val"].shape) == (1, 4, 10, 10)


def test_bias_that_is_not_trained_is_read_from_its_table() -> None:
    site = only_site(Biased(masked=False), X)
    assert site.grad_leaf is None
    assert to_text(site.score) == "(add s (load 0 f32 (add (sub k q) 9) h))"
    assert site.leaves[0].kind == "static"


def test_learned_temperature() -> None:
    class Scaled(Heads):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: (q @ k.mT * self.scale.exp()).softmax(-1) @ v)
            self.scale = nn.Parameter(noise(4, 1, 1))

    site = only_site(Scaled(), X, training=True)
    assert to_text(site.score) == "(mul s (load 0 f32 0 h 0 0))"


class NanoGPT(Heads):
    """A causal mask of ones, kept as a buffer."""

    def __init__(self) -> None:
        super().__init__(self.run)
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def run(self, q: T, k: T, v: T) -> T:
        length = q.shape[2]
        scores = (q @ k.mT) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, -math.inf)
        return scores.softmax(-1) @ v


def test_mask_that_is_a_buffer() -> None:
    site = only_site(NanoGPT(), X)
    assert to_text(site.score) == f"(where (not (load 0 bool 0 0 q k)) (mul s {SCALE!r}) -inf)"
    assert site.leaves[0].kind == "static"


def test_mask_that_is_a_buffer_of_another_size() -> None:
    site = only_site(NanoGPT(), X, dynamic=True)
    score = f"(where (ne (load 0 f32 0 0 q k) 0.0) (mul s {SCALE!r}) -inf)"
    assert to_text(site.score) == score
    assert site.leaves[0].kind == "static"
    assert tuple(site.leaves[0].node.meta["val"].shape) == (1, 1, 32, 32)


def test_two_sites_share_what_they_read() -> None:
    def attend(q: T, k: T, v: T, keep: T) -> T:
        for _ in range(2):
            mask = keep.bool()[:, None, None, :] & causal(10)
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return q

    first, second = all_sites(Heads(attend), X, torch.ones(2, 10, dtype=torch.long))
    assert first.score is second.score
    assert first.leaves[0].node is second.leaves[0].node


def test_exported_graph() -> None:
    gm = canonicalize(Heads(after), X)
    (site,) = find_sites(gm, StaticValues(gm, training=False))
    assert isinstance(site, Site) and to_text(site.score) == "(mul s 0.125)"


def test_exported_graph_with_dynamic_sizes() -> None:
    class Shifted(nn.Module):
        def forward(self, x: T) -> T:
            backward = torch.arange(x.shape[1]).flip(0)
            return (x @ x.sin().mT).masked_fill(backward < 3, -math.inf).softmax(-1) @ x

    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    program = torch.export.export(Shifted(), (X,), dynamic_shapes=(sizes,))
    gm = canonicalize(program)
    (site,) = find_sites(gm, StaticValues(gm, training=False))
    assert isinstance(site, Site)
    assert to_text(site.score) == "(where (ge (sub (int 0) k) 4) s -inf)"
    (integer,) = site.integers
    assert str(integer.size) == str(site.keys)


# What is no attention, or one that cannot be rewritten.
def handed_out(q: T, k: T, v: T) -> tuple[T, T]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


class Returns(Heads):
    def forward(self, x: T, *rest: T, **named: T) -> Any:
        q = x.view(2, 10, 4, 8).transpose(1, 2)
        return self.attend(q, q.sin(), q.cos())


def scores_handed_out(q: T, k: T, v: T) -> tuple[T, T]:
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.sum()


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        (handed_out, "its weights are needed elsewhere: the model returns them"),
        (scores_handed_out, "its scores are also used by sum"),
    ],
)
def test_intermediates_that_are_used_elsewhere(attend: Callable[..., Any], words: str) -> None:
    assert words in refusal(Returns(attend), X)


def over_queries(q: T, k: T, v: T) -> T:
    return (q @ k.mT).softmax(-2) @ v


def normalized(q: T, k: T, v: T) -> T:
    return F.layer_norm(q @ k.mT, (10,)).softmax(-1) @ v


def top_scores(q: T, k: T, v: T) -> T:
    scores = q @ k.mT
    least = scores.topk(3, -1).values[..., -1:]
    return scores.masked_fill(scores < least, -math.inf).softmax(-1) @ v


def heads_mixed(q: T, k: T, v: T) -> T:
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), MIXING).permute(0, 3, 1, 2)
    return scores.softmax(-1) @ v


def rounded(q: T, k: T, v: T) -> T:
    return (q @ k.mT).round().softmax(-1) @ v


def shifted(q: T, k: T, v: T) -> T:
    scores = q @ k.mT
    return (scores + scores.roll(1, -1)).softmax(-1) @ v


def sliced_in_place(q: T, k: T, v: T) -> T:
    scores = q @ k.mT
    scores[..., 5:] = -1e9
    return scores.softmax(-1) @ v


def weights_scaled(q: T, k: T, v: T) -> T:
    return ((q @ k.mT).softmax(-1) * torch.linspace(0, 1, 4)[:, None, None]) @ v


def weights_cleaned(q: T, k: T, v: T) -> T:
    return (q @ k.mT).softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        (over_queries, "over another dimension than the keys"),
        (normalized, "layer_norm is not pointwise"),
        (top_scores, "topk is not pointwise"),
        (heads_mixed, "linear is not pointwise"),
        (rounded, "round is not pointwise"),
        (shifted, "more than one product of a query and a key"),
        (sliced_in_place, "its scores are also used by slice"),
        (weights_scaled, "changed behind the softmax"),
        (weights_cleaned, "nan_to_num is not pointwise"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_refusals(attend: Callable[..., Any], words: str) -> None:
    assert words in refusal(Heads(attend), X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    words = "the kernels take float32 and bfloat16"
    assert words in refusal(Heads(fused), X.to(dtype))
    assert words in refusal(Heads(after), X.to(dtype))


def test_two_learned_biases() -> None:
    class Two(Heads):
        def __init__(self) -> None:
            super().__init__(self.run)
            self.rows = nn.Parameter(noise(10, 1))
            self.columns = nn.Parameter(noise(10))

        def run(self, q: T, k: T, v: T) -> T:
            return (q @ k.mT + self.rows + self.columns.abs()).softmax(-1) @ v

    assert "more than one bias" in refusal(Two(), X, training=True)


def classifier(x: T) -> T:
    return F.linear(x, WEIGHT).softmax(-1)


def router(x: T) -> T:
    weights, which = F.linear(x, WEIGHT).softmax(-1).topk(2)
    return weights.unsqueeze(-2) @ WEIGHT[which]


def cosine(x: T) -> T:
    return (x @ x.sin().mT).softmax(-1)


@pytest.mark.parametrize("model", [classifier, router, cosine])
def test_other_softmaxes_are_not_mentioned(model: Callable[[T], T]) -> None:
    (record,) = traced(model, X)
    assert record.sites() == []

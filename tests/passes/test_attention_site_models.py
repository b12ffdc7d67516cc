"""What Hugging Face models write is found, and their masks are what they are called.

Every site is checked against the graph: the scores that its softmax sees, and the model's outputs
after all sites have been replaced by what they are said to compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_graphs import all_sites, noise
from torch import nn

from sparse_compiler.passes.attention.site import Site
from sparse_compiler.score.expr import to_text

hf = pytest.importorskip("transformers", minversion="5.0")

LENGTH = 16
MIN32 = repr(torch.finfo(torch.float32).min)
MIN16 = repr(torch.finfo(torch.bfloat16).min)

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
TINY = {"vocab_size": 100, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, sliding_window=8)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**GROUPED, head_dim=16, sliding_window=8)
    ),
    "gptoss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **GROUPED,
            head_dim=16,
            sliding_window=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=100, n_embd=64, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2
        )
    ),
    "gptneo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            **TINY,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
        )
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**{**SMALL, "num_hidden_layers": 1})),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(**SMALL, local_attention=8, cls_token_id=1, sep_token_id=2)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**TINY, n_layer=1, n_head=4)),
    "mpt": lambda: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=100, d_model=64, n_layers=1, n_heads=4, max_seq_len=64)
    ),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**TINY, num_hidden_layers=1, num_attention_heads=4, multi_query=True)
    ),
    "falcon with alibi": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(
            **TINY, num_hidden_layers=1, num_attention_heads=4, multi_query=False, alibi=True
        )
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=100,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "swin": lambda: hf.SwinModel(
        hf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=32, depths=[2], num_heads=[2], window_size=4
        )
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is called, and the scores of its layers."""

    model: str
    implementation: str
    scores: tuple[str, ...]
    pad: bool = False
    dynamic: bool = False
    training: bool = False
    dtype: torch.dtype = torch.float32
    slow: bool = True
    kv_heads: int = 4
    empty_row: str = "nan"

    def __str__(self) -> str:
        flags = [n for n in ("pad", "dynamic", "training") if getattr(self, n)]
        kind = [] if self.dtype is torch.float32 else ["bf16"]
        return "-".join([self.model, self.implementation, *flags, *kind])


def sites_of(case: Case) -> list[Site]:
    torch.manual_seed(0)
    model = MODELS[case.model]()
    model.set_attn_implementation(case.implementation)
    model.train(case.training).to(case.dtype)
    length = torch.arange(2 * LENGTH).view(2, LENGTH)
    inputs: dict[str, Any] = {"input_ids": length * 7 % 97 + 3}
    if case.model == "swin":
        inputs = {"pixel_values": noise(2, 3, 32, 32).to(case.dtype)}
    if case.model == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    if case.model not in ("swin", "bert", "modernbert"):
        inputs["use_cache"] = False
    if case.pad:
        inputs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
        inputs["attention_mask"][1, -3:] = 0
    return all_sites(model, training=case.training, dynamic=case.dynamic, **inputs)


CAUSAL, WINDOW = "(le k q)", "(and (le (sub q k) 7) (le k q))"
KEPT = "(load 0 bool b k)"


def added(mask: str, score: str = "(mul s 0.25)", low: str = MIN32) -> str:
    """The score of a mask that is added: Hugging Face's eager attention."""
    return f"(add {score} (where {mask} 0.0 {low}))"


def kept(mask: str, score: str = "(mul s 0.25)") -> str:
    """The score of a bool mask of ``scaled_dot_product_attention``."""
    return f"(where {mask} {score} -inf)"


def both(mask: str) -> str:
    return f"(and {mask} {KEPT})"


CAPPED = "(mul (tanh (mul s 0.00125)) 50.0)"
CAPPED_LATER = "(mul (tanh s) (load 0 f64))"  # Dynamo makes the cap an input
NEO = "(add (where (load 0 bool 0 0 q k) s {low}) (where {mask} 0.0 {low}))"
WITH_ALIBI = "(add (load 0 f32 b h k) (mul s 0.25))"

CASES = [
    Case("llama", "eager", (added(CAUSAL),), slow=False, kv_heads=2),
    Case("llama", "eager", (added(both(CAUSAL)),), pad=True, kv_heads=2),
    Case("llama", "eager", (added(CAUSAL),), training=True, kv_heads=2),
    Case("llama", "sdpa", (kept(CAUSAL),), kv_heads=2, empty_row="zero"),
    Case("llama", "sdpa", (kept(both(CAUSAL)),), pad=True, kv_heads=2, empty_row="zero"),
    Case("llama", "sdpa", (kept(both(CAUSAL)),), pad=True, dynamic=True, kv_heads=2,
         empty_row="zero"),
    Case("mistral", "eager", (added(both(WINDOW), "s"),), pad=True, dynamic=True, kv_heads=2),
    Case("mistral", "sdpa", (kept(WINDOW),), kv_heads=2, slow=False, empty_row="zero"),
    Case("mistral", "sdpa", (kept(both(WINDOW)),), pad=True, kv_heads=2, dtype=torch.bfloat16,
         empty_row="zero"),
    Case("phi3", "eager", (added(WINDOW),), kv_heads=2),
    Case("qwen2", "sdpa", (kept(both(CAUSAL)),), pad=True, kv_heads=2, empty_row="zero"),
    Case("gemma2", "eager", (added(both(WINDOW), CAPPED), added(both(CAUSAL), CAPPED)), pad=True,
         slow=False, kv_heads=2),
    Case("gemma2", "eager", (added(WINDOW, CAPPED_LATER), added(CAUSAL, CAPPED_LATER)),
         dynamic=True, kv_heads=2),
    Case("gptoss", "eager", (added(both(WINDOW)), added(both(CAUSAL))), pad=True, slow=False,
         kv_heads=2),
    Case("gptoss", "eager", (added(WINDOW, low=MIN16), added(CAUSAL, low=MIN16)),
         dtype=torch.bfloat16, kv_heads=2),
    Case("gptoss", "eager", (added(WINDOW), added(CAUSAL)), training=True, kv_heads=2),
    Case("gpt2", "eager", (added(CAUSAL),)),
    Case("gpt2", "sdpa", (kept(both(CAUSAL)),), pad=True, empty_row="zero"),
    Case("gptneo", "eager", (NEO.format(mask=CAUSAL, low=MIN32),), slow=False),
    Case("gptneo", "eager", (NEO.format(mask=CAUSAL, low=MIN32),), dynamic=True),
    Case("bert", "eager", (added(KEPT),), pad=True),
    Case("bert", "sdpa", (kept(KEPT),), pad=True, dynamic=True, empty_row="zero"),
    Case("modernbert", "eager",
         ("(mul s 0.25)", added("(and (le (sub q k) 4) (ge (sub q k) -4))"))),
    Case("modernbert", "sdpa",
         (kept(KEPT), kept(both("(and (le (sub q k) 4) (ge (sub q k) -4))"))), pad=True,
         empty_row="zero"),
    Case("bloom", "eager",
         (f"(add {WITH_ALIBI} (where (and (le k q) (load 1 bool b k)) 0.0 {MIN32}))",), pad=True,
         slow=False),
    Case("mpt", "eager",
         (f"(where {both(CAUSAL)} (add (mul s 0.25) (load 1 f32 0 h 0 (add k 48))) {MIN32})",),
         pad=True),
    Case("falcon", "sdpa", (kept(both(CAUSAL)),), pad=True, kv_heads=1, empty_row="zero"),
    Case("falcon with alibi", "sdpa",
         (f"(add (mul s 0.25) (where {both(CAUSAL)} (load 1 f32 b h 0 k) {MIN32}))",), pad=True,
         empty_row="zero"),
    Case("t5", "eager",
         (
             f"(add (add s (load 0 f32 0 h q k)) (where (load 1 bool b k) 0.0 {MIN32}))",
             f"(add (add s (load 0 f32 0 h q k)) (where {CAUSAL} 0.0 {MIN32}))",
             f"(add s (where {KEPT} 0.0 {MIN32}))",
         ), pad=True),
    Case("t5", "sdpa",
         (
             f"(add s (where (load 0 bool b k) (load 1 f32 0 h q k) {MIN32}))",
             f"(add s (where {CAUSAL} (load 0 f32 0 h q k) {MIN32}))",
             f"(add s (where {KEPT} 0.0 {MIN32}))",
         ), pad=True, empty_row="zero"),
    Case("t5", "eager",
         (
             "(add s (load 0 f32 0 h q k))",
             f"(add (add s (load 0 f32 0 h q k)) (where {CAUSAL} 0.0 {MIN32}))",
             "s",
         ), training=True),
    Case("swin", "sdpa", ("(add (mul s 0.25) (load 0 f32 0 h q k))",), empty_row="zero"),
    Case("swin", "eager", ("(add (mul s 0.25) (load 0 f32 0 h q k))",), training=True),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * c.slow, id=str(c)) for c in CASES]
)
def test_models(case: Case) -> None:
    sites = sites_of(case)
    found = dict.fromkeys(to_text(site.score) for site in sites)
    shifted = [text for text in found if "mod b" in text]  # Swin's shifted windows
    assert tuple(text for text in found if text not in shifted) == case.scores
    assert bool(shifted) == (case.model == "swin")
    for site in sites:
        assert (site.heads, site.kv_heads) == (2 if case.model == "swin" else 4, site.kv_heads)
        assert site.kv_heads == (2 if case.model == "swin" else case.kv_heads)
        assert site.empty_row == case.empty_row and site.dtype is case.dtype
        assert (site.sink is not None) == (case.model == "gptoss")
        learned = case.training and case.model in ("t5", "swin")
        assert (site.grad_leaf is not None) == (learned and "f32" in to_text(site.score))


def test_layers_of_one_kind_share_their_mask() -> None:
    sites = sites_of(Case("gemma2", "eager", (), pad=True))
    (full,), (window,) = ([site.leaves[0].node] for site in sites)
    assert full is window  # both read the padding

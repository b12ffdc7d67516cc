"""Small random models of every way to write attention, with what the compiler has to do to them.

Sequences of 130 to 200 tokens make tiles of 64 matter; windows of 32 and 64 make some of them empty
in at least one layer. Two layers of a model share their shapes, so that compiling stays cheap;
where an architecture mixes local and global layers it has one of each. All dropout is off: what is
left is deterministic in training too.

`python -m tests.models.attention_models [NAME...]` prints what becomes of each model, variant by
variant; `--help` tells the rest.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from tests.models.attention_expected import (
    BIGBIRD,
    CAUSAL,
    LONGFORMER,
    T5,
    Expected,
    always,
    chunked,
    decoder,
    encoder,
    sliding,
)

VOCABULARY = 100
LENGTH = 160
WINDOW = 32
HEADS = 4

# The ids that several configurations place outside of so small a vocabulary.
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# How most decoders name their sizes.
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
}
_GROUPED = {**_SIZES, **_SPECIAL, "num_key_value_heads": 2}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def text(length: int = LENGTH, batch: int = 2) -> dict[str, Any]:
    return {"input_ids": tokens(batch, length)}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, its inputs, the variants that make sense for it, and what has to be rewritten.

    Attributes:
        make: builds the model; it is seeded and told the attention implementation by `build`.
        inputs: keyword arguments of one call, without any padding mask.
        implementations: values of `attn_implementation`; ("own",) where there is no such switch.
        stages: "forward", "cache", "decode" and "train"; see `attention_check`.
        mask: name of the argument that takes a padding mask, None where there is none.
        boolean_mask: the mask is bool instead of int64.
        length: tokens that the mask covers.
        expected: what each attention site has to become: `"IMPLEMENTATION VARIANT"` or just
            `"VARIANT"` -> one entry for each site in the order of the graphs, a part of its
            pattern's name if it must be rewritten, None if it must stay. A variant that is not a
            key is not asserted, nor is any of a model whose `expected` is None.
        package: what has to be installed, beside transformers.
    """

    make: Callable[[str], nn.Module]
    inputs: Callable[[], dict[str, Any]] = text
    implementations: tuple[str, ...] = ("eager", "sdpa")
    stages: tuple[str, ...] = ("forward", "train")
    mask: str | None = "attention_mask"
    boolean_mask: bool = False
    length: int = LENGTH
    expected: Expected | None = None
    package: str | None = None

    def build(self, implementation: str) -> nn.Module:
        """The model in float32 and evaluation mode; the same weights at every call."""
        torch.manual_seed(0)
        random.seed(0)
        model = self.make(implementation).eval()
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                # Initial weights of 0.02 give scores near 0, and zero biases and sinks hide errors.
                if parameter.dim() < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif "embed" not in name and "wte" not in name:
                    parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
        return model


def _hugging_face(
    model: str, config: str, settings: Mapping[str, Any]
) -> Callable[[str], nn.Module]:
    def make(implementation: str) -> nn.Module:
        made = getattr(hf, config)(**settings)
        made._attn_implementation = implementation
        return getattr(hf, model)(made)

    return make


def _decoder(name: str, settings: Mapping[str, Any], **others: Any) -> Subject:
    """A decoder with grouped heads and every kind of cache, the way most are configured."""
    config = others.pop("config", f"{name}Config")
    make = _hugging_face(f"{name}ForCausalLM", config, {**_GROUPED, **settings})
    return Subject(make, **{"stages": ("forward", "cache", "decode", "train"), **others})


def _falcon(alibi: bool) -> Callable[[str], nn.Module]:
    settings = {**_SIZES, **_SPECIAL, "ffn_hidden_size": 96, "parallel_attn": False}
    return _hugging_face("FalconForCausalLM", "FalconConfig", {**settings, "alibi": alibi})


class TrilAttention(nn.Module):
    """Causal attention as in nanoGPT: scores by hand, a `tril` buffer, -inf, two dropouts."""

    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.0), nn.Dropout(0.0)
        lower = torch.tril(torch.ones(block_size, block_size))
        self.register_buffer("bias", lower.view(1, 1, block_size, block_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.size()
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(batch, length, width)
        return self.resid_dropout(self.c_proj(y))


class TrilBlock(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = TrilAttention(width, heads, block_size)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.0)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TrilGPT(nn.Module):
    """A GPT in the style of nanoGPT: learned positions, tied output weights, optional targets."""

    def __init__(
        self, vocabulary: int, block_size: int, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(block_size, width)
        self.drop = nn.Dropout(0.0)
        self.h = nn.ModuleList(TrilBlock(width, heads, block_size) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        position = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(position))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        flat = logits.view(-1, logits.size(-1))
        return logits, F.cross_entropy(flat, targets.view(-1), ignore_index=-1)


def _local_transformer(_: str) -> nn.Module:
    from local_attention import LocalTransformer

    return LocalTransformer(
        num_tokens=VOCABULARY,
        max_seq_len=256,
        dim=64,
        depth=2,
        causal=True,
        local_attn_window_size=WINDOW,
        dim_head=16,
        heads=HEADS,
        num_residual_streams=1,
    )


def _linear_transformer(**settings: Any) -> Callable[[str], nn.Module]:
    def make(_: str) -> nn.Module:
        from linear_attention_transformer import LinearAttentionTransformerLM

        return LinearAttentionTransformerLM(
            num_tokens=VOCABULARY, dim=64, heads=HEADS, depth=2, max_seq_len=192, **settings
        )

    return make


_longformer = _hugging_face(
    "LongformerModel",
    "LongformerConfig",
    {**_SIZES, **_NO_DROPOUT, **_SPECIAL, "attention_window": [WINDOW, WINDOW]},
)


def _sequence(name: str, length: int) -> Callable[[], dict[str, Any]]:
    return lambda: {name: tokens(2, length)}


def _pair() -> dict[str, Any]:
    return {**text(), "decoder_input_ids": tokens(2, 140, seed=2)}


def _image() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(2, 3, 112, 112, generator=generator)}


def _longformer_inputs() -> dict[str, Any]:
    everywhere = torch.zeros(2, LENGTH, dtype=torch.long)
    everywhere[:, :2] = 1
    return {**text(), "global_attention_mask": everywhere}


MODELS: dict[str, Subject] = {
    "llama": _decoder("Llama", {}, expected=decoder(CAUSAL, CAUSAL, flagged=True)),
    "mistral": _decoder(
        "Mistral",
        {"sliding_window": WINDOW},
        expected=decoder(sliding(WINDOW), sliding(WINDOW)),
    ),
    "gemma2": _decoder(
        "Gemma2",
        {**_HYBRID, "head_dim": 24, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 24},
        implementations=("eager",),
        expected=decoder(sliding(WINDOW), CAUSAL, terms=", soft-cap 5"),
    ),
    "gemma3": _decoder(
        "Gemma3",
        {**_HYBRID, "head_dim": 32, "query_pre_attn_scalar": 32},
        config="Gemma3TextConfig",
        expected=decoder(sliding(WINDOW), CAUSAL, flagged=True),
    ),
    "gpt_oss": _decoder(
        "GptOss",
        {
            **_HYBRID,
            "head_dim": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        implementations=("eager",),
        expected=decoder(sliding(WINDOW), CAUSAL),
    ),
    "phi3": _decoder("Phi3", {"sliding_window": 64}, expected=decoder(sliding(64), sliding(64))),
    "qwen2": _decoder(
        "Qwen2",
        {**_HYBRID, "use_sliding_window": True},
        expected=decoder(sliding(WINDOW), CAUSAL, flagged=True),
    ),
    "llama4": _decoder(
        "Llama4",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "moe_layers": [],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 48,
            "layer_types": ["chunked_attention", "full_attention"],
        },
        config="Llama4TextConfig",
        expected=decoder(chunked(48), CAUSAL, flagged=True),
    ),
    "modernbert": Subject(
        _hugging_face(
            "ModernBertModel",
            "ModernBertConfig",
            {
                **_SIZES,
                **_SPECIAL,
                "cls_token_id": 1,
                "sep_token_id": 2,
                "local_attention": 2 * WINDOW,
                "layer_types": ["full_attention", "sliding_attention"],
            },
        ),
        expected=encoder("", f"local window {WINDOW} to either side"),
    ),
    "bert": Subject(
        _hugging_face("BertModel", "BertConfig", {**_SIZES, **_NO_DROPOUT}),
        expected=encoder("", ""),
    ),
    "gpt2": Subject(
        _hugging_face(
            "GPT2LMHeadModel",
            "GPT2Config",
            {
                **_SPECIAL,
                "vocab_size": VOCABULARY,
                "n_embd": 80,
                "n_layer": 2,
                "n_head": HEADS,
                "n_positions": 256,
                "resid_pdrop": 0.0,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
            },
        ),
        stages=("forward", "cache", "decode", "train"),
        expected=decoder(CAUSAL, CAUSAL, flagged=True),
    ),
    "gpt_neo": Subject(
        _hugging_face(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            {
                **_SPECIAL,
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "num_layers": 2,
                "num_heads": HEADS,
                "attention_types": [[["global", "local"], 1]],
                "window_size": WINDOW,
                "max_position_embeddings": 256,
            },
        ),
        implementations=("eager",),
        stages=("forward", "cache", "train"),
        expected=decoder(CAUSAL, sliding(WINDOW)),
    ),
    "bloom": Subject(
        _hugging_face(
            "BloomForCausalLM",
            "BloomConfig",
            {
                **_SPECIAL,
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "n_layer": 2,
                "n_head": HEADS,
            },
        ),
        implementations=("eager",),
        stages=("forward", "cache", "train"),
        # Its GELU is a torch.autograd.Function: in training the whole graph is left as it is.
        expected={
            **decoder(CAUSAL, CAUSAL, terms=", ALiBi"),
            "train": (),
            "train right": (),
        },
    ),
    "mpt": Subject(
        _hugging_face(
            "MptForCausalLM",
            "MptConfig",
            {
                **_SPECIAL,
                "vocab_size": VOCABULARY,
                "d_model": 64,
                "n_heads": HEADS,
                "n_layers": 2,
                "max_seq_len": 256,
            },
        ),
        implementations=("eager",),
        stages=("forward", "cache", "train"),
        expected=decoder(CAUSAL, CAUSAL, terms=", ALiBi"),
    ),
    "falcon": Subject(
        _falcon(alibi=False),
        stages=("forward", "cache", "decode", "train"),
        expected=decoder(CAUSAL, CAUSAL),
    ),
    "falcon_alibi": Subject(
        _falcon(alibi=True),
        stages=("forward", "cache", "train"),
        # Its biases are computed from the padding mask.
        expected=decoder(CAUSAL, CAUSAL, terms=", bias of each head and key"),
    ),
    "t5": Subject(
        _hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            {
                "vocab_size": VOCABULARY,
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 96,
                "num_layers": 2,
                "num_heads": HEADS,
                "dropout_rate": 0.0,
                "decoder_start_token_id": 0,
            },
        ),
        _pair,
        stages=("forward", "cache", "train"),
        expected=T5,
    ),
    "swin": Subject(
        _hugging_face(
            "SwinModel",
            "SwinConfig",
            {
                **_NO_DROPOUT,
                "image_size": 112,
                "embed_dim": 64,
                "depths": [2],
                "num_heads": [HEADS],
                "window_size": 14,
                "drop_path_rate": 0.0,
            },
        ),
        _image,
        mask=None,
        # The shifted windows' mask is -100, of which exp is not 0.
        expected=always(None, None),
    ),
    "longformer": Subject(_longformer, implementations=("eager",), expected=LONGFORMER),
    "longformer_global": Subject(_longformer, _longformer_inputs, implementations=("eager",)),
    "bigbird": Subject(
        _hugging_face(
            "BigBirdModel",
            "BigBirdConfig",
            {**_SIZES, **_NO_DROPOUT, **_SPECIAL, "block_size": 16, "num_random_blocks": 1},
        ),
        _sequence("input_ids", 176),
        implementations=("eager",),
        length=176,
        expected=BIGBIRD,
    ),
    "nanogpt": Subject(
        lambda _: TrilGPT(VOCABULARY, 256, 64, 2, HEADS),
        _sequence("idx", 200),
        implementations=("own",),
        mask=None,
        expected=always("causal", "causal"),
    ),
    "local_attention": Subject(
        _local_transformer,
        _sequence("x", 150),
        implementations=("own",),
        mask="mask",
        boolean_mask=True,
        length=150,
        # Windows are cut by hand: 32 queries and 64 keys leave nothing to skip but padding.
        expected=encoder("", ""),
        package="local_attention",
    ),
    "linear_attention": Subject(
        _linear_transformer(causal=False),
        _sequence("x", 192),
        implementations=("own",),
        mask="input_mask",
        boolean_mask=True,
        length=192,
        expected=always(None, None),
        package="linear_attention_transformer",
    ),
    "linear_attention_causal": Subject(
        _linear_transformer(
            causal=True, blindspot_size=32, n_local_attn_heads=2, local_attn_window_size=64
        ),
        _sequence("x", 192),
        implementations=("own",),
        mask="input_mask",
        boolean_mask=True,
        length=192,
        # Two heads look at a window, whose first has nothing before it; two are linear already.
        expected={
            **always("", "", None, None),
            "ones": ("padding", "padding", None, None),
            "train right": ("padding", "padding", None, None),
        },
        package="linear_attention_transformer",
    ),
}


if __name__ == "__main__":
    from tests.models.attention_table import main

    main(MODELS)

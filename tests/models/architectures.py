"""Small random Hugging Face models of every kind, with inputs.

Hidden sizes differ between models, so that no kernel of one is taken for another's; both layers of
a model share theirs, so that compiling stays cheap.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn


def tokens(batch: int, length: int, vocabulary: int = 100) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def padding(batch: int, length: int) -> torch.Tensor:
    """A mask whose last row ends three tokens early."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -3:] = 0
    return mask


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to make a model and its inputs; ``pattern`` and ``sparsity`` say how it is pruned."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    pattern: str = "unstructured"
    sparsity: float | None = 0.8


def bert() -> nn.Module:
    return hf.BertModel(
        hf.BertConfig(
            vocab_size=100,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=160,
            max_position_embeddings=64,
        )
    )


def modernbert() -> nn.Module:
    return hf.ModernBertModel(
        hf.ModernBertConfig(
            vocab_size=100,
            hidden_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=64,
            local_attention=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    )


def llama(**changes: Any) -> nn.Module:
    settings = {
        "vocab_size": 100,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 144,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**settings, **changes}))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=100, n_embd=72, n_layer=2, n_head=4, n_positions=64)
    )


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            vocab_size=100,
            hidden_size=88,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            intermediate_size=136,
            sliding_window=8,
            max_position_embeddings=64,
        )
    )


def qwen2() -> nn.Module:
    return hf.Qwen2ForCausalLM(
        hf.Qwen2Config(
            vocab_size=100,
            hidden_size=104,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=152,
            max_position_embeddings=64,
        )
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=100,
            d_model=56,
            d_kv=16,
            d_ff=120,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def bart() -> nn.Module:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=100,
            d_model=48,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=112,
            decoder_ffn_dim=112,
            max_position_embeddings=64,
        )
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=176,
            image_size=32,
            patch_size=8,
            num_labels=10,
        )
    )


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(
        hf.ConvNextConfig(
            hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], image_size=32, num_labels=10
        )
    )


def wav2vec2() -> nn.Module:
    return hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            vocab_size=32,
            hidden_size=60,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=132,
            conv_dim=(32, 32),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )
    )


def whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=100,
            num_mel_bins=20,
            d_model=68,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=124,
            decoder_ffn_dim=124,
            max_source_positions=20,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )


def _text(batch: int, length: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch, length), "attention_mask": padding(batch, length)}


def _pair(batch: int, length: int) -> dict[str, Any]:
    return {**_text(batch, length), "decoder_input_ids": tokens(batch, 5)}


def _sound() -> dict[str, Any]:
    return {"input_features": noise(2, 20, 40), "decoder_input_ids": tokens(2, 5)}


ARCHITECTURES = {
    "bert": Architecture(bert, lambda: _text(2, 11), "2:4", None),
    "modernbert": Architecture(modernbert, lambda: _text(2, 13)),
    "llama": Architecture(llama, lambda: {**_text(2, 9), "use_cache": False}, "2:4", None),
    "gpt2": Architecture(gpt2, lambda: {**_text(2, 12), "use_cache": False}),
    "gemma2": Architecture(gemma2, lambda: {**_text(2, 14), "use_cache": False}),
    "qwen2": Architecture(qwen2, lambda: {**_text(2, 10), "use_cache": False}, "2:4", None),
    "t5": Architecture(t5, lambda: {**_pair(2, 9), "use_cache": False}),
    "bart": Architecture(bart, lambda: {**_pair(2, 8), "use_cache": False}, "2:4", None),
    "vit": Architecture(vit, lambda: {"pixel_values": noise(2, 3, 32, 32)}),
    "convnext": Architecture(convnext, lambda: {"pixel_values": noise(2, 3, 32, 32)}),
    "wav2vec2": Architecture(wav2vec2, lambda: {"input_values": noise(2, 400)}),
    "whisper": Architecture(whisper, lambda: {**_sound(), "use_cache": False}),
}

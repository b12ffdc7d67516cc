"""Small models of the transformers library with mixtures of experts, their loops switched on."""

from typing import Any

import torch
from torch import nn

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_GROUPED: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

# Name of the configuration's class without "Config": its arguments.
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        **_SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "Qwen3Moe": {
        **_SMALL,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "Olmoe": {**_SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV2": {**_SMALL, **_LATENT, **_GROUPED, "topk_method": "greedy"},
    "DeepseekV3": {**_SMALL, **_LATENT, **_GROUPED},
    "GptOss": {
        **_SMALL,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "Jamba": {
        **_SMALL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "Phimoe": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "vocab_size": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "LongcatFlash": {
        **_SMALL,
        **_LATENT,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "head_dim": 8,
        "moe_topk": 2,
    },
    "JetMoe": {
        **_SMALL,
        "kv_channels": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "SwitchTransformers": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "num_heads": 4,
        "num_experts": 4,
        "expert_capacity": 3,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    },
    "NllbMoe": {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "num_experts": 4,
        "expert_capacity": 8,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 2,
    },
}


def build(name: str) -> nn.Module:
    """A model with random weights that are not tiny, in eval mode."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    plain = name in ("SwitchTransformers", "NllbMoe")
    kind = "ForConditionalGeneration" if plain else "ForCausalLM"
    model = getattr(transformers, name + kind)(config).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def inputs(name: str, batch: int = 2, length: int = 7) -> dict[str, Any]:
    ids = torch.randint(3, 60, (batch, length))
    if name in ("SwitchTransformers", "NllbMoe"):
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1), "use_cache": False}
    return {"input_ids": ids, "use_cache": False}

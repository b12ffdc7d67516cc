"""Longformer: many graphs as it is, one graph with skipped tiles after ``sc.prepare``."""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import interleaved_medians
from torch import Tensor, nn

import sparse_compiler as sc


def build(layers: int, width: int, window: int, length: int) -> nn.Module:
    """A Longformer with random weights."""
    try:
        from transformers import LongformerConfig, LongformerModel
    except ImportError:
        raise SystemExit(
            "This example needs transformers: pip install 'transformers>=5'."
        ) from None
    config = LongformerConfig(
        attention_window=window,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        vocab_size=1000,
        max_position_embeddings=length + 2,
        pad_token_id=1,
        sep_token_id=2,
    )
    return LongformerModel(config, add_pooling_layer=False).eval().requires_grad_(False)


def graphs(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """How many graphs Dynamo cuts the model into."""
    found: list[Any] = []

    def count(gm: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=count)(**inputs)
    torch._dynamo.reset()
    return len(found)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints one table; returns seconds of a forward pass by name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--window", type=int, default=256, help="keys a token sees, both sides")
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    # What Dynamo has to say about each break is counted below.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)

    model = build(options.layers, options.width, options.window, options.length)
    ids = torch.randint(3, 1000, (1, options.length))
    flags = torch.zeros_like(ids)
    flags[:, 0] = 1
    inputs = {"input_ids": ids, "global_attention_mask": flags}

    # Two copies, because preparing a model is meant to change what is compiled from it.
    prepared = sc.prepare(copy.deepcopy(model), **inputs)
    with torch.no_grad():
        counts = {"Inductor": graphs(model, inputs), "sparse": graphs(prepared.model, inputs)}
        runs: dict[str, Callable[..., Any]] = {
            "eager": model,
            "Inductor": torch.compile(model),
            "sparse": torch.compile(prepared.model, backend="sparse"),
        }
        expected = model(**inputs)[0]
        first: dict[str, float] = {}
        difference: dict[str, float] = {}
        for name, run in runs.items():
            start = time.perf_counter()
            difference[name] = float((run(**inputs)[0] - expected).abs().max())
            first[name] = time.perf_counter() - start
        calls = {name: functools.partial(run, **inputs) for name, run in runs.items()}
        seconds = interleaved_medians(calls, 9, "measure")

    print(f"{'':9}{'graphs':>7}{'first call s':>14}{'ms':>9}{'difference':>12}")
    for name in runs:
        count = counts.get(name, "")
        row = f"{name:9}{count:>7}{first[name]:14.1f}{seconds[name] * 1e3:9.1f}"
        print(f"{row}{difference[name]:12.1e}")
    print(f"\n{prepared}")
    return seconds


if __name__ == "__main__":
    main()

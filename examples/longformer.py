"""Longformer: many graphs as it is, one graph with skipped tiles after ``sc.prepare``."""

from __future__ import annotations

import argparse
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

    seconds: dict[str, float] = {}
    rows = []
    with torch.no_grad():
        expected = model(**inputs)[0]

        def measure(name: str, run: Callable[..., Any], count: int) -> None:
            start = time.perf_counter()
            difference = float((run(**inputs)[0] - expected).abs().max())
            first = time.perf_counter() - start
            seconds.update(interleaved_medians({name: lambda: run(**inputs)}, 7, name))
            rows.append((name, str(count), first, seconds[name] * 1e3, difference))

        measure("eager", model, 0)
        count = graphs(model, inputs)
        measure("Inductor", torch.compile(model), count)

        prepared = sc.prepare(model, **inputs)
        count = graphs(model, inputs)
        measure("prepared, sparse", torch.compile(model, backend="sparse"), count)

    print(f"{'':18}{'graphs':>7}{'first call s':>14}{'ms':>9}{'difference':>12}")
    for name, count_text, first, milliseconds, difference in rows:
        print(f"{name:18}{count_text:>7}{first:14.1f}{milliseconds:9.1f}{difference:12.1e}")
    print(f"\n{prepared}")
    return seconds


if __name__ == "__main__":
    main()

"""Prunes a real language model and compares eager, Inductor and sparse on it: ``make demo``.

SmolLM2-135M-Instruct is pruned once with Wanda, to 2:4 and to 60 % unstructured. Inductor runs the
same pruned weights; it cannot use their zeros. Every time is a median of runs that took turns.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from _common import (
    CALIBRATION_MODULES,
    HELD_BACK_MODULES,
    docstrings,
    interleaved_medians,
    load_smollm2,
    perplexity,
    progress,
    resident_mib,
    token_batches,
)
from torch import Tensor, nn

from sparse_compiler.pruning import prune_

PROMPT = "Return a list of all files in the directory. If the directory does not exist,"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything the demo does."""

    layers: int | None = None
    calibration: tuple[int, int] = (24, 256)
    held_back: tuple[int, int] = (8, 512)
    prefill: int = 512
    sentence: int = 24
    decode: int = 8
    repeats: int = 7


QUICK = Sizes(2, (2, 64), (2, 64), 64, 6, 2, 3)


@dataclasses.dataclass
class Row:
    """What is known about one version of the model; NaN is not measured."""

    name: str
    zeros: float = 0.0
    perplexity: float = math.nan
    decode: dict[str, float] = dataclasses.field(default_factory=dict)
    prefill: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_seconds: float = math.nan
    added_mib: float = math.nan
    packed_mib: float = math.nan


class Steps:
    """Wall time of the parts of the demo, in the order they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        print(f"{name} … ", end="", flush=True)
        yield
        seconds = time.perf_counter() - start
        print(f"{seconds:.1f} s", flush=True)
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def __str__(self) -> str:
        parts = [f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()]
        return f"{sum(self.seconds.values()):.0f} s in all: " + ", ".join(parts)


class Session:
    """A model (compiled or not) with a static key-value cache: one graph a shape.

    The cache is allocated once, so that decoding is the same graph with M = 1 at every position.
    """

    def __init__(self, model: Any, config: Any, length: int) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache: Any = StaticCache(config=config, max_cache_len=length)
        self.cache.early_initialization(
            batch_size=1,
            num_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )

    def step(self, ids: Tensor) -> Tensor:
        """Feeds ids [1, n], appends to the cache, and returns the last logits [1, vocabulary]."""
        output = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)
        return output.logits[:, -1]

    def prefill(self, ids: Tensor) -> Tensor:
        """Starts anew with ids [1, n]."""
        self.cache.reset()
        return self.step(ids)

    def decode(self, logits: Tensor, count: int) -> list[int]:
        """``count`` more tokens, each the most probable one."""
        tokens = []
        for _ in range(count):
            ids = logits.argmax(-1, keepdim=True)
            tokens.append(int(ids))
            logits = self.step(ids)
        return tokens

    def complete(self, prompt: Tensor, count: int) -> list[int]:
        """The continuation of a short prompt [1, n], fed one token at a time."""
        self.cache.reset()
        for token in prompt[0].tolist():
            logits = self.step(torch.tensor([[token]]))
        return self.decode(logits, count)


def warm_up(session: Session, ids: Tensor) -> float:
    """Compiles prefill and decode by calling them; seconds."""
    start = time.perf_counter()
    session.decode(session.prefill(ids), 1)
    return time.perf_counter() - start


def timings(
    sessions: dict[str, Session], ids: Tensor, sizes: Sizes
) -> tuple[dict[str, float], dict[str, float]]:
    """Decode tokens per second and prefill milliseconds of each session."""
    logits = {name: session.prefill(ids) for name, session in sessions.items()}

    def decode(name: str) -> None:
        session = sessions[name]
        # Back to where the prefill ended: every run writes the same cache positions.
        for layer in session.cache.layers:
            layer.cumulative_length.fill_(ids.shape[1])
        session.decode(logits[name], sizes.decode)

    seconds = interleaved_medians(
        {name: partial(decode, name) for name in sessions}, sizes.repeats, "decode"
    )
    rate = {name: sizes.decode / value for name, value in seconds.items()}
    prefills = {name: partial(session.prefill, ids) for name, session in sessions.items()}
    seconds = interleaved_medians(prefills, sizes.repeats, "prefill")
    return rate, {name: value * 1e3 for name, value in seconds.items()}


def table(rows: list[Row], backend: str, prefill: int) -> str:
    """All rows as the columns of one table."""

    def number(value: float, digits: int = 1) -> str:
        return "–" if math.isnan(value) else f"{value:,.{digits}f}"

    def both(values: dict[str, float], name: str, faster_is_more: bool) -> str:
        value, base = values.get(name, math.nan), values.get("inductor", math.nan)
        if math.isnan(value) or name != "sparse":
            return number(value)
        ratio = value / base if faster_is_more else base / value
        return f"{number(value)}  ({ratio:.2f}×)"

    lines: list[tuple[str, list[str]]] = [
        ("", [row.name for row in rows]),
        ("zeros in linear layers", [f"{row.zeros:.0%}" for row in rows]),
        ("perplexity, held-back text", [number(row.perplexity) for row in rows]),
    ]
    labels = {"eager": "eager", "inductor": "Inductor", "sparse": f'backend="{backend}"'}
    for name, label in labels.items():
        lines.append((f"decode tokens/s, {label}", [both(r.decode, name, True) for r in rows]))
    for name, label in labels.items():
        lines.append(
            (f"prefill of {prefill}, ms, {label}", [both(r.prefill, name, False) for r in rows])
        )
    lines += [
        ("compile time, s (prefill and decode)", [number(r.compile_seconds, 0) for r in rows]),
        ("memory added by compiling, MiB", [number(r.added_mib, 0) for r in rows]),
        ("packed weights, MiB", [number(r.packed_mib, 0) for r in rows]),
    ]
    widths = [max(len(line[1][i]) for line in lines) + 3 for i in range(len(rows))]
    label_width = max(len(label) for label, _ in lines)
    return "\n".join(
        f"{label:{label_width}}"
        + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in lines
    )


def prepare(sizes: Sizes) -> tuple[Any, Any]:
    """The model, cut to its first layers if asked, and its tokenizer."""
    model, tokenizer = load_smollm2()
    if sizes.layers is not None:
        model.model.layers = nn.ModuleList(list(model.model.layers)[: sizes.layers])
        model.config.num_hidden_layers = sizes.layers
    return model, tokenizer


def explain(model: nn.Module, session: Session) -> Any:
    """The compiler's report on one decoding step."""
    import sparse_compiler as sc

    session.cache.reset()
    ids = torch.ones(1, 1, dtype=torch.long)
    return sc.explain(model, input_ids=ids, past_key_values=session.cache, logits_to_keep=1)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the demo and returns the columns of its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="sparse", help="what stands against Inductor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two layers, few tokens")
    options = parser.parse_args(argv)
    sizes = QUICK if options.quick else Sizes()
    torch.set_num_threads(options.threads)
    steps = Steps()
    with torch.no_grad():
        rows = run(options.backend, sizes, steps)
    print(f"\n{steps}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    return rows


def run(backend: str, sizes: Sizes, steps: Steps) -> list[Row]:
    """The demo itself."""
    with steps("load SmolLM2-135M-Instruct"):
        model, tokenizer = prepare(sizes)
    with steps("read docstrings"):
        calibration = token_batches(tokenizer, docstrings(CALIBRATION_MODULES), *sizes.calibration)
        held_back = token_batches(tokenizer, docstrings(HELD_BACK_MODULES), *sizes.held_back)
        ids = torch.cat(held_back, dim=1)[:, : sizes.prefill]
        prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    length = max(ids.shape[1] + sizes.decode + 1, prompt.shape[1] + sizes.sentence)
    config = model.config

    dense = Row("dense")
    with steps("perplexity"):
        dense.perplexity = perplexity(model, held_back, "perplexity, dense")
    variants: list[tuple[Row, Any]] = []
    for name, arguments in (
        ("2:4", {"pattern": "2:4"}),
        ("60 %", {"pattern": "unstructured", "sparsity": 0.6}),
    ):
        with steps("prune"):
            pruned = copy.deepcopy(model)
            # Without the output layer: calibration needs no logits.
            report = prune_(
                pruned.model,
                method="wanda",
                calibration=progress(calibration, f"calibrate {name}"),
                **arguments,
            )
        with steps("perplexity"):
            row = Row(name, report.sparsity, perplexity(pruned, held_back, f"perplexity, {name}"))
        variants.append((row, pruned))

    # Inductor's code depends on shapes only: compiled once, it runs every version's weights.
    sessions = {
        "eager": Session(model, config, length),
        "inductor": Session(torch.compile(model, dynamic=False), config, length),
    }
    before = resident_mib()
    with steps("compile with Inductor"):
        dense.compile_seconds = warm_up(sessions["inductor"], ids)
        dense.added_mib = resident_mib() - before
    with steps("measure"):
        dense.decode, dense.prefill = timings(sessions, ids, sizes)

    reports = []
    for row, pruned in variants:
        model.load_state_dict(pruned.state_dict())
        # Dynamo would reuse the code made for the last version, whose zeros are elsewhere.
        torch._dynamo.reset()
        with steps("Inductor again, from its cache"):
            warm_up(sessions["inductor"], ids)
        compiled = torch.compile(pruned, backend=backend, dynamic=False)
        sparse = Session(compiled, config, length)
        before = resident_mib()
        with steps(f"compile with {backend}"):
            row.compile_seconds = warm_up(sparse, ids)
            row.added_mib = resident_mib() - before
        with steps("measure"):
            row.decode, row.prefill = timings({**sessions, "sparse": sparse}, ids, sizes)
        with steps("generate"):
            said = {
                name: session.complete(prompt, sizes.sentence)
                for name, session in (("eager", sessions["eager"]), (backend, sparse))
            }
        print(f"\n{row.name}, {PROMPT!r}")
        for name, tokens in said.items():
            print(f"  {name:8} {tokenizer.decode(tokens)!r}")
        print("  the same" if said["eager"] == said[backend] else "  DIFFERENT")
        if backend == "sparse":
            with steps("explain"):
                reports.append((row, explain(pruned, sparse)))
    for row, report in reports:
        row.packed_mib = sum(r.packed_bytes for r in report.rewrites if r.applied) / 2**20
        print(f"\n{row.name}, one decoding step\n{report}")
    rows = [dense, *(row for row, _ in variants)]
    print("\n" + table(rows, backend, ids.shape[1]))
    return rows


if __name__ == "__main__":
    main()

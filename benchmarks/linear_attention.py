"""Attention without softmax, forward and training: `python -m benchmarks.linear_attention`.

Each spelling is compiled unmodified by Inductor and by this project. The running-sum spelling needs
[heads, n, d, d] numbers as written, so it is measured at short lengths only.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import harness, targets
from benchmarks.contestants import OURS, Unavailable, require_backend

HEADS, SIZE = 8, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def quadratic(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    return scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.tril((F.elu(q) + 1) @ (F.elu(k) + 1).mT)
    return scores @ v / (scores.sum(-1, keepdim=True) + 1e-6)


def running_sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    states = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    total = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))
    return torch.einsum("bhnd,bhnde->bhne", q, states) / (total + 1e-6).unsqueeze(-1)


# Spelling and lengths.
CASES: dict[Attention, tuple[int, ...]] = {
    quadratic: (64, 256, 512, 2048, 4096),
    causal: (64, 256, 512, 2048, 4096),
    running_sum: (256, 512),
}


def _step(
    attention: Attention, backend: str, length: int, dtype: torch.dtype, train: bool
) -> Callable[[], list[torch.Tensor]]:
    """One forward, or one forward and backward; returns the output, or the gradients."""
    # A function of its own for each case: Dynamo limits how often one is compiled.
    forward = torch.compile(lambda q, k, v: attention(q, k, v), backend=backend, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, length, SIZE)
    args = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    direction = torch.randn(shape, generator=generator).to(dtype)
    for x in args:
        x.requires_grad_(train)

    def step() -> list[torch.Tensor]:
        if train:
            return list(torch.autograd.grad(forward(*args), args, direction))
        with torch.no_grad():
            return [forward(*args)]

    return step


def _compare(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for x, reference in zip(ours, expected, strict=True):
        error = float((x.float() - reference.float()).abs().max() / reference.float().abs().max())
        if not error <= _TOLERANCE[x.dtype]:
            raise Unavailable(f"WRONG: differs from Inductor by {error:.1e} (relative)")


def run(rounds: int = harness.ROUNDS, keep: bool = False, quick: bool = False) -> None:
    """Measures every spelling; prints and records it."""
    backends = ("inductor", OURS)
    table = harness.Table(
        f"attention without softmax, {HEADS} heads of {SIZE}, "
        f"median of {rounds} interleaved rounds",
        ["spelling", "n", "dtype", "what", *(f"{b} ms" for b in backends), "ratio", "target"],
        [11, 5, 5, 8, 11, 9, 23, 16],
    )
    records: list[dict[str, object]] = []
    notes: dict[str, None] = {}
    cases = [
        (attention, length, dtype, train)
        for attention, lengths in CASES.items()
        for length in (lengths[-2:] if quick else lengths)
        for dtype in (["fp32"] if quick else DTYPES)
        for train in (False, True)
    ]
    for attention, length, dtype, train in cases:
        torch._dynamo.reset()
        contestants: list[harness.Contestant] = []
        expected: list[torch.Tensor] = []
        for backend in backends:
            try:
                if backend == OURS:
                    require_backend()
                step = _step(attention, backend, length, DTYPES[dtype], train)
                result = step()
                expected = expected or result
                _compare(result, expected)
                contestants.append(harness.Local(backend, step))
            except Exception as error:  # stays in the table, the other is still timed
                notes[f"{backend}: {type(error).__name__}: {error}"] = None
        if not contestants:
            continue
        measured = harness.measure(contestants, rounds)
        both = all(backend in measured.rounds for backend in backends)
        ratio = measured.ratio("inductor", OURS) if both else None
        told = harness.verdict(ratio.median if ratio else None, targets.NEVER_SLOWER)
        times = [
            f"{measured.seconds(b) * 1e3:.2f}" if b in measured.rounds else "none" for b in backends
        ]
        what = "training" if train else "forward"
        told = "disturbed" if measured.disturbed else told
        table.add(attention.__name__, length, dtype, what, *times, ratio or "-", told)
        facts = {"spelling": attention.__name__, "length": length, "dtype": dtype, "what": what}
        others = round(statistics.median(measured.others), 3)
        records.append({**facts, "others": others, **measured.to_dict()})
    print()
    for note in notes:
        print(f"[no figure] {note}")
    harness.write_results("linear_attention", table.machine, records, keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    harness.add_arguments(parser)
    arguments = parser.parse_args()
    run(arguments.rounds, arguments.keep, arguments.quick)


if __name__ == "__main__":
    main()

"""Training with masked weights: an MLP at 90 % zeros; `python -m benchmarks.training`.

The masks are those of `torch.nn.utils.prune`, which multiplies them into the weights in every
forward.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
from torch.nn.utils import prune

from benchmarks import harness, targets
from benchmarks.contestants import OURS, Unavailable, require_backend

_WIDTHS = (1024, 4096, 4096, 1024)
_ZEROS = 0.9
_TOLERANCE = 1e-3


def masked_mlp() -> torch.nn.Sequential:
    """Linear layers of `_WIDTHS` with GELU between them; every weight has a fixed random mask."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for in_features, out_features in itertools.pairwise(_WIDTHS):
        layer = torch.nn.Linear(in_features, out_features)
        prune.random_unstructured(layer, "weight", _ZEROS)
        layers += [layer, torch.nn.GELU()]
    return torch.nn.Sequential(*layers[:-1])


def _step(backend: str, rows: int) -> Callable[[], list[torch.Tensor]]:
    """One forward and backward; returns the gradients of the unmasked weights."""
    own = masked_mlp()
    forward: Callable[..., torch.Tensor] = own
    if backend != "eager":
        forward = torch.compile(own, backend=backend)
    x = torch.randn(rows, _WIDTHS[0], generator=torch.Generator().manual_seed(1))
    parameters = list(own.parameters())

    def step() -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = None
        forward(x).square().mean().backward()
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    return step


def _compare(gradients: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, reference in zip(gradients, expected, strict=True):
        error = float((ours - reference).abs().max() / reference.abs().max())
        if not error <= _TOLERANCE:
            raise Unavailable(f"WRONG GRADIENT: differs from eager by {error:.1e} (relative)")


def run(
    rounds: int = harness.ROUNDS, keep: bool = False, rows: tuple[int, ...] = (64, 512)
) -> None:
    """Measures one training step per number of rows; prints and records it."""
    backends = ("eager", "inductor", OURS)
    widths = "-".join(map(str, _WIDTHS))
    table = harness.Table(
        f"training step (forward + backward), masked MLP {widths}, {_ZEROS:.0%} zeros, fp32, "
        f"median of {rounds} interleaved rounds",
        ["rows", *(f"{b} ms" for b in backends), f"{OURS} against inductor", "target", "others"],
        [5, 9, 11, 9, 23, 16, 0],
    )
    records: list[dict[str, object]] = []
    notes: dict[str, None] = {}
    for m in rows:
        torch._dynamo.reset()
        expected = _step("eager", m)()
        contestants = []
        for backend in backends:
            try:
                if backend == OURS:
                    require_backend()
                step = _step(backend, m)
                _compare(step(), expected)
                contestants.append(harness.Local(backend, step))
            except Exception as error:  # stays in the table, the others are still timed
                notes[f"{backend}: {type(error).__name__}: {error}"] = None
        measured = harness.measure(contestants, rounds)
        ratio = measured.ratio("inductor", OURS) if OURS in measured.rounds else None
        times = [
            f"{measured.seconds(b) * 1e3:.2f}" if b in measured.rounds else "none" for b in backends
        ]
        told = harness.verdict(ratio.median if ratio else None, targets.NEVER_SLOWER)
        told = "disturbed" if measured.disturbed else told
        others = f"{statistics.median(measured.others):.2f}"
        table.add(m, *times, ratio or "-", told, others)
        records.append({"rows": m, "widths": _WIDTHS, "zeros": _ZEROS, **measured.to_dict()})
    print()
    for note in notes:
        print(f"[no figure] {note}")
    harness.write_results("training", table.machine, records, keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    harness.add_arguments(parser)
    arguments = parser.parse_args()
    run(arguments.rounds, arguments.keep)


if __name__ == "__main__":
    main()

"""Mixtures of experts, blocks and whole models: `python -m benchmarks.moe`.

Hugging Face's own block, whose experts come in three implementations; ours runs its default
(`grouped_mm`) unmodified. The peer is the fastest of what the same block does today: Inductor on
`grouped_mm`, Inductor on `batched_mm` (few tokens only, it copies a weight for each pair), and the
eager loop over experts, which Inductor cannot compile whole. A block that runs every expert on
every token, as tutorials write it, has no such peer but Inductor.
"""

import argparse
import copy
import dataclasses
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import harness, targets
from benchmarks.contestants import OURS, Unavailable, require_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Pairs up to which weights are gathered at all: more would take gigabytes.
_MOST_GATHERED = 64


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a block: features, hidden units, experts, experts a token."""

    features: int
    hidden: int
    experts: int
    choices: int

    def __str__(self) -> str:
        return f"{self.experts} x {self.hidden}, top {self.choices}, of {self.features}"


MIXTRAL = Shape(1024, 3584, 8, 2)
FINE = Shape(2048, 768, 64, 8)
SMALL = Shape(512, 128, 128, 8)
TRAINED = Shape(512, 128, 64, 8)
EVERY = (Shape(512, 1024, 8, 2), Shape(256, 512, 16, 2))

Step = Callable[[], list[torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        what: "forward", "training" or "every expert".
        target: least ratio against the best peer.
    """

    what: str
    shape: Shape
    tokens: int
    dtype: str
    target: float


def cases(quick: bool) -> Iterator[Case]:
    """All lines; with `quick` those that the targets are stated for."""
    # Inductor's figures and the floors of the performance table, times 1.25 but for one token.
    fp32 = {1: 5.7 / 2.6, 8: 38.5 / 13.0, 256: 93 / 76.0}
    bf16 = {1: 2.6 / 1.3, 8: 8.8 / 6.5, 256: 35 / 32.5}
    for dtype, known in (("fp32", fp32), ("bf16", bf16)):
        for tokens in (1, 8, 256) if quick else (1, 4, 8, 32, 256, 1024):
            target = known.get(tokens, targets.NEVER_SLOWER)
            yield Case("forward", MIXTRAL, tokens, dtype, target)
    for shape in (FINE, SMALL):
        for tokens in (1, 64) if quick else (1, 8, 64, 512):
            for dtype in ["fp32"] if quick else DTYPES:
                yield Case("forward", shape, tokens, dtype, targets.NEVER_SLOWER)
    for shape in EVERY:
        yield Case("every expert", shape, 256, "fp32", 0.8 * shape.experts / shape.choices)
    for tokens in (128,) if quick else (16, 128, 1024):
        yield Case("training", TRAINED, tokens, "fp32", 1.0)


class EveryExpert(torch.nn.Module):
    """Every expert on every token, weighted by gates that are mostly zero."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.choices = shape.choices
        self.gate = torch.nn.Linear(shape.features, shape.experts)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(shape.features, shape.hidden),
                torch.nn.GELU(),
                torch.nn.Linear(shape.hidden, shape.features),
            )
            for _ in range(shape.experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.gate(x)
        best, ids = logits.topk(self.choices, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, ids, best.softmax(-1))
        return (torch.stack([e(x) for e in self.experts], -1) * gates.unsqueeze(-2)).sum(-1)


def _block(shape: Shape, implementation: str) -> torch.nn.Module:
    """Hugging Face's Mixtral block; equal weights at every call."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.features,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.choices,
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return block.eval()


def _step(call: Callable[..., torch.Tensor], model: torch.nn.Module, case: Case) -> Step:
    generator = torch.Generator().manual_seed(0)
    size = (1, case.tokens, case.shape.features)
    x = torch.randn(size, generator=generator).to(DTYPES[case.dtype])
    direction = torch.randn(size, generator=generator).to(DTYPES[case.dtype])
    leaves = [x.requires_grad_(case.what == "training"), *model.parameters()]

    def step() -> list[torch.Tensor]:
        if case.what == "training":
            return list(torch.autograd.grad(call(x), leaves, direction))
        with torch.no_grad():
            return [call(x)]

    return step


def _contestants(case: Case) -> dict[str, Callable[[], Step]]:
    """Who takes part, and how to make the call that is timed."""
    made: dict[str, torch.nn.Module] = {}

    def model(implementation: str) -> torch.nn.Module:
        if case.what == "every expert":
            torch.manual_seed(0)
            return made.setdefault("", EveryExpert(case.shape).eval())
        if not made:
            made["grouped_mm"] = _block(case.shape, "grouped_mm").to(DTYPES[case.dtype])
        if implementation not in made:
            # The same parameters under another configuration.
            source = made["grouped_mm"]
            shared = {id(p): p for p in source.parameters()}
            other = copy.deepcopy(source, dict(shared))
            other.experts.config._experts_implementation = implementation
            made[implementation] = other
        return made[implementation]

    def compiled(implementation: str, backend: str) -> Callable[[], Step]:
        def make() -> Step:
            module = model(implementation)
            call = torch.compile(module, backend=backend, dynamic=False)
            return _step(call, module, case)

        return make

    if case.what == "every expert":
        return {"inductor": compiled("", "inductor"), OURS: compiled("", OURS)}
    found = {"grouped": compiled("grouped_mm", "inductor")}
    if case.tokens * case.shape.choices <= _MOST_GATHERED and case.what == "forward":
        found["batched"] = compiled("batched_mm", "inductor")
    found["loop"] = lambda: _step(model("eager"), model("eager"), case)
    return {**found, OURS: compiled("grouped_mm", OURS)}


def _compare(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        error = float((one.float() - other.float()).abs().max() / other.float().abs().max())
        if not error <= _TOLERANCE[one.dtype]:
            raise Unavailable(f"WRONG RESULT: differs by {error:.1e} (relative)")


def _measured(case: Case, rounds: int, notes: dict[str, None]) -> harness.Measurement:
    torch._dynamo.reset()
    contestants: list[harness.Contestant] = []
    want: list[torch.Tensor] = []
    for name, make in _contestants(case).items():
        try:
            if name == OURS:
                require_backend()
            step = make()
            with warnings.catch_warnings():  # Dynamo's, of Hugging Face's version checks
                warnings.simplefilter("ignore")
                result = step()
            want = want or result
            _compare(result, want)
            contestants.append(harness.Local(name, step))
        except Exception as error:  # stays in the table, the others are still timed
            first = str(error).strip().splitlines() or [""]
            notes[f"{name}, {case.shape}: {type(error).__name__}: {first[0]}"] = None
    return harness.measure(contestants, rounds)


def run(rounds: int = harness.ROUNDS, keep: bool = False, quick: bool = False) -> None:
    """Measures every block; prints and records it."""
    columns = ["grouped", "batched", "loop", "inductor", OURS]
    table = harness.Table(
        f"mixtures of experts, median of {rounds} interleaved rounds",
        ["block", "what", "tokens", "dtype", *(f"{c} ms" for c in columns), "ratio", "target"],
        [28, 12, 6, 5, 10, 10, 10, 11, 9, 24, 16],
    )
    records: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    for case in cases(quick):
        measured = _measured(case, rounds, notes)
        times = [
            f"{measured.seconds(c) * 1e3:.2f}" if c in measured.rounds else "-" for c in columns
        ]
        peers = [name for name in measured.rounds if name != OURS]
        best = min(peers, key=measured.seconds, default="")
        ratio = measured.ratio(best, OURS) if best and OURS in measured.rounds else None
        told = harness.verdict(ratio.median if ratio else None, case.target)
        told = "disturbed" if measured.disturbed else told
        table.add(case.shape, case.what, case.tokens, case.dtype, *times, ratio or "-", told)
        others = round(statistics.median(measured.others), 3)
        facts = {**dataclasses.asdict(case), "best": best, "others": others}
        records.append({**facts, **measured.to_dict()})
    print()
    for note in notes:
        print(f"[no figure] {note}")
    harness.write_results("moe", table.machine, records, keep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    harness.add_arguments(parser)
    arguments = parser.parse_args()
    run(arguments.rounds, arguments.keep, arguments.quick)


if __name__ == "__main__":
    main()

"""The table that `python -m tests.models.attention_models` prints."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tests.models.attention_check import (
    ALWAYS,
    STAGES,
    WAYS,
    Outcome,
    available,
    check,
    complaints,
)

if TYPE_CHECKING:
    from tests.models.attention_models import Subject

_COLUMNS = ("model", "variant", "graphs", "sites", "applied", "error", "eager", "seconds", "worst")
_WIDTHS = (24, 18, 6, 5, 7, 8, 8, 7, 5)


def _line(cells: Sequence[object]) -> str:
    padded = (str(c).ljust(w) for c, w in zip(cells, _WIDTHS, strict=True))
    return "  ".join(padded).rstrip()


def _row(name: str, outcome: Outcome) -> str:
    applied = f"{sum(r.applied for r in outcome.rewrites)}/{len(outcome.rewrites)}"
    graphs = f"{outcome.graphs}/{outcome.dynamo_graphs}"
    errors = f"{outcome.error:.1e}", f"{outcome.eager_error:.1e}"
    cells = (graphs, outcome.sites, applied, *errors, f"{outcome.seconds:.1f}", outcome.worst)
    return _line((name, outcome.variant, *cells))


def main(models: Mapping[str, Subject]) -> None:
    """Print a table of models and variants, and below each line what was said about its sites."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(models)}")
    parser.add_argument("--way", choices=WAYS, default="passes", help="passes: nothing is compiled")
    parser.add_argument("--stage", choices=tuple(STAGES), help="only this one")
    parser.add_argument("--implementation", help="only this one: eager, sdpa or own")
    parser.add_argument("--selection", default="always", help="as in the backend's options")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in models]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    options = {**ALWAYS, "selection": arguments.selection}
    print(_line(_COLUMNS), flush=True)
    failures = 0
    for name in arguments.names or models:
        subject = models[name]
        if not available(subject):
            print(_line((name, f"package {subject.package} is not installed", *[""] * 7)))
            continue
        for implementation in subject.implementations:
            for stage in subject.stages:
                if arguments.implementation not in (None, implementation):
                    continue
                if arguments.stage not in (None, stage):
                    continue
                failures += _print_stage(
                    name, subject, implementation, stage, arguments.way, options
                )
    print(f"\n{failures} of the stages failed" if failures else "\nall agree")


def _print_stage(
    name: str,
    subject: Subject,
    implementation: str,
    stage: str,
    way: str,
    options: Mapping[str, Any],
) -> int:
    try:
        outcomes = check(subject, implementation, stage, way, options)
    except Exception as error:  # the table goes on with the next stage
        torch._dynamo.reset()
        first = str(error).strip().splitlines() or [""]
        print(f"{name} {implementation} {stage}: {type(error).__name__}: {first[0]}", flush=True)
        return 1
    for outcome in outcomes:
        print(_row(name, outcome), flush=True)
        if outcome.excuse:
            print(f"    not tried: {outcome.excuse}")
        for rewrite in outcome.rewrites:
            verdict = rewrite.pattern or "?" if rewrite.applied else "left"
            print(f"    {rewrite.target}: {verdict}: {rewrite.reason}")
    found = complaints(subject, outcomes)
    for sentence in found:
        print(f"    WRONG {sentence}", flush=True)
    return int(bool(found))

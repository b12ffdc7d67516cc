"""``explain``: what was found in a model, what was chosen, why, and what it gained."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import torch
from torch import fx

from sparse_compiler import backend
from sparse_compiler.options import Options
from sparse_compiler.passes import Rewrite
from sparse_compiler.prepare.registry import PREPARERS
from sparse_compiler.region import region_graph


@dataclasses.dataclass(frozen=True)
class GraphPair:
    """One compiled graph, before and after the passes.

    Attributes:
        before: the canonical graph as Dynamo gave it.
        after: the graph that Inductor compiled; the same graph if nothing was rewritten.
        seconds: time this package spent on it (analysis, packing, selection).
    """

    before: fx.GraphModule
    after: fx.GraphModule
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``explain`` found out; ``print`` it, or look at the parts.

    Attributes:
        rewrites: every candidate with its verdict, see ``Rewrite``.
        graphs: one pair for each graph that Dynamo found.
        graph_breaks: reasons for which Dynamo cut the model, with how often each occurred.
        compile_seconds: from the first call to its result, everything included.
        preparable: of a model in several graphs, what kinds of modules ``prepare`` knows, with how
            many there are.
    """

    rewrites: tuple[Rewrite, ...]
    graphs: tuple[GraphPair, ...]
    graph_breaks: tuple[tuple[str, int], ...]
    compile_seconds: float
    preparable: tuple[tuple[str, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what ``json.dumps`` takes."""
        return {
            "rewrites": [dataclasses.asdict(rewrite) for rewrite in self.rewrites],
            "graphs": [
                {
                    "nodes_before": len(pair.before.graph.nodes),
                    "nodes_after": len(pair.after.graph.nodes),
                    "seconds": pair.seconds,
                }
                for pair in self.graphs
            ],
            "graph_breaks": [list(item) for item in self.graph_breaks],
            "compile_seconds": self.compile_seconds,
            "preparable": [list(item) for item in self.preparable],
        }

    def to_networkx(self) -> list[nx.DiGraph]:
        """The compiled graphs as networkx graphs."""
        return [region_graph(pair.after.graph) for pair in self.graphs]

    def __str__(self) -> str:
        applied = sum(rewrite.applied for rewrite in self.rewrites)
        lines = [
            f"{len(self.graphs)} graph{'s' * (len(self.graphs) != 1)}, "
            f"{len(self.rewrites)} candidates, {applied} rewritten, "
            f"compiled in {self.compile_seconds:.1f} s "
            f"({sum(pair.seconds for pair in self.graphs):.1f} s of it in this package)"
        ]
        if self.rewrites:
            lines += ["", *_table(self.rewrites)]
        for reason, times in self.graph_breaks:
            lines.append(f"graph break ({times}x): {reason}")
        for kind, number in self.preparable:
            lines.append(
                f"{kind} ({number}x) may be what cuts the model: sc.prepare(model, *inputs), or "
                "sc.compile(model, *inputs), replaces it by one that is traced whole"
            )
        if not self.graphs:
            lines.append("Dynamo compiled nothing: the model was not called, or runs eagerly.")
        return "\n".join(lines)


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Compile a model with ``backend="sparse"``, run it once, and report what was done.

    Args:
        model: a module or function; one that is already compiled is unwrapped first.
        *args: inputs, as the model takes them.
        options: options of the backend.
        **kwargs: keyword inputs.

    Run it in the mode that is to be explained: under ``torch.no_grad()`` for inference. Nothing
    that was compiled before is thrown away.
    """
    Options.parse(options)
    model = getattr(model, "_orig_mod", model)
    records: list[backend.CompiledGraph] = []

    # A function of its own: Dynamo keeps code of other backends apart.
    def reporting(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return backend.sparse(gm, example_inputs, options=options)

    breaks = torch._dynamo.utils.counters["graph_break"]
    earlier = Counter(breaks)
    backend.listeners.append(records.append)
    started = time.perf_counter()
    try:
        torch.compile(model, backend=reporting)(*args, **kwargs)
    finally:
        backend.listeners.remove(records.append)
    seconds = time.perf_counter() - started
    new_breaks = Counter(breaks) - earlier
    return Report(
        tuple(rewrite for record in records for rewrite in record.rewrites),
        tuple(GraphPair(r.before, r.after, r.seconds) for r in records),
        tuple((reason.splitlines()[0], times) for reason, times in new_breaks.most_common()),
        seconds,
        _preparable(model) if new_breaks or len(records) != 1 else (),
    )


def _preparable(model: Callable[..., Any]) -> tuple[tuple[str, int], ...]:
    """Kinds of modules that ``prepare`` knows and has not replaced yet."""
    if not isinstance(model, torch.nn.Module):
        return ()
    left = [module for module in model.modules() if "forward" not in vars(module)]
    counts = {p.name: sum(map(p.find, left)) for p in PREPARERS}
    return tuple((kind, number) for kind, number in counts.items() if number)


_HEADINGS = (
    "layer",
    "shape",
    "rows",
    "zeros",
    "pattern",
    "format",
    "dense",
    "sparse",
    "gain",
    "why",
)


def _table(rewrites: Sequence[Rewrite]) -> list[str]:
    """Layers that differ in their numbers only share a line."""
    groups: dict[tuple[Any, ...], list[Rewrite]] = {}
    for item in rewrites:
        name = re.sub(r"(?<![A-Za-z])\d+", "*", item.target)
        reason = re.sub(r"\d+\.\d+", "*", item.reason)
        pattern = re.sub(r"^\d+ ", "", item.pattern or "-")  # "14 zero rows"
        if item.spelling:
            pattern += f" [{item.spelling}]"
        key = (item.kind, name, item.shape, item.rows, item.format, pattern, reason)
        groups.setdefault(key, []).append(item)
    rows = [_HEADINGS, *(_row(key[1], key[5], group) for key, group in groups.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]


def _row(name: str, pattern: str, group: list[Rewrite]) -> tuple[str, ...]:
    first = group[0]
    if len({item.pattern for item in group}) == 1 and not first.spelling:
        pattern = first.pattern or "-"

    def mean(attribute: str, form: str) -> str:
        values = [getattr(item, attribute) for item in group]
        known = [value for value in values if value is not None]
        return form.format(sum(known) / len(known)) if known else "-"

    why = first.reason
    if first.near_misses:
        why += "; near miss: " + ", ".join(first.near_misses)
    return (
        f"{name} x{len(group)}" if len(group) > 1 else _shortened(first.target),
        "x".join(map(str, first.shape)) or "-",
        ",".join(map(str, first.rows)) or "-",
        mean("sparsity", "{:.1%}"),
        pattern,
        first.format,
        mean("baseline_ms", "{:.3f} ms"),
        mean("sparse_ms", "{:.3f} ms"),
        mean("speedup", "{:.2f}x"),
        why,
    )


def _shortened(target: str) -> str:
    """A list of layers as its first and how many more there are."""
    first, *others = target.split(", ")
    return f"{first} and {len(others)} more" if others else first

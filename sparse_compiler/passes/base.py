"""What every pass shares: its context, its verdicts, and the manager that runs several.

A pass reads as find, check, rewrite. ``check`` answers with a ``Rewrite``: applied or not, and why,
in a sentence. Nothing is silent: what a pass looked at and left alone is in the list too.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from sparse_compiler.derived import drop_unused
from sparse_compiler.dispatch import MoeProblem
from sparse_compiler.errors import PassError, SparseCompilerError
from sparse_compiler.formats.cost import Comparison, Decision, LinearProblem, ModelSelector
from sparse_compiler.options import Options
from sparse_compiler.score.cost import AttentionProblem

log = logging.getLogger("sparse_compiler")


@dataclasses.dataclass
class Rewrite:
    """One candidate, what was decided about it, and why.

    Attributes:
        kind: ``"linear"``, ``"dead_channels"``, ``"constant"``, ``"attention"``,
            ``"linear_attention"``, ``"moe"``, or ``"graph"`` for one left alone.
        target: path of the weight's module in the user's model, such as ``layers.0.mlp.up_proj``.
        shape: out_features, in_features; of attention: batch, heads, queries, keys, head size; of a
            mixture of experts: tokens, experts, choices, features, hidden features.
        rows: rows of the input (batch times sequence) the decision was made for.
        dtype: of the weight; of attention: of queries and keys.
        sparsity: fraction of zeros, 0 to 1; of attention: of tiles that are skipped; of a mixture
            of experts: of the pairs of a token and an expert, as written, that are not computed.
        pattern: what the zeros look like, such as ``"2:4"`` or ``"causal & sliding window 256"``.
        spelling: how the model writes it, such as ``"sdpa"`` or ``"matmul, add, softmax, matmul"``.
        format: how the weight is stored now, or ``"tiles"``; ``"dense"`` if it was left alone.
        applied: whether the graph was changed.
        reason: why, in a sentence.
        speedup: measured dense time over sparse time, None if nothing was measured.
        baseline_ms: dense time in milliseconds.
        sparse_ms: time of the best sparse candidate in milliseconds.
        near_misses: patterns that a few weights break.
        packed_bytes: memory of the packed weight.
        error: traceback of an internal failure, if there was one.
    """

    kind: str
    target: str
    shape: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    dtype: str = ""
    sparsity: float = 0.0
    pattern: str = ""
    spelling: str = ""
    format: str = "dense"
    applied: bool = False
    reason: str = ""
    speedup: float | None = None
    baseline_ms: float | None = None
    sparse_ms: float | None = None
    near_misses: tuple[str, ...] = ()
    packed_bytes: int = 0
    error: str | None = None


class Selector(Protocol):
    """Decides between dense and the legal formats of a linear layer."""

    def choose(self, problem: LinearProblem, weight: torch.Tensor) -> Decision:
        """The format to use, or None for dense, with the reason and the times."""
        ...

    def compare(self, before: LinearProblem, after: LinearProblem) -> Comparison:
        """Times of a dense layer and of a smaller one, both at the one number of rows."""
        ...

    def attend(self, problem: AttentionProblem) -> Decision:
        """The format ``"tiles"`` if skipping a score's empty tiles pays, or None for dense."""
        ...

    def race(
        self,
        key: str,
        estimate: tuple[float, float],
        runs: Callable[[], tuple[Callable[[], None], Callable[[], None]]],
    ) -> Decision:
        """The format ``"rewritten"`` if the second of two runs is faster, or None for the first.

        Args:
            key: all that decides their times.
            estimate: milliseconds of both by a roofline.
            runs: makes them; called only if they are to be timed.
        """
        ...

    def dispatch(self, problem: MoeProblem) -> Decision:
        """The format ``"routed"`` if computing the routed pairs only pays, or None."""
        ...


@dataclasses.dataclass
class PassContext:
    """What passes need to know about one compilation.

    Attributes:
        options: the user's options.
        training: whether gradients may flow through the graph.
        selector: decides between dense and sparse; the roofline model by default.
        rewrites: verdicts, in the order they were made.
    """

    options: Options = dataclasses.field(default_factory=Options)
    training: bool = False
    selector: Selector = dataclasses.field(default_factory=ModelSelector)
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)

    def out_of_fuel(self) -> bool:
        """Whether the number of rewrites that ``options.fuel`` allows has been made."""
        fuel = self.options.fuel
        return fuel is not None and sum(r.applied for r in self.rewrites) >= fuel

    def failed(self, rewrite: Rewrite, error: Exception) -> None:
        """A pass failed inside: leave the region dense and warn, or raise.

        Raises:
            PassError: with ``on_error="raise"``.
        """
        rewrite.applied = False
        rewrite.error = traceback.format_exc()
        rewrite.reason = f"an internal error left it dense: {type(error).__name__}: {error}"
        if self.options.on_error == "raise":
            if isinstance(error, SparseCompilerError):
                raise error
            raise PassError(f"{rewrite.target}: {type(error).__name__}: {error}") from error
        warnings.warn(
            f"sparse_compiler left {rewrite.target} dense after an internal error "
            f"({type(error).__name__}: {error}). The report has the traceback; "
            'options={"on_error": "raise"} raises it.',
            stacklevel=2,
        )


class Pass(abc.ABC):
    """Base of all passes: called with a canonical graph module, returns a ``PassResult``.

    Args:
        context: what the compilation knows; a fresh default one if the pass runs on its own.
    """

    name: str

    def __init__(self, context: PassContext | None = None) -> None:
        self.context = context or PassContext()

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Run on ``gm`` in place.

        Returns:
            ``PassResult(graph_module, modified)``; the verdicts are in
            ``graph_module.meta["rewrites"]``.
        """
        edits = len(gm.meta.get("edits", ()))
        gm.meta["rewrites"] = self.context.rewrites
        self.run(gm)
        modified = len(gm.meta.get("edits", ())) > edits
        if modified:
            gm.graph.eliminate_dead_code()
            drop_unused(gm)
            gm.graph.lint()
            gm.recompile()
        log.debug("%s: %s", self.name, "changed the graph" if modified else "no change")
        return PassResult(gm, modified)

    @abc.abstractmethod
    def run(self, gm: fx.GraphModule) -> None:
        """Find candidates in ``gm``, check them, rewrite those that pay."""


class PassManager:
    """Runs passes one after the other.

    Args:
        passes: the passes; they are given ``context`` if one is passed here.
    """

    def __init__(self, passes: Sequence[Pass], context: PassContext | None = None) -> None:
        self.passes = list(passes)
        if context is not None:
            for item in self.passes:
                item.context = context

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        modified = False
        for item in self.passes:
            result = item(gm)
            gm, modified = result.graph_module, modified or result.modified
        return PassResult(gm, modified)


def module_path(node: fx.Node, fallback: str) -> str:
    """Path of the innermost module that a node comes from, such as ``layers.0.mlp``."""
    stack = node.meta.get("nn_module_stack") or {}
    if stack:
        path = str(list(stack.values())[-1][0])
        for prefix in ("L['self']", "L['fn']", "L__self__"):
            path = path.removeprefix(prefix)
        path = path.replace("['", ".").replace("']", "").strip(".")
        path = ".".join(part for part in path.split(".") if not part.startswith("_modules"))
        if path:
            return path
    return fallback

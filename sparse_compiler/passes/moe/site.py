"""What is known of one mixture of experts: a site that can be rewritten, or a refusal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import fx

from sparse_compiler.region import Builder
from sparse_compiler.score.expr import Expr

# Makes one operand of the operator where the rewrite stands.
Make: TypeAlias = Callable[[Builder], fx.Node]


@dataclasses.dataclass(frozen=True)
class Site:
    """One mixture of experts, as the operator ``moe`` takes it.

    Attributes:
        node: what the rewrite replaces: its result.
        region: all nodes that die with it, ``node`` included.
        spelling: how the model writes it, for reports, such as ``"grouped_mm"``.
        form: what it costs today: ``"grouped"``, ``"gathered"``, ``"dense"`` or ``"capacity"``.
        x: the tokens [T, D].
        ids: the experts of each token [T, K], int64.
        gates: their weights [T, K].
        inner: P stacked weights [E, I, D], or P * E weights [I, D], part by part.
        inner_bias: P biases [E, I], or none.
        outer: one stacked weight [E, O, I], or E weights [O, I].
        outer_bias: [E, O], or None.
        body: what is between the linear layers, in ``load(p, "f32", K)``.
        experts: E.
        choices: K.
        tokens: T.
        features: D.
        hidden: I.
        out_features: O.
        dtype: of tokens and weights.
        restore: from the operator's result [T, O] to the shape and dtype of ``node``.
        gates_on_input: whether a gate scales its token, not the expert's result.
        passthrough: experts behind the E that return the token itself.
        slots: slots of each expert, of the form ``"capacity"``.
        turned: whether weights are stored [in, out].
    """

    node: fx.Node
    region: frozenset[fx.Node]
    spelling: str
    form: str
    x: Make
    ids: Make
    gates: Make
    inner: Sequence[Make]
    inner_bias: Sequence[Make]
    outer: Sequence[Make]
    outer_bias: Make | None
    body: Expr
    experts: int
    choices: int
    tokens: int | torch.SymInt
    features: int
    hidden: int
    out_features: int
    dtype: torch.dtype
    restore: Callable[[Builder, fx.Node], fx.Node]
    gates_on_input: bool = False
    passthrough: int = 0
    slots: int | torch.SymInt = 0
    turned: bool = False


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A mixture of experts that is left alone.

    Attributes:
        node: its result, or the node it was recognised by.
        spelling: how the model writes it, as far as it was read.
        reason: why, in a sentence without its full stop.
    """

    node: fx.Node
    spelling: str
    reason: str


class Refused(Exception):
    """Why something cannot be rewritten: a sentence without its full stop."""


def given(node: fx.Node) -> Make:
    """An operand that a node of the graph is already."""
    return lambda builder: node

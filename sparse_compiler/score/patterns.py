"""What people call a score's masks and terms: for reports, and to prove the simplest ones.

Names come from the structure of the expression (``names`` has those of conditions). None is a claim
that kernels rely on, except for ``causal`` and ``scale``, which are exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from sparse_compiler.score.affine import Comparison
from sparse_compiler.score.expr import Expr, K, Q, S, add, and_, const, not_
from sparse_compiler.score.fit import factored, fit
from sparse_compiler.score.masks import plan
from sparse_compiler.score.names import Known, conjunction, without
from sparse_compiler.score.node import TRUE

# A fill this low has weight 0 in any row that keeps a pair.
_LOW = -1e30
# The logarithm of more times than any key is repeated.
_MOST = 20.0


@dataclasses.dataclass(frozen=True)
class Causal:
    """``scale * s`` where k <= q + offset, and nothing elsewhere.

    Attributes:
        scale: the factor of s.
        offset: an int expression in runtime integers; 0 in SDPA's ``is_causal``.
    """

    scale: float
    offset: Expr


def is_causal(score: Expr) -> Causal | None:
    """The proof that a score is a causal mask with a scale and nothing else, None if it is not."""
    scale = mask_only(score)
    if scale is None or plan(score).additions or not _is_swallowed(score):
        return None
    found = Comparison.of(keep_condition(score))
    if found is None or found.op != "ge":
        return None
    offset = add(without(found.terms, (Q, 1), (K, -1)), -found.bound)
    return None if offset.depends_on("bhqk") or offset.depends_on("load") else Causal(scale, offset)


def mask_only(score: Expr) -> float | None:
    """The scale, if the score is ``scale * s`` wherever its masks keep a pair; else None."""
    return scale_of(plan(score).full)


def scale_of(score: Expr) -> float | None:
    """c, if the score is ``c * s``; else None."""
    if score is S:
        return 1.0
    if score.op == "mul" and score.operands[0] is S and score.operands[1].op == "const":
        return float(score.operands[1].value)
    return None


def keep_condition(score: Expr) -> Expr:
    """Where all conditions of the score's masks keep a pair; true if it has none."""
    terms = (item if keep else not_(item) for item, keep in plan(score).conditions)
    return and_(TRUE, *terms)


def _is_swallowed(score: Expr) -> bool:
    """Whether every fill is so low that what it is added to does not matter."""
    conditions = {condition for condition, _ in plan(score).conditions}
    fills = [
        min((branch.value for branch in node.operands[1:] if branch.op == "const"), default=0.0)
        for node in score.walk()
        if node.op == "where" and node.operands[0] in conditions and node.type == "float"
    ]
    # Nothing may come between a fill and the softmax but additions, scales and other choices.
    plain = {"where", "add", "mul", "const", "s"}
    inside = {node.op for node in _values_of(score)}
    return inside <= plain and all(fill <= _LOW for fill in fills)


def _values_of(score: Expr) -> list[Expr]:
    """The nodes that the value is computed from, without conditions."""
    found: dict[Expr, None] = {}
    waiting = [score]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting.extend(item for item in node.operands if item.type != "bool")
    return list(found)


def describe(score: Expr, leaves: Sequence[torch.Tensor | None] = (), earlier: int = 0) -> str:
    """What a score does, in a few words: ``"causal & sliding window 256 & padding"``.

    Args:
        score: a float expression.
        leaves: tensors that ``load`` reads, by slot, None for those that are not known: masks of
            blocks are looked at.
        earlier: how many more keys than queries there are.

    Returns:
        The masks, joined with ``&``, and then what else is done to the scores, after commas.
    """
    found = plan(score)
    names = conjunction(keep_condition(score), Known(leaves, earlier))
    names += [_addition(item) for item in found.additions]
    low, *others = [" & ".join(dict.fromkeys(names)) or "no mask", *_terms(found.full)]
    return ", ".join([low, *dict.fromkeys(others)])


def _addition(item: Expr) -> str:
    """The name of an additive mask."""
    if item.depends_on("q") and item.depends_on("k"):
        return "additive mask tensor"
    return "additive padding" if item.depends_on("k") else "additive mask"


def _terms(full: Expr) -> list[str]:
    """What is done to the scores besides masks and a scale."""
    names: list[str] = []
    for node in _values_of(full):
        if node.op == "tanh" and node.depends_on("s"):
            names.append(_cap(full, node))
        if node.op == "add" and node.depends_on("s"):
            names += [_bias(item) for item in node.operands if not item.depends_on("s")]
    if not names and scale_of(full) is None and full is not S:
        names.append(
            "a function of the score" if full.depends_on("s") else "scores without q and k"
        )
    return names


def _cap(full: Expr, tanh: Expr) -> str:
    for node in _values_of(full):
        if node.op == "mul" and node.operands[0] is tanh and node.operands[1].op == "const":
            return f"soft-cap {node.operands[1].value:g}"
    return "tanh"


def _bias(item: Expr) -> str:
    """The name of what is added to a score."""
    if item.op == "where" and item.operands[1].op == "const" and item.operands[2] is const(0.0):
        times = math.exp(min(item.operands[1].value, _MOST))
        if round(times) > 1 and math.isclose(times, round(times), rel_tol=1e-6):
            return f"some pairs count {round(times)} times"
    if item.depends_on("q") and item.depends_on("k") and not item.depends_on("load"):
        return "distance bias"
    if not item.loads():
        return "bias"
    slopes = item.op == "mul" and any(
        part.loads() and not part.depends_on("qk") for part in item.operands
    )
    if slopes and (item.depends_on("k")):
        return "ALiBi"
    indices = [index for node in item.loads() for index in node.operands]
    if any(index.depends_on("q") and index.depends_on("k") for index in indices):
        return "relative-position bias"
    if item.depends_on("q") and item.depends_on("k"):
        return "bias tensor"
    if item.depends_on("k"):
        return "bias of each head and key" if item.depends_on("h") else "bias of each key"
    return "bias of each query"


__all__ = [
    "Causal",
    "describe",
    "factored",
    "fit",
    "is_causal",
    "keep_condition",
    "mask_only",
    "scale_of",
]

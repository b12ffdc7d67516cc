"""What people call a score's masks and terms: for reports, and to prove the simplest ones.

Names come from the structure of the expression. None is a claim that kernels rely on, except for
``causal`` and ``scale``, which are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from sparse_compiler.score.affine import Affine, Comparison
from sparse_compiler.score.expr import Expr, K, Q, S, add, and_, const, not_, sub
from sparse_compiler.score.fit import factored, fit
from sparse_compiler.score.logic import parts
from sparse_compiler.score.masks import plan
from sparse_compiler.score.node import FALSE, TRUE

# A fill this low has weight 0 in any row that keeps a pair.
_LOW = -1e30


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
    offset = add(_without(found.terms, (Q, 1), (K, -1)), -found.bound)
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


def describe(score: Expr, leaves: Sequence[torch.Tensor] | None = None) -> str:
    """What a score does, in a few words: ``"causal & sliding window 256 & padding"``.

    Args:
        score: a float expression.
        leaves: tensors that ``load`` reads, if known: block masks are looked at for their density.

    Returns:
        The masks, joined with ``&``, and then what else is done to the scores, after commas.
    """
    found = plan(score)
    names = _conjunction(keep_condition(score), leaves)
    names += [_addition(item) for item in found.additions]
    low, *others = [" & ".join(dict.fromkeys(names)) or "no mask", *_terms(found.full)]
    return ", ".join([low, *dict.fromkeys(others)])


def _conjunction(keep: Expr, leaves: Sequence[torch.Tensor] | None) -> list[str]:
    """Names of the conditions that all hold where a pair is kept."""
    if keep is TRUE:
        return []
    if keep is FALSE:
        return ["nothing kept"]
    found = parts("and", keep)
    names: list[str] = []
    bands = [(item, band) for item in found if (band := _band(item)) is not None]
    below = [reach for _, (side, reach) in bands if side == "ge"]
    above = [reach for _, (side, reach) in bands if side == "le"]
    names += _window(below, above)
    banded = {item for item, _ in bands}
    return names + [_name(item, leaves) for item in found if item not in banded]


def _window(below: Sequence[Expr], above: Sequence[Expr]) -> list[str]:
    """Names of ``q - k >= below`` and ``q - k <= above``."""
    names: list[str] = []
    if len(below) == len(above) == 1 and add(below[0], above[0]) is const(0):
        return [f"local window {above[0]} to either side"]
    for bound in below:
        if bound.op != "const":
            names.append("causal with an offset")
        elif bound.value == 0:
            names.append("causal")
        elif bound.value > 0:
            names.append(f"only keys at least {bound.value} back")
        else:
            names.append(f"at most {-bound.value} ahead")
    for bound in above:
        if below:
            names.append(f"sliding window {add(sub(bound, below[0]), 1)}")
        else:
            names.append("anti-causal" if bound is const(0) else f"at most {bound} back")
    return names


def _band(item: Expr) -> tuple[str, Expr] | None:
    """``("ge", c)`` of q - k >= c and ``("le", c)`` of q - k <= c, for c without an index."""
    found = Comparison.of(item)
    if found is None or found.op not in ("le", "ge"):
        return None
    rest = _without(found.terms, (Q, 1), (K, -1))
    if rest.depends_on("bhqk") or dict(found.terms).get(Q) != 1:
        return None
    return found.op, sub(found.bound, rest)


def _without(terms: Sequence[tuple[Expr, int]], *removed: tuple[Expr, int]) -> Expr:
    """A sum less some terms."""
    rest = Affine(tuple(terms), 0)
    for term, factor in removed:
        rest = rest.plus(Affine(((term, factor),), 0), -1)
    return rest.expr()


def _name(item: Expr, leaves: Sequence[torch.Tensor] | None) -> str:
    """The name of one condition."""
    if item.op == "or":
        return _union(item, leaves)
    if item.op == "and":
        return f"({' & '.join(_conjunction(item, leaves))})"
    band = _band(item)
    if band is not None:
        return " & ".join(_window(*(([band[1]], []) if band[0] == "ge" else ([], [band[1]]))))
    if not item.depends_on("q") and not item.depends_on("k"):
        return "a condition on the whole batch"
    if not (item.depends_on("q") and item.depends_on("k")):
        return _one_sided(item)
    if item.op == "eq":
        name = _same(*item.operands)
        if name:
            return name
    if item.op in ("load", "not") and item.loads():
        return _mask_tensor(item.loads()[0], leaves)
    return "an arbitrary mask" if item.loads() else "an arbitrary condition on positions"


def _one_sided(item: Expr) -> str:
    """The name of a condition on the key or the query alone."""
    side = "key" if item.depends_on("k") else "query"
    if item.depends_on("load"):
        return "padding" if side == "key" else "padded queries"
    found = Comparison.of(item)
    letter = K if side == "key" else Q
    if found is not None and found.terms == ((letter, 1),):
        signs = {"le": "up to", "ge": "from", "eq": "at", "ne": "other than"}
        plural = "keys" if side == "key" else "queries"
        return f"{plural} {signs[found.op]} {found.bound}"
    return f"a condition on the {side}"


def _same(left: Expr, right: Expr) -> str | None:
    """The name of ``f(q) == f(k)``, or of a remainder of q - k."""
    for one, other in ((left, right), (right, left)):
        if other.op == "const" and one.op == "mod" and one.operands[1].op == "const":
            rest = _without(Affine.of(one.operands[0]).terms, (Q, 1), (K, -1))
            swapped = _without(Affine.of(one.operands[0]).terms, (Q, -1), (K, 1))
            if not rest.depends_on("qk") or not swapped.depends_on("qk"):
                return f"dilated {one.operands[1].value}"
    if left.substitute({Q: K}) is not right and right.substitute({Q: K}) is not left:
        return None
    if left.op == "floordiv" and left.operands[1].op == "const":
        return f"chunks of {left.operands[1].value}"
    return "same document" if left.depends_on("load") else "same block"


def _union(item: Expr, leaves: Sequence[torch.Tensor] | None) -> str:
    """The name of a disjunction: local and global attention, a prefix, strides."""
    found = parts("or", item)
    band = [part for part in found if _band(part) is not None]
    sides = [part for part in found if not (part.depends_on("q") and part.depends_on("k"))]
    if len(found) == 2 and band and sides and sides[0].depends_on("k"):
        return "prefix LM"
    names = [" & ".join(_conjunction(part, leaves)) for part in found if part not in sides]
    names = [name.replace("dilated", "strided") for name in names]
    if sides:
        names.append("global tokens")
    return f"({' | '.join(dict.fromkeys(names))})"


def _mask_tensor(load: Expr, leaves: Sequence[torch.Tensor] | None) -> str:
    """The name of a mask that is read from a tensor indexed by q and k."""
    sizes = {
        index.operands[1].value
        for index in load.operands
        if index.op == "floordiv" and index.operands[1].op == "const"
    }
    name = f"mask of blocks of {min(sizes)}" if sizes else "a mask tensor"
    if leaves is None or leaves[load.slot].dtype != torch.bool or not leaves[load.slot].numel():
        return name
    return f"{name} ({float(leaves[load.slot].float().mean()):.0%} kept)"


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

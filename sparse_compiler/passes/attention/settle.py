"""What a score reads from the model itself, recognised where it is an index expression.

nanoGPT keeps its causal mask as a buffer of ones, GPT-Neo its local one, MPT its slopes. A buffer
whose every element equals an index expression is replaced by it: tiles are then classified without
reading it, and kernels compute what they would have loaded. The compiled code depends on the buffer
staying as it is, so the map of the tiles is derived from it, and a buffer that becomes something
else sends the call to the dense graph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from sparse_compiler.derived import PLAIN, DoesNotFit, has_version
from sparse_compiler.ops.attention import flat
from sparse_compiler.passes.attention.found import Meaning, Site
from sparse_compiler.passes.attention.leaves import Leaf
from sparse_compiler.score import tiles
from sparse_compiler.score.expr import B, Expr, H, K, Q, load
from sparse_compiler.score.fit import fit
from sparse_compiler.static import StaticExpression, StaticValues

_INDICES = (B, H, Q, K)


@dataclasses.dataclass(frozen=True)
class Settled:
    """A score and what it still reads.

    Attributes:
        score: with recognised buffers replaced and the other leaves' slots counted anew.
        leaves: what it still loads, by slot.
        grad_leaf: the slot that wants a gradient, or None.
        guarded: the buffers that the map of the tiles depends on, recognised ones first.
        recognised: what each recognised buffer was: an expression of its own indices.
        at_run_time: whether the map of the tiles has to be computed in the graph.
        meaning: the score for reports.
    """

    score: Expr
    leaves: tuple[Leaf, ...]
    grad_leaf: int | None
    guarded: tuple[StaticExpression, ...]
    recognised: tuple[Expr, ...]
    at_run_time: bool
    meaning: Meaning

    def map_of(
        self, old: torch.Tensor, sizes: Sequence[int], *values: torch.Tensor
    ) -> torch.Tensor:
        """The map of the tiles for new values of the guarded buffers.

        Args:
            old: the map that the code was compiled with, or what stands for it.
            sizes: batch, heads, queries and keys.
            *values: of ``guarded``.

        Raises:
            DoesNotFit: a recognised buffer has become something else.
        """
        for value, expression in zip(values, self.recognised, strict=False):
            if _fit(value) is not expression:
                raise DoesNotFit("a mask that was recognised has changed")
        if self.at_run_time:
            return old
        batch, heads, queries, keys = sizes
        rest = values[len(self.recognised) :]
        return flat(tiles.classify(self.score, rest, (), batch, heads, queries, keys))


def settle(site: Site, static: StaticValues) -> Settled:
    """Look at every leaf of a site that parameters and buffers decide."""
    fits: dict[Leaf, Expr] = {}
    guarded: list[StaticExpression] = []
    recognised: list[Expr] = []
    known: dict[int, StaticExpression] = {}
    for slot, leaf in enumerate(site.leaves):
        expression = static.expression(leaf.node) if leaf.kind == "static" else None
        if expression is None or not _watched(static, expression):
            continue
        known[slot] = expression
        value = static.value(leaf.node)
        found = None if value is None else _fit(value)
        if found is None or value is None:
            continue
        fits[leaf] = found
        guarded.append(expression)
        recognised.append(found)
        del known[slot]
    score = _with_fits(site.score, site.leaves, fits)
    meaning = _with_fits(site.meaning.score, site.meaning.leaves, fits)
    slots = sorted({node.slot for node in score.loads()})
    score = score.substitute(
        {
            node: load(slots.index(node.slot), node.dtype, *node.operands)
            for node in score.loads()
            if node.slot != slots.index(node.slot)
        }
    )
    leaves = tuple(site.leaves[slot] for slot in slots)
    sizes = (site.batch, site.heads, site.queries, site.keys)
    fixed = (
        all(slot in known for slot in slots)
        and not score.depends_on("int")
        and all(isinstance(size, int) for size in sizes)
    )
    if fixed:
        guarded.extend(known[slot] for slot in slots)
    grad_leaf = slots.index(site.grad_leaf) if site.grad_leaf in slots else None
    return Settled(
        score,
        leaves,
        grad_leaf,
        tuple(guarded),
        tuple(recognised),
        not fixed,
        Meaning(meaning, site.meaning.leaves),
    )


def _with_fits(score: Expr, leaves: Sequence[Leaf], fits: Mapping[Leaf, Expr]) -> Expr:
    """A score with recognised buffers replaced by what they hold."""
    replaced: dict[Expr, Expr] = {}
    for node in score.loads():
        found = fits.get(leaves[node.slot])
        if found is not None:
            names = _INDICES[len(_INDICES) - len(node.operands) :]
            replaced[node] = found.substitute(dict(zip(names, node.operands, strict=True)))
    return score.substitute(replaced) if replaced else score


def _watched(static: StaticValues, expression: StaticExpression) -> bool:
    """Whether changes of the expression's leaves can be seen."""
    tensors = static.leaf_values(expression)
    return all(type(tensor) in PLAIN and has_version(tensor) for tensor in tensors)


def _fit(value: torch.Tensor) -> Expr | None:
    """The index expression that a tensor holds, in the last ones of b, h, q, k."""
    if not 1 <= value.dim() <= len(_INDICES):
        return None
    return fit(value, _INDICES[len(_INDICES) - value.dim() :])


def remake(
    settled: Settled, old: torch.Tensor, sizes: Sequence[int]
) -> Callable[..., torch.Tensor]:
    """From the values of the guarded buffers to the new map; for ``static.combine``."""
    return functools.partial(settled.map_of, old, sizes)

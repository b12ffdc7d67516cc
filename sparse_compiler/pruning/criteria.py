"""Criteria: what it costs to remove a weight.

A criterion gives every weight a score that adds up: the expected squared error in the layer's
output when that weight alone becomes zero. Sums over blocks, rows and columns are therefore
meaningful, and the ranking is the same as by the square root, which the papers write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sparse_compiler.errors import nearest
from sparse_compiler.pruning.errors import PruningError

Score = Callable[[Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A way to score weights.

    Attributes:
        name: what the user writes as ``method``.
        score: (weight [out, in], squared input norms [in] or None), both float64, to scores
            [out, in].
        needs_inputs: whether calibration batches are needed.
        per_row: whether scores are only comparable within one output row.
    """

    name: str
    score: Score
    needs_inputs: bool = False
    per_row: bool = False


def _magnitude(weight: Tensor, inputs: Tensor | None) -> Tensor:
    return weight.square()


def _wanda(weight: Tensor, inputs: Tensor | None) -> Tensor:
    assert inputs is not None
    return weight.square() * inputs


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        # Han et al., "Learning both weights and connections", arXiv:1506.02626: |w|.
        Criterion("magnitude", _magnitude),
        # Sun et al., "A simple and effective pruning approach for large language models",
        # arXiv:2306.11695: |w| · ‖x‖₂, compared within each output row.
        Criterion("wanda", _wanda, needs_inputs=True, per_row=True),
    )
}


def criterion(name: str) -> Criterion:
    """The criterion called ``name``.

    Raises:
        PruningError: there is none; the message names the nearest.
    """
    if name not in CRITERIA:
        raise PruningError(f"unknown method {name!r}.{nearest(name, CRITERIA)}")
    return CRITERIA[name]

"""Which channels of a group are dead, and which of the dead ones have to stay as witnesses.

0 times infinity is NaN: where a layer's input is not finite, the dense model turns whole rows into
NaN through its dead channels. A dead channel that is kept does exactly the same, so it is enough to
keep a few, the witnesses, that are not finite whenever any of the removed ones would be.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from sparse_compiler.passes.dead_channels.group import Group, Layer
from sparse_compiler.passes.dead_channels.state import (
    FINITE,
    MINUS,
    NAN,
    PLUS,
    Scenario,
    State,
)
from sparse_compiler.passes.dead_channels.values import propagate
from sparse_compiler.passes.dead_channels.weights import Values, along

# Every combination of a group's inputs is looked at.
_MOST_INPUTS = 4


@dataclasses.dataclass(frozen=True)
class Dead:
    """The dead units of a group.

    Attributes:
        units: a bool for each unit.
        states: what the group's tensors hold, for folding constants into biases.
    """

    units: torch.Tensor
    states: Mapping[fx.Node, State]


def find_dead(group: Group, layers: Mapping[fx.Node, Layer], values: Values) -> Dead:
    """Units that are a constant at, or ignored by, every reader."""
    states = propagate(group, layers, values, Scenario())
    dead = torch.ones(group.units, dtype=torch.bool)
    for reader in group.readers:
        axis, state = group.axis_of_reader(reader), states[reader.x]
        columns = values.peaks(reader.weight, reader.in_dims[axis.dim])
        foldable = state.known & torch.isfinite(state.value)
        if reader.padded or len(reader.out_dims) != 1 or not _folds(reader, values):
            foldable &= state.value == 0
        fine = (foldable | (columns == 0)) & torch.isfinite(columns)
        dead &= group.by_unit(fine, axis).all(dim=1)
    for writer in group.writers:
        axis = group.axes[writer.node]
        fine = torch.isfinite(values.peaks(writer.weight, writer.out_dims[axis.dim]))
        if writer.bias is not None:
            fine &= torch.isfinite(values[writer.bias]).cpu()
        dead &= group.by_unit(fine, axis).all(dim=1)
    weights = {layer.weight for layer in (*group.writers, *group.readers)}
    for step in group.steps:
        for node in step.reads:
            value = values.get(node)
            if value is not None and node not in weights and not torch.isfinite(value).all():
                dead &= step.kind == "layer"
    return Dead(dead, states)


def _folds(reader: Layer, values: Values) -> bool:
    return reader.bias is None or (reader.bias in values and values[reader.bias].dim() == 1)


@dataclasses.dataclass(frozen=True)
class _Source:
    """What one input of the group does to its units when it is not finite.

    Attributes:
        touched: units it reaches.
        certain: units it makes not finite at every reader, whichever element is not finite.
        cases: [units, cases]: elements and signs with which it does; None if not worked out.
        exact: units that are finite in all other cases.
    """

    touched: torch.Tensor
    certain: torch.Tensor
    cases: torch.Tensor | None = None
    exact: torch.Tensor | None = None


class Witnesses:
    """Decides which dead units stay.

    Args:
        group: the channels.
        layers: every layer of the graph, by node.
        values: of the static nodes.
        strangers: tensors that may hold infinities of their own.
    """

    def __init__(
        self,
        group: Group,
        layers: Mapping[fx.Node, Layer],
        values: Values,
        strangers: Sequence[fx.Node],
    ) -> None:
        self._group, self._layers, self._values = group, layers, values
        inputs = {writer.x for writer in group.writers} - set(group.axes) | set(strangers)
        self._too_many = len(inputs) > _MOST_INPUTS
        counts = () if self._too_many else range(1, len(inputs) + 1)
        sets = [frozenset(some) for n in counts for some in itertools.combinations(inputs, n)]
        self._sources = [self._look(nodes) for nodes in sets]

    def choose(self, dead: torch.Tensor) -> torch.Tensor | None:
        """The dead units to keep, or None if none of them can stand for the others."""
        kept = torch.zeros_like(dead)
        sources = [source for source in self._sources if bool((source.touched & dead).any())]
        together = dead.clone()
        for source in sources:
            together &= source.certain
        if bool(together.any()):
            kept[together.nonzero()[0]] = True
            return kept
        for source in sources:
            if bool((source.certain & dead).any()):
                kept[(source.certain & dead).nonzero()[0]] = True
            elif source.cases is not None:
                kept |= _set_cover(source.cases & dead[:, None])
        return kept if self.cover(dead & ~kept, dead & kept) else None

    def cover(self, removed: torch.Tensor, kept: torch.Tensor) -> bool:
        """Whether the kept dead units are not finite whenever a removed one would be."""
        if self._too_many:
            return False
        for source in self._sources:
            if not bool((source.touched & removed).any()) or bool((source.certain & kept).any()):
                continue
            if source.cases is None or source.exact is None:
                return False
            have = source.cases[kept].any(dim=0)
            exact = bool(source.exact[removed].all())
            if not bool(have.all()) and not (
                exact and bool((have | ~source.cases[removed].any(dim=0)).all())
            ):
                return False
        return True

    def _look(self, nodes: frozenset[fx.Node]) -> _Source:
        touched, certain = self._reached(Scenario(nodes))
        writers = [writer for writer in self._group.writers if writer.x in nodes]
        if bool(certain.all()) or len(nodes) > 1 or len(writers) != 1:
            return _Source(touched, certain)
        (writer,) = writers
        plus, minus, nan = (self._reached(Scenario(nodes, c))[1] for c in (PLUS, MINUS, NAN))
        axis = self._group.axes[writer.node]
        if axis.outer != 1 or self._group.units != len(plus):
            return _Source(touched, certain)
        rows = along(self._values[writer.weight], writer.out_dims[axis.dim]).cpu()
        if rows.shape[0] != self._group.units:
            return _Source(touched, certain)
        up, down = rows > 0, rows < 0
        flat = ~up & ~down & nan[:, None]
        positive = (up & plus[:, None]) | (down & minus[:, None]) | flat
        negative = (down & plus[:, None]) | (up & minus[:, None]) | flat
        cases = torch.cat([positive, negative], dim=1) & nan[:, None]
        return _Source(touched, certain, cases, (plus | minus) & nan)

    def _reached(self, scenario: Scenario) -> tuple[torch.Tensor, torch.Tensor]:
        """Units that may not be finite at some reader, and those certainly not at every one."""
        group = self._group
        states = propagate(group, self._layers, self._values, scenario)
        touched = torch.zeros(group.units, dtype=torch.bool)
        certain = torch.ones(group.units, dtype=torch.bool)
        for reader in group.readers:
            axis, state = group.axis_of_reader(reader), states[reader.x]
            ignored = self._values.peaks(reader.weight, reader.in_dims[axis.dim]) == 0
            # Infinity times a weight may be an infinity; times zero, and NaN, it is NaN.
            sure = (((state.classes & FINITE) == 0) & ignored) | (state.classes == NAN)
            reached = group.by_unit(state.classes != FINITE, axis).any(dim=1)
            if bool(reached.any()):
                certain &= group.by_unit(sure, axis).any(dim=1)
            touched |= reached
        return touched, certain & touched


def _set_cover(cases: torch.Tensor) -> torch.Tensor:
    """Greedily, few rows that together have every case that any row has."""
    chosen = torch.zeros(cases.shape[0], dtype=torch.bool)
    missing = cases.any(dim=0)
    counts = cases.float()
    while bool(missing.any()):
        best = int((counts @ missing.float()).argmax())
        chosen[best] = True
        missing &= ~cases[best]
    return chosen

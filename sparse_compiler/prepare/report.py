"""What ``prepare`` did to a model, and how to take it back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn


@dataclasses.dataclass(frozen=True)
class Swapped:
    """A module whose computation was replaced for compiled code.

    Attributes:
        path: of the module in the model, ``""`` for the model itself.
        kind: name of the preparer.
        checked: on which inputs it agreed with the original.
    """

    path: str
    kind: str
    checked: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Refused:
    """A module that was found and left as it was.

    Attributes:
        path: of the module in the model, ``""`` for the model itself.
        kind: name of the preparer.
        reason: why, in a sentence.
    """

    path: str
    kind: str
    reason: str


@dataclasses.dataclass
class Prepared:
    """The result of ``prepare``; ``print`` it, or look at the parts.

    Attributes:
        model: the model that was given, changed in place.
        swapped: what was replaced.
        refused: what was found and left alone, with reasons.
    """

    model: nn.Module
    swapped: tuple[Swapped, ...]
    refused: tuple[Refused, ...]
    _undo: list[Callable[[], None]] = dataclasses.field(repr=False, default_factory=list)

    def undo(self) -> nn.Module:
        """Puts every replaced module back; a second call does nothing.

        Returns:
            The model, as it was before ``prepare``.
        """
        while self._undo:
            self._undo.pop()()
        return self.model

    def __str__(self) -> str:
        if not self.swapped and not self.refused:
            return (
                "nothing to prepare: no module here is of a kind that is known to break graphs; "
                'torch.compile(model, backend="sparse") takes it as it is.'
            )
        lines = [f"{len(self.swapped)} replaced, {len(self.refused)} left alone"]
        for kind in dict.fromkeys(item.kind for item in self.swapped):
            done = [item for item in self.swapped if item.kind == kind]
            lines.append(f"  {kind}: {len(done)}, agreed on {', '.join(done[0].checked)}")
            lines += [f"    {item.path or '(the model)'}" for item in done]
        for refused in self.refused:
            lines.append(f"  {refused.kind} at {refused.path or '(the model)'}: {refused.reason}")
        return "\n".join(lines)

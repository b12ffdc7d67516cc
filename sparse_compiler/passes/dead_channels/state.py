"""What is known about the channels of one tensor."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

# Classes of a number, as bits.
FINITE, PLUS, MINUS, NAN = 1, 2, 4, 8
NOT_FINITE = PLUS | MINUS | NAN
ANY = FINITE | NOT_FINITE


@dataclasses.dataclass(frozen=True)
class State:
    """What is known about the channels along one dimension, as vectors.

    Attributes:
        known: whether the channel is one number everywhere.
        value: that number.
        classes: what it may be otherwise.
        path: how its rows came about. Two tensors that the same infinity reaches are only
            comparable row by row if their rows were arranged in the same way.
        shifted: whether some rows were left out or moved.
    """

    known: torch.Tensor
    value: torch.Tensor
    classes: torch.Tensor
    path: tuple[Any, ...] = ()
    shifted: bool = False

    @property
    def touched(self) -> bool:
        return bool((self.classes != FINITE).any())


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Some of the group's inputs are not finite; products of them are one of ``classes``."""

    sources: frozenset[fx.Node] = frozenset()
    classes: int = NOT_FINITE

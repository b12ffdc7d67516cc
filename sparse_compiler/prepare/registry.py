"""A preparer is three steps: find a module, check a replacement, swap it in."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_compiler.prepare.swap import replace_forward

# What each module was called with when the example ran, by the names of its parameters. Tensors are
# on the meta device: shape and dtype only. A module that the example never reached is missing.
Calls = Mapping[nn.Module, Sequence[Mapping[str, Any]]]


@dataclasses.dataclass
class Case:
    """Random inputs on which a module and its replacement have to agree.

    Attributes:
        name: what is special about them, for the reason if they do not.
        args: positional arguments; their floating-point tensors are differentiated.
        kwargs: keyword arguments, not differentiated.
        training: whether the module is in training mode. Dropout is not turned off.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: bool = False


class Preparer(abc.ABC):
    """Knows one kind of module by its structure, and how to write it so that it can be traced.

    Attributes:
        name: what it prepares, for reports.
        exact: whether outputs and all gradients are compared in float32. If False, outputs alone
            are compared, in the module's own precision; for modules whose parts were compared.
    """

    name: str = ""
    exact: bool = True

    @abc.abstractmethod
    def find(self, module: nn.Module) -> bool:
        """Whether the module looks like one of these. Never by its class's name."""

    @abc.abstractmethod
    def refuse(self, module: nn.Module, calls: Calls | None) -> str | None:
        """Why this one is left alone, in a sentence, as far as can be seen without running it.

        Args:
            module: one that was found.
            calls: what the example called modules with; None without an example.
        """

    @abc.abstractmethod
    def cases(self, module: nn.Module, calls: Calls | None, thorough: bool) -> Iterable[Case]:
        """Inputs for the check, in float32 if ``exact``.

        Args:
            module: one that was not refused.
            calls: as for ``refuse``.
            thorough: True for the first module of each ``signature``, where every case matters;
                False for its repetitions in other layers, where one small case will do.
        """

    @abc.abstractmethod
    def forward(self) -> Callable[..., Any]:
        """What stands for ``forward`` while code is compiled; called as ``f(module, *args)``."""

    def signature(self, module: nn.Module) -> Hashable:
        """Equal for modules that run the same code on the same shapes with other weights."""
        return type(module), tuple(p.shape for p in module.parameters())

    def result(self, output: Any) -> list[Tensor]:
        """The part of an output that has to agree; by default its first tensor."""
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)][:1]

    def swap(self, module: nn.Module) -> Callable[[], None]:
        """Replaces what the module computes; returns what puts it back."""
        return replace_forward(module, self.forward())


PREPARERS: list[Preparer] = []


def register(preparer: Preparer) -> Preparer:
    """Adds a preparer; they are tried in the order in which they were added.

    Returns:
        The preparer.

    Raises:
        TypeError: it is not a ``Preparer``.
        ValueError: it has no name, or one that is taken.
    """
    if not isinstance(preparer, Preparer):
        raise TypeError(f"register() takes an object like MyPreparer(), not {preparer!r}.")
    if not preparer.name or any(known.name == preparer.name for known in PREPARERS):
        raise ValueError(f"the name {preparer.name!r} is empty or taken: give it another.")
    PREPARERS.append(preparer)
    return preparer

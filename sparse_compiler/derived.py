"""Tensors that were computed from a model's weights, and what to do when the weights change.

A packed weight is a copy: the compiled model must notice when its source changes. Each ``Derived``
remembers which leaves it came from and how to make it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import fx

from sparse_compiler.static import StaticExpression

Remake = Callable[[torch.Tensor], Sequence[torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Derived:
    """Buffers of a graph module that were made from one static expression.

    Attributes:
        attributes: names of the buffers.
        expression: the expression they were made from.
        leaves: names of its leaves in the graph, in the order ``expression`` takes them.
        remake: from the expression's value to new buffers, in order. Raises ``DoesNotFit`` when
            the new value cannot be packed at all.
        target: what it is the weight of, for messages.
        exposed: whether the model hands the buffer out, so that somebody may write to it.
    """

    attributes: tuple[str, ...]
    expression: StaticExpression
    leaves: tuple[str, ...]
    remake: Remake
    target: str
    exposed: bool = False


class DoesNotFit(Exception):
    """A changed weight has no form that the compiled code could take."""


def derive(
    attributes: Sequence[str],
    expression: StaticExpression,
    remake: Remake,
    target: str,
    *,
    exposed: bool = False,
) -> Derived:
    """A record for ``gm.meta["derived"]``; see ``Derived``."""
    leaves = tuple(
        leaf.name if leaf.op == "placeholder" else str(leaf.target) for leaf in expression.leaves
    )
    return Derived(tuple(attributes), expression, leaves, remake, target, exposed)


def drop_unused(gm: fx.GraphModule) -> None:
    """Forget derived buffers that no node reads any more: a later pass packed them again."""
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    kept: list[Derived] = []
    for item in gm.meta.get("derived", ()):
        places = [i for i, name in enumerate(item.attributes) if name in used]
        if len(places) == len(item.attributes):
            kept.append(item)
        elif places:
            kept.append(
                dataclasses.replace(
                    item,
                    attributes=tuple(item.attributes[i] for i in places),
                    remake=_only(item.remake, places),
                )
            )
    for name in [name for name in gm.meta.get("constants", ()) if name not in used]:
        delattr(gm, name)
        gm.meta["constants"].remove(name)
    if "derived" in gm.meta:
        gm.meta["derived"] = kept


def _only(remake: Remake, places: Sequence[int]) -> Remake:
    def some(value: torch.Tensor) -> list[torch.Tensor]:
        made = remake(value)
        return [made[i] for i in places]

    return some


# Other classes of tensors may be computed with in ways nobody here knows.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def has_version(tensor: torch.Tensor) -> bool:
    """Whether changes to a tensor can be seen: inference tensors have no version counter."""
    return not tensor.is_inference()


def fitted(new: torch.Tensor, old: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """``new`` in the size of ``old``: shorter lists are filled up.

    Raises:
        DoesNotFit: there are more kept weights than the compiled code has room for.
    """
    if new.shape == old.shape:
        return new
    if new.dim() != 1 or new.numel() > old.numel():
        raise DoesNotFit("it has more non-zero weights than before")
    return torch.cat([new, new.new_full((old.numel() - new.numel(),), fill)])

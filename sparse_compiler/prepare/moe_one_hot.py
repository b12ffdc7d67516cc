"""Routers with a capacity that build their slots with a ``one_hot`` as long as the data asks for.

``one_hot(i, max(i.max() + 1, length))[..., :length]`` never fails, whatever ``i`` is, but asks the
data for its largest number, which cuts the graph. Comparing ``i`` with 0 .. length - 1 is the same
and asks nothing. The rest of the router is its own code.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.prepare.agree import attempt
from sparse_compiler.prepare.moe_source import Source
from sparse_compiler.prepare.registry import Calls, Case, Preparer
from sparse_compiler.prepare.swap import replacing

_BOUNDED = "__bounded__"


def bounded_one_hot(indexes: Tensor, length: int) -> Tensor:
    """One-hot rows [..., length]; of zeros where a number is ``length`` or more."""
    places = torch.arange(length, device=indexes.device)
    return (indexes.unsqueeze(-1) == places).to(torch.int64)


class Bounded:
    """A router's forward with ``bounded_one_hot``, for compiled code; else the original."""

    def __init__(self, owner: type) -> None:
        self.owner = owner
        self.original = vars(owner)["forward"]
        source = Source(self.original)
        tree = copy.deepcopy(source.tree)
        called = _one_hot(self.original)
        for item in ast.walk(tree):
            if isinstance(item, ast.Name) and item.id == called:
                item.id = _BOUNDED
        self.function = source.compiled(tree, {_BOUNDED: bounded_one_hot})

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not replacing():
            return self.original(module, *args, **kwargs)
        return self.function(module, *args, **kwargs)

    def __reduce__(self) -> Any:
        return Bounded, (self.owner,)


class CapacityRouter(Preparer):
    """A router whose slots come from a ``one_hot`` of a length that depends on the data."""

    name = "router with a capacity"

    def find(self, module: nn.Module) -> bool:
        return _one_hot(vars(type(module)).get("forward")) is not None

    def refuse(self, module: nn.Module, calls: Calls | None) -> str | None:
        if calls is not None and module not in calls:
            return "the example never reaches it: give example inputs that run it"
        forward = vars(type(module))["forward"]
        name = _one_hot(forward)
        indexes = torch.tensor([[0, 3, 4], [9, 1, 2]])
        try:
            same = torch.equal(forward.__globals__[name](indexes, 4), bounded_one_hot(indexes, 4))
            Bounded(type(module))
        except Refused as error:
            return str(error)
        except Exception as error:
            return f"its {name} fails with {type(error).__name__}: {error}"
        if not same:
            return f"its {name} is not one_hot cut to a length"
        if next(self.cases(module, calls, True), None) is None:
            return "it takes none of the inputs that were tried: give example inputs"
        return None

    def cases(self, module: nn.Module, calls: Calls | None, thorough: bool) -> Iterator[Case]:
        args = _tokens(module, (calls or {}).get(module))
        if args is None:
            return
        yield Case("random tokens", *args)
        if thorough:
            crowded = pytree.tree_map_only(Tensor, lambda t: t[..., :1, :].expand_as(t), args[0])
            yield Case("equal tokens", crowded, args[1])
            yield Case("training", *args, training=True)

    def result(self, output: Any) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]

    def forward(self) -> Callable[..., Any]:
        raise TypeError("each class has a replacement of its own: see swap()")

    def swap(self, module: nn.Module) -> Callable[[], None]:
        replacement = functools.partial(Bounded(type(module)), module)
        module.forward = replacement

        def undo() -> None:
            if vars(module).get("forward") is replacement:
                del module.forward

        return undo


def _one_hot(forward: Any) -> str | None:
    """The global function of a forward that asks how long its one-hot rows have to be."""
    if not inspect.isfunction(forward):
        return None
    for name in forward.__code__.co_names:
        called = forward.__globals__.get(name)
        if isinstance(called, types.FunctionType) and called.__module__ == forward.__module__:
            used = called.__code__.co_names
            if called.__code__.co_argcount == 2 and used.count("one_hot") and "max" in used:
                return name
    return None


def _tokens(
    module: nn.Module, seen: Iterable[Mapping[str, Any]] | None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments that the module takes: like the example's, or tokens of a likely size."""
    device = next(module.parameters()).device
    for call in seen or ():
        first, *others = call.items()
        args = (torch.randn(first[1].shape, device=device),)
        kwargs = {
            name: torch.randint(3, value.shape, device=device) / 2
            if isinstance(value, Tensor)
            else value
            for name, value in others
        }
        return (args, kwargs) if _takes(module, args, kwargs) else None
    for parameter in module.parameters():
        for size in parameter.shape[-2:]:
            for shape in ((2, 12, size), (*parameter.shape[:-2], 2, 12, size)):
                args = (torch.randn(shape, device=device),)
                if _takes(module, args, {}):
                    return args, {}
    return None


def _takes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    twin = copy.deepcopy(module).float()
    with torch.random.fork_rng():
        return attempt(lambda: twin(*args, **kwargs))[1] is None

"""Random inputs for a mixture of experts: as the example called it, or as such modules are."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compiler.prepare.registry import Case

# Batch and length. None of them is likely to be a number of experts, or a width.
_SIZES = {
    "random tokens": (3, 7),
    "one token": (1, 1),
    "equal tokens": (2, 5),
    "tokens of zeros": (2, 3),
    "no tokens": (1, 0),
    "many tokens": (2, 128),
    "large tokens": (3, 9),
    "training": (2, 11),
}
# Code may look at its values: a limit, a threshold, more tokens than an expert takes.
_LARGE = 50.0


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument of a forward.

    Attributes:
        kind: ``"tokens"``, ``"numbers"`` of experts, ``"one hot"``, ``"weights"``, or ``"given"``.
        value: of a given one.
        flat: whether batch and length are one dimension.
        width: last dimension.
        middle: whether a dimension of one is between tokens and the last.
        limit: numbers are below it.
        dtype: of the tensor.
    """

    kind: str
    value: Any = None
    flat: bool = True
    width: int = 0
    middle: bool = False
    limit: int = 2
    dtype: torch.dtype = torch.int64

    def make(self, batch: int, length: int, device: torch.device) -> Any:
        shape = (batch * length,) if self.flat else (batch, length)
        if self.kind == "given":
            return self.value
        if self.kind == "numbers":
            order = torch.rand(*shape, max(self.limit, self.width)).argsort(-1)
            value = order[..., : self.width].to(self.dtype)
        elif self.kind == "one hot":
            chosen = torch.randint(0, self.width + 1, shape)
            value = nn.functional.one_hot(chosen, self.width + 1)[..., : self.width].to(self.dtype)
        elif self.kind == "weights":
            value = torch.rand(*shape, self.width) + 0.1
        else:
            value = torch.randn(*shape, self.width)
        return (value.unsqueeze(-2) if self.middle else value).to(device)


@dataclasses.dataclass(frozen=True)
class Form:
    """How a module is called.

    Attributes:
        arguments: by the parameter's name, in order.
        features: size of a token.
        choices: experts of a token, where they are arguments.
    """

    arguments: tuple[tuple[str, Argument], ...]
    features: int
    choices: int = 0

    def names(self, training: bool) -> Iterator[str]:
        return (name for name in _SIZES if training or name != "training")

    def case(self, name: str, device: torch.device) -> Case:
        """Inputs of one kind; always the same."""
        batch, length = _SIZES[name]
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            args = [item.make(batch, length, device) for _, item in self.arguments]
        for place, (_, item) in enumerate(self.arguments):
            if item.kind == "tokens" and name == "equal tokens":
                args[place] = args[place][:1, :1].expand_as(args[place]).clone()
                if item.flat:
                    args[place] = args[place][:1].expand_as(args[place]).clone()
            if item.kind == "tokens" and name == "tokens of zeros":
                args[place] = torch.zeros_like(args[place])
            if item.kind == "tokens" and name == "many tokens":  # most of them alike
                rows = args[place].view(-1, item.width)
                rows[len(rows) // 16 :] = rows[-1].clone()
            if item.kind == "tokens" and name == "large tokens":
                args[place] = args[place] * _LARGE
            if item.kind == "weights" and name == "large tokens":  # and very small ones
                args[place] = args[place] ** 6
        return Case(name, tuple(args), training=name == "training")

    @property
    def run(self) -> Callable[[nn.Module, Tensor, Tensor, Tensor], Any] | None:
        """Calls a module with tokens, numbers and weights, if that is what it takes."""
        kinds = [item.kind for _, item in self.arguments]
        if not {"tokens", "numbers", "weights"} <= set(kinds) or len(kinds) != len(set(kinds)):
            return None
        return self._run

    def _run(self, module: nn.Module, x: Tensor, ids: Tensor, gates: Tensor) -> Any:
        given = {"tokens": x, "numbers": ids, "weights": gates}
        args = []
        for _, item in self.arguments:
            value = given.get(item.kind, item.value)
            if item.kind == "tokens" and not item.flat:
                value = x.unsqueeze(0)
            args.append(value)
        return module(*args)


def forms(
    module: nn.Module, seen: Sequence[Mapping[str, Any]] | None, features: int
) -> Iterator[Form]:
    """Ways of calling a module, the likely first.

    Args:
        module: the module.
        seen: its calls in the example, if there was one.
        features: size of a token; 0 if it is not known.
    """
    if seen:
        yield from _observed(module, seen[0], features)
        return
    needed = [
        item.name
        for item in inspect.signature(type(module).forward).parameters.values()
        if item.default is item.empty and item.kind in (item.POSITIONAL_OR_KEYWORD,)
    ][1:]
    for size in [features] if features else _features(module):
        for flat in (False, True):
            tokens = Argument("tokens", flat=flat, width=size)
            if len(needed) == 1:
                yield Form(((needed[0], tokens),), size)
        if len(needed) == 3:
            yield from _triples(module, needed, size)


def _triples(module: nn.Module, needed: list[str], size: int) -> Iterator[Form]:
    experts = _count(module)
    weights = Argument("weights", width=2)
    numbers = Argument("numbers", width=2, limit=experts)
    for flat in (True, False):
        tokens = Argument("tokens", flat=flat, width=size)
        for order in ((tokens, numbers, weights), (tokens, weights, numbers)):
            yield Form(tuple(zip(needed, order, strict=True)), size, 2)
        one_hot = Argument("one hot", width=experts, middle=True)
        yield Form(
            tuple(zip(needed, (tokens, one_hot, Argument("weights", width=1)), strict=True)), size
        )
        mask = Argument("one hot", width=experts)
        every = Argument("weights", width=experts)
        yield Form(tuple(zip(needed, (tokens, mask, every), strict=True)), size)


def _observed(module: nn.Module, call: Mapping[str, Any], features: int) -> Iterator[Form]:
    """Like a call of the example, with other numbers and lengths."""
    experts = _count(module)
    tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    sizes = [features] if features else list(_features(module))
    for size in sizes:
        names = [n for n, t in tensors.items() if t.is_floating_point() and t.shape[-1:] == (size,)]
        if not names:
            continue
        first = tensors[names[0]]
        tokens, choices = first.shape[:-1].numel(), 0
        arguments: list[tuple[str, Argument]] = []
        for name, value in call.items():
            if not isinstance(value, Tensor):
                arguments.append((name, Argument("given", value)))
            elif name == names[0]:
                flat = value.dim() == 2
                arguments.append((name, Argument("tokens", flat=flat, width=size)))
            elif value.dim() in (2, 3) and value.shape[:-1].numel() == tokens:
                width, middle = value.shape[-1], value.dim() == 3 and value.shape[1] == 1
                flat = middle or value.dim() == 2
                kind = "weights" if value.is_floating_point() else "numbers"
                if kind == "numbers" and (width == experts or value.dtype is torch.bool):
                    kind = "one hot"
                choices = width if kind == "numbers" else choices
                arguments.append(
                    (name, Argument(kind, None, flat, width, middle, experts, value.dtype))
                )
            else:
                return
        kept = arguments
        while kept and kept[-1][1].kind == "given":  # defaults, which may have to be keywords
            kept = kept[:-1]
        yield Form(tuple(kept), size, choices)


def _features(module: nn.Module) -> list[int]:
    """Sizes that a token may have, by the parameters' shapes."""
    found: dict[int, int] = {}
    for parameter in module.parameters():
        for size in parameter.shape[-2:]:
            found[size] = found.get(size, 0) + 1
    return sorted(found, key=lambda size: -found[size])


def _count(module: nn.Module) -> int:
    """How many experts a module has, as far as shapes tell."""
    stacked = [p.shape[0] for p in module.parameters() if p.dim() == 3]
    if stacked:
        return min(stacked)
    for name in ("num_experts", "n_experts", "moe_num_experts", "num_local_experts"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return max(len(list(module.children())), 2)

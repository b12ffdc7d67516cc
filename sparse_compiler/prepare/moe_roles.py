"""Which variables of a loop over experts are the tokens, their experts and their weights.

Nothing is taken from names. What the variables hold in front of the loop is put together in the few
ways that fit, and the way that gives what the loop gives is the one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compiler.experts import Experts, routed

# Far from what rounding does in float32, near enough that no other reading fits.
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Roles:
    """How the operator's operands come from variables.

    Attributes:
        x: the tokens, [..., D].
        ids: the variable that says which experts: numbers [..., K], or ``ids_form``.
        gates: the weights, None if there are none.
        ids_form: ``"numbers"``; ``"one hot"``, [..., E] with at most one that is not zero, where a
            token without any is dropped, ``"one hot or itself"``, where it stays as it is; or
            ``"weights"``, [..., E]: the experts whose weight is not zero.
        gates_form: ``"chosen"``, [..., K], or ``"all"``, [..., E], of which the chosen count.
        choices: K.
        width: last dimension of what is indexed by experts.
        as_tokens: whether the result is shaped like the tokens, not [T, O].
        adds: whether the result is added to what the variable held.
        on_input: whether a weight scales its token, not the expert's result.
        dtype_of: whose dtype the result has: ``"x"`` or ``"gates"``.
        factor: of the whole result.
    """

    x: str
    ids: str
    gates: str | None
    ids_form: str = "numbers"
    gates_form: str = "chosen"
    choices: int = 1
    width: int = 1
    as_tokens: bool = False
    adds: bool = False
    on_input: bool = False
    dtype_of: str = "x"
    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """What stands for a loop: called with the module and the variables that ``Roles`` names."""

    experts: Experts
    roles: Roles

    def __call__(
        self,
        module: nn.Module,
        x: Tensor,
        ids: Tensor,
        gates: Tensor | None,
        before: Tensor | None = None,
    ) -> Tensor:
        roles = self.roles
        tokens = x.reshape(-1, x.shape[-1])
        chosen, weights = self._chosen(ids, gates)
        y = routed(module, self.experts, tokens, chosen, weights, gates_on_input=roles.on_input)
        if roles.dtype_of == "gates" and gates is not None:
            y = y.to(gates.dtype)
        if roles.factor != 1.0:
            y = y * roles.factor
        if before is not None:
            return before + y.reshape(before.shape).to(before.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1]) if roles.as_tokens else y

    def _chosen(self, ids: Tensor, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Numbers of experts and weights, [T, K] each."""
        roles = self.roles
        if roles.ids_form == "weights":
            weights = ids.reshape(-1, roles.width)
            numbers = torch.arange(roles.width, device=ids.device).expand(weights.shape)
            return torch.where(weights != 0, numbers, -1), weights
        if roles.ids_form.startswith("one hot"):
            mask = ids.reshape(-1, roles.width) != 0
            none = -1 if roles.ids_form == "one hot" else self.experts.experts
            chosen = torch.where(mask.any(-1), mask.to(torch.int64).argmax(-1), none).unsqueeze(-1)
        else:
            chosen = ids.reshape(-1, roles.choices).to(torch.int64)
        if gates is None:
            return chosen, None
        if roles.gates_form == "all":
            every = gates.reshape(-1, roles.width)
            return chosen, every.gather(1, chosen.clamp(0, roles.width - 1))
        return chosen, gates.reshape(-1, roles.choices)


def dispatch(experts: Experts, roles: Roles) -> Dispatch:
    """The call for a reading."""
    if roles.ids_form == "one hot or itself":
        experts = dataclasses.replace(experts, passthrough=1)
    return Dispatch(experts, roles)


@dataclasses.dataclass(frozen=True)
class Match:
    """A reading that gives what a variable holds after a statement.

    Attributes:
        roles: the reading.
        result: the variable.
        index: how many statements of the block have run.
    """

    roles: Roles
    result: str
    index: int


def matches(
    module: nn.Module,
    experts: Experts,
    seen: Mapping[int, Mapping[str, Any]],
    assigned: Mapping[int, set[str]],
) -> list[Match]:
    """All readings that fit, the best first.

    Args:
        module: holds the experts.
        experts: where.
        seen: variables, by the number of statements of the block that had run; the first is in
            front of the loop.
        assigned: by the same number, the variables that a new last statement may set.
    """
    first = min(seen)
    before = {name: value for name, value in seen[first].items() if isinstance(value, Tensor)}
    found: list[Match] = []
    for roles in _readings(module, experts, before):
        gates = None if roles.gates is None else before[roles.gates]
        try:
            y = dispatch(experts, roles)(module, before[roles.x], before[roles.ids], gates)
        except (RuntimeError, IndexError):
            continue
        for index in sorted(seen):
            if index == first:
                continue
            for name in sorted(assigned.get(index, ())):
                value = seen[index].get(name)
                found += _fits(roles, name, index, value, before.get(name), y, before[roles.x])
    return sorted(found, key=lambda match: _cost(match, before))


def _cost(match: Match, before: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Fewer pairs first, then fewer rows: tokens are not repeated for each choice."""
    roles = match.roles
    tokens = before[roles.x].shape[:-1].numel()
    choices = roles.width if roles.ids_form == "weights" else roles.choices
    return tokens * choices, tokens, roles.gates is None, match.index, match.roles.adds


def _readings(module: nn.Module, experts: Experts, before: Mapping[str, Tensor]) -> Iterator[Roles]:
    inner = experts.operands(module)[0][0]
    features, total = inner.shape[-1], experts.experts + experts.passthrough
    floats = {n: t for n, t in before.items() if t.is_floating_point()}
    whole = {n: t for n, t in before.items() if not t.is_floating_point() and not t.is_complex()}
    tokens_of = [n for n, t in floats.items() if t.dim() > 1 and t.shape[-1] == features]
    for x in tokens_of:
        tokens = floats[x].shape[:-1].numel()
        chosen = list(_numbers(whole, tokens, total, experts.passthrough > 0))
        for (ids, form, choices), on_input in itertools.product(chosen, (False, True)):
            width = whole[ids].shape[-1] if form != "numbers" else total
            start = Roles(x, ids, None, form, "chosen", choices, width, on_input=on_input)
            for gates, value in floats.items():
                if value.numel() == tokens * choices and gates != x:
                    yield dataclasses.replace(start, gates=gates)
                if value.shape[-1:] == (width,) and value.numel() == tokens * width:
                    yield dataclasses.replace(start, gates=gates, gates_form="all")
            if not on_input:
                yield start
        for gates, value in floats.items():
            if value.dim() > 1 and value.shape[-1] == total and value.numel() == tokens * total:
                yield Roles(x, gates, gates, "weights", "all", total, total)


def _numbers(
    whole: Mapping[str, Tensor], tokens: int, total: int, passthrough: bool
) -> Iterator[tuple[str, str, int]]:
    for name, value in whole.items():
        if not value.numel() or value.numel() % tokens or value.dim() == 0:
            continue
        each = value.numel() // tokens
        if value.dtype is not torch.bool and each <= max(total, 8) and value.min() >= 0:
            yield name, "numbers", each
        rows = (value != 0).reshape(tokens, -1)
        if value.dim() > 1 and value.shape[-1] == each > 1 and bool((rows.sum(-1) <= 1).all()):
            yield name, "one hot", 1
            if not passthrough:
                yield name, "one hot or itself", 1


def _fits(
    roles: Roles, name: str, index: int, value: Any, before: Any, y: Tensor, x: Tensor
) -> Iterator[Match]:
    if not isinstance(value, Tensor) or value.numel() != y.numel() or not value.is_floating_point():
        return
    for as_tokens, shape in ((True, (*x.shape[:-1], y.shape[-1])), (False, y.shape)):
        factor = _factor(value, y) if value.shape == shape else None
        if factor is not None:
            roles = dataclasses.replace(roles, as_tokens=as_tokens, factor=factor)
            yield Match(roles, name, index)
            return
    if isinstance(before, Tensor) and before.shape == value.shape and _close(value - before, y):
        yield Match(dataclasses.replace(roles, adds=True), name, index)


def _factor(value: Tensor, y: Tensor) -> float | None:
    """1 if the values are ``y``; a short decimal number if they are that many times as much."""
    if _close(value, y):
        return 1.0
    flat = y.reshape(-1).double()
    ratio = float(value.reshape(-1).double() @ flat / (flat @ flat).clamp(min=1e-30))
    factor = round(ratio, 4)
    near = abs(ratio - factor) < 5e-7 and factor != 0
    return factor if near and _close(value, y * factor) else None


def _close(value: Tensor, y: Tensor) -> bool:
    y = y.reshape(value.shape).to(value.dtype)
    size = float(y.abs().max())
    return bool(size > 0 and float((value - y).abs().max()) <= _TOLERANCE * size)

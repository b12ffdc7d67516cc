"""Autocast, made visible: the products it computes in lower precision get their casts written out.

``torch.autocast`` works inside operators, below the canonical IR: ``aten.linear`` takes float32 and
gives bfloat16. An operator that replaces it would not. So the operands of products become explicit
casts; then a cast weight is a static expression like any other. Everything else is left to autocast
itself, whose regions stay in the graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# On every device these are computed in the lower precision.
_PRODUCTS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.mv.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
)
_LOWERED = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class _State:
    device: str
    dtype: torch.dtype
    enabled: bool


def _ambient(device: str) -> _State:
    return _State(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))


def uses_autocast(gm: fx.GraphModule) -> bool:
    """Whether autocast is on now, or is switched on in the graph."""
    if _ambient("cpu").enabled or _ambient("cuda").enabled:
        return True
    return any(node.target is torch.amp.autocast_mode._enter_autocast for node in gm.graph.nodes)


class CastingInterpreter(fx.Interpreter):
    """Runs a canonical graph with the casts of its products written out."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._entered = [_ambient("cpu"), _ambient("cuda")]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.amp.autocast_mode._enter_autocast:
            device, dtype, enabled, _ = args
            dtype = dtype or torch.get_autocast_dtype(device)
            self._entered.append(_State(device, dtype, enabled))
        elif target is torch.amp.autocast_mode._exit_autocast:
            self._entered.pop()
        elif isinstance(target, torch._ops.OpOverload):
            states = {state.device: state for state in self._entered}  # the innermost counts
            for state in states.values():
                if state.enabled and target in _PRODUCTS:
                    args, kwargs = _cast((args, kwargs), state)
            with contextlib.ExitStack() as stack:
                for state in states.values():
                    stack.enter_context(_switched(state))
                return super().call_function(target, args, kwargs)
        return super().call_function(target, args, kwargs)


def _cast(operands: Any, state: _State) -> Any:
    def one(value: Any) -> Any:
        if (
            not isinstance(value, torch.Tensor)
            or value.device.type != state.device
            or value.dtype not in _LOWERED
            or value.dtype == state.dtype
        ):
            return value
        return aten.to.dtype(value, state.dtype)

    return torch.utils._pytree.tree_map(one, operands)


@contextlib.contextmanager
def _switched(state: _State) -> Iterator[None]:
    """Autocast in this state; ``torch.autocast`` would only be recorded, not entered."""
    before, cached = _ambient(state.device), torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        torch.set_autocast_dtype(state.device, state.dtype)
        torch.set_autocast_enabled(state.device, state.enabled)
        yield
    finally:
        torch.set_autocast_enabled(state.device, before.enabled)
        torch.set_autocast_dtype(state.device, before.dtype)
        torch.set_autocast_cache_enabled(cached)

"""Replacing a module's ``forward`` on the instance, for compiled code only.

Class, parameters, buffers, hooks and ``state_dict`` keys are those of the original, and eager calls
run the original code: written with a dense mask, the replacement would be slower there. Only under
``torch.compile`` and ``torch.export`` is it traced.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_forced: contextvars.ContextVar[bool] = contextvars.ContextVar("_forced", default=False)


def replacing() -> bool:
    """Whether replacements are to be used: code is being traced, or ``always_replaced`` is on."""
    return torch.compiler.is_compiling() or _forced.get()


@contextlib.contextmanager
def always_replaced() -> Iterator[None]:
    """Uses replacements in eager calls too: how they are compared with the original."""
    token = _forced.set(True)
    try:
        yield
    finally:
        _forced.reset(token)


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the module's class computes."""
    return type(module).forward(module, *args, **kwargs)


@torch.compiler.disable
def untraced(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``original``, run eagerly inside of compiled code: Dynamo fails in some of the originals."""
    return original(module, *args, **kwargs)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Makes ``forward(module, ...)`` the module's forward.

    Returns:
        A function that takes it back; calling it again, or after somebody else replaced ``forward``
        once more, does nothing.
    """
    # A partial, unlike a bound method, is copied and pickled together with its module.
    replacement = functools.partial(forward, module)
    module.forward = replacement

    def undo() -> None:
        if vars(module).get("forward") is replacement:
            del module.forward

    return undo


def replacement_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function that ``replace_forward`` put there, None if it did not."""
    forward = vars(module).get("forward")
    if isinstance(forward, functools.partial) and forward.args == (module,):
        return forward.func
    return None


def cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices that a model's parameters are on, whose random state is to be kept."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undoes what running a model changes in it: modes, attributes, exchanged submodules.

    A BigBird that gets a short input exchanges its attention modules for good; a layer pruned with
    ``torch.nn.utils.prune`` keeps the last weight it computed.
    """
    saved = []
    for module in model.modules():
        state = vars(module)
        tables = {name: dict(state[name]) for name in ("_modules", "_parameters", "_buffers")}
        saved.append((module, {k: v for k, v in state.items() if k not in tables}, tables))
    try:
        yield
    finally:
        for module, attributes, tables in saved:
            vars(module).update(attributes)
            for name, table in tables.items():
                vars(module)[name].clear()
                vars(module)[name].update(table)

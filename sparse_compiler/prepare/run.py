"""``prepare`` and ``compile``: find, check, swap, over a whole model."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_compiler.errors import OptionError
from sparse_compiler.prepare.agree import disagreement
from sparse_compiler.prepare.registry import PREPARERS, Calls, Preparer
from sparse_compiler.prepare.report import Prepared, Refused, Swapped
from sparse_compiler.prepare.swap import cuda_devices, restored

log = logging.getLogger("sparse_compiler")


def prepare(model: nn.Module, *args: Any, **kwargs: Any) -> Prepared:
    """Replaces what breaks Dynamo's graph in known hand-sparse modules, in place.

    Modules are found by their structure. Each replacement computes the same as the original and was
    compared with it, outputs and gradients, on random inputs; where it differs, or where the
    comparison fails, the module is left alone and the reason is in the result. Parameters,
    ``state_dict`` keys and hooks stay, and eager calls still run the original code: what is
    replaced is what ``torch.compile`` and ``torch.export`` see.

    Args:
        model: any model; one without such modules is left as it is.
        *args: example inputs, as the model takes them. It is run on them once, in eval mode and
            without gradients, to see which modules are reached and how. Without any, modules are
            checked at lengths of their own.
        **kwargs: example keyword inputs.

    Returns:
        What was replaced and what was refused; ``.undo()`` takes it back.

    Raises:
        TypeError: the model is not a module, or compiled already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare() takes a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError(
            "the model is compiled already: write prepare(model, ...) first, then "
            'torch.compile(model, backend="sparse").'
        )
    found = [p for p in PREPARERS if any(p.find(module) for module in model.modules())]
    calls = _observe(model, found, args, kwargs) if found and (args or kwargs) else None
    prepared = Prepared(model, (), ())
    try:
        for preparer in found:
            _prepare_all(preparer, prepared, calls)
    except BaseException:
        # A preparer's own failure, or Ctrl-C: the model is as it was.
        prepared.undo()
        raise
    return prepared


def compile(
    model: nn.Module,
    *args: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    **torch_compile_kwargs: Any,
) -> Callable[..., Any]:
    """``prepare`` and ``torch.compile(backend="sparse")`` in one call, for every model.

    What was refused is logged as a warning; call ``prepare`` yourself for the whole report.

    Args:
        model: any model. ``prepare`` changes it in place.
        *args: example inputs for ``prepare``.
        example_kwargs: example keyword inputs for ``prepare``.
        **torch_compile_kwargs: for ``torch.compile``: ``mode``, ``options``, ``dynamic``, ...

    Returns:
        The compiled model.

    Raises:
        OptionError: a ``backend`` was given.
    """
    if "backend" in torch_compile_kwargs:
        raise OptionError(
            'compile() always uses backend="sparse": for another one, write '
            "sc.prepare(model, ...) and torch.compile(model, backend=...)."
        )
    prepared = prepare(model, *args, **(example_kwargs or {}))
    for refused in prepared.refused:
        log.warning("%s at %s: %s", refused.kind, refused.path or "(the model)", refused.reason)
    for swapped in prepared.swapped:
        log.info("%s at %s: replaced", swapped.kind, swapped.path or "(the model)")
    return torch.compile(model, backend="sparse", **torch_compile_kwargs)


def _prepare_all(preparer: Preparer, prepared: Prepared, calls: Calls | None) -> None:
    """Find, check, swap for one preparer; fills ``prepared``."""
    checked: dict[Hashable, tuple[str, ...]] = {}
    # What an earlier preparer has just replaced is done, whatever else it looks like.
    done = {swapped.path for swapped in prepared.swapped}
    for path, module in prepared.model.named_modules():
        if path in done or not preparer.find(module):
            continue
        reason = _unsuited(module) or preparer.refuse(module, calls)
        names: tuple[str, ...] = ()
        if reason is None:
            kind = preparer.signature(module)
            try:
                cases = preparer.cases(module, calls, kind not in checked)
                names, reason = disagreement(preparer, module, cases)
            except Exception as error:
                reason = f"it could not be checked: {type(error).__name__}: {error}"
        if reason is not None:
            prepared.refused += (Refused(path, preparer.name, reason),)
            continue
        names = checked.setdefault(kind, names)
        prepared._undo.append(preparer.swap(module))
        prepared.swapped += (Swapped(path, preparer.name, names),)


def _unsuited(module: nn.Module) -> str | None:
    """Why no module in this state can be replaced."""
    if "forward" in vars(module):
        return (
            "its forward was replaced on the instance already, by an earlier prepare() or by "
            "another library: undo that first"
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        return "its weights are on the meta device: load them first"
    return None


def _observe(
    model: nn.Module, preparers: list[Preparer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Calls:
    """Runs the example once and notes how the modules in question are called."""
    calls: dict[nn.Module, list[Mapping[str, Any]]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError:
            return  # The call itself is about to fail, with a better message.
        bound.apply_defaults()
        calls.setdefault(module, []).append(
            pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), dict(bound.arguments))
        )

    # An example may hold a cache, which the run would fill.
    args, kwargs = pytree.tree_map(_copied, (args, kwargs))
    with restored(model), torch.no_grad(), torch.random.fork_rng(devices=cuda_devices(model)):
        watched = [m for m in model.modules() if any(p.find(m) for p in preparers)]
        hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in watched]
        try:
            model.eval()
            model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)

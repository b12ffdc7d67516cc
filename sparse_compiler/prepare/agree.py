"""Whether a module and its replacement compute the same: outputs, and all gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from sparse_compiler.prepare.registry import Case, Preparer
from sparse_compiler.prepare.swap import always_replaced, cuda_devices, restored

# Largest difference allowed, as a part of the largest value. Rounding in float32 is about 1e-6; one
# key too many in a row of a thousand is 1e-3. Not float64: Longformer casts scores to float32 for
# its softmax, where float64's "minus nearly infinity" is infinite, and padding has NaN gradients.
_BOUND = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def disagreement(
    preparer: Preparer, module: nn.Module, cases: Iterable[Case]
) -> tuple[tuple[str, ...], str | None]:
    """Runs the original and the replacement on all cases.

    Parameters, gradients and random state are as before when this returns, and the replacement is
    not in place.

    Returns:
        The names of the cases that agreed, and a sentence on the first that did not, or on there
        being none (None if all agreed).
    """
    agreed: list[str] = []
    with torch.inference_mode(False), torch.enable_grad(), _same_random_state(module):
        for case in cases:
            reason = _one(preparer, module, case)
            if reason:
                return tuple(agreed), f"{reason} ({case.name})"
            agreed.append(case.name)
    if not agreed:
        return (), "it takes none of the inputs that were tried: give example inputs"
    return tuple(agreed), None


def attempt(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a model's own code gives, and what it raised.

    Which inputs it takes is known by running it only, and then it may raise anything.

    Returns:
        The result and None, or None and the error, for a sentence.
    """
    try:
        with torch.no_grad():
            return run(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


@contextlib.contextmanager
def _same_random_state(module: nn.Module) -> Iterator[None]:
    with torch.random.fork_rng(devices=cuda_devices(module)):
        torch.manual_seed(0)
        yield


def _one(preparer: Preparer, module: nn.Module, case: Case) -> str | None:
    with restored(module):
        module.train(case.training)
        expected = _run(preparer, module, case)
        undo = preparer.swap(module)
        try:
            with always_replaced():
                actual = _run(preparer, module, case)
        finally:
            undo()
    return _difference(actual, expected)


def _run(preparer: Preparer, module: nn.Module, case: Case) -> dict[str, Tensor]:
    """Everything that has to agree, by name. Gradients are those of a random scalar."""
    if not preparer.exact:
        with torch.no_grad():
            output = preparer.result(module(*case.args, **case.kwargs))
        return {f"output {i}": tensor for i, tensor in enumerate(output)}
    weights = _weights(module)
    leaves = {
        f"argument {i}": leaf.detach().clone().requires_grad_()
        for i, leaf in enumerate(case.args)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    args = tuple(leaves.get(f"argument {i}", leaf) for i, leaf in enumerate(case.args))
    kwargs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, case.kwargs)
    # Noise in a router is the same for the original and the replacement.
    torch.manual_seed(0)
    outputs = preparer.result(functional_call(module, weights, args, kwargs))
    # The same direction for original and replacement, whatever the strides of their outputs are.
    torch.manual_seed(1)
    directions = [torch.randn(out.shape, dtype=out.dtype).to(out.device) for out in outputs]
    total = sum((o * d).sum() for o, d in zip(outputs, directions, strict=True))
    leaves |= {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if isinstance(total, Tensor) and total.requires_grad:
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {f"output {i}": tensor.detach() for i, tensor in enumerate(outputs)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers in float32; floating-point parameters are leaves."""
    weights = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        copied = parameter.detach().clone()
        weights[name] = copied.float().requires_grad_() if copied.is_floating_point() else copied
    for name, buffer in module.named_buffers(remove_duplicate=False):
        copied = buffer.detach().clone()
        weights[name] = copied.float() if copied.is_floating_point() else copied
    return weights


def _difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    if list(actual) != list(expected):
        return f"it returns {list(actual)}, the original {list(expected)}"
    # Some gradients are zero but for rounding (a key's bias shifts all scores of a row), so
    # gradients are held to the largest of them.
    largest: dict[bool, float] = {}
    for name, tensor in expected.items():
        size = float(tensor.abs().max()) if tensor.numel() else 0.0
        kind = name.startswith("gradient")
        largest[kind] = max(largest.get(kind, 0.0), size)
    for name, tensor in expected.items():
        if actual[name].shape != tensor.shape:
            shapes = f"{list(actual[name].shape)}, not {list(tensor.shape)}"
            return f"its {name} has shape {shapes}"
        scale = largest[name.startswith("gradient")]
        error = float((actual[name] - tensor).abs().max()) if tensor.numel() else 0.0
        # Written so that a NaN is a difference.
        if not error <= _BOUND.get(tensor.dtype, 0.0) * scale:
            return f"its {name} differs from the original's by {error:.1e}, of {scale:.1e}"
    return None

"""The mixture-of-experts operators on CPUs: one library for each expert body and element type.

The operators stay whole in Inductor's graphs, and this is what runs. Weights are handed over where
they lie, as a pointer and strides for each part, or for each expert where they are listed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import torch

from sparse_compiler.codegen import cpp, inductor
from sparse_compiler.codegen.score import body_functor
from sparse_compiler.ops import moe as operators

_ELEMENTS = {torch.float32: "F32", torch.bfloat16: "BF16"}


@functools.cache
def _library(name: str, body: str, parts: int, dtype: torch.dtype, isa: int) -> Any:
    source = jinja2.Template(cpp.template("moe"), undefined=jinja2.StrictUndefined).render(
        name=name,
        isa=isa,
        headers=cpp.headers(name),
        element=_ELEMENTS[dtype],
        functor=body_functor(body, parts),
        parts=parts,
    )
    return inductor.load_library(source)


class _Arguments:
    """Numbers and pointers in the order in which the kernel reads them."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.pointers: list[int | None] = []
        self._kept: list[torch.Tensor] = []

    def tensor(self, tensor: torch.Tensor | None) -> None:
        """The address; what was made for the call lives until it ends."""
        self.pointers.append(None if tensor is None else tensor.data_ptr())
        if tensor is not None:
            self._kept.append(tensor)

    def weights(self, tensors: Sequence[torch.Tensor]) -> None:
        """Addresses and strides, one tensor after the other."""
        for tensor in tensors:
            self.numbers.extend(tensor.stride())
            self.pointers.append(tensor.data_ptr())

    def bias(self, bias: torch.Tensor | None) -> None:
        """[E, n]; a stride and the address of rows without gaps."""
        if bias is not None:
            bias = operators.rows(bias)
        self.numbers.append(0 if bias is None else bias.stride(0))
        self.tensor(bias)


def _run(name: str, call: Sequence[Any], more: Callable[[_Arguments], None]) -> None:
    x, ids, gates, inner, inner_bias, outer, outer_bias, *literals = call
    body, experts, passthrough, gates_on_input = literals
    listed = inner[0].dim() == 2, outer[0].dim() == 2
    parts = len(inner) // experts if listed[0] else len(inner)
    x = operators.rows(x)
    arguments = _Arguments()
    arguments.numbers.extend(
        (*ids.shape, experts, x.shape[1], inner[0].shape[-2], outer[0].shape[-2], passthrough)
    )
    arguments.numbers.extend((gates_on_input, *listed, x.stride(0)))
    arguments.tensor(x)
    arguments.tensor(ids.contiguous())
    arguments.tensor(gates.float().contiguous())
    arguments.weights(inner)
    for part in range(parts):
        arguments.bias(inner_bias[part] if inner_bias else None)
    arguments.weights(outer)
    arguments.bias(outer_bias)
    more(arguments)
    library = _library(name, body, parts, x.dtype, inductor.vector_isa())
    library.run(
        (ctypes.c_int64 * len(arguments.numbers))(*arguments.numbers),
        (ctypes.c_void_p * len(arguments.pointers))(*arguments.pointers),
        ctypes.c_int(inductor.num_threads()),
    )


def _supported(call: Sequence[Any]) -> bool:
    x, _, _, inner, inner_bias, outer, outer_bias, *_ = call
    tensors = [x, *inner, *inner_bias, *outer, *([] if outer_bias is None else [outer_bias])]
    return x.dtype in _ELEMENTS and all(tensor.dtype is x.dtype for tensor in tensors)


def _forward(call: Sequence[Any], keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, ids, _, inner, _, outer, _, _, experts, *_ = call
    out = x.new_empty(x.shape[0], outer[0].shape[-2])
    kept = None
    if keep:
        number = len(inner) if inner[0].dim() == 3 else len(inner) // experts
        kept = x.new_zeros(number, ids.numel(), inner[0].shape[-2])

    def more(arguments: _Arguments) -> None:
        arguments.tensor(out)
        arguments.tensor(kept)

    if x.shape[0]:
        _run("moe_forward", call, more)
    return out, kept


def _moe(*call: Any, digest: str = "") -> torch.Tensor:
    return _forward(call, keep=False)[0] if _supported(call) else operators.moe(*call)


def _moe_training(*call: Any, digest: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    if not _supported(call):
        return operators.moe_training(*call)
    out, parts = _forward(call, keep=True)
    assert parts is not None
    return out, parts


def _moe_backward(
    grad: torch.Tensor, parts: torch.Tensor, *call: Any, digest: str = ""
) -> list[torch.Tensor]:
    if not _supported(call):
        return operators.moe_backward(grad, parts, *call)
    x, _, gates, inner, inner_bias, outer, outer_bias, *_ = call
    experts = call[8]
    number = len(inner) // experts if inner[0].dim() == 2 else len(inner)
    dx, dgates = x.new_empty(x.shape), gates.new_empty(gates.shape, dtype=torch.float32)
    weights = [[operators.grad_like(tensor) for tensor in group] for group in (inner, outer)]
    biases = [tensor.new_empty(tensor.shape) for tensor in inner_bias]
    last = None if outer_bias is None else outer_bias.new_empty(outer_bias.shape)

    def more(arguments: _Arguments) -> None:
        for tensor in (grad.to(x.dtype).contiguous(), parts.contiguous(), dx, dgates):
            arguments.tensor(tensor)
        arguments.weights(weights[0])
        for part in range(number):
            arguments.tensor(biases[part] if biases else None)
        arguments.weights(weights[1])
        arguments.tensor(last)

    _run("moe_backward", call, more)
    found = [dx, dgates.to(gates.dtype), *weights[0], *biases, *weights[1]]
    return found if last is None else [*found, last]


@functools.cache
def register_all() -> None:
    """Run the mixture-of-experts operators on these kernels wherever tensors live on the CPU."""
    bodies: dict[str, Callable[..., Any]] = {
        "moe": _moe,
        "moe_training": _moe_training,
        "moe_backward": _moe_backward,
    }
    for name, body in bodies.items():
        operators.LIBRARY.impl(name, body, "CPU")

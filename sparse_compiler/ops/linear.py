"""The sparse linear operators: x [rows, in_features] times a packed weight.

The bodies here are the operators' meaning and their oracle: unpack, then multiply. Inductor never
runs them; it lowers the operators to kernels (``codegen``). Each takes a ``digest`` of the kernel
sources, which puts the kernels' version into Inductor's cache keys.

- ``linear_dense``: a weight without zeros and at most 4 rows. Its gradients are dense.
- ``linear_csr``, ``linear_bitmap``: fixed weights. The gradient for x is the dense one.
- ``masked_linear_csr``: trainable weights under a mask. It takes the mask's transposed layout, so
  that the gradient for x is a sparse product too, and the gradient for the values is computed at
  the kept positions only (``sampled_csr``).
- ``take``: the values of a dense trainable weight in stored order; ``put``, its gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from sparse_compiler.formats import bitmap, csr

_LAYOUT = "Tensor columns, Tensor segments, int out_features, int in_features, int group"
_LIBRARY = torch.library.Library("sparse_compiler", "DEF")
_LIBRARY.define("linear_dense(Tensor x, Tensor weight, str digest='') -> Tensor")
_LIBRARY.define(
    f"linear_csr(Tensor x, Tensor values, {_LAYOUT}, int k_block, str digest='') -> Tensor"
)
_LIBRARY.define(
    "linear_bitmap(Tensor x, Tensor values, Tensor bits, Tensor starts, int out_features, "
    "int in_features, str digest='') -> Tensor"
)
_LIBRARY.define(
    f"sampled_csr(Tensor grad, Tensor x, {_LAYOUT}, int k_block, str digest='') -> Tensor"
)
_LIBRARY.define(
    f"masked_linear_csr(Tensor x, Tensor values, {_LAYOUT}, int k_block, Tensor transposed_order, "
    "Tensor transposed_columns, Tensor transposed_segments, int transposed_k_block, "
    "str digest='') -> Tensor"
)
_LIBRARY.define(
    "take(Tensor dense, Tensor index, Tensor? places=None, Tensor? source=None, "
    "str digest='') -> Tensor"
)
_LIBRARY.define(
    "put(Tensor values, Tensor places, Tensor source, SymInt size, str digest='') -> Tensor"
)


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.t())


def _linear_dense(x: torch.Tensor, weight: torch.Tensor, digest: str = "") -> torch.Tensor:
    return _multiply(x, weight)


def _linear_csr(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    segments: torch.Tensor,
    out_features: int,
    in_features: int,
    group: int,
    k_block: int,
    digest: str = "",
) -> torch.Tensor:
    weight = csr.unpack(
        values,
        columns,
        segments,
        out_features=out_features,
        in_features=in_features,
        group=group,
    )
    return _multiply(x, weight)


def _linear_bitmap(
    x: torch.Tensor,
    values: torch.Tensor,
    bits: torch.Tensor,
    starts: torch.Tensor,
    out_features: int,
    in_features: int,
    digest: str = "",
) -> torch.Tensor:
    weight = bitmap.unpack(values, bits, out_features=out_features, in_features=in_features)
    return _multiply(x, weight)


def _sampled_csr(
    grad: torch.Tensor,
    x: torch.Tensor,
    columns: torch.Tensor,
    segments: torch.Tensor,
    out_features: int,
    in_features: int,
    group: int,
    k_block: int,
    digest: str = "",
) -> torch.Tensor:
    """Float32 gradient of the stored values: grad [rows, out], x [rows, in]; 0 at padding."""
    index = csr.element_index(
        columns,
        segments,
        out_features=out_features,
        in_features=in_features,
        group=group,
        per_unit=4 // x.dtype.itemsize,
    )
    full = torch.mm(grad.float().t(), x.float()).flatten()
    return torch.cat([full, full.new_zeros(1)])[index]


def _masked_linear_csr(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    segments: torch.Tensor,
    out_features: int,
    in_features: int,
    group: int,
    k_block: int,
    transposed_order: torch.Tensor,
    transposed_columns: torch.Tensor,
    transposed_segments: torch.Tensor,
    transposed_k_block: int,
    digest: str = "",
) -> torch.Tensor:
    return _linear_csr(
        x, values, columns, segments, out_features, in_features, group, k_block, digest
    )


def _take(
    dense: torch.Tensor,
    index: torch.Tensor,
    places: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    digest: str = "",
) -> torch.Tensor:
    """Elements of ``dense`` by flat index; an index past the end gives 0.

    ``places`` and ``source`` are the same relation for the gradient, ``put``: ascending flat
    indices, and which stored value belongs there. Without them there is no gradient.
    """
    flat = dense.flatten()
    return torch.cat([flat, flat.new_zeros(1)])[index.long()]


def _put(
    values: torch.Tensor, places: torch.Tensor, source: torch.Tensor, size: int, digest: str = ""
) -> torch.Tensor:
    """The inverse of ``take``: ``size`` zeros with ``values`` at their places."""
    dense = values.new_zeros(size + 1).index_put([places.long()], values[source.long()])
    return dense[:-1].clone()


for _name, _body in {
    "linear_dense": _linear_dense,
    "linear_csr": _linear_csr,
    "linear_bitmap": _linear_bitmap,
    "sampled_csr": _sampled_csr,
    "masked_linear_csr": _masked_linear_csr,
    "take": _take,
    "put": _put,
}.items():
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_compiler::linear_dense")
def _fake_linear_dense(x: torch.Tensor, weight: torch.Tensor, digest: str = "") -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("sparse_compiler::linear_csr")
def _fake_linear_csr(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], args[3])


@torch.library.register_fake("sparse_compiler::linear_bitmap")
def _fake_linear_bitmap(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], args[3])


@torch.library.register_fake("sparse_compiler::masked_linear_csr")
def _fake_masked_linear_csr(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], args[3])


@torch.library.register_fake("sparse_compiler::sampled_csr")
def _fake_sampled_csr(
    grad: torch.Tensor, x: torch.Tensor, columns: torch.Tensor, *args: Any
) -> torch.Tensor:
    group = args[3]
    stored = columns.shape[0] * group * (4 // x.dtype.itemsize)
    return x.new_empty(stored, dtype=torch.float32)


@torch.library.register_fake("sparse_compiler::take")
def _fake_take(dense: torch.Tensor, index: torch.Tensor, *args: Any) -> torch.Tensor:
    return dense.new_empty(index.shape)


@torch.library.register_fake("sparse_compiler::put")
def _fake_put(
    values: torch.Tensor, places: torch.Tensor, source: torch.Tensor, size: int, digest: str = ""
) -> torch.Tensor:
    return values.new_empty(size)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*(item for item in inputs if isinstance(item, torch.Tensor)))
    ctx.literals = [None if isinstance(item, torch.Tensor) else item for item in inputs]


def _restore(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if item is None else item for item in ctx.literals]


def _linear_dense_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, weight, _ = _restore(ctx)
    grad_x = torch.mm(grad, weight) if ctx.needs_input_grad[0] else None
    grad_weight = torch.mm(grad.t(), x) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


def _linear_csr_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    _, values, columns, segments, out_features, in_features, group, _, _ = _restore(ctx)
    weight = csr.unpack(
        values,
        columns,
        segments,
        out_features=out_features,
        in_features=in_features,
        group=group,
    )
    return (torch.mm(grad, weight), *[None] * 8)


def _linear_bitmap_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    _, values, bits, _, out_features, in_features, _ = _restore(ctx)
    weight = bitmap.unpack(values, bits, out_features=out_features, in_features=in_features)
    return (torch.mm(grad, weight), *[None] * 6)


def _masked_linear_csr_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (
        x,
        values,
        columns,
        segments,
        out_features,
        in_features,
        group,
        k_block,
        order,
        transposed_columns,
        transposed_segments,
        transposed_k_block,
        digest,
    ) = _restore(ctx)
    grad_x = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.sparse_compiler.linear_csr(
            grad,
            torch.ops.sparse_compiler.take(values, order, digest=digest),
            transposed_columns,
            transposed_segments,
            in_features,
            out_features,
            1,
            transposed_k_block,
            digest,
        )
    if ctx.needs_input_grad[1]:
        grad_values = torch.ops.sparse_compiler.sampled_csr(
            grad, x, columns, segments, out_features, in_features, group, k_block, digest
        ).to(values.dtype)
    return (grad_x, grad_values, *[None] * 11)


def _take_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    places, source = ctx.saved_tensors
    size = ctx.dense_shape.numel()
    dense = torch.ops.sparse_compiler.put(grad, places, source, size, ctx.digest)
    return dense.view(ctx.dense_shape), None, None, None, None


def _take_save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.dense_shape = inputs[0].shape
    ctx.digest = inputs[4]
    ctx.save_for_backward(*inputs[2:4])
    if inputs[2] is None:
        ctx.mark_non_differentiable(output)


for _name, _backward, _save in (
    ("linear_dense", _linear_dense_backward, _save_inputs),
    ("linear_csr", _linear_csr_backward, _save_inputs),
    ("linear_bitmap", _linear_bitmap_backward, _save_inputs),
    ("masked_linear_csr", _masked_linear_csr_backward, _save_inputs),
    ("take", _take_backward, _take_save),
):
    torch.library.register_autograd(
        f"sparse_compiler::{_name}", _backward, setup_context=_save, lib=_LIBRARY
    )

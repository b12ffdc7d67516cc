"""The attention operators on CPUs: one library for each score, head size and element type.

The operators stay whole in Inductor's graphs, which call them as they call any other operator, and
this is what runs: it compiles the kernel at its first use (Inductor's cache keeps it on disk) and
hands it the tensors with whatever strides they have.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import torch

from sparse_compiler.codegen import cpp, inductor
from sparse_compiler.codegen.score import functor
from sparse_compiler.ops import attention as operators

_ELEMENTS = {torch.float32: "F32", torch.bfloat16: "BF16"}
# With at most this many queries keys are streamed past all of them, none is packed.
DECODE_QUERIES = 8


@functools.cache
def _library(
    name: str, score: str, dtype: torch.dtype, d: int, dv: int, grad_leaf: int, isa: int
) -> Any:
    made = functor(score, grad_leaf)
    source = jinja2.Template(cpp.template("attention"), undefined=jinja2.StrictUndefined).render(
        name=name,
        isa=isa,
        headers=cpp.headers(name),
        element=_ELEMENTS[dtype],
        functor=made.source,
        ranks=made.ranks,
        d=d,
        dv=dv,
    )
    return inductor.load_library(source)


def _run(
    name: str,
    library: Any,
    sizes: Sequence[int],
    tensors: Sequence[torch.Tensor | None],
    strides: Sequence[Sequence[int]],
    seed: int,
    scalars: tuple[float, float],
    grads: Sequence[torch.Tensor | None],
    leaves: Sequence[torch.Tensor],
    integers: Sequence[int],
) -> None:
    numbers = [*sizes, *(s for stride in strides for s in stride), seed]
    for grad in grads[:4]:
        assert grad is not None
        numbers.extend(grad.stride()[:3])
    for leaf in leaves:
        numbers.extend((*leaf.shape, *leaf.stride()))
    numbers.extend(integers)
    everything = [*tensors, *grads, *leaves]
    pointers = [None if t is None else t.data_ptr() for t in everything]
    library.run(
        (ctypes.c_int64 * len(numbers))(*numbers),
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_float * 2)(*scalars),
        ctypes.c_int(inductor.num_threads()),
    )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose last dimension is contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _call(
    name: str,
    call: Sequence[Any],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    grads: Sequence[torch.Tensor | None] = (),
    grad_leaf: int = -1,
) -> None:
    q, k, v, kinds, leaves, integers, sink, seed, score, empty_row, dropout = call
    batch, heads, queries, d = q.shape
    library = _library(name, score, q.dtype, d, v.shape[-1], grad_leaf, inductor.vector_isa())
    kinds_stride = [0 if kinds.shape[i] == 1 else kinds.stride(i) for i in (0, 1)]
    rows = None
    if sink is not None:
        rows = sink.float().expand(batch, heads, queries)
    _run(
        name,
        library,
        (batch, heads, k.shape[1], queries, k.shape[2]),
        (q, k, v, out, lse, kinds, rows),
        (
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            out.stride()[:3],
            kinds_stride,
            (0, 0, 0) if rows is None else rows.stride(),
        ),
        0 if seed is None else int(seed.item()),
        (0.0 if empty_row == "zero" else float("nan"), dropout),
        grads,
        leaves,
        integers,
    )


def _supported(*tensors: torch.Tensor) -> bool:
    return all(t.dtype in _ELEMENTS and t.dtype is tensors[0].dtype for t in tensors)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, v = map(_rows, (q, k, v))
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32) if with_lse else None
    few = queries <= DECODE_QUERIES and not with_lse
    _call("attention_decode" if few else "attention_forward", (q, k, v, *args), out, lse)
    return out, lse


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, digest: str = ""
) -> torch.Tensor:
    if not _supported(q, k, v):
        return operators.attention(q, k, v, *args)
    return _forward(q, k, v, *args, with_lse=False)[0]


def _attention_training(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, digest: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _supported(q, k, v):
        return operators.attention_training(q, k, v, *args)
    out, lse = _forward(q, k, v, *args[:-1], with_lse=True)
    assert lse is not None
    return out, lse


def _attention_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *args: Any,
    digest: str = "",
) -> tuple[torch.Tensor, ...]:
    if not _supported(q, k, v):
        return operators.attention_backward(grad, out, lse, q, k, v, *args)
    *call, grad_leaf = args
    q, k, v, grad, out = map(_rows, (q, k, v, grad.to(q.dtype), out))
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    sink = call[3]
    batch, heads, queries = q.shape[:3]
    dsink = q.new_empty(0 if sink is None else lse.shape, dtype=torch.float32)
    shape = (batch, heads, queries, k.shape[2]) if grad_leaf >= 0 else (0,)
    dleaf = q.new_empty(shape, dtype=torch.float32)
    grads = [grad, dq, dk, dv, *(t if t.numel() else None for t in (dsink, dleaf))]
    _call("attention_backward", (q, k, v, *call), out, lse, grads, grad_leaf)
    return dq, dk, dv, dsink, dleaf


@functools.cache
def register_all() -> None:
    """Run the attention operators on these kernels wherever tensors live on the CPU."""
    bodies: dict[str, Callable[..., Any]] = {
        "attention": _attention,
        "attention_training": _attention_training,
        "attention_backward": _attention_backward,
    }
    for name, body in bodies.items():
        operators.LIBRARY.impl(name, body, "CPU")

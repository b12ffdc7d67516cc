"""The kernels as plain functions on tensors, without Inductor: for timing and for checking.

Each library holds one kernel for one element type; it is compiled once and cached on disk.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import jinja2
import torch

from sparse_compiler.codegen import cpp, inductor


@functools.cache
def _library(
    name: str,
    dtype: torch.dtype,
    isa: int,
    *,
    group: int = 1,
    n_block: int = 0,
    static_rows: int = -1,
) -> Any:
    source = jinja2.Template(cpp.template("timing"), undefined=jinja2.StrictUndefined).render(
        name=name,
        isa=isa,
        headers=cpp.headers(name),
        element="F32" if dtype is torch.float32 else "BF16",
        group=group,
        n_block=n_block,
        static_rows=static_rows,
        piece=cpp.PIECE,
    )
    return inductor.load_library(source)


def _address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def linear(
    name: str,
    x: torch.Tensor,
    packed: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    *,
    group: int = 1,
    k_block: int = 0,
) -> None:
    """Run a linear kernel into ``out`` [rows, out_features]; all contiguous.

    ``packed`` is the weight as the kernel ``name`` takes it; (weight,) for ``linear_dense``.
    """
    rows, in_features = x.shape
    static_rows = 1 if rows == 1 else -1
    if name == "linear_dense":
        n_block, static_rows = cpp.GEMV_BLOCK, rows
    else:
        # [n-blocks, k-blocks, rows or groups of an n-block, ...]
        table = packed[2] if name == "linear_csr" else packed[1]
        n_block = table.shape[2] * group
    first, second = (*packed[1:], None, None)[:2]
    library = _library(
        name, x.dtype, inductor.vector_isa(), group=group, n_block=n_block, static_rows=static_rows
    )
    sizes = [ctypes.c_int64(size) for size in (rows, out.shape[1], in_features)]
    library.run(
        _address(x),
        *sizes,
        *map(_address, (packed[0], first, second)),
        ctypes.c_int64(k_block),
        _address(out),
        ctypes.c_int(inductor.num_threads()),
    )


def sampled(
    grad: torch.Tensor,
    x: torch.Tensor,
    columns: torch.Tensor,
    segments: torch.Tensor,
    out: torch.Tensor,
    *,
    group: int,
    k_block: int,
) -> None:
    """Run ``sampled_csr`` into ``out``, float32, one per stored value; all contiguous."""
    n_block = segments.shape[2] * group
    library = _library("sampled_csr", x.dtype, inductor.vector_isa(), group=group, n_block=n_block)
    sizes = [ctypes.c_int64(size) for size in (x.shape[0], grad.shape[1], x.shape[1])]
    library.run(
        _address(grad),
        _address(x),
        *sizes,
        _address(columns),
        _address(segments),
        ctypes.c_int64(k_block),
        _address(out),
        ctypes.c_int(inductor.num_threads()),
    )


def take(dense: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Run ``take`` into ``out``, of the dtype of ``dense``; all contiguous, ``index`` int32."""
    _move("take", dense, dense.numel(), index, None, out)


def put(
    values: torch.Tensor, places: torch.Tensor, source: torch.Tensor, out: torch.Tensor
) -> None:
    """Run ``put`` into ``out``, of the dtype of ``values``; all contiguous, indices int32."""
    _move("put", values, out.numel(), places, source, out)


def _move(
    name: str,
    tensor: torch.Tensor,
    size: int,
    places: torch.Tensor,
    source: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    library = _library(name, tensor.dtype, inductor.vector_isa())
    library.run(
        _address(tensor),
        ctypes.c_int64(size),
        _address(places),
        _address(source),
        ctypes.c_int64(places.numel()),
        _address(out),
        ctypes.c_int(inductor.num_threads()),
    )

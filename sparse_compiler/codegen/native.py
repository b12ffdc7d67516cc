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
    name: str, dtype: torch.dtype, group: int, n_block: int, static_rows: int, isa: int
) -> Any:
    source = jinja2.Template(cpp.template("timing"), undefined=jinja2.StrictUndefined).render(
        name=name,
        isa=isa,
        headers=cpp.headers(name),
        element="F32" if dtype is torch.float32 else "BF16",
        group=group,
        n_block=n_block,
        static_rows=static_rows,
    )
    return inductor.load_library(source)


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def linear(
    name: str,
    x: torch.Tensor,
    packed: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    *,
    group: int = 1,
    k_block: int = 0,
) -> None:
    """Run ``linear_csr`` or ``linear_bitmap`` into ``out`` [rows, out_features]; all contiguous."""
    rows, in_features = x.shape
    # [n-blocks, k-blocks, rows or groups of an n-block, ...]
    table = packed[2] if name == "linear_csr" else packed[1]
    n_block = table.shape[2] * group
    static_rows = 1 if rows == 1 else -1
    library = _library(name, x.dtype, group, n_block, static_rows, inductor.vector_isa())
    sizes = [ctypes.c_int64(size) for size in (rows, out.shape[1], in_features)]
    library.run(
        _address(x),
        *sizes,
        *map(_address, packed),
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
    library = _library("sampled_csr", x.dtype, group, n_block, -1, inductor.vector_isa())
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

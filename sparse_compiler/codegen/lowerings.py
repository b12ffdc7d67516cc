"""How Inductor lowers this package's operators on CPUs: one function an operator."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from sparse_compiler.codegen import cpp, inductor
from sparse_compiler.ops import linear as _linear_ops  # noqa: F401  registers the operators

_CSR = ("values", "columns", "segments")


def _rows_of_block(table: Any) -> int:
    """Third size of a layout's table [n-blocks, k-blocks, rows or groups of an n-block, ...]."""
    return int(table.get_size()[2])


def _linear_csr(
    x: Any,
    values: Any,
    columns: Any,
    segments: Any,
    out_features: int,
    in_features: int,
    group: int,
    k_block: int,
    digest: str = "",
) -> Any:
    kernel = cpp.linear_kernel(
        "linear_csr",
        _CSR,
        out_features=out_features,
        in_features=in_features,
        group=group,
        k_block=k_block,
        n_block=_rows_of_block(segments) * group,
    )
    size = [x.get_size()[0], out_features]
    return inductor.lower_kernel(kernel, [x, values, columns, segments], x.get_dtype(), size)


def _linear_bitmap(
    x: Any,
    values: Any,
    bits: Any,
    starts: Any,
    out_features: int,
    in_features: int,
    digest: str = "",
) -> Any:
    kernel = cpp.linear_kernel(
        "linear_bitmap",
        ("values", "bits", "starts"),
        out_features=out_features,
        in_features=in_features,
        n_block=_rows_of_block(bits),
    )
    size = [x.get_size()[0], out_features]
    return inductor.lower_kernel(kernel, [x, values, bits, starts], x.get_dtype(), size)


def _masked_linear_csr(x: Any, *args: Any) -> Any:
    return _linear_csr(x, *args[:7])


def _sampled_csr(
    grad: Any,
    x: Any,
    columns: Any,
    segments: Any,
    out_features: int,
    in_features: int,
    group: int,
    k_block: int,
    digest: str = "",
) -> Any:
    per_unit = 4 // x.get_dtype().itemsize
    kernel = cpp.sampled_kernel(
        out_features=out_features,
        in_features=in_features,
        group=group,
        k_block=k_block,
        n_block=_rows_of_block(segments) * group,
        tail=64 * group * per_unit,
    )
    size = [columns.get_size()[0] * group * per_unit]
    return inductor.lower_kernel(kernel, [grad, x, columns, segments], torch.float32, size)


def _take(dense: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    size = dense.numel()
    values = dense.flatten()[index.clamp(max=size - 1)]
    return torch.where(index < size, values, 0)


def _put(values: torch.Tensor, index: torch.Tensor, shape: list[int]) -> torch.Tensor:
    zeros = values.new_zeros(math.prod(shape) + 1)
    return zeros.index_put([index], values)[:-1].reshape(shape)


@functools.cache
def register_all() -> None:
    """Give Inductor a lowering for every operator of this package."""
    operators = torch.ops.sparse_compiler
    inductor.register(operators.linear_csr.default, _linear_csr)
    inductor.register(operators.linear_bitmap.default, _linear_bitmap)
    inductor.register(operators.masked_linear_csr.default, _masked_linear_csr)
    inductor.register(operators.sampled_csr.default, _sampled_csr)
    inductor.register_decomposition(operators.take.default, _take)
    inductor.register_decomposition(operators.put.default, _put)

"""How Inductor lowers this package's operators on CPUs: one function an operator."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sparse_compiler.codegen import attention, cpp, inductor, moe
from sparse_compiler.ops import linear as _linear_ops  # noqa: F401  registers the operators

_CSR = ("values", "columns", "segments")


def _rows_of_block(table: Any) -> int:
    """Third size of a layout's table [n-blocks, k-blocks, rows or groups of an n-block, ...]."""
    return int(table.get_size()[2])


def _linear_dense(x: Any, weight: Any, digest: str = "") -> Any:
    out_features, in_features = (int(size) for size in weight.get_size())
    kernel = cpp.linear_kernel(
        "linear_dense",
        ("weight",),
        out_features=out_features,
        in_features=in_features,
        n_block=cpp.GEMV_BLOCK,
    )
    return inductor.lower_kernel(
        kernel, [x, weight], x.get_dtype(), [x.get_size()[0], out_features]
    )


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


def _take(dense: Any, index: Any, places: Any = None, source: Any = None, digest: str = "") -> Any:
    flat = inductor.flattened(dense)
    kernel = cpp.move_kernel("take", "index")
    return inductor.lower_kernel(kernel, [flat, index], dense.get_dtype(), index.get_size())


def _put(values: Any, places: Any, source: Any, size: int, digest: str = "") -> Any:
    kernel = cpp.move_kernel("put", "places", "source")
    return inductor.lower_kernel(kernel, [values, places, source], values.get_dtype(), [size])


@functools.cache
def register_all() -> None:
    """Give Inductor a lowering for every operator of this package."""
    operators = torch.ops.sparse_compiler
    inductor.register(operators.linear_dense.default, _linear_dense)
    inductor.register(operators.linear_csr.default, _linear_csr)
    inductor.register(operators.linear_bitmap.default, _linear_bitmap)
    inductor.register(operators.masked_linear_csr.default, _masked_linear_csr)
    inductor.register(operators.sampled_csr.default, _sampled_csr)
    inductor.register(operators.put.default, _put)
    inductor.register(operators.take.default, _take)
    attention.register_all()
    moe.register_all()

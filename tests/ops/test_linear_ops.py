"""The operators' meaning: reference bodies, fakes and gradients."""

import pytest
import torch
from helpers import assert_product, pruned
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from sparse_compiler.formats import bitmap, csr
from sparse_compiler.ops import linear as _registers  # noqa: F401

ops = torch.ops.sparse_compiler


def csr_arguments(x, weight, group=1):
    layout, values = csr.pack(weight, group=group)
    shape = (*weight.shape, group, layout.k_block)
    return (x, values, layout.columns, layout.segments, *shape)


def bitmap_arguments(x, weight):
    layout, values = bitmap.pack(weight)
    return (x, values, layout.bits, layout.starts, *weight.shape)


@given(
    rows=st.integers(0, 5),
    out_features=st.integers(1, 70),
    in_features=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    group=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 100),
)
def test_references(rows, out_features, in_features, dtype, group, seed):
    weight = pruned(out_features, in_features, 0.4, dtype, seed=seed)
    x = torch.randn(rows, in_features).to(dtype)
    expected = torch.nn.functional.linear(x, weight)
    torch.testing.assert_close(ops.linear_csr(*csr_arguments(x, weight, group)), expected)
    torch.testing.assert_close(ops.linear_bitmap(*bitmap_arguments(x, weight)), expected)
    if dtype is torch.float32:
        assert_product(ops.linear_csr(*csr_arguments(x, weight, group)), x, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fakes_and_autograd_registrations(dtype):
    weight = pruned(20, 12, 0.4, dtype)
    x = torch.randn(3, 12, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 20, dtype=dtype)
    # The backward of a fixed weight unpacks it, whose size depends on data: dynamic shapes are
    # checked by the compiled tests.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.linear_csr.default, csr_arguments(x, weight), test_utils=utils)
    opcheck(ops.linear_bitmap.default, bitmap_arguments(x, weight), test_utils=utils)
    opcheck(
        ops.sampled_csr.default,
        (grad, x.detach(), *csr_arguments(x, weight)[2:]),
        test_utils=utils,
    )
    index = torch.tensor([0, 5, 239, 240], dtype=torch.int32)
    source = torch.arange(4, dtype=torch.int32)
    dense = weight.clone().requires_grad_()
    opcheck(ops.take.default, (dense, index, index, source), test_utils=utils)
    opcheck(ops.put.default, (torch.randn(4), index, source, 240), test_utils=utils)


def test_take_and_put_are_each_others_inverse():
    dense = torch.randn(4, 5, requires_grad=True)
    index = torch.tensor([3, 19, 20, 0], dtype=torch.int32)
    places, source = index.sort()
    values = ops.take(dense, index, places, source.int())
    assert values.tolist() == [dense[0, 3].item(), dense[3, 4].item(), 0.0, dense[0, 0].item()]
    values.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    expected = torch.zeros(4, 5)
    expected[0, 3], expected[3, 4], expected[0, 0] = 1.0, 2.0, 4.0
    assert torch.equal(dense.grad, expected)


@pytest.mark.parametrize("group", [1, 8])
def test_the_gradient_for_x_is_the_dense_one(group):
    weight = pruned(20, 12, 0.4)
    x, again = (torch.randn(3, 12).requires_grad_() for _ in range(2))
    again.data.copy_(x.data)
    grad = torch.randn(3, 20)
    torch.nn.functional.linear(again, weight).backward(grad)
    for y in (
        ops.linear_csr(*csr_arguments(x, weight, group)),
        ops.linear_bitmap(*bitmap_arguments(x, weight)),
    ):
        x.grad = None
        y.backward(grad)
        torch.testing.assert_close(x.grad, again.grad)


def test_gradients_of_a_streamed_dense_weight():
    weight, x, grad = torch.randn(20, 12), torch.randn(3, 12), torch.randn(3, 20)
    found = [t.clone().requires_grad_() for t in (x, weight)]
    exact = [t.double().requires_grad_() for t in (x, weight)]
    ops.linear_dense(*found).backward(grad)
    torch.nn.functional.linear(*exact).backward(grad.double())
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5)

"""PyTorch's own operator samples (OpInfo) through the compiler.

Dynamo's graph of every sample is canonicalized and goes through all passes, and what comes out is
run eagerly: same results and gradients as eager, or the same kind of exception; nothing may fail
inside or warn. All tensors but the first are parameters, so that linear layers are rewritten,
and multiplied by the operators' reference implementations. A subset is compiled for real.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from sparse_compiler import backend
from sparse_compiler.formats.cost import AlwaysSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import PassContext, Rewrite

SAMPLES = 3
FLOAT_OPS = [op for op in op_db if torch.float32 in op.supported_dtypes("cpu")]
EVERY_OP = sorted(FLOAT_OPS, key=lambda op: (op.name, op.variant_test_name))

# Their result is memory that nobody has written, or depends on the call.
UNDEFINED = {
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided",
    "nn.functional.scaled_dot_product_attention",
}  # fmt: skip
LINEAR = {
    "__rmatmul__", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "einsum", "inner", "linalg.multi_dot",
    "masked.where", "masked_fill", "matmul", "mm", "mul", "mv", "nn.functional.bilinear",
    "nn.functional.conv1d", "nn.functional.conv2d", "nn.functional.conv3d", "nn.functional.linear",
    "outer", "tensordot", "where",
}  # fmt: skip


class Call(nn.Module):
    """One sample as a model: the first tensor is the input, the others are parameters."""

    def __init__(self, function: Callable[..., Any], sample: Any, *, pruned: bool) -> None:
        super().__init__()
        self.function = function
        flat, self.spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        self.flat: list[Any] = []
        self.names: list[str | None] = []
        self.inputs: list[torch.Tensor] = []
        for position, value in enumerate(flat):
            name = None
            if isinstance(value, torch.Tensor):
                name = f"operand_{position}"
                if not self.inputs:
                    self.inputs.append(value.detach().requires_grad_(value.requires_grad))
                else:
                    self.hold(name, value, pruned)
                value = None
            self.names.append(name)
            self.flat.append(value)

    def hold(self, name: str, value: torch.Tensor, pruned: bool) -> None:
        value = value.detach()
        if not value.is_floating_point():
            self.register_buffer(name, value)
            return
        if pruned and value.dim() >= 2:
            keep = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)) > 0.6
            value = value * keep
        self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs: torch.Tensor) -> Any:
        flat = list(self.flat)
        first = True
        for position, name in enumerate(self.names):
            if name is not None:
                flat[position] = inputs[0] if first else getattr(self, name)
                first = False
        value, args, kwargs = pytree.tree_unflatten(flat, self.spec)
        return self.function(value, *args, **kwargs)


@dataclasses.dataclass
class Run:
    """Results (or the exception) of one call."""

    results: list[Any] = dataclasses.field(default_factory=list)
    error: BaseException | None = None


def outcome(call: Callable[..., Any], model: Call, *, grad: bool) -> Run:
    """Results and gradients of a call, on fresh copies of its inputs, or what it raised."""
    torch.manual_seed(0)
    inputs = [x.detach().clone().requires_grad_(grad and x.requires_grad) for x in model.inputs]
    try:
        with contextlib.nullcontext() if grad else torch.no_grad():
            results = pytree.tree_leaves(call(*inputs))
            if grad:
                loss = [r.abs().sum() for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
                wanted = [t for t in [*inputs, *model.parameters()] if t.requires_grad]
                if loss and wanted:
                    results += torch.autograd.grad(sum(loss), wanted, allow_unused=True)
    except Exception as error:
        return Run(error=error)
    return Run(results)


def passes_only(rewrites: list[Rewrite]) -> Callable[..., Any]:
    """A Dynamo backend: canonicalize, run the passes, and run what comes out eagerly."""

    def compile(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        options = Options.parse({"selection": "always", "on_error": "raise"})
        context = PassContext(options, torch.is_grad_enabled(), AlwaysSelector())
        record = backend._rewrite(gm, example_inputs, context)
        rewrites.extend(record.rewrites)
        return record.after

    return compile


def eagerly(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    return gm


def compare(wanted: Run, got: Run, what: str, **tolerance: float) -> None:
    if wanted.error is not None:
        assert got.error is not None, f"{what}: {wanted.error!r} is not raised"
        return
    assert got.error is None, f"{what}: {got.error!r}"
    assert len(wanted.results) == len(got.results), what
    for want, have in zip(wanted.results, got.results, strict=True):
        if isinstance(want, torch.Tensor):
            torch.testing.assert_close(
                have, want, equal_nan=True, msg=lambda m: f"{what}: {m}", **tolerance
            )
        else:
            assert type(want) is type(have), what
            assert want == have or want != want, what


def samples(op: Any, *, grad: bool) -> Iterator[Any]:
    torch.manual_seed(0)
    grad = grad and op.supports_autograd
    return itertools.islice(op.sample_inputs("cpu", torch.float32, requires_grad=grad), SAMPLES)


def check_passes(op: Any, *, grad: bool, limit: int = SAMPLES) -> int:
    """Run samples through the passes; the number of linear layers that were rewritten."""
    applied = 0
    for number, sample in enumerate(itertools.islice(samples(op, grad=grad), limit)):
        model = Call(op.op, sample, pruned=op.name in LINEAR and not grad)
        if not model.inputs:
            continue
        what = f"{op.full_name} sample {number}"
        wanted = outcome(model, model, grad=grad)
        torch._dynamo.reset()
        rewrites: list[Rewrite] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = outcome(torch.compile(model, backend=passes_only(rewrites)), model, grad=grad)
        assert not [w for w in caught if "sparse_compiler" in str(w.message)], what
        if got.error is not None and wanted.error is None:
            # Dynamo itself cannot trace every operator.
            torch._dynamo.reset()
            plain = outcome(torch.compile(model, backend=eagerly), model, grad=grad)
            if plain.error is not None and type(plain.error) is type(got.error):
                continue
        compare(wanted, got, what)
        applied += sum(rewrite.applied for rewrite in rewrites)
    return applied

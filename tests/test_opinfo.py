"""PyTorch's own operator samples (OpInfo) through the compiler.

Dynamo's graph of every sample is canonicalized and goes through all passes, and what comes out is
run eagerly: same results and gradients as eager, or the same kind of exception; nothing may fail
inside or warn. All tensors but one are parameters, so that linear layers are rewritten,
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
    "__rmatmul__", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "einsum", "inner",
    "linalg.multi_dot",
    "masked.where", "masked_fill", "matmul", "mm", "mul", "mv", "nn.functional.bilinear",
    "nn.functional.conv1d", "nn.functional.conv2d", "nn.functional.conv3d", "nn.functional.linear",
    "outer", "tensordot", "where",
}  # fmt: skip
# Which of the tensors is the model's input; the first, where nothing is said.
INPUT = {"addbmm": 1, "addmm": 1, "addmv": 2, "baddbmm": 1, "mv": 1}


class Call(nn.Module):
    """One sample as a model: one tensor is the input, the others are parameters."""

    def __init__(self, op: Any, sample: Any, *, pruned: bool) -> None:
        super().__init__()
        self.function = op.op
        flat, self.spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        tensors = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
        self.flat = [None if i in tensors else value for i, value in enumerate(flat)]
        self.input_at = tensors[INPUT.get(op.name, 0)] if tensors else None
        self.held = [i for i in tensors if i != self.input_at]
        for position in self.held:
            self.hold(f"operand_{position}", flat[position], pruned)
        self.inputs: list[torch.Tensor] = []
        if self.input_at is not None:
            given = flat[self.input_at]
            self.inputs.append(given.detach().requires_grad_(given.requires_grad))

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
        flat[self.input_at] = inputs[0]
        for position in self.held:
            flat[position] = getattr(self, f"operand_{position}")
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
                loss = [
                    r.abs().sum()
                    for r in results
                    if isinstance(r, torch.Tensor) and r.requires_grad
                ]
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


def samples(op: Any, *, grad: bool, limit: int) -> Iterator[Any]:
    torch.manual_seed(0)
    grad = grad and op.supports_autograd
    return itertools.islice(op.sample_inputs("cpu", torch.float32, requires_grad=grad), limit)


def models(op: Any, *, grad: bool, limit: int) -> Iterator[tuple[str, Call]]:
    for number, sample in enumerate(samples(op, grad=grad, limit=limit)):
        model = Call(op, sample, pruned=op.name in LINEAR and not grad)
        if model.inputs:
            yield f"{op.full_name} sample {number}", model


@contextlib.contextmanager
def no_warnings_of_ours(what: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(w.message) for w in caught if "sparse_compiler" in str(w.message)], what


def check_passes(op: Any, *, grad: bool, limit: int) -> int:
    """Run samples through the passes; the number of layers that were rewritten."""
    applied = 0
    for what, model in models(op, grad=grad, limit=limit):
        wanted = outcome(model, model, grad=grad)
        torch._dynamo.reset()
        rewrites: list[Rewrite] = []
        with no_warnings_of_ours(what):
            got = outcome(torch.compile(model, backend=passes_only(rewrites)), model, grad=grad)
        if got.error is not None and wanted.error is None:
            # Dynamo itself cannot trace every operator.
            torch._dynamo.reset()
            plain = outcome(torch.compile(model, backend=eagerly), model, grad=grad)
            if plain.error is not None and type(plain.error) is type(got.error):
                continue
        compare(wanted, got, what)
        applied += sum(rewrite.applied for rewrite in rewrites)
    return applied


def check_compiled(op: Any, *, limit: int) -> int:
    """Compile samples with ``sparse`` and with ``inductor``; the number of layers rewritten."""
    records: list[backend.CompiledGraph] = []
    backend.listeners.append(records.append)
    try:
        for what, model in models(op, grad=False, limit=limit):
            torch._dynamo.reset()
            wanted = outcome(torch.compile(model, backend="inductor"), model, grad=False)
            torch._dynamo.reset()
            options = {"selection": "always", "on_error": "raise"}
            fast = torch.compile(model, backend="sparse", options=options)
            with no_warnings_of_ours(what):
                got = outcome(fast, model, grad=False)
            assert type(wanted.error) is type(got.error), f"{what}: {got.error!r}"
            compare(wanted, got, what, rtol=1e-4, atol=1e-4)
    finally:
        backend.listeners.remove(records.append)
    return sum(rewrite.applied for record in records for rewrite in record.rewrites)


LINEAR_OPS = [op for op in EVERY_OP if op.name in LINEAR]
DEFINED_OPS = [op for op in EVERY_OP if op.name not in UNDEFINED]
# A linear layer with a pruned operand is among their first samples.
REWRITTEN = {
    "__rmatmul__",
    "addmm.decomposed",
    "einsum",
    "matmul",
    "mm",
    "mv",
    "nn.functional.linear",
}


def names(op: Any) -> str:
    return op.full_name


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("op", LINEAR_OPS, ids=names)
def test_passes_keep_linear_operators(op):
    applied = check_passes(op, grad=False, limit=8)
    assert applied or op.full_name not in REWRITTEN
    if op.supports_autograd:
        check_passes(op, grad=True, limit=1)


@pytest.mark.slow
@pytest.mark.parametrize("op", DEFINED_OPS, ids=names)
def test_passes_keep_every_operator(op):
    check_passes(op, grad=False, limit=SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in DEFINED_OPS if op.supports_autograd], ids=names)
def test_passes_keep_gradients(op):
    check_passes(op, grad=True, limit=1)


@pytest.mark.slow
@pytest.mark.parametrize("op", LINEAR_OPS, ids=names)
def test_compiled_as_by_inductor(op):
    check_compiled(op, limit=SAMPLES)

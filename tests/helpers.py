"""What several tests share: pruned weights, the bound results are held to, and a probe backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from sparse_compiler import backend
from sparse_compiler.canonical import canonicalize
from sparse_compiler.formats.cost import AlwaysSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import PassContext, Rewrite, SparseLinear


def pruned(
    rows: int,
    columns: int,
    density: float,
    dtype: torch.dtype = torch.float32,
    *,
    block: tuple[int, int] = (1, 1),
    seed: int = 0,
) -> torch.Tensor:
    """Random weights of which about a share ``density`` of the blocks is kept."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    keep = torch.rand(high, wide, generator=generator) < density
    keep = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (weight * keep[:rows, :columns]).to(dtype)


def prune_layers(model: nn.Module, density: float = 0.2) -> nn.Module:
    """Prune every weight of two or more dimensions in place, unstructured."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            if parameter.dim() > 1:
                keep = torch.rand(parameter.shape, generator=generator) < density
                parameter.mul_(keep)
    return model


def assert_product(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """y = x weight.T + bias, within the bound of a float32 dot product, entry by entry.

    The bound for a dot product of length K is |error| <= (K + 2) 2^-24 (|x| |w| + |b|), and 2^-8 of
    the result where it is rounded to bfloat16. NaN and infinities have to agree exactly.
    """
    bias64 = None if bias is None else bias.double()
    linear = torch.nn.functional.linear
    expected = linear(x.double(), weight.double(), bias64)
    size = linear(x.double().abs(), weight.double().abs(), None if bias is None else bias64.abs())
    bound = size * (x.shape[-1] + 2) * 2.0**-24 + 1e-30
    if y.dtype == torch.bfloat16:
        bound = bound + expected.abs() * 2.0**-8
    assert y.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(y.isfinite(), finite), "finite where it should not be, or the other way"
    special = y[~finite].double()
    assert torch.equal(special.isnan(), expected[~finite].isnan())
    infinite = ~special.isnan()
    assert torch.equal(special[infinite], expected[~finite][infinite])
    error = (y.double() - expected).abs()[finite]
    worst = (error / bound[finite]).max() if error.numel() else torch.zeros(())
    assert bool(worst <= 1), f"the error is {float(worst):.2f} times the bound"


def sparsify(
    gm: fx.GraphModule, *, training: bool = False, **options: Any
) -> tuple[fx.GraphModule, list[Rewrite]]:
    """Run SparseLinear on a canonical graph, whatever it costs; failures raise."""
    parsed = Options.parse({"selection": "always", "on_error": "raise", **options})
    context = PassContext(parsed, training, AlwaysSelector())
    result = SparseLinear(context)(gm)
    return result.graph_module, context.rewrites


def sparsified(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    """The model's canonical graph with SparseLinear applied, and the verdicts."""
    with torch.no_grad():
        return sparsify(canonicalize(model.eval(), *inputs), **options)


def targets(gm: fx.GraphModule) -> list[str]:
    """The operators of a graph, in order."""
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def count(gm: fx.GraphModule, name: str) -> int:
    """How many operators of a graph have ``name`` in theirs."""
    return sum(name in target for target in targets(gm))


@contextlib.contextmanager
def listening() -> Iterator[list[backend.CompiledGraph]]:
    """Collects what the backend compiles inside the block."""
    records: list[backend.CompiledGraph] = []
    backend.listeners.append(records.append)
    try:
        yield records
    finally:
        backend.listeners.remove(records.append)


# Every rewrite that is legal is made, nothing is timed, and nothing fails in silence.
ALWAYS = {"selection": "always", "on_error": "raise"}


def compiled(model: Any, **options: Any) -> Any:
    """The model compiled with every legal rewrite."""
    return torch.compile(model, backend="sparse", options={**ALWAYS, **options})

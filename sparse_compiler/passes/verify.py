"""``verify=True``: every rewrite is run against the region it replaces, on random inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.errors import VerificationError
from sparse_compiler.ops import attention as _operators  # noqa: F401  registers the operators
from sparse_compiler.ops import moe as _mixtures  # noqa: F401
from sparse_compiler.passes.base import PassContext
from sparse_compiler.region import Region
from sparse_compiler.static import StaticValues

Verify = Callable[[Region, Sequence[fx.Node], Sequence[fx.Node]], None]

_MIXTURES = (torch.ops.sparse_compiler.moe.default, torch.ops.sparse_compiler.moe_training.default)
_TILE_KINDS = torch.ops.sparse_compiler.tile_kinds.default

# Relative to the largest result: sums are taken in another order.
_BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def verifier(
    gm: fx.GraphModule, static: StaticValues, context: PassContext, target: str
) -> Verify | None:
    """A check for ``replace_region``, or None if the options do not ask for one."""
    if not context.options.verify:
        return None

    def verify(region: Region, created: Sequence[fx.Node], results: Sequence[fx.Node]) -> None:
        generator = torch.Generator().manual_seed(0)
        values: dict[fx.Node, Any] = {}
        # A map that several attentions share belongs to what decides it.
        maps = [node for node in inputs_of(created) if node.target is _TILE_KINDS]
        created = [*maps, *created]
        # What only the original reads (a mask) is computed from what the rewrite reads.
        between = _between([*region.nodes, *created], _made_up(created), static)
        for node in inputs_of([*between, *region.nodes, *created]):
            known = static.value(node) if static.is_static(node) else static.leaf(node)
            values[node] = known if known is not None else random_like(node, generator)
        _run(between, values, ())
        expected = _run(region.nodes, dict(values), region.outputs)
        actual = _run(created, dict(values), results)
        for want, got in zip(expected, actual, strict=True):
            bound = _BOUND.get(want.dtype, 1e-6)
            finite = want.isfinite()
            same = torch.equal(_special(want), _special(got))
            error = _largest((want.double() - got.double())[finite]) if same else torch.inf
            scale = max(_largest(want.double()[finite]), 1e-6)
            if not error <= bound * scale:
                raise VerificationError(
                    f"{target}: the rewrite differs from the original by {error:.3g} where "
                    f"the largest value is {scale:.3g}. Please report this, with the model."
                )

    return verify


def _made_up(created: Sequence[fx.Node]) -> set[fx.Node]:
    """What gets random values: all that a rewrite reads.

    Of a mixture of experts its tokens alone: ids and gates belong together, and are computed.
    """
    calls = [node for node in created if node.target in _MIXTURES]
    if not calls:
        return set(inputs_of(created))
    inside, found = set(created), set()
    waiting = [call.args[0] for call in calls]
    while waiting:
        node = waiting.pop()
        assert isinstance(node, fx.Node)
        if node in inside:
            waiting.extend(node.all_input_nodes)
        else:
            found.add(node)
    return found


def _special(values: torch.Tensor) -> torch.Tensor:
    """0 for finite values, and another number each for NaN and the two infinities."""
    return torch.where(values.isnan(), 3.0, torch.where(values.isinf(), values.sign(), 0.0))


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def inputs_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What nodes read that is not among them."""
    inside = set(nodes)
    found = {arg: None for node in nodes for arg in node.all_input_nodes if arg not in inside}
    return list(found)


def _between(nodes: Sequence[fx.Node], known: set[fx.Node], static: StaticValues) -> list[fx.Node]:
    """What has to be computed to run ``nodes`` from ``known``, static values and graph inputs."""
    found: set[fx.Node] = set()
    waiting = inputs_of(nodes)
    while waiting:
        node = waiting.pop()
        if node in known or node in found or node.op != "call_function" or static.is_static(node):
            continue
        found.add(node)
        waiting.extend(node.all_input_nodes)
    return sorted(found)


def random_like(node: fx.Node, generator: torch.Generator) -> Any:
    """A value of a node's shape and dtype, by the hints of what is dynamic."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, (int, float)) else value.node.hint
    shape = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype)
    if value.dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.8
    return torch.zeros(shape, dtype=value.dtype)


def _run(
    nodes: Sequence[fx.Node], values: dict[fx.Node, Any], outputs: Sequence[fx.Node]
) -> list[torch.Tensor]:
    with torch.no_grad():
        for node in nodes:
            if node.op == "get_attr":
                values[node] = getattr(node.graph.owning_module, str(node.target))
                continue
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return [values[node] for node in outputs]

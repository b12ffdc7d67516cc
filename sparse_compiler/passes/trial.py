"""A few nodes of a graph on their own, run on random inputs: what selection times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.verify import inputs_of, random_like

Run = Callable[[], None]


def trial(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], *, training: bool) -> Run:
    """Runs ``nodes``, operator by operator; with ``training`` their gradients as well.

    What they do is copied: the nodes may be erased afterwards.

    Args:
        nodes: operators and constants, in graph order.
        outputs: those whose values are wanted.
        training: whether gradients of the floating-point outputs by such inputs are computed.
    """
    generator = torch.Generator().manual_seed(0)
    graph, copies, values = fx.Graph(), dict[fx.Node, fx.Node](), list[Any]()
    for source in inputs_of(nodes):
        copies[source] = graph.placeholder(f"input_{len(values)}")
        values.append(random_like(source, generator))
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    module = fx.GraphModule(nodes[0].graph.owning_module or torch.nn.Module(), graph)

    def forward() -> None:
        module(*values)

    if not training:
        return forward
    leaves = []
    for place, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            values[place] = value.requires_grad_()
            leaves.append(value)

    def step() -> None:
        with torch.enable_grad():
            results = [result for result in module(*values) if result.requires_grad]
            ones = [torch.ones_like(result) for result in results]
            torch.autograd.grad(results, leaves, ones, allow_unused=True)

    return step


def largest_bytes(nodes: Sequence[fx.Node]) -> int:
    """Bytes of the largest tensor among the nodes' values."""
    found = 0
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            size = value.dtype.itemsize
            for extent in value.shape:
                size *= extent if isinstance(extent, int) else extent.node.hint
            found = max(found, size)
    return found

"""What tests of the finders of mixtures share: find, rewrite by hand, compare with the model."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from sparse_compiler.canonical import canonicalize
from sparse_compiler.ops import moe as _operators  # noqa: F401  registers the operators
from sparse_compiler.passes.moe.site import Refusal, Site
from sparse_compiler.region import Builder, Region, replace_region
from sparse_compiler.score.expr import to_text
from sparse_compiler.static import StaticValues

ops = torch.ops.sparse_compiler
Finder = Callable[[fx.GraphModule, StaticValues], Iterator[Site | Refusal]]
ROUTED = (ops.moe.default, ops.moe_training.default)


def found_in(
    find: Finder, model: nn.Module, *inputs: torch.Tensor, training: bool = False
) -> tuple[fx.GraphModule, list[Site | Refusal]]:
    gm = canonicalize(model, *inputs)
    return gm, list(find(gm, StaticValues(gm, training=training)))


def refusals(find: Finder, model: nn.Module, *inputs: torch.Tensor) -> list[str]:
    return [item.reason for item in found_in(find, model, *inputs)[1] if isinstance(item, Refusal)]


def the_site(found: list[Site | Refusal]) -> Site:
    assert len(found) == 1, found
    (site,) = found
    assert isinstance(site, Site), site
    return site


def apply(gm: fx.GraphModule, site: Site, *, training: bool = False) -> fx.GraphModule:
    """Replace a site by the operator, whose reference runs then."""

    region = Region.of(site.region)

    def build(builder: Builder, *inputs: fx.Node) -> list[fx.Node]:
        call = (
            site.x(builder), site.ids(builder), site.gates(builder),
            [make(builder) for make in site.inner], [make(builder) for make in site.inner_bias],
            [make(builder) for make in site.outer],
            None if site.outer_bias is None else site.outer_bias(builder),
            to_text(site.body), site.experts, site.passthrough, site.gates_on_input,
        )  # fmt: skip
        if training:
            both = builder.call(ops.moe_training.default, *call)
            result = builder.call(operator.getitem, both, 0)
        else:
            result = builder.call(ops.moe.default, *call)
        # An operator in place has two names for what it returns.
        return [site.restore(builder, result)] * len(region.outputs)

    replace_region(gm, region, build, rule="moe", fresh=True)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def copies_of_weights(gm: fx.GraphModule) -> list[str]:
    """Weights of the operator that are not views of the graph's own tensors."""
    calls = [node for node in gm.graph.nodes if node.target in ROUTED]
    assert calls
    found = []
    for call in calls:
        for weight in (*call.args[3], *call.args[5]):
            source = weight
            while source.op == "call_function":
                reshaped = source.target is torch.ops.aten.reshape.default
                if not reshaped and not source.target.is_view:  # type: ignore[union-attr]
                    found.append(str(source))
                source = source.args[0]
    return found


def check(find: Finder, model: nn.Module, *inputs: torch.Tensor, runs: Any = ()) -> Site:
    """Rewrite the one site of a float64 model; results and all gradients are the model's."""
    model = copy.deepcopy(model).double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    for training in (False, True):
        gm, found = found_in(find, model, *inputs, training=training)
        site = the_site(found)
        apply(gm, site, training=training)
        assert copies_of_weights(gm) == []
        for given in (inputs, *runs):
            given = tuple(x.double() if x.is_floating_point() else x for x in given)
            compare(model, gm, given)
    return site


def results_for(find: Finder, model: nn.Module, tokens: int, counts: Sequence[int]) -> list[int]:
    """Rewrite the one site of a graph for any number of tokens; tokens of each result.

    Args:
        find: the finder.
        model: takes tokens [T, features] of its router.
        tokens: of the example.
        counts: of the runs that are compared with the model, gradients included.
    """
    model = model.double()
    features = model.router.in_features
    program = torch.export.export(
        model,
        (torch.randn(tokens, features, dtype=torch.float64),),
        dynamic_shapes=({0: torch.export.Dim("T", min=2)},),
        strict=False,
    )
    gm = canonicalize(program)
    apply(gm, the_site(list(find(gm, StaticValues(gm, training=False)))))
    runs = [torch.randn(count, features, dtype=torch.float64) for count in counts]
    for x in runs:
        compare(model, gm, (x,))
    return [len(gm(x)) for x in runs]


def compare(model: nn.Module, gm: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> None:
    parameters = list(model.parameters())
    results = []
    for run in (model, gm):
        leaves = [
            x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs
        ]
        out = run(*leaves)
        out = out[0] if isinstance(out, (tuple, list)) else out
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        wanted = [*parameters, *(x for x in leaves if x.is_floating_point())]
        grads = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
        results.append((out, grads))
    (expected, expected_grads), (actual, actual_grads) = results
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for want, got in zip(expected_grads, actual_grads, strict=True):
        want = torch.zeros(()) if want is None else want
        got = torch.zeros_like(want) if got is None else got
        torch.testing.assert_close(got, want.expand_as(got), rtol=1e-8, atol=1e-9)

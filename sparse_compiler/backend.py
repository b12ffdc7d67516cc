"""``torch.compile(model, backend="sparse")``: Dynamo's graph in, a guarded callable out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from sparse_compiler.canonical import canonicalize_dynamo
from sparse_compiler.errors import CanonicalizationError, UnsupportedError
from sparse_compiler.formats.cost import AlwaysSelector, ModelSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import PASSES, PassContext, PassManager, Rewrite
from sparse_compiler.passes.base import Selector, log
from sparse_compiler.runtime import GuardedCall, watch

Compiled = Callable[..., Any]


@dataclasses.dataclass
class CompiledGraph:
    """What one compilation did, for reports.

    Attributes:
        before: the canonical graph as it came.
        after: the graph that was compiled.
        rewrites: every candidate with its verdict.
        call: the compiled callable.
        seconds: time spent in this package (analysis, packing, selection), without Inductor.
    """

    before: fx.GraphModule
    after: fx.GraphModule
    rewrites: list[Rewrite]
    call: Any = None
    seconds: float = 0.0


# Whoever wants to know about compilations (``explain``, tests) appends a function here.
listeners: list[Callable[[CompiledGraph], None]] = []


def sparse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The Dynamo backend, registered under the name ``sparse``.

    Args:
        gm: Dynamo's graph; never edited.
        example_inputs: its inputs, parameters included.
        mode: as for Inductor.
        options: see ``sparse_compiler.options.Options``.

    Returns:
        A callable with the signature of ``gm``.

    Raises:
        OptionError: an unknown option or a bad value.
        UnsupportedError: this version of torch is not supported.
    """
    parsed = Options.parse(options)
    _check_torch(torch.__version__)
    # Inductor is loaded at the first compilation, not when the backend is named.
    from sparse_compiler.codegen import cpp, inductor, lowerings

    inductor.check_settings(parsed.inductor)
    patches = {**inductor.mode_patches(mode), **parsed.inductor}
    started = time.perf_counter()
    training = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )
    context = PassContext(parsed, training, _selector(parsed))
    seen = watch(example_inputs)
    record = _rewrite(gm, example_inputs, context)
    record.seconds = time.perf_counter() - started
    after = record.after
    lowerings.register_all()
    if not after.meta.get("edits"):
        # Dynamo's own graph: a model without zeros is Inductor's to the last instruction.
        record.call = inductor.compile_graph(gm, example_inputs, patches)
    else:
        packed = _lift_constants(after, cpp.digest())
        inputs = [node.name for node in after.graph.nodes if node.op == "placeholder"]
        compiled = inductor.compile_graph(after, [*example_inputs, *packed.values()], patches)
        record.call = GuardedCall(
            compiled,
            gm,
            packed,
            after.meta.get("derived", ()),
            inputs[: len(example_inputs)],
            seen,
            lambda dense: torch.compile(
                dense, backend="sparse", mode=mode, options=dict(options or {})
            ),
        )
    for listener in listeners:
        listener(record)
    return record.call


def _check_torch(version: str) -> None:
    """Refuse versions of torch whose Inductor this package was never run with."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if not (2, 11) <= (major, minor) < (2, 14):
        raise UnsupportedError(
            f"torch {version} is not supported, its Inductor may differ: install torch>=2.11,<2.14."
        )


def _selector(options: Options) -> Selector:
    if options.selection == "always":
        return AlwaysSelector()
    if options.selection == "model":
        return ModelSelector(options.min_speedup)
    from sparse_compiler.codegen.selection import MeasuringSelector

    return MeasuringSelector(options.min_speedup, options.selection_budget)


def _rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], context: PassContext
) -> CompiledGraph:
    """Canonicalize a copy of the graph and run the passes on it."""
    try:
        canonical = canonicalize_dynamo(gm, example_inputs)
    except CanonicalizationError as error:
        context.rewrites.append(Rewrite("graph", "the whole graph", reason=str(error)))
        log.info("left a graph to Inductor: %s", error)
        return CompiledGraph(gm, gm, context.rewrites)
    except Exception as error:
        rewrite = Rewrite("graph", "the whole graph")
        context.rewrites.append(rewrite)
        context.failed(rewrite, error)
        return CompiledGraph(gm, gm, context.rewrites)
    placeholders = canonical.graph.find_nodes(op="placeholder")
    canonical.meta["example_inputs"] = {
        node.name: value
        for node, value in zip(placeholders, example_inputs, strict=True)
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
    }
    before = fx.GraphModule(canonical, _copied(canonical.graph))
    names = context.options.passes
    manager = PassManager([PASSES[name](context) for name in names])
    manager(canonical)
    # The compiled callable knows its graph, and must not keep replaced weights alive.
    for graph_module in (before, canonical):
        graph_module.meta["static_inputs"] = {}
        graph_module.meta.pop("example_inputs", None)
    for rewrite in context.rewrites:
        log.info("%s %s: %s", rewrite.kind, rewrite.target, rewrite.reason)
    return CompiledGraph(before, canonical, context.rewrites)


def _copied(graph: fx.Graph) -> fx.Graph:
    """The same nodes again: ``copy.copy`` of a graph would share them, and see every edit."""
    result = fx.Graph()
    result.output(result.graph_copy(graph, {}))
    return result


def _lift_constants(gm: fx.GraphModule, digest: str) -> dict[str, torch.Tensor]:
    """Make the packed buffers inputs of the graph, behind the original ones.

    They are never baked into the code: layers of one shape share a kernel, and a changed weight
    needs no recompilation. The kernels' digest goes into the graph, and so into cache keys.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    packed: dict[str, torch.Tensor] = {}
    last = placeholders[-1] if placeholders else None
    for name in gm.meta.get("constants", []):
        tensor = getattr(gm, name)
        uses = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]
        if not uses:
            delattr(gm, name)
            continue
        point = (
            gm.graph.inserting_after(last)
            if last
            else gm.graph.inserting_before(next(iter(gm.graph.nodes)))
        )
        with point:
            last = gm.graph.placeholder(name)
        last.meta = dict(uses[0].meta)
        last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        last._dynamo_source = None
        for use in uses:
            use.replace_all_uses_with(last)
            gm.graph.erase_node(use)
        delattr(gm, name)
        packed[name] = tensor
    for node in gm.graph.nodes:
        target = node.target
        ours = isinstance(target, torch._ops.OpOverload) and target.namespace == "sparse_compiler"
        if ours and any(argument.name == "digest" for argument in target._schema.arguments):
            node.kwargs = {**node.kwargs, "digest": digest}
    gm.graph.lint()
    gm.recompile()
    return packed

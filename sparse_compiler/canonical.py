"""One IR for every source: pre-dispatch ATen, as a GraphModule.

``aten.linear``, ``aten.conv2d``, ``aten.scaled_dot_product_attention`` stay whole; modules,
methods, operators and ``torch.nn.functional`` calls are gone. The graph stays non-functional
(``add_`` is still ``add_``): AOTAutograd functionalizes later, so regions have to look for mutation
themselves.

Static values (parameters, buffers, constants) are ``get_attr`` nodes in graphs that own them, and
placeholders in graphs that come from Dynamo; ``sparse_compiler.static`` hides the difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from sparse_compiler.autocast import CastingInterpreter, uses_autocast
from sparse_compiler.errors import CanonicalizationError

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def canonicalize(source: Any, *args: Any, **kwargs: Any) -> fx.GraphModule:
    """The canonical graph of a model.

    Args:
        source: a ``torch.nn.Module``, a ``torch.export`` program, or a ``GraphModule`` (traced,
            exported or already canonical: then the result equals it).
        *args: example inputs, as the model takes them; not needed for an exported program.
        **kwargs: example keyword inputs, for modules.

    Returns:
        A ``GraphModule`` of ATen operators that is called like ``source`` and shares its
        parameters and buffers.

    Raises:
        CanonicalizationError: the source cannot be traced; the message says why.
    """
    if isinstance(source, torch.export.ExportedProgram):
        return _from_export(source)
    if isinstance(source, fx.GraphModule):
        return source if _is_canonical(source) else _from_graph_module(source, args, kwargs)
    if isinstance(source, torch.nn.Module):
        try:
            program = torch.export.export(source, args, kwargs or None, strict=False)
        except Exception as error:
            raise CanonicalizationError(
                f"torch.export could not trace {type(source).__name__}: {error}\n"
                'Compile it with torch.compile(model, backend="sparse") instead, which allows '
                "graph breaks, or export the part of it that can be traced."
            ) from error
        return _from_export(program)
    raise CanonicalizationError(
        f"canonicalize() takes a torch.nn.Module, an ExportedProgram or a GraphModule, "
        f"not {type(source).__name__}. Wrap a function in a torch.nn.Module."
    )


def canonicalize_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The canonical graph of what Dynamo hands to a backend.

    Dynamo's graph is not touched. The result has the same placeholders in the same order, and
    ``meta["static_inputs"]`` maps the names of those that hold a parameter or a buffer to the
    real tensor; ``meta["with_gradient"]`` has the names of those that require grad.

    Raises:
        CanonicalizationError: the graph cannot be traced again; the message says why.
    """
    context = TracingContext.get()
    fake_mode = context.fake_mode
    if fake_mode is None:
        raise CanonicalizationError("Dynamo's tracing context has no fake mode.")
    if any(node.target is _CHECKPOINT for node in gm.graph.nodes):
        raise CanonicalizationError(
            "activation checkpointing cannot be traced a second time: compile the checkpointed "
            "modules themselves, checkpoint(torch.compile(block, backend='sparse'), x)."
        )
    trained = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )
    if trained and any(_is_autograd_function(node) for node in gm.graph.nodes):
        raise CanonicalizationError(
            "a torch.autograd.Function of the model's own cannot be traced a second time together "
            "with its backward: write it in differentiable operators, or compile the modules "
            "around it."
        )
    for node in gm.graph.find_nodes(op="get_attr"):
        if isinstance(fetch_attr(gm, str(node.target)), torch.Tensor):
            raise CanonicalizationError(
                f"the tensor {node.target} belongs to Dynamo's graph itself, where its changes "
                "cannot be seen: make it a parameter or a buffer of the model."
            )
    sources = [node for node in gm.graph.nodes if node.op == "placeholder"]

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        symbolic = context.tensor_to_context.get(value)
        return fake_mode.from_tensor(
            value,
            static_shapes=symbolic is None,
            symbolic_context=symbolic,
            source=symbolic.tensor_source if symbolic is not None else None,
        )

    canonical = _retrace(gm, [fake(value) for value in example_inputs], fake_mode)
    static: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    with_gradient: set[str] = set()
    for old, new, value in zip(sources, _placeholders(canonical), example_inputs, strict=True):
        for key, item in old.meta.items():
            new.meta.setdefault(key, item)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            with_gradient.add(new.name)
        dynamo_source = getattr(old, "_dynamo_source", None)
        if dynamo_source is not None:
            new._dynamo_source = dynamo_source
        marked = (old.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
        if isinstance(value, torch.Tensor) and marked and not isinstance(value, FakeTensor):
            static[new.name] = value
            name = getattr(dynamo_source, "name", None)
            names[new.name] = readable_source(name() if callable(name) else str(name or new.name))
    canonical.meta.update(gm.meta)
    canonical.meta["static_inputs"] = static
    canonical.meta["static_names"] = names
    canonical.meta["with_gradient"] = with_gradient
    canonical._param_name_to_source = dict(  # type: ignore[assignment]
        getattr(gm, "_param_name_to_source", None) or {}
    )
    return canonical


def _is_autograd_function(node: fx.Node) -> bool:
    """Whether a node applies a ``torch.autograd.Function``, whose backward tracing would lose."""
    called = node.target
    if not isinstance(called, torch._ops.HigherOrderOperator):
        return False
    return called.name() == "autograd_function_apply"


def readable_source(source: str) -> str:
    """``L['self']._modules['0']._parameters['weight']`` as ``0.weight``."""
    path = source
    for mark in ("._modules", "._parameters", "._buffers"):
        path = path.replace(mark, "")
    parts = path.replace('"', "'").replace("']['", ".").replace("['", ".").replace("']", "")
    names = [part for part in parts.split(".") if part]
    # Only in front: a module of the user's model may be called ``self``, as BERT's attention is.
    if names[:1] in (["L"], ["G"]):
        del names[0]
    if len(names) > 1 and names[0] in ("self", "fn", "args"):
        del names[0]
    return ".".join(names) or source


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _is_canonical(gm: fx.GraphModule) -> bool:
    """Only ATen (or other registered) operators, and an example value on every node."""
    import operator

    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_method"):
            return False
        if node.op == "call_function" and node.target is not operator.getitem:
            if not isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
                return False
            if "val" not in node.meta:
                return False
    return any(node.op == "call_function" for node in gm.graph.nodes)


def _from_export(program: torch.export.ExportedProgram) -> fx.GraphModule:
    accepts_flag = "check_guards" in inspect.signature(program.module).parameters
    gm = program.module(check_guards=False) if accepts_flag else program.module()
    for node in list(gm.graph.nodes):
        # Checks that only exported programs make, of what tracing has found already.
        if node.target in ("_guards_fn", torch.ops.aten._assert_tensor_metadata.default):
            gm.graph.erase_node(node)
    gm.recompile()
    if not _is_canonical(gm):
        raise CanonicalizationError(
            "The exported program is not in the pre-dispatch ATen dialect. Pass the result of "
            "torch.export.export(model, args) itself, not of run_decompositions()."
        )
    return gm


def _from_graph_module(
    gm: fx.GraphModule, args: Sequence[Any], kwargs: dict[str, Any]
) -> fx.GraphModule:
    """Trace a GraphModule that owns its parameters; their names survive as ``get_attr`` nodes."""
    if kwargs:
        raise CanonicalizationError(
            "A traced GraphModule takes positional example inputs: pass canonicalize(gm, x, ...)."
        )
    wanted = sum(node.op == "placeholder" for node in gm.graph.nodes)
    if len(args) > wanted or (not args and wanted):
        raise CanonicalizationError(
            f"The graph has {wanted} inputs and {len(args)} examples were given: "
            "call canonicalize(gm, *example_inputs)."
        )
    owned: dict[str, torch.Tensor] = dict(gm.named_parameters(remove_duplicate=False))
    owned.update(gm.named_buffers(remove_duplicate=False))
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in owned:
            value = fetch_attr(gm, str(node.target))
            if isinstance(value, torch.Tensor):
                owned[str(node.target)] = value
    names = list(owned)

    def run(*flat: torch.Tensor) -> Any:
        state = dict(zip(names, flat[: len(names)], strict=True))
        return torch.func.functional_call(gm, state, tuple(flat[len(names) :]))

    fake_mode = next(
        (value.fake_mode for value in args if isinstance(value, FakeTensor)),
        FakeTensorMode(allow_non_fake_inputs=True),
    )

    def fake(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return fake_mode.from_tensor(value, static_shapes=True)
        return value

    traced = _retrace(run, [fake(v) for v in [*owned.values(), *args]], fake_mode)
    for name, tensor in owned.items():
        assign_attr(traced, name, tensor)
    inputs = _placeholders(traced)
    for name, node in zip(names, inputs[: len(names)], strict=True):
        with traced.graph.inserting_before(node):
            attr = traced.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        attr.meta = dict(node.meta)
        node.replace_all_uses_with(attr)
        traced.graph.erase_node(node)
        if not attr.users:
            traced.graph.erase_node(attr)
    originals = _placeholders(gm)
    for old, new in zip(originals, inputs[len(names) :], strict=False):
        new.name = old.name
        new.target = old.target
    traced.graph.lint()
    traced.recompile()
    return traced


def _retrace(run: Callable[..., Any], inputs: list[Any], fake_mode: Any) -> fx.GraphModule:
    target = run
    if isinstance(run, fx.GraphModule):
        # The interpreter carries stack traces and module paths over to the new nodes.
        def target(*flat: Any) -> Any:
            return fx.Interpreter(run).run(*flat)

    def trace(function: Callable[..., Any]) -> fx.GraphModule:
        with fake_mode, enable_python_dispatcher(), preserve_node_meta():
            traced: fx.GraphModule = make_fx(
                function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True
            )(*inputs)
        _settle_literals(traced)
        return traced

    traced = trace(target)
    if uses_autocast(traced):
        implicit = traced
        traced = trace(lambda *flat: CastingInterpreter(implicit).run(*flat))
    return traced


def _settle_literals(gm: fx.GraphModule) -> None:
    """Keep literals such as ``torch.tensor(1.0)`` as attributes, and refuse what is none.

    All inputs are fake, so a real tensor is a literal. Any other one was computed where the trace
    could not see it: as a constant it would be wrong.
    """
    buffers = dict(gm.named_buffers())
    for node in gm.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = fetch_attr(gm, name)
        if not isinstance(value, torch.Tensor):
            continue
        if isinstance(value, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise CanonicalizationError(
                "torch.func transforms (vmap, grad) and tensor.data leave no trace in a graph: "
                "compile what is outside of them, and write tensor.detach()."
            )
        if buffers.pop(name, None) is not None:
            # AOTAutograd takes buffers for the model's own and asks for their source.
            delattr(gm, name)
            setattr(gm, name, value)


def fetch_attr(module: torch.nn.Module, path: str) -> Any:
    """The attribute at a dotted path, such as ``layers.0.weight``."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def assign_attr(module: torch.nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer at a dotted path, making the modules on the way."""
    *parents, last = path.split(".")
    for part in parents:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if isinstance(tensor, torch.nn.Parameter):
        module.register_parameter(last, tensor)
    else:
        module.register_buffer(last, tensor)

"""One expert's computation, recorded while it runs, and read as two linear layers and a body.

An expert runs once on real numbers, so that Python may do what it likes; every operator that sees
the token or a parameter becomes a node of a graph. Views of parameters and of results are told by
the memory they share, not by how they were made.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_compiler.experts import Piece
from sparse_compiler.passes.moe.body import part, read_body
from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.score.expr import Expr, to_text
from sparse_compiler.static import StaticValues

aten = torch.ops.aten
_PRODUCTS = (aten.mm.default, aten.addmm.default)


class Recorder(TorchDispatchMode):
    """Records the operators that depend on some tensors.

    Attributes:
        graph: what was recorded.
        random: whether an operator drew random numbers.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.random = False
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Any] = []
        for name, tensor in inputs.items():
            self._note(self.graph.placeholder("given_" + name.replace(".", "_")), tensor)

    def _note(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        self._nodes[id(value)] = node
        self._alive.append(value)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random = True
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(id(leaf) in self._nodes for leaf in leaves if isinstance(leaf, Tensor)):
            return result
        given = pytree.tree_map(self._argument, (tuple(args), dict(kwargs)))
        node = self.graph.call_function(func, given[0], given[1])
        if isinstance(result, Tensor):
            self._note(node, result)
        elif isinstance(result, (tuple, list)):
            node.meta["val"] = tuple(result)
            for place, item in enumerate(result):
                if isinstance(item, Tensor):
                    self._note(self.graph.call_function(operator.getitem, (node, place)), item)
        return result

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._nodes:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self._note(self.graph.placeholder(f"other_{len(self._alive)}"), value)
        return self._nodes[id(value)]


@dataclasses.dataclass(frozen=True)
class Linear:
    """A product with a parameter.

    Attributes:
        node: its result, bias added.
        input: the left operand.
        weight: the right operand as [out, in], a view of a parameter.
        bias: what was added, a view of a parameter.
    """

    node: fx.Node
    input: fx.Node
    weight: Tensor
    bias: Tensor | None


@dataclasses.dataclass(frozen=True)
class Reading:
    """An expert, read. Its fields are those of ``Experts``.

    Attributes:
        offsets: by parameter, where the expert's share of it begins, in elements.
    """

    inner: tuple[Piece, ...]
    inner_bias: tuple[Piece, ...]
    outer: Piece
    outer_bias: Piece | None
    body: str
    offsets: Mapping[str, int]


def read(
    run: Callable[[], Any], token: Tensor, parameters: Mapping[str, Tensor], stacked: bool
) -> Reading:
    """Reads one expert.

    Args:
        run: runs the expert, for one token, with ``parameters``.
        token: the tensor that ``run`` feeds to the expert.
        parameters: by their paths, as detached tensors.
        stacked: whether a parameter's first dimension counts experts.

    Raises:
        Refused: it is not two linear layers with a function between them; the sentence says why.
    """
    recorder = Recorder({"token": token, **parameters})
    with torch.no_grad(), recorder:
        run()
    graph = recorder.graph
    graph.output(None)
    static = StaticValues(fx.GraphModule(nn.Module(), graph), training=False)
    linears = _linears(graph, parameters)
    behind: dict[Linear, list[Linear]] = {
        linear: [other for other in linears if other is not linear and _reaches(linear, other)]
        for linear in linears
    }
    outers = [linear for linear in linears if behind[linear]]
    if len(outers) != 1:
        raise Refused(
            f"an expert has {len(linears)} linear layers, {len(outers)} of them behind another: "
            "known are one or two side by side, and one behind them"
        )
    (outer,) = outers
    found = _Parts(behind[outer])
    body, _ = read_body(outer.input, found.leaf, static)
    if len(found.parts) > 2:
        raise Refused(f"an expert's function takes {len(found.parts)} parts: known are one or two")
    places = _Places(parameters, stacked)
    inner, inner_bias = [], []
    for linear, start, step, rows in found.parts:
        weight = linear.weight[start : start + (rows - 1) * step + 1 : step]
        inner.append(places.piece(weight, True))
        if linear.bias is not None:
            bias = linear.bias[start : start + (rows - 1) * step + 1 : step]
            inner_bias.append(places.piece(bias, False))
    if len(inner_bias) not in (0, len(inner)):
        raise Refused("one of an expert's first linear layers has a bias, the other has none")
    return Reading(
        tuple(inner),
        tuple(inner_bias),
        places.piece(outer.weight, True),
        None if outer.bias is None else places.piece(outer.bias, False),
        to_text(body),
        places.offsets,
    )


def draws(run: Callable[[], Any], token: Tensor) -> bool:
    """Whether running something draws random numbers."""
    recorder = Recorder({"token": token})
    with torch.no_grad(), recorder:
        run()
    return recorder.random


def _owner(tensor: Any, parameters: Mapping[str, Tensor]) -> str | None:
    """The parameter that a tensor is a view of."""
    if not isinstance(tensor, Tensor):
        return None
    memory = tensor.untyped_storage().data_ptr()
    for name, parameter in parameters.items():
        if parameter.untyped_storage().data_ptr() == memory and memory:
            return name
    return None


def _linears(graph: fx.Graph, parameters: Mapping[str, Tensor]) -> list[Linear]:
    found: dict[fx.Node, Linear] = {}
    for node in graph.nodes:
        if node.target in _PRODUCTS:
            *bias, left, right = node.args[: 3 if node.target is aten.addmm.default else 2]
            weight = right.meta["val"]
            if _owner(weight, parameters) is None:
                raise Refused("an expert multiplies with something that is no parameter of its own")
            added = bias[0].meta["val"] if bias else None
            if added is not None and (_owner(added, parameters) is None or node.kwargs):
                raise Refused("an expert adds something that is no parameter of its own")
            found[node] = Linear(node, left, weight.t(), added)
        elif node.target in (aten.bmm.default, aten.baddbmm.default, aten.convolution.default):
            raise Refused(f"an expert computes {node.target}, which is no linear layer")
        elif node.target in (aten.add.Tensor, aten.add_.Tensor) and not node.kwargs:
            left, right = node.args[:2]
            for one, other in ((left, right), (right, left)):
                linear = found.get(_base(one)) if isinstance(one, fx.Node) else None
                if linear is None or linear.bias is not None or not isinstance(other, fx.Node):
                    continue
                value = other.meta["val"]
                if _owner(value, parameters) is None or value.numel() != len(linear.weight):
                    continue
                found.pop(linear.node)
                found[node] = dataclasses.replace(linear, node=node, bias=value.reshape(-1))
                break
    return list(found.values())


def _base(node: fx.Node) -> fx.Node:
    """The node whose whole result a chain of reshapes shows."""
    while (
        node.op == "call_function"
        and node.target is not operator.getitem
        and node.all_input_nodes
        and _is_view(node)
        and node.meta["val"].numel() == node.all_input_nodes[0].meta["val"].numel()
    ):
        node = node.all_input_nodes[0]
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether a node only shows what its operand holds."""
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0]) and isinstance(node.meta["val"], Tensor)
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    operand = node.all_input_nodes[0].meta["val"] if len(node.all_input_nodes) == 1 else None
    if not isinstance(operand, Tensor):
        return False
    values = node.meta["val"] if isinstance(node.meta["val"], tuple) else (node.meta["val"],)
    memory = operand.untyped_storage().data_ptr()
    return all(
        isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory
        for value in values
    )


def _reaches(target: Linear, source: Linear) -> bool:
    """Whether ``target``'s input is computed from ``source``'s result."""
    seen: set[fx.Node] = set()
    stack = [target.input]
    while stack:
        node = stack.pop()
        if node is source.node:
            return True
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return False


class _Parts:
    """What of the first linear layers' results the body reads."""

    def __init__(self, linears: list[Linear]) -> None:
        self._linears = {linear.node: linear for linear in linears}
        self.parts: list[tuple[Linear, int, int, int]] = []

    def leaf(self, node: fx.Node) -> Expr | None:
        source = node
        while source not in self._linears:
            if not _is_view(source) or not source.all_input_nodes:
                return None
            source = source.all_input_nodes[0]
        linear = self._linears[source]
        whole, shown = source.meta["val"], node.meta["val"]
        if not isinstance(shown, Tensor) or shown.numel() == 0:
            return None
        start = shown.storage_offset() - whole.storage_offset()
        rows = shown.shape[-1]
        found = (linear, start, shown.stride(-1) if rows > 1 else 1, rows)
        if found not in self.parts:
            self.parts.append(found)
        return part(self.parts.index(found))


class _Places:
    """Where in the parameters a weight is, by its memory."""

    def __init__(self, parameters: Mapping[str, Tensor], stacked: bool) -> None:
        self._parameters = parameters
        self._stacked = stacked
        self.offsets: dict[str, int] = {}

    def piece(self, view: Tensor, matrix: bool) -> Piece:
        name = _owner(view, self._parameters)
        if name is None:
            raise Refused("a weight of an expert is computed, not a parameter")
        parameter = self._parameters[name]
        if not parameter.is_contiguous():
            raise Refused(f"the parameter {name} is not contiguous")
        shape = parameter.shape[1:] if self._stacked else parameter.shape
        if matrix and len(shape) == 1:  # experts below each other, each of them whole
            shape = torch.Size((view.numel() // shape[0], shape[0]))
        size = shape.numel()
        offset = view.storage_offset() - parameter.storage_offset()
        self.offsets[name] = offset // size * size
        inside = offset % size
        if not matrix:
            return Piece(name, int(inside), _stride(view, 0), len(view), matrix=False)
        rows, columns = shape[-2:]
        along, across = _stride(view, 0), _stride(view, 1)
        if across == 1 and view.shape[1] == columns and along % columns == 0:
            return Piece(name, inside // columns, along // columns, len(view))
        if across == columns and view.shape[1] == rows:
            return Piece(name, int(inside), along, len(view), transposed=True)
        raise Refused(f"a weight of an expert is an unknown part of the parameter {name}")


def _stride(view: Tensor, dim: int) -> int:
    return view.stride(dim) if view.shape[dim] > 1 else 1

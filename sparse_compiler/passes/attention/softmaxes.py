"""Softmaxes, however they are written, and what stands directly in front of them.

``softmax(x)`` is one operator, or ``exp(x - max) / sum``, or ``exp(x - logsumexp(x))``. Subtracting
the row's maximum first changes nothing. A row may have one more column than there are keys: a sink,
whose weight is sliced off again.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.static import arguments

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Softmax:
    """One softmax of the graph.

    Attributes:
        node: its result.
        scores: what it is taken of.
        dim: over which dimension, counted from the front.
        empty_row: what a row of minus infinities gives.
    """

    node: fx.Node
    scores: fx.Node
    dim: int
    empty_row: str = "nan"


def read_softmax(node: fx.Node) -> Softmax | None:
    """The softmax that a node is the result of, or None."""
    name = schema_name(node)
    if name in ("softmax", "_softmax", "_safe_softmax", "special_softmax"):
        given = arguments(node)
        scores = given["self"]
        rank = scores.meta["val"].dim()
        if rank == 0:
            return None
        empty = "zero" if name == "_safe_softmax" else "nan"
        return _peeled(Softmax(node, scores, given["dim"] % rank, empty))
    if name == "div":
        return _quotient(node)
    if name == "exp":
        return _of_logarithms(node)
    return None


def _peeled(softmax: Softmax) -> Softmax:
    """The same softmax without the maximum that is subtracted from the scores."""
    node = softmax.scores
    for inner in _through_casts(node):
        if schema_name(inner) != "sub" or len(inner.all_input_nodes) != 2:
            continue
        left, right = inner.all_input_nodes
        if _is_extreme(right, left, softmax.dim) and not inner.kwargs:
            return dataclasses.replace(softmax, scores=left)
    return softmax


def _through_casts(node: fx.Node) -> Iterator[fx.Node]:
    """A node, and what it is a conversion of."""
    while True:
        yield node
        source = node.args[0] if node.args else None
        if schema_name(node) not in ("to", "_to_copy", "type_as", "detach", "clone", "contiguous"):
            return
        if not isinstance(source, fx.Node):
            return
        node = source


def _is_extreme(node: fx.Node, of: fx.Node, dim: int) -> bool:
    """Whether a node is the maximum of ``of`` along a dimension, which it keeps."""
    wanted = set(_through_casts(of))
    for inner in _through_casts(node):
        if inner.target is operator.getitem and inner.args[1] == 0:
            (inner,) = inner.all_input_nodes
        name = schema_name(inner)
        if name in ("unsqueeze", "amax", "max"):
            given = arguments(inner)
            if name == "unsqueeze":
                rank = inner.meta["val"].dim()
                return given["dim"] % rank == dim and _takes_extreme(given["self"], wanted, dim)
            return bool(given.get("keepdim")) and _takes_extreme(inner, wanted, dim)
    return False


def _takes_extreme(node: fx.Node, of: set[fx.Node], dim: int) -> bool:
    if node.target is operator.getitem and node.args[1] == 0:
        (node,) = node.all_input_nodes
    if schema_name(node) not in ("amax", "max"):
        return False
    given = arguments(node)
    source, dims = given["self"], given.get("dim")
    if dims is None or source not in of:
        return False
    rank = source.meta["val"].dim()
    return [d % rank for d in ([dims] if isinstance(dims, int) else dims)] == [dim]


def _quotient(node: fx.Node) -> Softmax | None:
    """``e / e.sum(dim, keepdim=True)`` with ``e = exp(x - max)``."""
    top, below = node.args[:2]
    if not isinstance(top, fx.Node) or not isinstance(below, fx.Node):
        return None
    if schema_name(top) != "exp":
        return None
    dim = _summed(below, top)
    if dim is None:
        return None
    scores = top.args[0]
    assert isinstance(scores, fx.Node)
    found = _peeled(Softmax(node, scores, dim))
    # Without the maximum it overflows where a softmax does not.
    return found if found.scores is not scores else None


def _summed(node: fx.Node, of: fx.Node) -> int | None:
    """The one dimension over which ``node`` sums ``of``, keeping it; else None."""
    restored = None
    if schema_name(node) == "unsqueeze":
        given = arguments(node)
        restored = given["dim"] % node.meta["val"].dim()
        node = given["self"]
    if schema_name(node) != "sum" or node.args[0] is not of:
        return None
    given = arguments(node)
    dims = given.get("dim")
    if not dims or len(dims) != 1:
        return None
    dim: int = dims[0] % of.meta["val"].dim()
    kept = given["keepdim"] if restored is None else restored == dim and not given["keepdim"]
    return dim if kept else None


def _of_logarithms(node: fx.Node) -> Softmax | None:
    """``exp(log_softmax(x))`` or ``exp(x - logsumexp(x))``."""
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    if schema_name(inner) in ("log_softmax", "_log_softmax"):
        given = arguments(inner)
        rank = given["self"].meta["val"].dim()
        return _peeled(Softmax(node, given["self"], given["dim"] % rank)) if rank else None
    if schema_name(inner) != "sub" or len(inner.args) != 2:
        return None
    scores, total = inner.args
    if not isinstance(scores, fx.Node) or not isinstance(total, fx.Node):
        return None
    if schema_name(total) != "logsumexp" or total.args[0] is not scores:
        return None
    given = arguments(total)
    rank = scores.meta["val"].dim()
    if not given["keepdim"] or len(given["dim"]) != 1:
        return None
    return Softmax(node, scores, given["dim"][0] % rank)


@dataclasses.dataclass(frozen=True)
class Sink:
    """One more column of the scores.

    Attributes:
        node: the column, with a size of 1 over ``dim``.
        cat: where it joins the scores.
        first: whether it comes before the keys, not behind them.
    """

    node: fx.Node
    cat: fx.Node
    first: bool


def read_sink(softmax: Softmax) -> Sink | None:
    """The column that is concatenated to the scores directly in front of the softmax, or None."""
    for node in _through_casts(softmax.scores):
        if schema_name(node) not in ("cat", "concat", "concatenate"):
            continue
        given = arguments(node)
        pieces, rank = given["tensors"], node.meta["val"].dim()
        if given["dim"] % rank != softmax.dim or len(pieces) != 2:
            return None
        for place in (1, 0):
            if pieces[place].meta["val"].shape[softmax.dim] == 1:
                return Sink(pieces[place], node, place == 0)
    return None

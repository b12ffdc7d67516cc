"""Proofs about the integers of a dispatch: which row is which pair of a token and an expert.

*Pairs* are counted token by token, pair = token * K + choice, or choice by choice. A model that
groups them sorts their expert ids; the sort's permutation says which pair each row is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.attention.symbols import symbolic
from sparse_compiler.passes.moe.layout import REGROUPED, SAME
from sparse_compiler.passes.moe.writes import Writes
from sparse_compiler.static import arguments

aten = torch.ops.aten

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_WIDE = (torch.int64, torch.int32, torch.int16, torch.float32, torch.float64)
# Up to here ids keep their value in each of the types that counting casts them to.
_MOST_EXPERTS = 2048


@dataclasses.dataclass(frozen=True)
class TokenIndex:
    """Row r is of token ``pair // choices`` (or ``pair % tokens``, counted by choices).

    Attributes:
        perm: pair = perm[r]; None where row and pair are the same.
        divisor: K, or for pairs counted choice by choice T.
        by_choice: whether pairs are counted choice by choice.
    """

    perm: fx.Node | None
    divisor: sympy.Expr
    by_choice: bool = False


class Routing:
    """Answers about the nodes of one graph.

    Args:
        writes: of the graph.
    """

    def __init__(self, writes: Writes) -> None:
        self.writes = writes

    def operand(self, node: fx.Node, name: str) -> Any:
        """An operand as the operator reads it: behind what was written to it in place."""
        value = arguments(node).get(name)
        return self.writes.now(value, node) if isinstance(value, fx.Node) else value

    def flat(self, node: fx.Node) -> fx.Node:
        """The first tensor with the same elements in the same order; casts stay."""
        while schema_name(node) in (*REGROUPED, "contiguous", "clone", "alias"):
            source = self.operand(node, "self")
            if not isinstance(source, fx.Node):
                break
            node = source
        return node

    def uncast(self, node: fx.Node) -> fx.Node:
        """``flat`` of integers, through casts to types that hold them as well."""
        while True:
            node = self.flat(node)
            source = self.operand(node, "self") if schema_name(node) in SAME else None
            if not isinstance(source, fx.Node) or source.meta["val"].dtype not in _INTEGERS:
                return node
            if node.meta["val"].dtype not in _WIDE:
                return node
            node = source

    def whole(self, node: fx.Node) -> fx.Node:
        """``flat`` of whole numbers, through casts to and from floats as well."""
        while True:
            node = self.flat(node)
            source = self.operand(node, "self") if schema_name(node) in SAME else None
            if not isinstance(source, fx.Node) or node.meta["val"].dtype not in _WIDE:
                return node
            node = source

    def sorts(self, perm: fx.Node) -> fx.Node | None:
        """The vector of integers that ``perm`` sorts, smallest first; or None."""
        perm = self.flat(perm)
        name = schema_name(perm)
        if name == "argsort":
            return self._sorted_input(perm)
        if name == "getitem" and perm.args[1] == 1:
            parent = perm.args[0]
            if isinstance(parent, fx.Node) and schema_name(parent) == "sort":
                return self._sorted_input(parent)
        return None

    def _sorted_input(self, node: fx.Node) -> fx.Node | None:
        source = self.operand(node, "self")
        if not isinstance(source, fx.Node) or arguments(node).get("descending"):
            return None
        value = source.meta["val"]
        return source if value.dim() == 1 and value.dtype in _INTEGERS else None

    def are_sorted_ids(self, node: fx.Node, perm: fx.Node, experts: int) -> bool:
        """Whether ``node`` has the id of each row; those of no expert may have any."""
        node = self.uncast(node)
        if schema_name(node) in ("clamp", "clamp_max", "clip"):
            given = arguments(node)
            high, low = given.get("max"), given.get("min")
            if high is not None and not (isinstance(high, int) and high >= experts - 1):
                return False
            if low is not None and low != 0:
                return False
            source = self.operand(node, "self")
            return isinstance(source, fx.Node) and self.are_sorted_ids(source, perm, experts)
        if schema_name(node) == "getitem" and node.args[1] == 0:
            parent, indices = node.args[0], self.flat(perm)
            return schema_name(indices) == "getitem" and indices.args[0] is parent
        picked = self.picked(node)
        flat = self.sorts(perm)
        if picked is None or flat is None:
            return False
        source, index = picked
        return self.same(index, perm) and self.uncast(source) is self.uncast(flat)

    def picked(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """(source, index) of ``source[index]`` along the first dimension."""
        name = schema_name(node)
        if name == "index":
            indices = self.operand(node, "indices")
            if not isinstance(indices, (list, tuple)) or len(indices) != 1:
                return None
            source, index = self.operand(node, "self"), indices[0]
        elif name == "index_select" and arguments(node)["dim"] == 0:
            source, index = self.operand(node, "self"), self.operand(node, "index")
        elif name == "embedding":
            given = arguments(node)
            if given["scale_grad_by_freq"] or given["sparse"] or given["padding_idx"] != -1:
                return None
            source, index = self.operand(node, "weight"), self.operand(node, "indices")
        else:
            return self._gathered(node)
        if not isinstance(source, fx.Node) or not isinstance(index, fx.Node):
            return None
        index = self.writes.now(index, node)
        return (source, index) if index.meta["val"].dtype in _INTEGERS else None

    def _gathered(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """``gather(source, 0, index)`` with the same index for all features."""
        if schema_name(node) != "gather" or arguments(node)["dim"] != 0:
            return None
        source, index = self.operand(node, "self"), self.operand(node, "index")
        if not isinstance(source, fx.Node) or not isinstance(index, fx.Node):
            return None
        rows = self.repeated_rows(index)
        width = source.meta["val"].shape[1:]
        whole = rows is not None and index.meta["val"].shape[1:] == width
        return (source, rows) if rows is not None and whole else None

    def repeated_rows(self, index: fx.Node) -> fx.Node | None:
        """The vector that is repeated along the second of two dimensions, or None."""
        shape = index.meta["val"].shape
        if len(shape) == 1:
            return index
        if len(shape) != 2 or schema_name(index) not in ("expand", "repeat"):
            return None
        source = self.operand(index, "self")
        if not isinstance(source, fx.Node):
            return None
        have = source.meta["val"].shape
        column = len(have) == 2 and have[1] == 1
        alike = column and symbolic(have[0]) == symbolic(shape[0])
        return self.flat(source) if alike else None

    def same(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two vectors are the same nodes, but for views."""
        return self.flat(one) is self.flat(other)

    def counts(self, node: fx.Node, perm: fx.Node, experts: int) -> str | None:
        """Why ``node`` may not be the end of each expert's rows, or None if it is.

        It is if it adds up how many of the ids that ``perm`` sorts are 0, 1, ... E - 1.
        """
        node = self.whole(node)
        if schema_name(node) != "cumsum":
            return "its offsets are no running sum of counts"
        counts = self.operand(node, "self")
        if not isinstance(counts, fx.Node) or counts.meta["val"].dim() != 1:
            return "its offsets are no running sum of counts"
        counts = self.whole(counts)
        counted = self._counted(counts, experts)
        if counted is None:
            return "its offsets are not counts of the experts' ids"
        flat = self.sorts(perm)
        base = self.uncast(counted)
        same = flat is not None and self._unturned(base) is self._unturned(self.uncast(flat))
        if not same and not self.are_sorted_ids(base, perm, experts):
            return "its offsets count other ids than those that are sorted"
        if schema_name(counts) == "histc" and not _bins_are_experts(self, counts, experts):
            return f"the bins of its histogram are not the {experts} experts"
        more = schema_name(counts) == "histc" and self._last_bin_takes_more(counts, experts)
        if more and (flat is None or not self.below(flat, experts)):
            return f"an id of {experts} would be counted for the last expert"
        return None

    def _counted(self, node: fx.Node, experts: int) -> fx.Node | None:
        """What a vector [E] counts: ids as integers, or cast."""
        name = schema_name(node)
        source: Any = None
        if name == "histc" and experts <= _MOST_EXPERTS:
            source = self.operand(node, "self")
        elif name == "bincount" and arguments(node).get("weights") is None:
            enough = arguments(node).get("minlength") == experts
            source = self.operand(node, "self") if enough else None
        elif name == "sum":
            source = self._one_hot_summed(node, experts)
        return source if isinstance(source, fx.Node) else None

    def _one_hot_summed(self, node: fx.Node, experts: int) -> fx.Node | None:
        """The ids of ``one_hot(ids, E).sum(all but the last dimension)``."""
        source = self.operand(node, "self")
        if not isinstance(source, fx.Node):
            return None
        hot = self.uncast(source)
        if schema_name(hot) != "one_hot" or arguments(hot)["num_classes"] != experts:
            return None
        rank = source.meta["val"].dim()
        dims = arguments(node).get("dim") or []
        if sorted(dim % rank for dim in dims) != list(range(rank - 1)):
            return None
        if symbolic(source.meta["val"].shape[-1]) != experts:
            return None
        ids = self.operand(hot, "self")
        return ids if isinstance(ids, fx.Node) else None

    def _unturned(self, node: fx.Node) -> fx.Node:
        """Through transposes, too: counting does not care for the order."""
        while schema_name(node) in ("t", "transpose", "permute"):
            source = self.operand(node, "self")
            if not isinstance(source, fx.Node):
                break
            node = self.uncast(source)
        return node

    def _last_bin_takes_more(self, histc: fx.Node, experts: int) -> bool:
        return _histogram(self, histc, experts + 1)[-1] > 1

    def below(self, ids: fx.Node, experts: int) -> bool:
        """Whether ids are provably in [0, E): the places of the largest of E, or clamped."""
        node = self._unturned(self.uncast(ids))
        name = schema_name(node)
        if name == "getitem" and node.args[1] == 1 and isinstance(node.args[0], fx.Node):
            parent = node.args[0]
            if schema_name(parent) not in ("topk", "max", "sort"):
                return False
            return self._places_of(parent, experts)
        if name == "argmax" and arguments(node).get("dim") is not None:
            return self._places_of(node, experts)
        if name in ("clamp", "clip"):
            given = arguments(node)
            return given.get("min") == 0 and given.get("max") == experts - 1
        return name == "remainder" and arguments(node).get("other") == experts

    def _places_of(self, node: fx.Node, experts: int) -> bool:
        source = self.operand(node, "self")
        if not isinstance(source, fx.Node):
            return False
        dim = arguments(node).get("dim", -1)
        size = symbolic(source.meta["val"].shape[-1 if dim is None else dim])
        return bool(size.is_Integer) and int(size) <= experts

    def inverse(self, node: fx.Node, perm: fx.Node) -> bool:
        """Whether ``node`` undoes ``perm``."""
        node = self.flat(node)
        source = self.sorts(node)
        if source is not None:
            return self.same(source, perm)
        name = schema_name(node)
        if name == "index_put" and not arguments(node)["accumulate"]:
            indices = self.operand(node, "indices")
            alone = isinstance(indices, (list, tuple)) and len(indices) == 1
            index, values = indices[0] if alone else None, self.operand(node, "values")
        elif name == "scatter" and arguments(node)["dim"] == 0:
            index, values = self.operand(node, "index"), self.operand(node, "src")
        else:
            return False
        if not isinstance(index, fx.Node) or not isinstance(values, fx.Node):
            return False
        into = self.operand(node, "self")
        length = _length(perm)
        whole = isinstance(into, fx.Node) and _length(into) == length
        return whole and self.same(index, perm) and self.counts_up(values, length)

    def counts_up(self, node: fx.Node, length: sympy.Expr | None) -> bool:
        """Whether ``node`` is 0, 1, 2, ... of this length."""
        node = self.uncast(node)
        if schema_name(node) != "arange" or _length(node) != length:
            return False
        given = arguments(node)
        return given.get("start", 0) == 0 and given.get("step", 1) == 1

    def token_index(self, node: fx.Node) -> TokenIndex | None:
        """Of which token each row is, or None."""
        node = self.uncast(node)
        picked = self.picked(node)
        if picked is not None:
            inner = self.token_index(picked[0])
            if inner is None or inner.perm is not None or self.sorts(picked[1]) is None:
                return None
            return dataclasses.replace(inner, perm=self.flat(picked[1]))
        if schema_name(node) in ("repeat_interleave", "expand", "repeat"):
            return self._counted_tokens(node)
        return self._divided(node)

    def _divided(self, node: fx.Node) -> TokenIndex | None:
        """``pair // K`` or ``pair % T``, of a permutation of the pairs or of all in order."""
        name = schema_name(node)
        given = arguments(node)
        if name == "div" and given.get("rounding_mode") not in ("floor", "trunc"):
            return None
        if name not in ("floor_divide", "div", "remainder", "fmod"):
            return None
        pair, divisor = self.operand(node, "self"), number(given["other"])
        if not isinstance(pair, fx.Node) or divisor is None:
            return None
        by_choice = name in ("remainder", "fmod")
        if self.sorts(pair) is not None:
            return TokenIndex(self.flat(pair), divisor, by_choice)
        if self.counts_up(pair, _length(pair)):
            return TokenIndex(None, divisor, by_choice)
        return None

    def _counted_tokens(self, node: fx.Node) -> TokenIndex | None:
        """``arange(T)``, each K times in a row; or all of it, K times."""
        name = schema_name(node)
        source = self.operand(node, "self")
        if not isinstance(source, fx.Node):
            return None
        tokens = _length(self.uncast(source))
        if tokens is None or not self.counts_up(source, tokens):
            return None
        shape = [symbolic(size) for size in node.meta["val"].shape]
        have = source.meta["val"].shape
        if name == "repeat_interleave" and len(shape) == 1:
            times = number(arguments(node).get("repeats"))
            return None if times is None else TokenIndex(None, times)
        if name == "repeat" and len(shape) == 1:
            return TokenIndex(None, tokens, by_choice=True)
        if len(shape) != 2:
            return None
        if len(have) == 2 and have[1] == 1 and shape[0] == tokens:
            return TokenIndex(None, shape[1])
        last = shape[1] == tokens and (len(have) == 1 or have[0] == 1)
        return TokenIndex(None, tokens, by_choice=True) if last else None


def number(value: Any) -> sympy.Expr | None:
    """A literal or a size in the graph, as an expression; None for what is neither."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        return None
    return symbolic(value)


def _length(node: fx.Node) -> sympy.Expr | None:
    """Number of elements of a vector, or of a column or row of one."""
    sizes = [symbolic(size) for size in node.meta["val"].shape if not _is_one(size)]
    if len(sizes) > 1:
        return None
    return sizes[0] if sizes else sympy.Integer(1)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _histogram(routing: Routing, node: fx.Node, ids: int) -> list[float]:
    """What a ``histc`` counts if each of the first ids occurs once: run, not derived."""
    casts: list[torch.dtype] = []
    source = routing.operand(node, "self")
    while isinstance(source, fx.Node):
        casts.append(source.meta["val"].dtype)
        before = routing.operand(source, "self") if schema_name(source) in SAME else None
        source = before if isinstance(before, fx.Node) else None
    values = torch.arange(ids)
    for dtype in reversed(casts):
        values = values.to(dtype)
    given = arguments(node)
    if not values.dtype.is_floating_point:
        values = values.to(torch.float32)  # integers are counted on GPUs only
    low, high = given.get("min", 0), given.get("max", 0)
    return [float(x) for x in torch.histc(values, int(given["bins"]), low, high)]


def _bins_are_experts(routing: Routing, node: fx.Node, experts: int) -> bool:
    """Whether each expert has a bin of its own. Bins are in the order of what they count."""
    given = arguments(node)
    if given["bins"] != experts or given.get("min", 0) != 0:
        return False
    if experts == 1 or given.get("min", 0) == given.get("max", 0):
        return False  # then the bins depend on the values
    return _histogram(routing, node, experts) == [1.0] * experts

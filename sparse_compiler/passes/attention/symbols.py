"""Symbolic sizes of a graph: what they are, and which of its nodes hold them at run time."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.pointwise import NotLiftable
from sparse_compiler.region import Builder

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Integer:
    """Where a runtime integer comes from: a SymInt node, or one size of a tensor node."""

    node: fx.Node
    dim: int | None = None

    @property
    def size(self) -> Any:
        """The SymInt itself."""
        value = self.node.meta["val"]
        return value if self.dim is None else value.shape[self.dim]

    def build(self, builder: Builder) -> fx.Node:
        """The integer as a node."""
        if self.dim is None:
            return self.node
        return builder.call(aten.sym_size.int, self.node, self.dim)


class Symbols:
    """Where a graph's symbolic sizes come from: the first node that has each."""

    def __init__(self, graph: fx.Graph) -> None:
        self._sources: dict[sympy.Symbol, Integer] = {}
        self._environment: Any = None
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._note(value, Integer(node))
            elif isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    self._note(size, Integer(node, dim))

    def _note(self, value: Any, source: Integer) -> None:
        if isinstance(value, torch.SymInt):
            self._environment = value.node.shape_env
            if value.node.expr.is_Symbol:
                self._sources.setdefault(value.node.expr, source)

    def not_negative(self, value: sympy.Expr) -> bool:
        """Whether a polynomial in sizes is at least 0, by what is known of the sizes."""
        value = sympy.expand(value)
        if value.is_nonnegative is not None or self._environment is None:
            return value.is_nonnegative is True
        return bool(self._environment.bound_sympy(value).lower >= 0)

    def source(self, symbol: sympy.Symbol) -> Integer:
        """The integer that a symbol stands for.

        Raises:
            NotLiftable: no node of the graph has it.
        """
        if symbol not in self._sources:
            raise NotLiftable(f"no value of the graph holds the size {symbol}")
        return self._sources[symbol]


def symbolic(size: int | torch.SymInt | sympy.Expr) -> sympy.Expr:
    """A size as a sympy expression; reading it guards on nothing."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


def sizes_of(node: fx.Node) -> list[sympy.Expr]:
    """The shape of a tensor node."""
    return [symbolic(size) for size in node.meta["val"].shape]

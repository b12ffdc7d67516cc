"""Where a tensor is not what it is everywhere else: the indices that were written to it.

``Spots`` are these indices along one dimension, as operators on the tensor that holds them, so
that two tensors that differ at the same places are seen to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.moe.axes import same_size
from sparse_compiler.region import Builder

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of a node that has no number before the graph runs."""

    node: fx.Node
    dim: int


@dataclasses.dataclass(frozen=True)
class Spots:
    """Indices along one dimension of a tensor.

    Attributes:
        source: the integer tensor that holds them.
        steps: operators and their arguments behind the first, which make of it a tensor like the
            one described: of size ``count`` in the dimension, and elsewhere of its sizes, or of 1
            where they are the same for all.
        shape: of that tensor.
        count: how many there are in each row.
        inside: whether an operator has checked that they are indices of the dimension.
    """

    source: fx.Node
    steps: tuple[tuple[Any, tuple[Any, ...]], ...]
    shape: tuple[int | Size, ...]
    count: int
    inside: bool

    @classmethod
    def of(cls, source: fx.Node, count: int, *, inside: bool) -> Spots:
        """The indices that a tensor holds, as they are."""
        shape = tuple(size_at(source, dim) for dim in range(source.meta["val"].dim()))
        return cls(source, (), shape, count, inside)

    def unsqueeze(self, dim: int) -> Spots:
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        return self._then(aten.unsqueeze.default, dim, shape=shape)

    def permute(self, dims: Sequence[int]) -> Spots:
        if list(dims) == list(range(len(dims))):
            return self
        shape = tuple(self.shape[dim] for dim in dims)
        return self._then(aten.permute.default, tuple(dims), shape=shape)

    def expand(self, shape: Sequence[int | Size]) -> Spots:
        if tuple(shape) == self.shape:
            return self
        return self._then(aten.expand.default, tuple(shape), shape=tuple(shape))

    def reshape(self, shape: Sequence[int | Size]) -> Spots:
        if tuple(shape) == self.shape:
            return self
        return self._then(aten.reshape.default, tuple(shape), shape=tuple(shape))

    def select(self, dim: int, index: Any) -> Spots:
        """Without a dimension; where all of its indices are the same, the first is any."""
        index = 0 if self.shape[dim] == 1 else index
        shape = (*self.shape[:dim], *self.shape[dim + 1 :])
        return self._then(aten.select.int, dim, index, shape=shape)

    def beside(self, gone: int, dim: int) -> Spots | None:
        """One row of all indices along ``gone``, in ``dim``; ``gone`` stays, of size 1."""
        times = self.shape[gone]
        if times == 1:
            return self
        if not isinstance(times, int):
            return None
        rest = [place for place in range(len(self.shape)) if place != gone]
        rest.insert(rest.index(dim) + 1, gone)
        shape = list(self.shape)
        shape[gone], shape[dim] = 1, self.count * times
        flat = [size for place, size in enumerate(shape) if place != gone]
        moved = self.permute(rest).reshape(flat).unsqueeze(gone)
        return dataclasses.replace(moved, count=self.count * times)

    def _then(self, target: Any, *args: Any, shape: tuple[int | Size, ...]) -> Spots:
        return dataclasses.replace(self, steps=(*self.steps, (target, args)), shape=shape)

    def build(self, builder: Builder) -> fx.Node:
        """The indices as a node."""
        node = self.source
        for target, args in self.steps:
            node = builder.call(target, node, *(_with_sizes(builder, arg) for arg in args))
        return node

    def nodes(self) -> set[fx.Node]:
        """The nodes of the graph whose values they are made from."""
        found: set[fx.Node] = {self.source}
        fx.node.map_arg([list(args) for _, args in self.steps], found.add)
        return found

    def sized(self) -> set[fx.Node]:
        """The nodes of the graph whose sizes they are made with."""
        sizes = [size for _, args in self.steps for arg in args for size in _listed(arg)]
        return {size.node for size in sizes if isinstance(size, Size)}


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _with_sizes(builder: Builder, value: Any) -> Any:
    if isinstance(value, Size):
        return builder.call(aten.sym_size.int, value.node, value.dim)
    return [_with_sizes(builder, item) for item in value] if isinstance(value, tuple) else value


def size_at(node: fx.Node, dim: int) -> int | Size:
    """A node's size: a number, or the first node of the graph that is seen to have it."""
    size = node.meta["val"].shape[dim]
    if isinstance(size, int):
        return size
    found = Size(node, dim)
    while True:
        for source in found.node.all_input_nodes:
            value = source.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            same = [j for j, have in enumerate(value.shape) if same_size(have, size)]
            if same:
                found = Size(source, same[0])
                break
        else:
            return found

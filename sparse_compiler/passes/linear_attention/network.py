"""Sums of products, in index notation: what a chain of multilinear operators computes.

``((q @ k.mT) * scale).masked_fill(later, 0) @ v`` is one sum over k and d of

    scale * q[b, h, i, d] * k[b, h, j, d] * v[b, h, j, e] * (j <= i)

whatever operators spell it, and so is ``einsum(q, einsum(k, v).cumsum(2))``. In this form nothing
is left of the order in which the model multiplies, and a better one can be looked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.linear_attention.indices import (
    Dims,
    Index,
    NotMultilinear,
    Renaming,
    renamed,
    same,
    unified,
)

# Sums of more products than this are left to the model.
_MOST_TERMS = 6


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """A tensor (or number) of the graph as one factor of a product.

    Attributes:
        node: the tensor.
        dims: its dimensions.
        use: ``"times"``; ``"over"``, the product is divided by it; ``"keep"`` and ``"drop"``, a
            bool tensor where the product is kept, or where it is zero.
    """

    node: fx.Node
    dims: Dims
    use: str = "times"

    @property
    def indices(self) -> tuple[Index, ...]:
        return tuple(index for dim in self.dims for index in dim)


@dataclasses.dataclass(frozen=True)
class Causal:
    """The factor that is 1 where ``column <= row`` (``<`` if strict), and 0 elsewhere."""

    row: Index
    column: Index
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class Term:
    """A product, summed over the bound indices."""

    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    causal: tuple[Causal, ...] = ()
    bound: tuple[Index, ...] = ()

    @property
    def indices(self) -> set[Index]:
        """All that it depends on or sums over."""
        found = {index for factor in self.factors for index in factor.indices}
        found.update(*((c.row, c.column) for c in self.causal))
        return found

    def renamed(self, names: Renaming) -> Term:
        def one(index: Index) -> Index:
            to = names.get(index, (index,))
            if len(to) != 1:
                raise NotMultilinear("a view splits the positions that a causal mask compares")
            return to[0]

        return Term(
            self.scale,
            tuple(dataclasses.replace(f, dims=renamed(f.dims, names)) for f in self.factors),
            tuple(Causal(one(c.row), one(c.column), c.strict) for c in self.causal),
            tuple(new for index in self.bound for new in names.get(index, (index,))),
        )

    def times(self, other: Term) -> Term:
        return Term(
            self.scale * other.scale,
            (*self.factors, *other.factors),
            (*self.causal, *other.causal),
            (*self.bound, *other.bound),
        )

    def summed(self, indices: Iterable[Index]) -> Term:
        """The sum over some more indices."""
        inside = {index for factor in self.factors for index in factor.indices}
        scale, bound = self.scale, list(self.bound)
        for index in indices:
            if index in inside:
                bound.append(index)
            elif any(index in (c.row, c.column) for c in self.causal):
                raise NotMultilinear("a causal mask is summed on its own")
            elif isinstance(index.size, int):
                scale *= index.size
            else:
                raise NotMultilinear("a number is summed over a dynamic dimension")
        return dataclasses.replace(self, scale=scale, bound=tuple(bound))


@dataclasses.dataclass(frozen=True)
class Network:
    """A value as a sum of terms.

    Attributes:
        dims: the dimensions of the value.
        terms: what is added up; each broadcasts along indices that it lacks.
        inside: the nodes between the factors and the value, itself included.
    """

    dims: Dims
    terms: tuple[Term, ...]
    inside: frozenset[fx.Node] = frozenset()

    @property
    def has_sum(self) -> bool:
        """Whether anything is summed, or masked, on the way."""
        return any(term.bound or term.causal for term in self.terms)

    def renamed(self, names: Renaming) -> Network:
        terms = tuple(term.renamed(names) for term in self.terms)
        return Network(renamed(self.dims, names), terms, self.inside)

    def fresh(self) -> Network:
        """The same with other indices, so that it can be used beside itself."""
        found = {index for dim in self.dims for index in dim}
        found.update(*(term.indices for term in self.terms))
        return self.renamed({index: (Index(index.size),) for index in found})

    def scaled(self, factor: float) -> Network:
        terms = tuple(dataclasses.replace(t, scale=t.scale * factor) for t in self.terms)
        return dataclasses.replace(self, terms=terms)

    def summed(self, dims: Iterable[int], *, keepdim: bool = False) -> Network:
        """The sum over some dimensions."""
        gone = {dim % len(self.dims) for dim in dims}
        indices = [index for dim in sorted(gone) for index in self.dims[dim]]
        kept = tuple(
            () if place in gone else dim
            for place, dim in enumerate(self.dims)
            if keepdim or place not in gone
        )
        return Network(kept, tuple(term.summed(indices) for term in self.terms), self.inside)


def large_factors(factors: Sequence[Factor]) -> list[Factor]:
    """Those that depend on more than any other: not a mask or a scale of one of them."""
    sets = [(factor, set(factor.indices)) for factor in factors if factor.use == "times"]
    return [factor for factor, own in sets if not any(own < other for _, other in sets)]


def leaf(node: fx.Node, use: str = "times") -> Network:
    """A node as the only factor."""
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, torch.Tensor) else ()
    dims = tuple(() if same(size, 1) else (Index(size),) for size in shape)
    return Network(dims, (Term(factors=(Factor(node, dims, use),)),))


def joined(
    operands: Sequence[Network], labels: Sequence[Sequence[Any]], out: Sequence[Any]
) -> Network:
    """The product of several values, summed over the labels that the result lacks.

    Args:
        operands: the values.
        labels: for each operand, names of its dimensions; dimensions of one name run together, and
            those of size 1 broadcast.
        out: the names of the result's dimensions.

    Raises:
        NotMultilinear: the dimensions do not match, or there are too many terms.
    """
    networks = [network.fresh() for network in operands]
    runs: dict[Any, tuple[Index, ...]] = {}
    for place, names in enumerate(labels):
        if len(set(names)) != len(names):
            raise NotMultilinear("a diagonal is taken")
        for at, name in enumerate(names):
            dim = networks[place].dims[at]
            if not runs.get(name):
                runs[name] = dim
            elif dim:
                renaming = unified(runs[name], dim)
                networks = [network.renamed(renaming) for network in networks]
                runs = {key: renamed((run,), renaming)[0] for key, run in runs.items()}
    terms: list[Term] = [Term()]
    for network in networks:
        terms = [term.times(other) for term in terms for other in network.terms]
    if len(terms) > _MOST_TERMS:
        raise NotMultilinear("too many products are added up")
    bound = [index for name, run in runs.items() if name not in out for index in run]
    inside = frozenset().union(*(network.inside for network in networks))
    dims = tuple(runs[name] for name in out)
    return Network(dims, tuple(term.summed(bound) for term in terms), inside)


def multiplied(left: Network, right: Network) -> Network:
    """The elementwise product, with broadcasting from the right."""
    ranks = len(left.dims), len(right.dims)
    names = list(range(max(ranks)))
    return joined([left, right], [names[len(names) - rank :] for rank in ranks], names)


def added(left: Network, right: Network) -> Network:
    """The elementwise sum, with broadcasting from the right."""
    one, other = left.fresh(), right.fresh()
    rank = max(len(one.dims), len(other.dims))
    one, other = (
        dataclasses.replace(x, dims=((),) * (rank - len(x.dims)) + x.dims) for x in (one, other)
    )
    for place in range(rank):
        if one.dims[place] and other.dims[place]:
            names = unified(one.dims[place], other.dims[place])
            one, other = one.renamed(names), other.renamed(names)
    terms = (*one.terms, *other.terms)
    if len(terms) > _MOST_TERMS:
        raise NotMultilinear("too many products are added up")
    dims = tuple(a or b for a, b in zip(one.dims, other.dims, strict=True))
    return Network(dims, terms, one.inside | other.inside)

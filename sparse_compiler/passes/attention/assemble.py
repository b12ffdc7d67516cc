"""Puts a site together, once it is known where its scores and its weights come from.

The two spellings of attention meet here: both say how their batch and head dimensions can be
counted (``Lead``), where they read queries, keys and values, and what the softmax sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.attention.facts import GraphFacts
from sparse_compiler.passes.attention.found import Meaning, Site
from sparse_compiler.passes.attention.indices import Indices
from sparse_compiler.passes.attention.leaves import Leaf
from sparse_compiler.passes.attention.lift_views import Index, schema_name
from sparse_compiler.passes.attention.operands import Operand, candidates
from sparse_compiler.passes.attention.output import Output
from sparse_compiler.passes.attention.symbols import Integer, sizes_of
from sparse_compiler.passes.pointwise import NotLiftable
from sparse_compiler.region import Region
from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import B, Expr, H, K, Q, S, integer
from sparse_compiler.static import is_mutated, with_aliases

_DTYPES = (torch.float32, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Lead:
    """One way to count an attention's leading dimensions by a batch and a head.

    Attributes:
        sizes: of the dimensions.
        split: how many of them are the batch; the others are heads.
        heads: how many heads there are in a single dimension that is both, else None.
    """

    sizes: tuple[sympy.Expr, ...]
    split: int
    heads: sympy.Expr | None = None

    def extents(self) -> tuple[sympy.Expr, sympy.Expr]:
        """The number of batches and of heads."""
        if self.heads is not None:
            return sympy.cancel(self.sizes[0] / self.heads), self.heads
        one = sympy.Integer(1)
        batch, heads = self.sizes[: self.split], self.sizes[self.split :]
        return sympy.prod(batch, one), sympy.prod(heads, one)

    def index(self, indices: Indices) -> Index:
        """The index of each dimension."""
        b, h = indices.atom(B), indices.atom(H)
        if self.heads is not None:
            return (indices.join((b, h), (indices.extents[B], self.heads)),)
        batch = indices.split(b, self.sizes[: self.split]) if self.split else ()
        heads = self.sizes[self.split :]
        return (*batch, *(indices.split(h, heads) if heads else ()))

    def output(self, node: fx.Node, order: Sequence[int]) -> Output:
        """How the result becomes ``node``, whose dimensions are in ``order``."""
        sizes = tuple(int(size) if size.is_Integer else None for size in self.sizes)
        if sizes.count(None) > 1 and len(sizes) > 2:
            raise NotLiftable("more than one of its leading dimensions is dynamic")
        is_pair = self.heads is None and (self.split, len(sizes)) == (1, 2)
        return Output(node, sizes, is_pair, tuple(order))


def leads(sizes: Sequence[sympy.Expr], heads: Iterator[sympy.Expr]) -> Iterator[Lead]:
    """The ways to count leading dimensions, the most likely first.

    Args:
        sizes: of the dimensions.
        heads: numbers of heads that shapes nearby suggest, for a single dimension.
    """
    shape = tuple(sizes)
    if len(shape) == 1:
        for count in heads:
            yield Lead(shape, 1, count)
    if len(shape) <= 1:
        yield Lead(shape, len(shape))
    else:
        for split in range(len(shape) - 1, 0, -1):
            yield Lead(shape, split)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Where an attention reads its operands: each a node, and the index of its elements.

    The queries' channels are counted by ``K`` and all others by ``Q``: an operand has no use for
    these otherwise.
    """

    query: tuple[fx.Node, Index]
    key: tuple[fx.Node, Index]
    value: tuple[fx.Node, Index]


@dataclasses.dataclass(frozen=True)
class Operands:
    """The three operands as views with few heads."""

    query: Operand
    key: Operand
    value: Operand
    repeats: bool


def choose(
    indices: Indices, facts: GraphFacts, reading: Reading, dtype: torch.dtype, end: fx.Node
) -> Operands:
    """Views of the operands in the dtype of the result.

    Raises:
        NotLiftable: an operand is no [batch, heads, positions, channels] of the result's dtype.
    """
    ways: dict[str, list[Operand]] = {}
    for name, position, channel in (("query", Q, K), ("key", K, Q), ("value", K, Q)):
        node, index = getattr(reading, name)
        size = next((s for s, i in zip(sizes_of(node), index, strict=True) if i is channel), 1)
        with indices.counting(channel, sympy.sympify(size)):
            found = list(candidates(indices, facts, node, index, position, channel, end))
        if not found:
            raise NotLiftable(f"its {name} cannot be seen as [batch, heads, length, channels]")
        ways[name] = [way for way in found if way.dtype == dtype]
        if not ways[name]:
            raise NotLiftable(f"its {name} is {_name(found[0].dtype)}, its result {_name(dtype)}")
    heads = indices.extents[H]
    queries = [way for way in ways["query"] if way.heads in (1, heads)]
    few = {way.heads for way in ways["key"]} & {way.heads for way in ways["value"]}
    if not few or not queries:
        raise NotLiftable("its keys and its values have different numbers of heads")
    least = min(few, key=int) if all(isinstance(n, int) for n in few) else next(iter(few))
    query = _nearest(queries)
    key = _nearest([way for way in ways["key"] if way.heads == least])
    value = next(way for way in ways["value"] if way.heads == least)
    for way in (query, key, value):
        if not way.flat and "batch" not in way.places and not indices.extents[B].is_Integer:
            raise NotLiftable("an operand is the same for a dynamic number of batches")
    return Operands(query, key, value, least != ways["key"][0].heads)


def _nearest(ways: Sequence[Operand]) -> Operand:
    """The first way in front of all factors: these go into the score."""
    return next(way for way in ways if way.scale == ways[-1].scale)


def assemble(
    facts: GraphFacts,
    indices: Indices,
    operands: Operands,
    output: Output,
    score: Expr,
    leaves: Sequence[Leaf],
    meanings: Mapping[Expr, Expr],
    node: fx.Node,
    region: Sequence[fx.Node],
    sizes: dict[str, Any],
    **rest: Any,
) -> Site:
    """The site.

    Raises:
        NotLiftable: it cannot be rewritten; the message is a sentence.
    """
    dtype: torch.dtype = output.node.meta["val"].dtype
    scale = operands.query.scale * operands.key.scale
    if operands.value.scale != 1:
        raise NotLiftable("its values are scaled")
    score = score.substitute({S: e.mul(S, scale)})
    meaning, meant, _ = renumbered(score.substitute(meanings), leaves, indices.integers)
    score, used, integers = renumbered(score, leaves, indices.integers)
    learned = [leaf.node.name for leaf in used if leaf.kind == "learned"]
    if len(learned) > 1:
        raise NotLiftable(f"gradients flow into more than one bias: {', '.join(learned)}")
    sink = rest.get("sink")
    read = {leaf.node for leaf in (*used, *([sink] if sink else []))}
    read |= {way.node for way in (operands.query, operands.key, operands.value)}
    region = _with_own_inputs(region, read)
    reason = Region.of(region).why_not_movable(fresh=True)
    if reason is not None:
        raise NotLiftable(reason)
    return Site(
        node=node,
        region=tuple(sorted(region)),
        query=operands.query,
        key=operands.key,
        value=operands.value,
        output=output,
        score=score,
        leaves=used,
        integers=integers,
        meaning=Meaning(meaning, meant),
        kv_heads=operands.key.heads,
        dtype=dtype,
        repeats=operands.repeats,
        **sizes,
        **rest,
    )


def _with_own_inputs(region: Sequence[fx.Node], read: set[fx.Node]) -> list[fx.Node]:
    """A region, and what is made for it alone and written to in place on the way.

    ``torch.tensor(fill)`` is detached in place; masks are filled in place. What the rewrite still
    reads stays outside.
    """
    inside = set(region)
    for node in Region.of(region).inputs:
        made = with_aliases([node])
        users = {user for item in made for user in item.users}
        written = is_mutated(node) and all(item.op == "call_function" for item in made)
        if written and users <= inside | made and not made & read:
            inside |= made
    return sorted(inside)


def site_sizes(
    indices: Indices, head_dim: sympy.Expr, value_dim: sympy.Expr, operands: Sequence[fx.Node]
) -> dict[str, Any]:
    """A site's sizes, as numbers or SymInts."""
    extents = indices.extents
    sizes = {
        "batch": extents[B],
        "heads": extents[H],
        "queries": extents[Q],
        "keys": extents[K],
        "head_dim": head_dim,
        "value_dim": value_dim,
    }
    return {name: sized_as(size, operands) for name, size in sizes.items()}


def sized_as(size: sympy.Expr, operands: Sequence[fx.Node]) -> Any:
    """A size as a number or a SymInt, in terms of the sizes of some nodes."""
    if size.is_Integer:
        return int(size)
    dynamic = [n for node in operands for n in node.meta["val"].shape if not isinstance(n, int)]
    for known in dynamic:
        if known.node.expr == size:
            return known
    return dynamic[0].node.shape_env.create_symintnode(size, hint=None)


def check_dtype(node: fx.Node) -> None:
    """Refuse what no kernel computes.

    Raises:
        NotLiftable: the node's dtype is neither float32 nor bfloat16, or it is empty.
    """
    value = node.meta["val"]
    if value.dtype not in _DTYPES:
        raise NotLiftable(f"it is {_name(value.dtype)}: the kernels take float32 and bfloat16")
    if any(isinstance(size, int) and size == 0 for size in value.shape):
        raise NotLiftable("it is empty")


def renumbered(
    score: Expr, leaves: Sequence[Leaf], integers: Sequence[Integer]
) -> tuple[Expr, tuple[Leaf, ...], tuple[Integer, ...]]:
    """The score with slots and places counted from 0, in the order in which it reads them."""
    used: dict[int, int] = {}
    places: dict[int, int] = {}
    for item in score.leaves():
        if item.op == "int":
            places.setdefault(item.slot, len(places))
        elif item.op == "load":
            used.setdefault(item.slot, len(used))
    whole = {item: integer(places[item.slot]) for item in score.leaves() if item.op == "int"}
    new = dict(whole)
    for item in score.loads():
        index = (part.substitute(whole) for part in item.operands)
        new[item] = e.load(used[item.slot], item.dtype, *index)
    kept = tuple(leaves[slot] for slot in used)
    return score.substitute(new), kept, tuple(integers[place] for place in places)


def spelled(region: Sequence[fx.Node]) -> str:
    """The operators of a region, without those that only move or convert."""
    names = [schema_name(node) for node in sorted(region)]
    return ", ".join(name for name in names if name not in _UNSPOKEN)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_UNSPOKEN = (
    "view", "reshape", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "contiguous",
    "expand", "to", "_to_copy", "type_as", "getitem", "alias", "detach", "clone", "flatten",
    "unflatten",
)  # fmt: skip

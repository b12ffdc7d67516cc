"""Which order to multiply in: the cheapest for a plain product, chunks for a causal one.

A causal product runs over chunks of the positions. Inside a chunk the scores are computed as they
are written; everything before it arrives as one state, the sum of φ(k) vᵀ:

    out[i] = Σ_{j <= i, j in the chunk of i} (q_i·k_j) v_j  +  q_i · state(chunks before)

which is n·(c·(d + e) + 2·d·e) multiplications for chunks of c positions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Sequence

from sparse_compiler.passes.linear_attention.indices import Index, numel
from sparse_compiler.passes.linear_attention.network import Causal, Factor, Term

# Positions of a chunk: the fastest of 32, 64, 128 and 256, or within a tenth of it, for head sizes
# 32 to 128, 512 to 16384 positions, float32 and bfloat16, forward and backward (one AVX-512 core).
CHUNK = 64

# Factors that multiply one operand: a value and its padding mask, say.
Group = tuple[Factor, ...]


class Refused(Exception):
    """A candidate is left alone; the message is the reason, a sentence."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A sum of products without a causal mask, contracted pairwise.

    Attributes:
        operands: what is multiplied.
        bound: what is summed over.
        steps: the two operands of each contraction, by place in the list of operands, which grows
            by each result.
    """

    operands: tuple[Group, ...]
    bound: frozenset[Index]
    steps: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Chunked:
    """A causal sum of products, and the part that each factor plays in it.

    Attributes:
        queries: depend on the row.
        keys: depend on the column, and share a bound index with the queries.
        values: the other factors of the column; none in a normaliser.
        features: the bound indices that queries and keys share.
        causal: the mask.
    """

    queries: Group
    keys: Group
    values: Group
    features: tuple[Index, ...]
    causal: Causal


@dataclasses.dataclass(frozen=True)
class TermPlan:
    """How one term is computed: ``scale * core``, times (or over) the outer factors."""

    scale: float
    core: Product | Chunked
    outer: Group


def plan(term: Term) -> TermPlan:
    """The plan for one term.

    Raises:
        Refused: it has no cheaper form; the message says what stands in the way.
    """
    bound = frozenset(term.bound)
    inner = [factor for factor in term.factors if bound.intersection(factor.indices)]
    outer = tuple(factor for factor in term.factors if factor not in inner)
    if len(term.causal) > 1:
        raise Refused("the scores are masked by two causal masks")
    core: Product | Chunked
    if term.causal:
        core = _chunked(inner, bound, term.causal[0])
    else:
        core = _product(_grouped(inner), bound)
    return TermPlan(term.scale, core, outer)


def indices_of(group: Iterable[Factor]) -> tuple[Index, ...]:
    """The indices of a group's product, in the order of their first appearance."""
    return tuple(dict.fromkeys(index for factor in group for index in factor.indices))


def signature(core: Chunked) -> Hashable:
    """What the scores inside chunks depend on, and their layout: the same for a normaliser."""
    names = {index: place for place, index in enumerate(indices_of((*core.queries, *core.keys)))}
    groups = tuple(
        tuple((f.node, f.use, tuple(tuple(names[i] for i in dim) for dim in f.dims)) for f in group)
        for group in (core.queries, core.keys)
    )
    return groups, names[core.causal.row], names[core.causal.column], core.causal.strict


def _grouped(factors: Sequence[Factor]) -> tuple[Group, ...]:
    """Factors that depend on no more than another one are put with the smallest such."""
    by_size = sorted(factors, key=lambda factor: (factor.use == "times", len(factor.indices)))
    groups: dict[Factor, list[Factor]] = {f: [f] for f in factors if f.use == "times"}
    for factor in by_size:
        homes = [
            other
            for other in groups
            if other is not factor and set(factor.indices) <= set(other.indices)
        ]
        if homes:
            home = min(homes, key=lambda other: numel(other.indices))
            groups[home].extend(groups.pop(factor, [factor]))
        elif factor.use != "times":
            raise Refused(_in_the_way(factor))
    return tuple(tuple(group) for group in groups.values())


def between(term: Term) -> str:
    """What keeps the factors of a term from being reordered, as a sentence; empty if nothing does.

    A factor of queries and keys beside their product: it shares a free index with one factor, and a
    bound index with another one that lacks the free index.
    """
    bound = set(term.bound)
    found = [
        factor
        for factor in term.factors
        for row in set(factor.indices) - bound
        for column in set(factor.indices) & bound
        if any(row in o.indices for o in term.factors if o is not factor)
        and any(column in o.indices and row not in o.indices for o in term.factors)
    ]
    return _in_the_way(max(found, key=lambda factor: numel(factor.indices))) if found else ""


def _in_the_way(factor: Factor) -> str:
    name = factor.node.name
    if factor.use in ("keep", "drop"):
        return f"the scores are masked by {name}, which cannot be shown to be causal"
    done = "divided" if factor.use == "over" else "multiplied"
    return f"the scores are {done} by {name}, which depends on the query and on the key"


def _chunked(factors: Sequence[Factor], bound: frozenset[Index], causal: Causal) -> Chunked:
    row, column = causal.row, causal.column
    if row in bound or column not in bound:
        raise Refused("each query sums over the positions behind it, not over those before it")
    queries = [f for f in factors if row in f.indices]
    columns = [f for f in factors if column in f.indices]
    for factor in queries:
        if column in factor.indices:
            raise Refused(_in_the_way(factor))
    features = tuple(i for i in indices_of(queries) if i in bound and i in indices_of(columns))
    if not features:
        raise Refused("queries and keys share no features")
    others = [f for f in factors if row not in f.indices and column not in f.indices]
    for factor in others:
        if set(factor.indices) <= set(indices_of(queries)):
            queries.append(factor)
        else:
            columns.append(factor)
    keys = [f for f in columns if set(features).intersection(f.indices)]
    rest = [f for f in columns if f not in keys]
    # A mask of the keys goes with the keys, so that a normaliser sees it, too.
    small = [f for f in rest if set(f.indices) <= set(indices_of(keys))]
    values = [f for f in rest if f not in small]
    groups = [_ordered([*group]) for group in (queries, [*keys, *small], values)]
    left = bound - {column} - set(features)
    if left:
        raise Refused("a sum runs over more than keys and features")
    return Chunked(groups[0], groups[1], groups[2], features, causal)


def _ordered(group: list[Factor]) -> Group:
    """Products first, the largest in front: masks and divisors are applied to them."""
    result = sorted(group, key=lambda f: (f.use != "times", -len(f.indices)))
    times = indices_of(f for f in result if f.use == "times")
    for factor in result:
        if factor.use != "times" and not set(factor.indices) <= set(times):
            raise Refused(_in_the_way(factor))
    return tuple(result)


def _product(operands: tuple[Group, ...], bound: frozenset[Index]) -> Product:
    return Product(operands, bound, _cheapest(_reduced(operands, bound), bound))


def _reduced(operands: Sequence[Group], bound: frozenset[Index]) -> list[frozenset[Index]]:
    """The indices of each operand, less those that are summed in it alone."""
    sets = [frozenset(indices_of(group)) for group in operands]
    reduced = []
    for place, own in enumerate(sets):
        others = frozenset().union(*sets[:place], *sets[place + 1 :])
        reduced.append(own - (bound - others))
    return reduced


def own_sums(core: Product) -> list[tuple[Index, ...]]:
    """The indices that are summed in each operand alone, before all else."""
    reduced = _reduced(core.operands, core.bound)
    return [
        tuple(index for index in indices_of(group) if index not in rest)
        for group, rest in zip(core.operands, reduced, strict=True)
    ]


def contractions(core: Product) -> list[frozenset[Index]]:
    """The indices that each step of a product runs over."""
    live = dict(enumerate(_reduced(core.operands, core.bound)))
    unions = []
    for one, other in core.steps:
        left, right = live.pop(one), live.pop(other)
        unions.append(left | right)
        live[len(core.operands) + len(unions) - 1] = kept(left | right, live.values(), core.bound)
    return unions


def kept(
    indices: Iterable[Index], others: Iterable[Iterable[Index]], bound: frozenset[Index]
) -> frozenset[Index]:
    """What a contraction leaves: all but the bound indices that no other operand has."""
    needed = frozenset().union(*others)
    return frozenset(index for index in indices if index not in bound or index in needed)


def _cheapest(
    sets: Sequence[frozenset[Index]], bound: frozenset[Index]
) -> tuple[tuple[int, int], ...]:
    """The order of pairwise contractions with the fewest multiplications."""
    best: tuple[int, tuple[tuple[int, int], ...]] | None = None

    def search(
        live: dict[int, frozenset[Index]], cost: int, steps: tuple[tuple[int, int], ...]
    ) -> None:
        nonlocal best
        if best is not None and cost >= best[0]:
            return
        if len(live) <= 1:
            best = cost, steps
            return
        for one, other in itertools.combinations(sorted(live), 2):
            rest = {place: own for place, own in live.items() if place not in (one, other)}
            union = live[one] | live[other]
            rest[len(sets) + len(steps)] = kept(union, rest.values(), bound)
            search(rest, cost + numel(union), (*steps, (one, other)))

    search(dict(enumerate(sets)), 0, ())
    return best[1] if best else ()

"""Attention that is written out: a product, its softmax, and another product."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from sparse_compiler.passes.attention.assemble import (
    Lead,
    Reading,
    assemble,
    check_dtype,
    choose,
    leads,
    site_sizes,
    spelled,
)
from sparse_compiler.passes.attention.facts import GraphFacts
from sparse_compiler.passes.attention.found import Refusal, Site
from sparse_compiler.passes.attention.fused import heads_of
from sparse_compiler.passes.attention.indices import Indices
from sparse_compiler.passes.attention.leaves import Leaf, is_plain
from sparse_compiler.passes.attention.lift import Lifter
from sparse_compiler.passes.attention.lift_views import (
    Index,
    aligned,
    is_whole_view,
    schema_name,
    source,
)
from sparse_compiler.passes.attention.output import Output
from sparse_compiler.passes.attention.paths import (
    Weights,
    behind,
    products_before,
    products_behind,
    read_weights,
    region_between,
)
from sparse_compiler.passes.attention.products import Product, read_product
from sparse_compiler.passes.attention.softmaxes import Sink, Softmax, read_sink
from sparse_compiler.passes.attention.symbols import sizes_of
from sparse_compiler.passes.pointwise import NotLiftable
from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import B, Expr, H, K, Q, S
from sparse_compiler.score.node import ZERO


def read_decomposed(facts: GraphFacts, softmax: Softmax) -> Site | Refusal | None:
    """The site of one softmax; None if it has nothing to do with attention."""
    before = products_before(facts, softmax)
    after = products_behind(softmax) if before else []
    if not after:
        return None
    spelling, reason = "", ""
    for scores in before:
        region = region_between(scores, after[0])
        spelling = spelling or spelled(region)
        try:
            check_dtype(after[0])
            weights = read_weights(softmax, after)
            return _site(facts, softmax, scores, weights, region)
        except NotLiftable as error:
            reason = reason or str(error)
    return Refusal(softmax.node, reason, spelling)


def _site(
    facts: GraphFacts, softmax: Softmax, scores: fx.Node, weights: Weights, region: list[fx.Node]
) -> Site:
    """The site.

    Raises:
        NotLiftable: it cannot be one.
    """
    _check_users(softmax, region)
    product = read_product(scores)
    if product is None:
        raise NotLiftable(f"its scores come from a {schema_name(scores)} that sums over more")
    after = weights.product
    sizes = [after.size(letter) for letter in weights.lead]
    nearby: Iterator[Any] = iter(())
    if len(sizes) == 1:
        nearby = heads_of(product.left, sizes[0], [*region, weights.value])
    reason = ""
    for lead in leads(sizes, nearby):
        try:
            return _counted(facts, softmax, product, weights, region, lead)
        except NotLiftable as error:
            reason = reason or str(error)
    raise NotLiftable(reason)


def _check_users(softmax: Softmax, region: Sequence[fx.Node]) -> None:
    """Refuse scores or weights that the model uses for something else, or hands out."""
    inside = set(region)
    for node in region[:-1]:
        for user in node.users:
            if user not in inside:
                what = "weights" if node >= softmax.node else "scores"
                where = "the model returns them" if user.op == "output" else f"by {user.name}"
                also = "needed elsewhere: " if user.op == "output" else "also used "
                raise NotLiftable(f"its {what} are {also}{where}")


def _counted(
    facts: GraphFacts,
    softmax: Softmax,
    product: Product,
    weights: Weights,
    region: list[fx.Node],
    lead: Lead,
) -> Site:
    """The site, with its leading dimensions counted in one way."""
    after, end = weights.product, weights.product.node
    batch, heads = lead.extents()
    extents = {
        B: batch,
        H: heads,
        Q: after.size(weights.query),
        K: after.size(weights.key),
    }
    indices = Indices(facts.symbols, extents)
    at = dict(zip(weights.lead, lead.index(indices), strict=True))
    at[weights.query], at[weights.key] = indices.atom(Q), indices.atom(K)

    letters = after.letters(weights.operand)
    after_softmax = Lifter(facts, indices, softmax.node, end)
    kept = _followed(
        "between its softmax and its values",
        lambda: after_softmax.value(weights.operand, after.index(weights.operand, letters, at)),
    )
    inner = after_softmax.reached
    if inner is None:
        raise NotLiftable("its values are not multiplied by its weights")
    scores, inner, sink = _columns(softmax, inner, indices)
    if sink is not None and sink.node in behind(product.node, end):
        raise NotLiftable("its sink is computed from the scores")

    def raw(lift: Lifter, index: Index) -> Expr:
        total = lift.scale(product.alpha)
        if product.bias is not None:
            bias = lift.operand(product.bias, index)
            total = e.add(e.mul(bias, lift.operand(product.beta, ())), total)
        return total

    before = Lifter(facts, indices, product.node, end, raw, beside=after_softmax)
    score = _followed("between its product and its softmax", lambda: before.value(scores, inner))
    if before.reached is None:
        raise NotLiftable("its softmax does not see the product of queries and keys")
    empty_row = softmax.empty_row
    if kept is not S:
        score, empty_row = _masked_twice(score, kept)

    reading = _reading(product, before.reached, weights, at)
    operands = choose(indices, facts, reading, end.meta["val"].dtype, end)
    if before.factors:
        query = dataclasses.replace(operands.query, factors=tuple(before.factors))
        operands = dataclasses.replace(operands, query=query)
    natural = weights.lead + weights.query + weights.channel
    output = lead.output(end, [natural.index(a) for a in after.out_letters])
    spelling = spelled(region)
    output = _as_pair(indices, output, at, natural, weights)
    if output.node is not end:
        region = [*region, output.node]
    return assemble(
        facts,
        indices,
        operands,
        output,
        score,
        before.leaves,
        before.meanings,
        softmax.node,
        region,
        site_sizes(
            indices,
            product.size(product.summed),
            after.size(weights.channel),
            (product.left, product.right, weights.value),
        ),
        sink=_sink_leaf(facts, indices, sink.node, inner, softmax.dim, end) if sink else None,
        dropout=after_softmax.dropout,
        empty_row=empty_row,
        spelling=spelling,
    )


def _followed(where: str, lift: Callable[[], Expr]) -> Expr:
    try:
        return lift()
    except NotLiftable as error:
        raise NotLiftable(f"{where}, {error}") from error


def _columns(
    softmax: Softmax, inner: Index, indices: Indices
) -> tuple[fx.Node, Index, Sink | None]:
    """What the softmax is taken of without its sink, and where its keys are in that."""
    keys = indices.extents[K]
    columns = sizes_of(softmax.node)[softmax.dim]
    at = inner[softmax.dim]
    others = (*inner[: softmax.dim], *inner[softmax.dim + 1 :])
    if any(item.depends_on("k") for item in others):
        raise NotLiftable("its softmax is over another dimension than the keys")
    if columns == keys and at is indices.atom(K):
        return softmax.scores, inner, None
    sink = read_sink(softmax)
    if sink is None or columns != keys + 1 or at is not e.add(indices.atom(K), int(sink.first)):
        raise NotLiftable("its softmax is over more than the keys that have a value")
    pieces: Any = sink.cat.args[0]
    scores = pieces[1 if sink.first else 0]
    index = (*inner[: softmax.dim], indices.atom(K), *inner[softmax.dim + 1 :])
    return scores, index, sink


def _masked_twice(score: Expr, kept: Expr) -> tuple[Expr, str]:
    """The score of an attention whose weights are set to 0 once more where it is masked.

    Then a row that is masked all over gives 0, whatever its scores were filled with.
    """
    if kept.op == "where" and {kept.operands[1], kept.operands[2]} == {S, e.const(0.0)}:
        condition = kept.operands[0] if kept.operands[1] is S else e.not_(kept.operands[0])
        if any(item.op == "where" and item.operands[0] is condition for item in score.walk()):
            return e.where(condition, score, -math.inf), "zero"
    raise NotLiftable("its weights are changed behind the softmax")


def _reading(product: Product, reached: Index, weights: Weights, at: dict[str, Expr]) -> Reading:
    """Which operand of the product holds queries and which keys, and where they are read."""
    found = dict(zip(product.out_letters, reached, strict=True))
    row = [a for a, item in found.items() if item.depends_on("q")]
    column = [a for a, item in found.items() if item.depends_on("k")]
    turned = bool(column) and column[0] not in product.right_letters
    query, keys = (product.left, product.right)[:: -1 if turned else 1]
    if len(row) > 1 or len(column) > 1 or (row and row[0] in product.letters(keys)):
        raise NotLiftable("its scores are read at other places than a query and a key")
    if column and found[column[0]] is not K:
        raise NotLiftable("its scores are read at other places than a query and a key")

    def index(operand: fx.Node, channel: Expr) -> Index:
        letters = product.letters(operand)
        return product.index(operand, letters, {**found, product.summed: channel})

    after = weights.product
    letters = after.letters(weights.value)
    value = after.index(weights.value, letters, {**at, weights.channel: Q})
    return Reading((query, index(query, K)), (keys, index(keys, Q)), (weights.value, value))


def _as_pair(
    indices: Indices, output: Output, at: dict[str, Expr], natural: str, weights: Weights
) -> Output:
    """The output behind a view that separates batch and heads again, if that is all that follows.

    A ``bmm`` gives [batch * heads, queries, channels]; nearly always a view takes it apart.
    """
    node = output.node
    if output.is_pair or len(node.users) != 1:
        return output
    (user,) = node.users
    b, h, q = (indices.atom(index) for index in (B, H, Q))
    channels = sizes_of(node)[weights.product.out_letters.index(weights.channel)]
    extents = indices.extents
    if not is_whole_view(user):
        return output
    if sizes_of(user) != [extents[B], extents[H], extents[Q], channels]:
        return output
    with indices.counting(K, channels):
        channel = indices.atom(K)
        found = source(indices, user, (b, h, q, channel))
        letters = {**at, weights.channel: channel}
        if found != (node, tuple(letters[a] for a in weights.product.out_letters)):
            return output
    sizes = tuple(int(n) if n.is_Integer else None for n in (extents[B], extents[H]))
    return Output(user, sizes, True, (0, 1, 2, 3))


def _sink_leaf(
    facts: GraphFacts, indices: Indices, node: fx.Node, inner: Index, dim: int, end: fx.Node
) -> Leaf:
    """The sink, where it has the fewest elements."""
    index = (*inner[:dim], ZERO, *inner[dim + 1 :])
    found: tuple[fx.Node, Index] | None = None
    moved: tuple[fx.Node, Index] | None = (node, aligned(node, index))
    while moved is not None and not facts.written_after(moved[0], end):
        if is_plain(moved[1]):
            found = moved
        moved = source(indices, *moved)
    if found is None:
        raise NotLiftable(f"its sink {node.name} is no logit of a batch, a head and a query")
    return Leaf(found[0], facts.kind(found[0]), found[1])

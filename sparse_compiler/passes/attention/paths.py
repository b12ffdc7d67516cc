"""Between which products a softmax lies: scores come from one, weights go into the other."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from torch import fx

from sparse_compiler.passes.attention.facts import GraphFacts
from sparse_compiler.passes.attention.lift_views import schema_name
from sparse_compiler.passes.attention.products import Product, is_product, read_product
from sparse_compiler.passes.attention.softmaxes import Softmax
from sparse_compiler.passes.pointwise import NotLiftable
from sparse_compiler.static import writes_to

# How far a product may be from its softmax, in operators.
_FAR = 400

_PRODUCTS = ("matmul", "bmm", "mm", "baddbmm", "einsum")
_BARRIERS = ("softmax", "_softmax", "topk", "sort")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The product of weights and values.

    Attributes:
        product: how it is spelled.
        operand: its operand that holds the weights.
        value: the other one.
        query: the letter that counts queries.
        channel: the letter that counts the values' channels.
        lead: the result's other letters, in order.
    """

    product: Product
    operand: fx.Node
    value: fx.Node
    query: str
    channel: str
    lead: str

    @property
    def key(self) -> str:
        return self.product.summed


def products_before(facts: GraphFacts, softmax: Softmax) -> list[fx.Node]:
    """Products of two activations that the scores come from, in graph order."""
    found, seen = [], {softmax.scores}
    waiting = collections.deque(seen)
    while waiting and len(seen) < _FAR:
        node = waiting.popleft()
        if is_product(node):
            if _is_of_activations(facts, node):
                found.append(node)
                continue
            if not _mixes_heads(node):
                continue
        if schema_name(node) not in _BARRIERS:
            new = [source for source in node.all_input_nodes if source not in seen]
            seen.update(new)
            waiting.extend(new)
    return sorted(found)


def _is_of_activations(facts: GraphFacts, node: fx.Node) -> bool:
    """Whether neither side of a product is a layer's weight."""
    if schema_name(node) not in _PRODUCTS:
        return False
    operands = node.all_input_nodes[-2:]
    return not any(x.meta["val"].dim() < 3 for x in operands if facts.static.is_static(x))


def _mixes_heads(node: fx.Node) -> bool:
    """Whether a layer is applied to scores or weights: no hidden state has four dimensions."""
    first = node.all_input_nodes[0]
    return node.meta["val"].dim() >= 4 and first.meta["val"].dim() >= 4


def products_behind(softmax: Softmax) -> list[fx.Node]:
    """Products that the weights go into, in graph order."""
    found, seen = [], {softmax.node}
    waiting = collections.deque(seen)
    while waiting and len(seen) < _FAR:
        for user in waiting.popleft().users:
            if user in seen:
                continue
            seen.add(user)
            if is_product(user):
                if schema_name(user) in _PRODUCTS:
                    found.append(user)
                elif _mixes_heads(user):
                    waiting.append(user)
            elif schema_name(user) not in _BARRIERS:
                waiting.append(user)
    return sorted(found)


def read_weights(softmax: Softmax, after: Sequence[fx.Node]) -> Weights:
    """The product that weights go into.

    Args:
        softmax: what makes the weights.
        after: the products behind it, in graph order.

    Raises:
        NotLiftable: it is no product of weights and values.
    """
    product = read_product(after[0])
    if product is None or product.bias is not None:
        raise NotLiftable(
            f"its weights go into {schema_name(after[0])}, in a way that is no product of "
            "weights and values"
        )
    later = behind(softmax.node, after[0])
    sides = [x for x in (product.left, product.right) if x in later or x is softmax.node]
    if len(sides) != 1:
        raise NotLiftable("its weights are multiplied by themselves")
    left = sides[0] is product.left
    value = product.right if left else product.left
    letters = product.left_letters if left else product.right_letters
    others = product.right_letters if left else product.left_letters
    # A letter of the weights alone counts queries; the last one, if values lack heads as well.
    rows = [a for a in letters if a in product.out_letters and a not in others]
    channels = [a for a in others if a in product.out_letters and a not in letters]
    if not rows or not channels:
        raise NotLiftable("its weights and values have no queries, or no channels")
    row, channel = rows[-1], channels[-1]
    lead = "".join(a for a in product.out_letters if a not in (row, channel))
    return Weights(product, sides[0], value, row, channel, lead)


def behind(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes that depend on ``start``, before ``end``."""
    found = {start}
    node = start.next
    while node is not end and node.op != "root":
        if any(item in found for item in node.all_input_nodes):
            found.add(node)
        node = node.next
    found.discard(start)
    return found


def region_between(scores: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Nodes on the ways from one product to the other, both included, in graph order."""
    later = behind(scores, end)
    inside, waiting = {scores, end}, [end]
    while waiting:
        for item in waiting.pop().all_input_nodes:
            if item not in inside and (item in later or item is scores):
                inside.add(item)
                waiting.append(item)
    # What nobody reads, such as the positions of a maximum.
    idle = {user for node in inside - {end} for user in node.users if _is_idle(user)}
    return sorted(inside | idle)


def _is_idle(node: fx.Node) -> bool:
    return not node.users and node.op == "call_function" and not writes_to(node)

"""Which nodes die when the result of a mixture of experts is computed in another way."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.passes.moe.writes import Writes, owner
from sparse_compiler.static import writes_to


def region_of(
    node: fx.Node, sources: Iterable[fx.Node], writes: Writes, products: Iterable[fx.Node] = ()
) -> frozenset[fx.Node]:
    """The nodes that only ``node`` needs, with ``node``, back to ``sources``.

    An operator in place writes to what an earlier node made, and either name may be used behind
    it: those names of ``node`` are in the region, whoever uses them.

    Args:
        node: the result.
        sources: what the rewrite reads: never in the region.
        writes: of the graph.
        products: the work that is to be saved: nodes that have to be in the region.

    Raises:
        Refused: a source changes before ``node`` is computed, or a product is needed elsewhere.
    """
    sources = set(sources)
    for source in sources:
        if writes.changes(source, node):
            raise Refused(f"{source.name} is written to in place before the experts are done")
    first = owner(node)
    names = {item for item in _reachable(node, sources) if owner(item) is first}
    kept = _reachable(node, sources)
    while True:
        outside = {item for item in kept - names if not kept.issuperset(item.users)}
        # What writes to a tensor that lives on has to stay.
        outside |= {item for item in kept if not kept.issuperset(writes_to(item))}
        if not outside:
            break
        kept -= outside
    for product in products:
        if product not in kept:
            raise Refused(f"{product.name}, a step of it, is used for something else as well")
    return frozenset(kept | {node})


def _reachable(node: fx.Node, sources: set[fx.Node]) -> set[fx.Node]:
    """Operators before ``node`` that lead to it, write to them in place, or lead nowhere."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        item = waiting.pop()
        if item in found or item in sources or item.op != "call_function":
            continue
        found.add(item)
        waiting.extend(item.all_input_nodes)
        waiting.extend(user for user in item.users if item in writes_to(user) and user < node)
        waiting.extend(user for user in item.users if not user.users and not user.is_impure())
    return found

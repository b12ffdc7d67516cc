"""Which nodes die when the result of a mixture of experts is computed in another way."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.passes.moe.writes import Writes
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
    names = _names(node, sources)
    kept = _grown(node, names, sources)
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


def _names(node: fx.Node, sources: set[fx.Node]) -> set[fx.Node]:
    """The node, and what it is in place of: one tensor."""
    found = {node}
    while len(targets := writes_to(node)) == 1:
        node = targets[0]
        if node in sources or node.op != "call_function":
            break
        found.add(node)
    return found


def _grown(last: fx.Node, names: set[fx.Node], sources: set[fx.Node]) -> set[fx.Node]:
    """The names, and step by step what nothing outside reads: no look at the rest of the graph."""
    found = set(names)
    waiting = [source for name in names for source in name.all_input_nodes]
    while waiting:
        item = waiting.pop()
        if item in found or item in sources or item.op != "call_function":
            continue
        loose = [user for user in item.users if user not in found]
        if all(user < last and _ends(user, item) for user in loose):
            joined = [item, *loose]
            found.update(joined)
            waiting.extend(source for each in joined for source in each.all_input_nodes)
    return found


def _ends(user: fx.Node, item: fx.Node) -> bool:
    """Whether nothing reads the result of a user of ``item``, by that name."""
    return not user.users and (not user.is_impure() or item in writes_to(user))

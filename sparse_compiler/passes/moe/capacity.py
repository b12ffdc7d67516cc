"""One-hot dispatch: each expert has slots, and tokens are moved there and back by products.

``inputs = einsum("tec,td->ecd", dispatch, x)``, experts on their slots, and
``einsum("tec,ecd->td", combine, outputs)``, where ``dispatch`` is whether ``combine`` is not zero.
If no two tokens share a slot (``slots``), a token gets what its own experts make of it, times its
gates: the tensors [T, E, C], and the products with them, are not needed. What is over capacity is
dropped as before: its id is -1.

Soft mixtures (slots are means of tokens) and expert choice are recognised and left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from sparse_compiler.passes.moe.assemble import (
    Mixture,
    dying,
    movable,
    operands,
    remembered,
    restored,
    weight_nodes,
)
from sparse_compiler.passes.moe.axes import (
    Axis,
    Layout,
    arrange,
    forward,
    fresh,
    is_cast,
    is_view,
    leaves,
    unify,
)
from sparse_compiler.passes.moe.backgrounds import Backgrounds
from sparse_compiler.passes.moe.expert import Experts, Reader
from sparse_compiler.passes.moe.products import Product, read_linear, read_product
from sparse_compiler.passes.moe.site import Refusal, Refused, Site
from sparse_compiler.passes.moe.slots import UNPROVED, Part, Slots, Term
from sparse_compiler.passes.moe.weighted import behind_views
from sparse_compiler.region import Builder
from sparse_compiler.static import StaticValues, arguments

aten = torch.ops.aten

_SPELLING = "one-hot dispatch"
_SOFT = "every slot is a mean of all tokens (a soft mixture): all pairs are wanted"
_CHOICE = "experts choose their tokens (expert choice): only the pairs that are wanted are computed"


def find(gm: fx.GraphModule, static: StaticValues) -> Iterator[Site | Refusal]:
    """Mixtures whose experts have slots, in graph order."""
    backgrounds = Backgrounds(gm.graph)
    reader = Reader(static, backgrounds.writes)
    for node in list(gm.graph.nodes):
        product = read_product(node)
        if product is None:
            continue
        if read_linear(node, static) is not None:
            if _is_expert_choice(node, reader):
                yield Refusal(node, "expert choice", _CHOICE)
            continue
        for item in (product, product.turned()):
            experts = _on_slots(item.left, node, reader)
            dispatch = None if experts is None else read_product(experts.x)
            if experts is None or dispatch is None:
                continue
            try:
                yield _Reading(item, experts, dispatch, static, backgrounds).site()
            except Refused as refused:
                yield Refusal(node, _SPELLING, str(refused))
            break


def _on_slots(node: fx.Node, at: fx.Node, reader: Reader) -> Experts | None:
    try:
        return reader.experts(node, at, slots=True)
    except Refused:
        return None


def _is_expert_choice(node: fx.Node, reader: Reader) -> bool:
    """Whether experts run on tokens that a top-k along the tokens has picked."""
    experts = _on_slots(node, node, reader)
    if experts is None or experts.x.target is not aten.index.Tensor:
        return False
    indices = arguments(experts.x)["indices"]
    if not isinstance(indices[0], fx.Node):
        return False
    try:
        source, _ = behind_views(indices[0], experts.x, reader.writes)
    except Refused:
        return False
    picked = source.args[0] if source.op == "call_function" and source.args else None
    return isinstance(picked, fx.Node) and picked.target is aten.topk.default


class _Reading:
    def __init__(
        self,
        combine: Product,
        experts: Experts,
        dispatch: Product,
        static: StaticValues,
        backgrounds: Backgrounds,
    ) -> None:
        self._combine, self._experts = combine, experts
        features = set(experts.features)
        wide = [
            a
            for a, axes in zip(dispatch.out_letters, leaves(experts.x_layout), strict=True)
            if features & set(axes)
        ]
        turn = any(a in dispatch.right_letters for a in wide)
        self._dispatch = dispatch.turned() if turn else dispatch
        self._wide = wide
        self._static, self._backgrounds = static, backgrounds
        self._writes = backgrounds.writes

    def site(self) -> Site:
        combine, dispatch, experts = self._combine, self._dispatch, self._experts
        weights, chain = behind_views(combine.right, combine.node, self._writes)
        layout = fresh(weights)
        self._same_tensor(weights, layout)
        # Both products name the same axes: those of the tokens, and those of the combine tensor.
        x = dispatch.left
        x_layout = fresh(x)
        axes = dispatch.axes(x_layout, self._dispatch_layout(layout))
        if axes is None or any(a in dispatch.right_letters for a in self._wide):
            raise Refused(UNPROVED)
        for letter, own in zip(dispatch.out_letters, experts.x_layout, strict=True):
            if not unify(axes[letter], own):
                raise Refused(UNPROVED)
        counted = [axis for a in dispatch.contracted for axis in axes[a]]
        many = forward(chain, layout)
        letters = None if many is None else combine.axes(leaves(experts.layout), leaves(many))
        if letters is None or experts.expert is None:
            raise Refused(UNPROVED)
        (expert,) = experts.expert.leaves()
        tokens = self._tokens(x_layout)
        slots = [a for a in _flat(experts.x_layout) if a not in (*tokens, *_features(experts))]
        slots = [axis for axis in slots if axis is not expert]
        result = tuple(leaves((letters[a],))[0] for a in combine.out_letters)
        summed = [x for a in combine.contracted for x in leaves((letters[a],))[0]]
        if len(slots) != 1 or set(summed) != {expert, slots[0]}:
            raise Refused(UNPROVED)
        outputs = experts.outputs.leaves()
        if set(_flat(result)) != {*tokens, *outputs} or len(_flat(result)) != len(tokens) + 1:
            raise Refused(UNPROVED)
        reader = Slots(self._writes, expert, slots[0], leaves((tuple(counted),))[0])
        terms = reader.read(weights, leaves(layout), chain[0] if chain else combine.node)
        tokens = list(leaves((tuple(tokens),))[0])  # now that views have split them
        if len(set(tokens)) != len(tokens):
            raise Refused(UNPROVED)
        for term in terms:
            for part in (term.choice, *term.gates):
                if not set(part.axes()) <= {*tokens, *leaves((term.rows,))[0], expert}:
                    raise Refused(UNPROVED)
        mixture = Mixture(
            node=combine.node,
            layout=result,
            experts=(experts,),
            expert=expert,
            factors=(),
            spelling=_SPELLING,
            form="capacity",
            slots=slots[0].size,
        )
        return self._site(mixture, terms, x, x_layout, tokens)

    def _same_tensor(self, weights: fx.Node, layout: Layout) -> None:
        """That the dispatch tensor is whether the combine tensor is not zero."""
        self._chain: list[fx.Node] = []
        node = self._writes.now(self._dispatch.right, self._dispatch.node)
        while node is not weights:
            given = arguments(node) if node.op == "call_function" else {}
            if node.target in (aten.softmax.int, aten._softmax.default):
                raise Refused(_SOFT)
            bound = given.get("other")
            compared = node.target is aten.ne.Scalar and bound == 0
            source = given.get("self")
            followed = is_view(node) or compared or is_cast(node)
            if not followed or not isinstance(source, fx.Node):
                raise Refused("its dispatch tensor is not where its combine tensor is not zero")
            self._chain.append(node)
            node = self._writes.now(source, node)
        if not any(item.meta["val"].dtype is torch.bool for item in self._chain):
            raise Refused("tokens are multiplied by their gates when they are dispatched")

    def _dispatch_layout(self, layout: Layout) -> Layout:
        views = [node for node in reversed(self._chain) if is_view(node)]
        found = forward(views, layout)
        if found is None:
            raise Refused(UNPROVED)
        return found

    def _tokens(self, x_layout: Layout) -> list[Axis]:
        features = set(_features(self._experts))
        return [axis for axis in _flat(x_layout) if axis not in features]

    def _site(
        self,
        mixture: Mixture,
        terms: Sequence[Term],
        x: fx.Node,
        x_layout: Layout,
        tokens: list[Axis],
    ) -> Site:
        experts = self._experts
        features = _features(experts)
        parts = [part for term in terms for part in (*term.gates, term.choice)]
        ids_nodes = {
            part.node.args[0] for part in parts if part.node.target is aten.one_hot.default
        }
        kept = {x, *weight_nodes(experts), *(part.node for term in terms for part in term.gates)}
        kept |= {node for node in ids_nodes if isinstance(node, fx.Node)}
        region = dying(mixture.node, kept)
        for node in kept:
            if self._writes.changes(node, mixture.node):
                raise Refused(f"{node.name} is written to in place before the experts are done")
        if not experts.nodes <= region:
            raise Refused("what an expert computes is used elsewhere as well")
        number = mixture.expert.size
        pairs = remembered(lambda builder: _ids_and_gates(builder, mixture, terms, tokens))
        choices = sum(_width(term) for term in terms)
        return Site(
            node=mixture.node,
            region=movable(region),
            spelling=_SPELLING,
            form="capacity",
            x=lambda builder: arrange(
                builder, x, x_layout, [*tokens, *features], [-1, _size(features)]
            ),
            ids=lambda builder: pairs(builder)[0],
            gates=lambda builder: pairs(builder)[1],
            experts=number,
            choices=choices,
            tokens=_size(tokens),
            features=_size(features),
            dtype=x.meta["val"].dtype,
            restore=lambda builder, y: restored(builder, y, mixture, tokens),
            slots=mixture.slots,
            **operands(mixture, number, _size(features)),
        )


def _ids_and_gates(
    builder: Builder, mixture: Mixture, terms: Sequence[Term], tokens: list[Axis]
) -> tuple[fx.Node, fx.Node]:
    """[T, K] each, the choices of one term behind those of another; -1 for what is dropped."""
    ids, gates = [], []
    dtype = mixture.experts[0].x.meta["val"].dtype
    for term in terms:
        rows = [*tokens, *leaves((term.rows,))[0]]
        source = term.choice.node.args[0]
        assert isinstance(source, fx.Node)
        chosen = arrange(builder, source, leaves(term.choice.layout)[:-1], rows, [-1, 1])
        kept: fx.Node | None = None
        gate: fx.Node | None = None
        for part in term.gates:
            value = _at(builder, part, chosen, rows, mixture.expert)
            if value.meta["val"].dtype is torch.bool:
                if kept is not None:
                    value = builder.call(aten.logical_and.default, kept, value)
                kept = value
                continue
            if not value.meta["val"].is_floating_point():
                value = builder.call(aten.to.dtype, value, dtype)
            if gate is None:
                gate = builder.call(aten.reciprocal.default, value) if part.inverse else value
            else:
                step = aten.div.Tensor if part.inverse else aten.mul.Tensor
                gate = builder.call(step, gate, value)
        if gate is None:
            gate = builder.call(aten.ones_like.default, chosen, dtype=dtype)
        if kept is not None:
            dropped = builder.call(aten.logical_not.default, kept)
            chosen = builder.call(aten.masked_fill.Scalar, chosen, dropped, -1)
        width = _width(term)
        ids.append(builder.call(aten.reshape.default, chosen, [-1, width]))
        gates.append(builder.call(aten.reshape.default, gate, [-1, width]))
    if len(ids) == 1:
        return ids[0], gates[0]
    return builder.call(aten.cat.default, ids, 1), builder.call(aten.cat.default, gates, 1)


def _at(builder: Builder, part: Part, chosen: fx.Node, rows: list[Axis], expert: Axis) -> fx.Node:
    """A factor at the chosen experts, [rows, 1]."""
    layout = leaves(part.layout)
    if expert not in part.axes():
        return arrange(builder, part.node, layout, rows, [-1, 1])
    dense = arrange(builder, part.node, layout, [*rows, expert], [-1, expert.size])
    return builder.call(aten.gather.default, dense, 1, chosen)


def _width(term: Term) -> int:
    size = _size(leaves((term.rows,))[0])
    if not isinstance(size, int):
        raise Refused(UNPROVED)
    return size


def _size(axes: Sequence[Axis]) -> int:
    result = 1
    for axis in axes:
        result = result * axis.size
    return result


def _flat(layout: Layout) -> list[Axis]:
    return [axis for dim in leaves(layout) for axis in dim]


def _features(experts: Experts) -> list[Axis]:
    return list(leaves((experts.features,))[0])

"""Sites of models that run every expert, from what was read of them: experts and gates in axes."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from sparse_compiler.passes.moe.axes import Axis, Layout, arrange, leaves, same_size, size_of
from sparse_compiler.passes.moe.backgrounds import Backgrounds
from sparse_compiler.passes.moe.expert import Experts, Weight
from sparse_compiler.passes.moe.gates import SOFT, Routed, routed, routed_columns
from sparse_compiler.passes.moe.site import Make, Refused, Site
from sparse_compiler.passes.moe.spots import Size, size_at
from sparse_compiler.region import Builder
from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import Expr
from sparse_compiler.static import aliased_inputs, is_mutated, with_aliases, writes_to

aten = torch.ops.aten
Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Factor:
    """What the experts' results are multiplied by.

    Attributes:
        node: a tensor, or the first expert's.
        layout: of its dimensions.
        reader: the operator that multiplies by it.
        columns: one tensor an expert, and who reads it, where there are such.
    """

    node: fx.Node
    layout: Layout
    reader: fx.Node
    columns: tuple[tuple[fx.Node, fx.Node], ...] = ()

    def nodes(self) -> set[fx.Node]:
        return {self.node, *(node for node, _ in self.columns)}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Experts that all run, and how their results are combined.

    Attributes:
        node: the sum.
        layout: of its dimensions.
        experts: all of them in one, or one by one.
        expert: their axis.
        factors: what their results (or their tokens) are multiplied by.
        scale: a number that the results are multiplied by.
        rest: what is added to the sum, of its shape.
        spelling: how the model writes it.
        form: what it costs as it is written.
        on_input: whether the tokens are multiplied.
        slots: of each expert, for the form ``"capacity"``.
    """

    node: fx.Node
    layout: Layout
    experts: tuple[Experts, ...]
    expert: Axis
    factors: tuple[Factor, ...]
    spelling: str
    form: str = "dense"
    scale: float = 1.0
    rest: tuple[fx.Node, ...] = ()
    on_input: bool = False
    slots: Any = 0


def assemble(mixture: Mixture, backgrounds: Backgrounds) -> Site:
    """The site of a mixture.

    Raises:
        Refused: its gates are soft, or the operator does not compute it.
    """
    first = mixture.experts[0]
    if not isinstance(mixture.expert.size, int):
        raise Refused("the number of its experts is known at run time only")
    factor, found = _routing(mixture, backgrounds)
    _check(mixture)
    tokens = list(leaves((first.tokens,))[0])
    if len(mixture.experts) > 1:
        number = len(mixture.experts)
    else:
        assert isinstance(mixture.expert.size, int)
        number = mixture.expert.size
    keep = _kept(mixture, found)
    region = dying(mixture.node, keep | _sized(mixture, found))
    for node in keep:
        if backgrounds.writes.changes(node, mixture.node):
            raise Refused(f"{node.name} is written to in place before the experts are combined")
    for item in mixture.experts:
        if not item.nodes <= region:
            raise Refused("what an expert computes is used elsewhere as well")
    for node in mixture.rest:
        if is_mutated(node) and (node not in region or aliased_inputs(node) or writes_to(node)):
            raise Refused(f"the experts' results are added to {node.name} in place")
    ids = remembered(lambda builder: _ids(builder, factor, found, tokens))
    features = list(leaves((first.features,))[0])
    wide = math.prod(axis.size for axis in features)

    def gates(builder: Builder) -> fx.Node:
        return _gates(builder, mixture, ids(builder), tokens, number, first.x.meta["val"].dtype)

    def x(builder: Builder) -> fx.Node:
        return arrange(builder, first.x, first.x_layout, [*tokens, *features], [-1, wide])

    return Site(
        node=mixture.node,
        region=movable(region),
        spelling=mixture.spelling,
        form=mixture.form,
        x=x,
        ids=ids,
        gates=gates,
        experts=number,
        choices=found.choices,
        tokens=math.prod(axis.size for axis in tokens),
        features=wide,
        dtype=first.x.meta["val"].dtype,
        restore=lambda builder, y: restored(builder, y, mixture, tokens),
        gates_on_input=mixture.on_input,
        **operands(mixture, number, wide),
    )


def operands(mixture: Mixture, number: int, wide: int) -> dict[str, Any]:
    """What of a site is the experts': weights, biases and the body, by name."""
    first = mixture.experts[0]
    (hidden,), (outputs,) = first.hidden.leaves(), first.outputs.leaves()
    biases = [item.outer_bias for item in mixture.experts]
    return {
        "inner": _weights(mixture, number, wide),
        "inner_bias": _biases(mixture, number),
        "outer": _outer(mixture, number),
        "outer_bias": _bias_of(biases, [i.outputs for i in mixture.experts], mixture, number),
        "body": first.body,
        "hidden": hidden.size,
        "out_features": outputs.size,
    }


def weight_nodes(experts: Experts) -> set[fx.Node]:
    """The tensors that hold the experts' weights and biases."""
    biases = [bias for group in experts.inner_bias for bias in group]
    weights = (*experts.inner, experts.outer, *biases, *experts.outer_bias)
    return {weight.node for weight in weights}


def _routing(mixture: Mixture, backgrounds: Backgrounds) -> tuple[Factor, Routed]:
    """The factor that is proved to be mostly zero, with the fewest choices."""
    found: list[tuple[Factor, Routed]] = []
    reasons: list[str] = []
    for factor in mixture.factors:
        answer: Routed | str | None = None
        if factor.columns:
            columns, readers = zip(*factor.columns, strict=True)
            answer = routed_columns(backgrounds, columns, readers)
        else:
            dims = [d for d, axes in enumerate(leaves(factor.layout)) if mixture.expert in axes]
            if dims and leaves(factor.layout)[dims[0]] == (mixture.expert,):
                size = mixture.expert.size
                answer = routed(backgrounds, factor.node, dims[0], size, factor.reader)
        if isinstance(answer, Routed):
            found.append((factor, answer))
        elif answer is not None:
            reasons.append(answer)
    if not found:
        raise Refused(reasons[0] if reasons else SOFT)
    return min(found, key=lambda pair: pair[1].choices)


def _check(mixture: Mixture) -> None:
    first = mixture.experts[0]
    dtype = first.x.meta["val"].dtype
    for item in mixture.experts:
        if item.body is not first.body:
            raise Refused("its experts are not alike: they have different activations")
        sizes = [(e.hidden.size, e.outputs.size, len(e.inner)) for e in (first, item)]
        if sizes[0] != sizes[1]:
            raise Refused("its experts are not alike: they differ in size")
        for weight in (*item.inner, item.outer):
            if weight.node.meta["val"].dtype != dtype:
                raise Refused("its tokens and its weights differ in dtype")
    if mixture.on_input:
        zeros = [torch.zeros(1)] * len(first.inner)
        biased = first.outer_bias or any(first.inner_bias)
        if biased or not _is_zero(first.body, zeros):
            why = "it has biases" if biased else "its activation"
            raise Refused(
                "its gates are on the experts' input, and an expert's result for zeros is not "
                f"zero: {why}"
            )


def _is_zero(body: Expr, zeros: list[torch.Tensor]) -> bool:
    one = torch.zeros(1, 1, 1, 1)
    return not bool(evaluate(body, one, zeros, [], 1, 1, 1, 1).any())


def _sized(mixture: Mixture, found: Routed) -> set[fx.Node]:
    """The nodes whose sizes the operands are made with."""
    sizes = [
        size_at(factor.node, dim)
        for factor in mixture.factors
        for dim in range(factor.node.meta["val"].dim())
    ]
    return found.sized() | {size.node for size in sizes if isinstance(size, Size)}


def _kept(mixture: Mixture, found: Routed) -> set[fx.Node]:
    """The nodes that the operands are made of."""
    kept = found.nodes()
    for node in mixture.rest:
        kept |= set(node.all_input_nodes) if is_mutated(node) else {node}
    for factor in mixture.factors:
        kept |= factor.nodes()
    for item in mixture.experts:
        kept |= {item.x, *weight_nodes(item)}
    return kept


def dying(node: fx.Node, kept: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """The nodes that nothing but ``node`` needs, up to what is kept."""
    stay = set(kept)
    region: set[fx.Node] = set()
    missing: dict[fx.Node, int] = {node: 0}
    waiting = [node]
    while waiting:
        current = waiting.pop()
        region.add(current)
        for source in current.all_input_nodes:
            if source in stay or source.op != "call_function":
                continue
            missing[source] = missing.get(source, len(source.users)) - 1
            if not missing[source]:
                waiting.append(source)
    # Other names of what is written to in place, used behind it.
    for inner in list(region):
        for target in writes_to(inner):
            late = target.op == "call_function" and target not in stay
            if late and all(user in region or user > node for user in target.users):
                region.add(target)
    return frozenset(region)


def movable(region: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """The part of a dying region that can be replaced in one step; the rest is dead then.

    Views of what lives on are left out (whether it is written to is looked up once for each node of
    the region, through all its views); so is what comes before the last write to something that
    the region reads.
    """
    kept: set[fx.Node] = set()
    for node in sorted(region):
        if any(source not in kept for source in aliased_inputs(node)):
            continue
        kept.add(node)
    inputs = {source for node in kept for source in node.all_input_nodes} - kept
    first = min(kept)
    late = [
        writer
        for alias in with_aliases(inputs)
        for writer in alias.users
        if alias in writes_to(writer) and first < writer < max(kept) and writer not in kept
    ]
    last = max(late, default=None)
    return frozenset(node for node in kept if last is None or node > last)


def remembered(make: Callable[[Builder], Made]) -> Callable[[Builder], Made]:
    """Made once for each builder."""
    known: list[tuple[Builder, Made]] = []

    def build(builder: Builder) -> Made:
        if not known or known[-1][0] is not builder:
            known.append((builder, make(builder)))
        return known[-1][1]

    return build


def _ids(builder: Builder, factor: Factor, found: Routed, tokens: list[Axis]) -> fx.Node:
    value = factor.node.meta["val"]
    sizes = [
        _made(builder, size_at(factor.node, dim)) for dim in range(value.dim()) if dim != found.dim
    ]
    ids = found.ids(builder, sizes)
    choice = Axis(found.choices)
    old = leaves(factor.layout)
    layout = (*old[: found.dim], (choice,), *old[found.dim + 1 :])
    if found.choices == 1:
        layout = (*old[: found.dim], (), *old[found.dim + 1 :])
        return arrange(builder, ids, layout, tokens, [-1, 1])
    return arrange(builder, ids, layout, [*tokens, choice], [-1, found.choices])


def _made(builder: Builder, size: int | Size) -> Any:
    if isinstance(size, Size):
        return builder.call(aten.sym_size.int, size.node, size.dim)
    return size


def _gates(
    builder: Builder,
    mixture: Mixture,
    ids: fx.Node,
    tokens: list[Axis],
    number: int,
    dtype: torch.dtype,
) -> fx.Node:
    """The product of all factors at the ids, [T, K]."""
    safe = builder.call(aten.clamp.default, ids, 0, number - 1)
    result: fx.Node | None = None
    for factor in mixture.factors:
        node, layout = factor.node, leaves(factor.layout)
        if factor.columns:
            columns = [column for column, _ in factor.columns]
            node = builder.call(aten.stack.default, columns, -1)
            layout = (*layout, (mixture.expert,))
        if node.meta["val"].dtype in (torch.bool, torch.int64, torch.int32):
            node = builder.call(aten.to.dtype, node, dtype)
        if any(mixture.expert in dim for dim in layout):
            dense = arrange(builder, node, layout, [*tokens, mixture.expert], [-1, number])
            part = builder.call(aten.gather.default, dense, 1, safe)
        else:
            part = arrange(builder, node, layout, tokens, [-1, 1])
        result = part if result is None else builder.call(aten.mul.Tensor, result, part)
    assert result is not None
    if mixture.scale != 1:
        result = builder.call(aten.mul.Tensor, result, mixture.scale)
    if not same_size(result.meta["val"].shape[1], ids.meta["val"].shape[1]):
        result = builder.call(aten.expand_as.default, result, ids)
    return result


def _weights(mixture: Mixture, number: int, wide: int) -> list[Make]:
    """First linear layers: stacked, or part by part one an expert."""
    found: list[Make] = []
    for place in range(len(mixture.experts[0].inner)):
        for item in mixture.experts:
            (hidden,) = item.hidden.leaves()
            features = list(leaves((item.features,))[0])
            lead = [] if item.expert is None else [mixture.expert]
            shape = [number, hidden.size, wide][1 - len(lead) :]
            found.append(item.inner[place].make([*lead, hidden, *features], shape))
    return found


def _outer(mixture: Mixture, number: int) -> list[Make]:
    found: list[Make] = []
    for item in mixture.experts:
        (hidden,), (outputs,) = item.hidden.leaves(), item.outputs.leaves()
        lead = [] if item.expert is None else [mixture.expert]
        shape = [number, outputs.size, hidden.size][1 - len(lead) :]
        found.append(item.outer.make([*lead, outputs, hidden], shape))
    return found


def _biases(mixture: Mixture, number: int) -> list[Make]:
    """Biases [E, I] of each part; zeros for a part that has none while another has."""
    first = mixture.experts[0]
    if not any(any(item.inner_bias) for item in mixture.experts):
        return []
    found = []
    for place in range(len(first.inner)):
        groups = [item.inner_bias[place] for item in mixture.experts]
        made = _bias_of(groups, [item.hidden for item in mixture.experts], mixture, number)
        found.append(made or _zeros(mixture, number, first.hidden))
    return found


def _zeros(mixture: Mixture, number: int, width: Axis) -> Make:
    value = mixture.experts[0].x.meta["val"]

    def build(builder: Builder) -> fx.Node:
        return builder.call(
            aten.zeros.default, [number, width.size], dtype=value.dtype, device=value.device
        )

    return build


def _bias_of(
    groups: Sequence[tuple[Weight, ...]], widths: Sequence[Axis], mixture: Mixture, number: int
) -> Make | None:
    """The sum of the biases of each expert, [E, width], or None."""
    if not any(groups):
        return None

    def one(builder: Builder, group: tuple[Weight, ...], width: Axis, lead: bool) -> fx.Node:
        (axis,) = width.leaves()
        wanted = [mixture.expert, axis] if lead else [axis]
        shape = [number, axis.size] if lead else [axis.size]
        made = [bias.make(wanted, shape)(builder) for bias in group]
        if not made:
            value = mixture.experts[0].x.meta["val"]
            return builder.call(aten.zeros.default, shape, dtype=value.dtype, device=value.device)
        result = made[0]
        for other in made[1:]:
            result = builder.call(aten.add.Tensor, result, other)
        return result

    def build(builder: Builder) -> fx.Node:
        if mixture.experts[0].expert is not None:
            return one(builder, groups[0], widths[0], True)
        made = [one(builder, g, w, False) for g, w in zip(groups, widths, strict=True)]
        return builder.call(aten.stack.default, made, 0)

    return build


def restored(builder: Builder, y: fx.Node, mixture: Mixture, tokens: list[Axis]) -> fx.Node:
    """[T, O] as the sum's shape, with what else is added."""
    (outputs,) = mixture.experts[0].outputs.leaves()
    value = mixture.node.meta["val"]
    layout = leaves(mixture.layout)
    have = [*tokens, outputs]
    turn = [have.index(axis) for dim in layout for axis in dim]
    if turn != sorted(turn):
        sizes = [size_of(builder, axis) for axis in have]
        y = builder.call(aten.reshape.default, y, sizes)
        y = builder.call(aten.permute.default, y, turn)
    shape = [
        size if isinstance(size, int) else _product(builder, axes)
        for size, axes in zip(value.shape, layout, strict=True)
    ]
    dynamic = [place for place, size in enumerate(shape) if not isinstance(size, int)]
    if len(dynamic) == 1:
        shape[dynamic[0]] = -1
    now = y.meta["val"].shape
    same = len(now) == len(shape) and all(map(same_size, now, value.shape))
    if not same or turn != sorted(turn):
        y = builder.call(aten.reshape.default, y, shape)
    if y.meta["val"].dtype != value.dtype:
        y = builder.call(aten.to.dtype, y, value.dtype)
    for node in mixture.rest:
        if is_mutated(node):
            node = builder.call(node.target, *node.args, **node.kwargs)  # type: ignore[arg-type]
        y = builder.call(aten.add.Tensor, y, node)
    return y


def _product(builder: Builder, axes: Sequence[Axis]) -> Any:
    sizes = [size_of(builder, axis) for axis in axes]
    result = sizes[0]
    for size in sizes[1:]:
        result = builder.call(operator.mul, result, size)
    return result

"""What the channels of a group hold: constants, and where infinities and NaN go.

Two questions are answered by running the group's operators on vectors, one element a channel.
Which channels are the same number in every row (a zero row of a weight leaves its bias)? And if a
layer's input has an infinity, can the channel stay finite? For the second, a channel's value is a
set of classes: finite, +inf, -inf, NaN.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.dead_channels.dims import operator_name, shape
from sparse_compiler.passes.dead_channels.group import Group, Layer, Step
from sparse_compiler.passes.dead_channels.state import (
    ANY,
    FINITE,
    MINUS,
    NAN,
    NOT_FINITE,
    PLUS,
    Scenario,
    State,
)
from sparse_compiler.passes.dead_channels.weights import Values

_SAMPLES = {PLUS: float("inf"), MINUS: float("-inf"), NAN: float("nan")}


def propagate(
    group: Group, layers: Mapping[fx.Node, Layer], values: Values, scenario: Scenario
) -> dict[fx.Node, State]:
    """States of all the group's tensors."""
    states: dict[fx.Node, State] = {}
    for step in group.steps:
        if step.kind == "layer":
            state = _written(step, layers[step.node], states, values, scenario)
        elif step.kind in ("pointwise", "batch_norm"):
            state = _elementwise(step, states, values, scenario)
        elif step.kind == "depthwise":
            state = _depthwise(step, states, values)
        elif step.kind in ("attention", "product"):
            state = _attended(step, states)
        else:
            state = _moved(step, group, states)
        states[step.node] = state
    return states


def _written(
    step: Step,
    layer: Layer,
    states: Mapping[fx.Node, State],
    values: Values,
    scenario: Scenario,
) -> State:
    weight = values[layer.weight]
    zero = values.peaks(layer.weight, layer.out_dims[step.axis.dim]) == 0
    value = torch.zeros(step.size, dtype=weight.dtype)
    if layer.bias is not None:
        value = values[layer.bias].cpu().clone()
    classes = torch.full((step.size,), FINITE, dtype=torch.uint8)
    before = states.get(layer.x)  # the layer may read the very channels it writes to
    path, shifted, bad = layer.geometry, False, scenario.classes
    if before is not None:
        path, shifted, bad = (*before.path, *path), before.shifted, NOT_FINITE
    if layer.x in scenario.sources or (before is not None and before.touched):
        classes = torch.where(zero, NAN, bad).to(torch.uint8)
        zero = torch.zeros_like(zero)
    return State(zero, value, classes, path, shifted)


def _moved(step: Step, group: Group, states: Mapping[fx.Node, State]) -> State:
    """Views, permutations, slices, pools: no arithmetic between channels, or none at all."""
    operands = [(node, states[node]) for node in step.reads if node in states]
    node, state = operands[0]
    name = operator_name(step.node)
    axis, size = step.axis, step.size
    known, value, classes = state.known, state.value, state.classes
    shifted = any(item.shifted for _, item in operands)
    for _, other in operands[1:]:  # cat and stack along another dimension
        known = known & other.known & (value == other.value)
        classes = classes | other.classes
    if step.kind == "pieces":
        source_axis = group.axes[node]
        if source_axis.outer != axis.outer:  # all pieces in one vector, as they were
            return dataclasses.replace(state, path=(*state.path, name))
    elif step.kind == "piece":
        if len(known) != size:
            part = slice(step.args[1] * size, (step.args[1] + 1) * size)
            known, value, classes = known[part], value[part], classes[part]
        return State(known, value, classes, state.path, shifted)
    elif step.kind == "pool":
        known = known & (value == 0)  # a border may be padded with zeros
        if name.endswith("max_pool2d") or "max" in name:
            finite = classes | torch.where((classes & MINUS) != 0, FINITE | PLUS, 0)
            certain = (classes == FINITE) | (classes == NAN)
            classes = torch.where(certain, classes, finite | NAN).to(torch.uint8)
        else:
            classes = _scaled(classes)
    elif step.kind == "softmax":
        known = torch.zeros_like(known)
        classes = torch.where(classes == FINITE, FINITE, ANY).to(torch.uint8)
    elif name in ("slice", "select", "cat", "stack"):
        last = len(shape(node)) - 1
        shifted |= step.given.get("dim", 0) % (last + 1) != last
    elif name in ("permute", "transpose", "t"):
        moved = step.given.get("dims") or [*range(len(shape(node)))]
        swapped = [step.given.get("dim0", -1), step.given.get("dim1", -1)]
        last = len(shape(node)) - 1
        shifted |= moved[-1] % (last + 1) != last or (
            name != "permute" and last in [d % (last + 1) for d in swapped]
        )
    if len(known) != size or axis.outer != group.axes[node].outer:
        zero = group.by_unit(known & (value == 0), group.axes[node]).all(dim=1)
        mixed = group.by_unit(classes, group.axes[node])
        joined = torch.zeros(group.units, dtype=torch.uint8)
        for column in mixed.unbind(dim=1):
            joined |= column
        shape_of = (axis.outer, group.units, size // (axis.outer * group.units))
        known = zero.view(1, -1, 1).expand(shape_of).flatten()
        classes = joined.view(1, -1, 1).expand(shape_of).flatten()
        value = torch.zeros(size, dtype=value.dtype)
    literals = tuple(str(item) for item in step.args if not isinstance(item, fx.Node))
    return State(known, value, classes, (*state.path, name, *literals), shifted)


def _scaled(classes: torch.Tensor) -> torch.Tensor:
    """Classes of a sum of multiples of a channel's elements."""
    certain = (classes == FINITE) | (classes == NAN)
    return torch.where(certain, classes, classes | NOT_FINITE).to(torch.uint8)


def _attended(step: Step, states: Mapping[fx.Node, State]) -> State:
    """Attention, or a product of two tensors that keeps heads apart."""
    operands = [states[node] for node in step.args[: 3 if step.kind == "attention" else 2]]

    def each(vector: torch.Tensor) -> torch.Tensor:
        return vector.repeat_interleave(step.size // len(vector))

    zero = [each(item.known & (item.value == 0)) for item in operands]
    certain = [each((item.classes & FINITE) == 0) for item in operands]
    nan = [each(item.classes == NAN) for item in operands]
    touched = torch.stack([each(item.classes != FINITE) for item in operands]).any(dim=0)
    shifted = [item.shifted for item in operands]
    if step.kind == "attention":
        # Every row a bad value reaches, through keys or queries, it reaches as a value, too:
        # a weight of zero times an infinity is NaN.
        known = zero[2]
        sure, sure_nan = (item[2] & (not any(shifted)) for item in (certain, nan))
    else:
        known = zero[0] | zero[1]
        sure, sure_nan = (
            (item[0] & (not shifted[0])) | (item[1] & (not shifted[1])) for item in (certain, nan)
        )
    reached = torch.where(sure_nan, NAN, torch.where(sure, NOT_FINITE, ANY))
    classes = torch.where(touched, reached, FINITE).to(torch.uint8)
    paths = tuple(item.path for item in operands)
    return State(known, torch.zeros(step.size), classes, (paths, step.kind), any(shifted))


def _depthwise(step: Step, states: Mapping[fx.Node, State], values: Values) -> State:
    state = states[step.args[0]]
    zero = state.known & (state.value == 0)
    times = step.size // len(zero)
    bias = step.given.get("bias")
    value = torch.zeros(step.size, dtype=state.value.dtype)
    if bias is not None:
        value = values[bias].cpu().clone()
    classes = _scaled(state.classes)
    return State(
        zero.repeat_interleave(times),
        value,
        classes.repeat_interleave(times),
        (*state.path, "depthwise", str(step.args[3:])),
        state.shifted,
    )


def _elementwise(
    step: Step, states: Mapping[fx.Node, State], values: Values, scenario: Scenario
) -> State:
    """Run the operator on vectors, once for each combination of classes of its operands."""
    size = step.size
    nodes = list(dict.fromkeys(step.reads))
    operands = [states[node] for node in nodes if node in states]
    classes = torch.zeros(size, dtype=torch.uint8)
    choices = [_choices(node, size, states, values, scenario) for node in nodes]
    for combination in itertools.product(*choices):
        finite = all(pick.finite for pick in combination)
        where = torch.stack([pick.possible for pick in combination]).all(dim=0)
        if finite:
            classes |= torch.where(where, FINITE, 0).to(torch.uint8)
        elif where.any():
            chosen = {n: pick.vector for n, pick in zip(nodes, combination, strict=True)}
            classes |= torch.where(where, _class_of(_evaluate(step, chosen)), 0)
    constants = {node: _constant(node, size, states, values) for node in nodes}
    value = _evaluate(step, {node: vector for node, (_, vector) in constants.items()})
    known = torch.stack([which for which, _ in constants.values()]).all(dim=0)
    if operator_name(step.node) in ("mul", "mul_"):
        zeros = torch.stack([which & (vector == 0) for which, vector in constants.values()])
        known, value = known | zeros.any(dim=0), torch.where(zeros.any(dim=0), 0, value)
    known = known & torch.isfinite(value) & (classes == FINITE)
    touched = [item for item in operands if item.touched]
    paths = {item.path for item in touched}
    if len(paths) > 1:  # the same infinity in different rows of the two
        classes = torch.where(classes == FINITE, FINITE, ANY).to(torch.uint8)
    path = next(iter(paths), operands[0].path)
    return State(known, value, classes, path, any(item.shifted for item in operands))


@dataclasses.dataclass(frozen=True)
class _Pick:
    """One class of an operand: where it is possible, and a representative."""

    possible: torch.Tensor
    vector: torch.Tensor
    finite: bool


def _choices(
    node: fx.Node, size: int, states: Mapping[fx.Node, State], values: Values, scenario: Scenario
) -> list[_Pick]:
    dtype = node.meta["val"].dtype
    everywhere = torch.ones(size, dtype=torch.bool)
    known, constant = _constant(node, size, states, values)
    finite, classes = everywhere, NOT_FINITE * everywhere
    if node in states:
        finite, classes = (states[node].classes & FINITE) != 0, states[node].classes
    elif node not in scenario.sources or not dtype.is_floating_point:
        classes = classes * 0
    else:
        finite = ~everywhere
    picks = [_Pick(finite & known, constant, True)]
    for sample in (0, 1, -1):
        picks.append(_Pick(finite & ~known, torch.full((size,), sample, dtype=dtype), True))
    for bit, number in _SAMPLES.items():
        if bool((classes & bit).any()):
            vector = torch.full((size,), number, dtype=dtype)
            picks.append(_Pick((classes & bit) != 0, vector, False))
    return picks


def _constant(
    node: fx.Node, size: int, states: Mapping[fx.Node, State], values: Values
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where an operand is one number, and the number."""
    dtype = node.meta["val"].dtype
    if node in states:
        return states[node].known, states[node].value.to(dtype)
    value = values.get(node)
    if value is not None and value.numel() in (1, size):
        return torch.ones(size, dtype=torch.bool), value.cpu().flatten().expand(size)
    return torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=dtype)


def _evaluate(step: Step, vectors: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The step's operator on one number a channel."""

    def given(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        vector = vectors[value].clone()
        first = step.kind == "batch_norm" and value is step.args[0]
        return vector.unsqueeze(0) if first else vector

    schema = step.node.target._schema.arguments  # type: ignore[union-attr]
    named = {name: given(value) for name, value in step.given.items()}
    args = [named[a.name] for a in schema if a.name in named and not a.kwarg_only]
    kwargs = {a.name: named[a.name] for a in schema if a.name in named and a.kwarg_only}
    kwargs.pop("device", None)
    return step.node.target(*args, **kwargs).flatten()  # type: ignore[operator]


def _class_of(result: torch.Tensor) -> torch.Tensor:
    if not result.is_floating_point():
        return torch.full(result.shape, ANY, dtype=torch.uint8)
    classes = torch.full(result.shape, FINITE, dtype=torch.uint8)
    classes[result == float("inf")] = PLUS
    classes[result == float("-inf")] = MINUS
    classes[torch.isnan(result)] = NAN
    return classes

"""Dead channels are removed, and what is left is a smaller dense layer.

A channel is dead where every layer that reads it either multiplies it by zeros (a zero column) or
finds one and the same number in it (a zero row, whose output is its bias, through an activation):
zero times anything adds nothing, and a constant goes into the reader's bias. Then the rows that
compute the channel and the columns that read it are cut out together, through activations, gates,
batch norm, depthwise convolutions, views, and, a head at a time, through attention.

What is exact:

- Finite inputs: the result is the dense one, up to the order of summation (a folded constant is
  rounded once more). A number that is finite in the dense model must be so on the way to it:
  arithmetic that is removed is taken not to overflow. Hence float16, which does, is refused.
- Inputs with infinities or NaN: the same as dense. 0 times infinity is NaN, so in the dense model
  a dead channel turns every output of such a row into NaN. A few dead channels, the *witnesses*,
  therefore stay, chosen so that one of them is not finite whenever a removed one would be. One zero
  row is always enough: it is NaN for every bad input. Behind a ReLU, channels that are only ignored
  (zero columns) need about 2 + log2(in_features) of them, because relu(-inf) is 0. Where no choice
  of witnesses can be proved to do it, the group is refused. They cost next to nothing: the kept
  channels are filled up to a multiple of 16 anyway.
- Changed weights: the cut is made again as long as every removed channel is still dead.

A single layer with zero rows whose result is needed in full computes the others and is spread out
by an index, where the gain is worth the copy.

Trainable weights are left alone: that they contain zeros may be an accident.
"""

from __future__ import annotations

import torch
from torch import fx

from sparse_compiler.derived import PLAIN, has_version
from sparse_compiler.passes.base import Pass, Rewrite
from sparse_compiler.passes.dead_channels.cost import Gain, group_gain
from sparse_compiler.passes.dead_channels.cover import Witnesses, find_dead
from sparse_compiler.passes.dead_channels.finite import may_be_infinite
from sparse_compiler.passes.dead_channels.group import Group, Layer, find_layers, grow
from sparse_compiler.passes.dead_channels.rewrite import Cut, Plan, region_of, static_nodes
from sparse_compiler.passes.dead_channels.rows import cut_rows
from sparse_compiler.passes.dead_channels.weights import Values, zero_slices
from sparse_compiler.passes.verify import verifier
from sparse_compiler.region import replace_region
from sparse_compiler.static import StaticValues, arguments

# Below this share of dead channels nothing is gained that could be measured.
LEAST_SHARE = 0.02
# Matrix products work in vectors and tiles: kept channels are filled up to a multiple of this.
ALIGNMENT = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class DeadChannels(Pass):
    """Removes dead channels; see the module's text."""

    name = "dead_channels"

    def run(self, gm: fx.GraphModule) -> None:
        """Find, check, rewrite."""
        self._decided: set[tuple[fx.Node, int]] = set()
        self._zeros: dict[tuple[fx.Node, int], torch.Tensor] = {}
        while self._next_group(gm):
            pass
        if not self.context.training:
            cut_rows(gm, self.context, self._zeros_along, LEAST_SHARE, self._alignment)

    @property
    def _alignment(self) -> int:
        return 1 if self.context.options.selection == "always" else ALIGNMENT

    def _next_group(self, gm: fx.GraphModule) -> bool:
        """Decide groups until one is rewritten, which makes new nodes; whether one was."""
        static = StaticValues(gm, training=self.context.training)
        layers = find_layers(gm, static)
        zeros = [self._has_zeros(layer, static) for layer in layers.values()]
        if not any(zeros):
            return False
        for layer in layers.values():
            for dim in layer.in_dims:
                if (layer.x, dim) in self._decided:
                    continue
                self._decided.add((layer.x, dim))
                try:
                    group = grow(layer, dim, layers, static)
                except Exception as error:
                    self.context.failed(self._candidate(Group(), layer), error)
                    continue
                self._decided.update((item.x, group.axes[item.x].dim) for item in group.readers)
                if not self._is_candidate(group, layers, static):
                    continue
                rewrite = self._candidate(group, layer)
                try:
                    self._consider(gm, group, layers, static, rewrite)
                except Exception as error:
                    self.context.failed(rewrite, error)
                if rewrite.applied:
                    return True
        return False

    def _zeros_along(self, weight: fx.Node, dim: int, static: StaticValues) -> torch.Tensor:
        """Which slices of a weight are all zero."""
        key = (weight, dim)
        if key not in self._zeros:
            value = static.value(weight)
            assert value is not None
            if type(value) in PLAIN and value.layout is torch.strided:
                self._zeros[key] = zero_slices(value, dim)
            else:
                self._zeros[key] = torch.zeros(weight.meta["val"].shape[dim], dtype=torch.bool)
        return self._zeros[key]

    def _has_zeros(self, layer: Layer, static: StaticValues) -> bool:
        dims = {*layer.in_dims.values(), *layer.out_dims.values()}
        return any(bool(self._zeros_along(layer.weight, d, static).any()) for d in dims)

    def _is_candidate(
        self, group: Group, layers: dict[fx.Node, Layer], static: StaticValues
    ) -> bool:
        """Whether any channel could be dead: a zero column of a reader, or row of a writer."""
        columns = [
            (layer.weight, layer.in_dims[group.axes[layer.x].dim])
            for layer in layers.values()
            if layer.x in group.axes and group.axes[layer.x].dim in layer.in_dims
        ]
        rows = [
            (writer.weight, writer.out_dims[group.axes[writer.node].dim])
            for writer in group.writers
        ]
        return any(bool(self._zeros_along(*key, static).any()) for key in columns + rows)

    def _candidate(self, group: Group, start: Layer) -> Rewrite:
        names = [layer.name for layer in (*group.writers, *(group.readers or [start]))]
        rewrite = Rewrite("dead_channels", ", ".join(dict.fromkeys(names)))
        weight = group.writers[0] if group.writers else start
        rewrite.shape = weight.matrix_shape
        rewrite.dtype = str(weight.weight.meta["val"].dtype).removeprefix("torch.")
        self.context.rewrites.append(rewrite)
        return rewrite

    def _consider(
        self,
        gm: fx.GraphModule,
        group: Group,
        layers: dict[fx.Node, Layer],
        static: StaticValues,
        rewrite: Rewrite,
    ) -> None:
        if group.blockers:
            rewrite.reason = f"no channel can be removed: {group.blockers[0]}"
            return
        nodes = static_nodes(group, static)
        refusal = self._refuse_tensors(nodes, group, static)
        if refusal:
            rewrite.reason = refusal
            return
        values = [(node, static.value(node)) for node in nodes]
        known = Values((node, value) for node, value in values if value is not None)
        dead = find_dead(group, layers, known)
        rewrite.sparsity = float(dead.units.float().mean())
        count = int(dead.units.sum())
        rewrite.pattern = f"{count} of {group.units} channels"
        if not count:
            rewrite.reason = "its zero rows and columns belong to channels that others still use"
            return
        strangers = tuple(n for n in dict.fromkeys(group.strangers) if may_be_infinite(n, static))
        witnesses = Witnesses(group, layers, known, strangers).choose(dead.units)
        if witnesses is None:
            rewrite.reason = (
                "an infinite input would be NaN through a removed channel, and no dead channel "
                "that stays can be proved to say so"
            )
            return
        if not bool(witnesses.any()) and bool(dead.units.all()):
            witnesses[0] = True  # a layer without channels is no layer
        if not bool((dead.units & ~witnesses).any()):
            rewrite.reason = (
                "what is dead has to stay, as the witness that makes NaN of infinite inputs"
            )
            return
        removed = _aligned(dead.units & ~witnesses, self._alignment if _flat(group) else 1)
        share = float(removed.float().mean())
        if not share or (share < LEAST_SHARE and self.context.options.selection != "always"):
            rewrite.reason = f"{count} of {group.units} channels are too few to pay"
            return
        gain = group_gain(self.context.selector, group, removed)
        if not self._pays(gain, rewrite):
            return
        if self.context.out_of_fuel():
            rewrite.reason = "options['fuel'] is used up"
            return
        expressions = {node: static.expression(node) for node in nodes}
        plan = Plan(
            group,
            layers,
            strangers,
            dead.units,
            removed,
            {node: item for node, item in expressions.items() if item is not None},
        )
        region = region_of(group)
        refusal = _refuse_region(region.nodes, region.outputs) or region.why_not_movable(fresh=True)
        if refusal:
            rewrite.reason = f"no channel can be removed: {refusal}"
            return
        cut = Cut(plan, region, rewrite.target, known)
        replace_region(
            gm,
            region,
            cut,
            rule=self.name,
            fresh=True,
            verify=verifier(gm, static, self.context, rewrite.target),
        )
        gm.meta.setdefault("derived", []).extend(cut.derived)
        self._decided.update(cut.inputs)
        rewrite.applied, rewrite.format = True, "smaller dense"
        rewrite.reason = (
            f"{int(removed.sum())} of {group.units} channels are dead and were removed; {gain}"
        )

    def _pays(self, gain: Gain, rewrite: Rewrite) -> bool:
        rewrite.baseline_ms, rewrite.sparse_ms = gain.before_ms, gain.after_ms
        rewrite.speedup, rewrite.rows = gain.speedup, gain.rows
        options = self.context.options
        if options.selection == "always" or gain.speedup >= options.min_speedup:
            return True
        rewrite.reason = gain.unknown or f"not faster: {gain}"
        return False

    def _refuse_tensors(
        self, nodes: list[fx.Node], group: Group, static: StaticValues
    ) -> str | None:
        if self.context.training and any(static.is_trainable(node) for node in nodes):
            return (
                "the weights are being trained and their zeros may not last: compile under "
                "torch.no_grad() for inference"
            )
        for node in (*nodes, *group.axes):
            value = node.meta["val"]
            value = value[0] if isinstance(value, (list, tuple)) else value
            if value.dtype is torch.float16:
                return "it is float16, in which a removed channel may overflow: use bfloat16"
            if node in nodes and value.dtype not in _DTYPES:
                return f"{static.name(node)} is {value.dtype}: not looked into"
        for node in nodes:
            expression = static.expression(node)
            assert expression is not None
            for tensor in static.leaf_values(expression):
                if type(tensor) not in PLAIN:
                    return f"a weight is a {type(tensor).__name__}, a tensor subclass"
                if not has_version(tensor):
                    return (
                        "a weight is an inference tensor, whose changes cannot be seen: create "
                        "the model outside torch.inference_mode()"
                    )
        return None


def _flat(group: Group) -> bool:
    """Whether units are single channels, not heads."""
    return all(step.size <= group.units * step.axis.outer for step in group.steps)


def _aligned(removed: torch.Tensor, alignment: int) -> torch.Tensor:
    """Fewer removed units, so that the kept ones are a multiple of ``alignment``."""
    kept = int((~removed).sum())
    surplus = min(-kept % alignment, int(removed.sum()))
    result = removed.clone()
    result[removed.nonzero().flatten()[:surplus]] = False
    return result


def _may_be_random(node: fx.Node) -> bool:
    given = arguments(node)  # dropout and attention are tagged, but draw nothing in inference
    return bool(given.get("train", given.get("dropout_p", True)))


def _refuse_region(nodes: tuple[fx.Node, ...], outputs: tuple[fx.Node, ...]) -> str | None:
    for node in nodes:
        if "val" not in node.meta or isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{node.name} in between cannot be moved"
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and _may_be_random(node):
            return f"{node.name} in between is random"
    for node in outputs:
        if not isinstance(node.meta["val"], torch.Tensor):
            return f"a size of it, {node.name}, is used elsewhere"
    return None

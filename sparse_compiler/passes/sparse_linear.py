"""Linear layers with a static, pruned weight become sparse ones where that is faster.

Find: every contraction with one static side (``contraction.py``). Check: device, dtype, whether the
zeros are structure or accident, whether a format pays. Rewrite: pack the weight, put the sparse
operator in the layer's place, and remember how to pack it again when the weight changes.

Where zeros pay at batch 1, layers without zeros are most of what is left: in a graph with sparse
layers they are read by a kernel of our own, if that is faster. A model without zeros is left alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparse_compiler.derived import PLAIN, Remake, derive, fitted, has_version
from sparse_compiler.formats import bitmap, csr
from sparse_compiler.formats.blocking import MAX_UNITS
from sparse_compiler.formats.cost import DYNAMIC_ROWS, GEMV_ROWS, LEAST_SPARSITY, LinearProblem
from sparse_compiler.formats.pattern import Pattern, find_pattern
from sparse_compiler.ops import linear as _operators  # noqa: F401  registers the operators
from sparse_compiler.passes.base import Pass, Rewrite, module_path
from sparse_compiler.passes.contraction import Contraction, find_contractions
from sparse_compiler.passes.masked_linear import MaskedWeight, find_mask, rewrite_masked
from sparse_compiler.passes.verify import verifier
from sparse_compiler.region import Builder, Region, replace_region
from sparse_compiler.static import StaticExpression, StaticValues

DTYPES = (torch.float32, torch.bfloat16)

ops = torch.ops.sparse_compiler


class SparseLinear(Pass):
    """Rewrites linear layers; see the module's text."""

    name = "sparse_linear"

    def run(self, gm: fx.GraphModule) -> None:
        """Find, check, rewrite."""
        static = StaticValues(gm, training=self.context.training)
        self._with_gradient = descendants(gm)
        full: list[_Candidate] = []
        any_sparse = False
        for layer in find_contractions(gm, static):
            candidate = _Candidate(layer, Rewrite("linear", layer_name(layer, static)))
            self.context.rewrites.append(candidate.rewrite)
            self._attempt(self._consider, gm, candidate, static)
            any_sparse |= candidate.rewrite.applied
            if candidate.may_stream:
                full.append(candidate)
        if any_sparse and not self.context.training:
            # Backwards: a layer's input is then still the node that was found.
            for candidate in reversed(full):
                self._attempt(self._stream, gm, candidate, static)

    def _attempt(
        self,
        step: Callable[[fx.GraphModule, _Candidate, StaticValues], None],
        gm: fx.GraphModule,
        candidate: _Candidate,
        static: StaticValues,
    ) -> None:
        try:
            step(gm, candidate, static)
        except Exception as error:
            self.context.failed(candidate.rewrite, error)

    def _consider(self, gm: fx.GraphModule, candidate: _Candidate, static: StaticValues) -> None:
        layer, rewrite = candidate.layer, candidate.rewrite
        expression = static.expression(layer.weight)
        assert expression is not None
        value = layer.weight.meta["val"]
        rewrite.shape, rewrite.dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        region = Region.of([layer.node])
        refusal = (
            refuse_tensor(value)
            or _refuse_leaves(static, expression)
            or _refuse_conversion(layer)
            or region.why_not_movable(fresh=True)
        )
        if refusal:
            rewrite.reason = refusal
            return
        matrix = layer.matrix(static.value(layer.weight))  # type: ignore[arg-type]
        pattern = find_pattern(matrix)
        rewrite.shape, rewrite.sparsity = pattern.shape, pattern.sparsity
        rewrite.pattern, rewrite.near_misses = pattern.name, pattern.near_misses
        candidate.pattern = pattern
        if pattern.nonzeros == matrix.numel():
            rewrite.reason = "the weight has no zeros"
            return
        masked = None
        if static.is_trainable(layer.weight):
            masked = find_mask(layer.weight, static)
            if masked is None:
                rewrite.reason = (
                    "the weight is being trained and nothing in the model keeps its zeros: mask "
                    "it (torch.nn.utils.prune), or compile under torch.no_grad() for inference"
                )
                return
            mask = static.value(masked.mask)
            assert mask is not None
            pattern = find_pattern(masked.keeps(layer, mask))
            rewrite.sparsity, rewrite.pattern = pattern.sparsity, pattern.name
        elif self.context.training and layer.x in self._with_gradient:
            # Its own zeros are its mask: the gradient of its input is a sparse product, too.
            masked = MaskedWeight(layer.weight, layer.weight, lambda weight: weight != 0)
        refusal = refuse_pattern(pattern, trained=masked is not None)
        if refusal:
            rewrite.reason = refusal
            return
        problem = problem_of(layer, pattern, value.dtype, training=masked is not None)
        rewrite.rows = problem.rows
        if self.context.out_of_fuel():
            rewrite.reason = "options['fuel'] is used up"
            return
        decision = self.context.selector.choose(problem, matrix)
        rewrite.reason, rewrite.speedup = decision.reason, decision.speedup
        rewrite.baseline_ms, rewrite.sparse_ms = decision.baseline_ms, decision.sparse_ms
        if decision.format is None:
            return
        if masked is not None:
            rewrite_masked(gm, layer, static, masked, decision, problem, self.context, rewrite)
            return
        rows = None if problem.dynamic else problem.rows[0]
        packed = pack(decision.format, matrix, pattern, rows)
        attributes: list[str] = []

        def build(builder: Builder, *inputs: fx.Node) -> fx.Node:
            nodes = [builder.constant(name, tensor) for name, tensor in packed.tensors.items()]
            attributes.extend(str(node.target) for node in nodes)
            return layer.build(
                builder, lambda x: builder.call(packed.operator, x, *nodes, *packed.literals)
            )

        replace_region(
            gm,
            region,
            build,
            rule=f"{self.name}: {packed.format}",
            verify=verifier(gm, static, self.context, rewrite.target),
            fresh=True,
        )
        gm.meta.setdefault("derived", []).append(
            derive(attributes, expression, _remake(layer, packed), rewrite.target)
        )
        rewrite.applied, rewrite.format = True, packed.format
        rewrite.packed_bytes = sum(t.numel() * t.itemsize for t in packed.tensors.values())

    def _stream(self, gm: fx.GraphModule, candidate: _Candidate, static: StaticValues) -> None:
        """Give a layer that has hardly any zeros the kernel for dense weights and few rows."""
        layer, rewrite = candidate.layer, candidate.rewrite
        assert candidate.pattern is not None
        dtype = layer.weight.meta["val"].dtype
        problem = problem_of(layer, candidate.pattern, dtype, training=False)
        decision = self.context.selector.choose(problem, static.value(layer.weight))  # type: ignore[arg-type]
        rewrite.rows, rewrite.speedup = problem.rows, decision.speedup
        rewrite.baseline_ms, rewrite.sparse_ms = decision.baseline_ms, decision.sparse_ms
        rewrite.reason += f"; {decision.reason}"
        if decision.format is None:
            return
        if self.context.out_of_fuel():
            rewrite.reason += "; options['fuel'] is used up"
            return

        def build(builder: Builder, *inputs: fx.Node) -> fx.Node:
            return layer.build(
                builder, lambda x: builder.call(ops.linear_dense.default, x, layer.weight)
            )

        replace_region(
            gm,
            Region.of([layer.node]),
            build,
            rule=f"{self.name}: {decision.format}",
            verify=verifier(gm, static, self.context, rewrite.target),
            fresh=True,
        )
        rewrite.applied, rewrite.format = True, decision.format


@dataclasses.dataclass
class _Candidate:
    """A layer under consideration; ``pattern`` is None until its weight has been looked at."""

    layer: Contraction
    rewrite: Rewrite
    pattern: Pattern | None = None

    @property
    def may_stream(self) -> bool:
        """Whether its weight is (nearly) full, lies as [out, in], and meets few rows."""
        layer, pattern = self.layer, self.pattern
        if self.rewrite.applied or pattern is None or pattern.sparsity >= LEAST_SPARSITY:
            return False
        plain = layer.w_letters == layer.out_feature_letters + layer.in_letters
        contiguous = plain and layer.weight.meta["val"].is_contiguous()
        few = isinstance(layer.rows, int) and 1 <= layer.rows <= GEMV_ROWS
        return contiguous and len(layer.w_letters) == 2 and few and pattern.nonzeros > 0


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed weight: the operator that multiplies by it, its tensors, and its literals."""

    format: str
    operator: Any
    tensors: dict[str, torch.Tensor]
    literals: tuple[int, ...]
    pattern: Pattern
    rows: int | None


def pack(
    name: str, matrix: torch.Tensor, pattern: Pattern, rows: int | None, k_block: int | None = None
) -> Packed:
    """Pack a weight [out_features, in_features] in the format ``name``."""
    if name == "bitmap":
        layout, values = bitmap.pack(matrix)
        tensors = {"values": values, "bits": layout.bits, "starts": layout.starts}
        return Packed(name, ops.linear_bitmap.default, tensors, pattern.shape, pattern, rows)
    group = csr.group_of(name, pattern)
    blocked, values = csr.pack(matrix, group=group, rows=rows, k_block=k_block)
    tensors = {"values": values, "columns": blocked.columns, "segments": blocked.segments}
    literals = (*pattern.shape, group, blocked.k_block)
    return Packed(name, ops.linear_csr.default, tensors, literals, pattern, rows)


def _remake(layer: Contraction, packed: Packed) -> Remake:
    """How to pack a changed weight so that the compiled code can take it."""
    k_block = packed.literals[3] if len(packed.literals) > 3 else None

    def remake(value: torch.Tensor) -> list[torch.Tensor]:
        matrix = layer.matrix(value)
        again = pack(packed.format, matrix, packed.pattern, packed.rows, k_block)
        return [
            fitted(new, old)
            for new, old in zip(again.tensors.values(), packed.tensors.values(), strict=True)
        ]

    return remake


def descendants(gm: fx.GraphModule) -> set[fx.Node]:
    """Nodes that depend on an input that requires grad; on any input where that is not known."""
    sources = gm.meta.get("with_gradient")
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            inside = sources is None or node.name in sources
        else:
            inside = any(source in found for source in node.all_input_nodes)
        if inside:
            found.add(node)
    return found


def layer_name(layer: Contraction, static: StaticValues) -> str:
    """The module's path, from the weight's name: ``layers.0.mlp.up_proj``."""
    expression = static.expression(layer.weight)
    assert expression is not None
    names = [static.name(leaf) for leaf in expression.leaves]
    name = next((name for name in names if "mask" not in name), layer.node.name)
    name = re.sub(r"\.original\d*$", "", name)
    for suffix in (".weight", ".weight_orig", ".parametrizations"):
        name = name.removesuffix(suffix)
    return name.replace(".parametrizations.weight", "") or module_path(layer.node, name)


def refuse_tensor(value: torch.Tensor) -> str | None:
    """Why no sparse kernel can take a weight of this device and dtype, or None."""
    if value.layout is not torch.strided:
        return f"the weight is a {value.layout} tensor: pass it dense, its zeros are found"
    if value.device.type != "cpu":
        return f"the weight is on {value.device.type}: this version has kernels for CPUs only"
    if value.is_complex():
        return "the weight is complex: sparse kernels take float32 and bfloat16"
    if value.dtype is torch.float64:
        return "the weight is float64: sparse kernels take float32 and bfloat16"
    if value.dtype is torch.float16:
        return "the weight is float16, which CPUs compute through float32: use bfloat16 or float32"
    if value.dtype not in DTYPES:
        return f"the weight is {value.dtype} (quantized?): sparse kernels take float32 and bfloat16"
    return None


def _refuse_leaves(static: StaticValues, expression: StaticExpression) -> str | None:
    for tensor in static.leaf_values(expression):
        if type(tensor) not in PLAIN:
            return f"the weight is a {type(tensor).__name__}, a tensor subclass: not looked into"
        if not has_version(tensor):
            return (
                "the weight is an inference tensor, whose changes cannot be seen: create the model "
                "outside torch.inference_mode()"
            )
    return None


def _refuse_conversion(layer: Contraction) -> str | None:
    dtypes = [node.meta["val"].dtype for node in (layer.x, layer.weight, layer.node)]
    if len(set(dtypes)) == 1:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{layer.node.target} converts its operands: {names[0]} times {names[1]} is {names[2]}"


def refuse_pattern(pattern: Pattern, *, trained: bool) -> str | None:
    """Why no format can hold such a weight, or would pay, or None."""
    out_features, in_features = pattern.shape
    if pattern.sparsity < LEAST_SPARSITY:
        return f"{pattern.sparsity:.0%} zeros are too few for any format to pay"
    if in_features > MAX_UNITS:
        return f"in_features {in_features} is above {MAX_UNITS}, which 16-bit columns can name"
    if trained and out_features > MAX_UNITS:
        return f"out_features {out_features} is above {MAX_UNITS}, which 16-bit columns can name"
    if trained and out_features * in_features >= 2**31 - 2**10:
        return "it has more than 2**31 weights, which 32-bit positions cannot name"
    if pattern.nonzeros >= 2**31 - 2**10:
        return "more than 2**31 weights are kept, which 32-bit positions cannot name"
    return None


def problem_of(
    layer: Contraction, pattern: Pattern, dtype: torch.dtype, *, training: bool
) -> LinearProblem:
    """The decision to be made about a layer."""
    rows = layer.rows
    dynamic = not isinstance(rows, int)
    if dynamic:
        hint = rows.node.hint if hasattr(rows, "node") else None
        counts = tuple(sorted({*DYNAMIC_ROWS, *([int(hint)] if hint else [])}))
    else:
        counts = (max(1, rows),)
    return LinearProblem(
        pattern.shape[0],
        pattern.shape[1],
        counts,
        dtype,
        pattern,
        dynamic,
        torch.get_num_threads(),
        training,
    )

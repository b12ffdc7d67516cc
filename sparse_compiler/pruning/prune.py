"""`prune_`: one-shot pruning of a model, in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparse_compiler.errors import nearest
from sparse_compiler.pruning.criteria import Criterion, criterion
from sparse_compiler.pruning.errors import PruningError
from sparse_compiler.pruning.layers import Layer, Selector, collect_input_norms, find_layers
from sparse_compiler.pruning.patterns import NM, Pattern, Units, keep_largest, parse_pattern

_SCOPES = ("row", "layer", "global")


@dataclass(frozen=True)
class LayerReport:
    """What happened to one weight.

    Attributes:
        name: module name; the first one for a weight that several modules share.
        shape: (out_features, in_features).
        pattern: the pattern asked for.
        sparsity_before: fraction of zeros before.
        sparsity_after: fraction of zeros after.
        kept_energy: share of the layer's summed score that stayed, 1.0 where nothing was lost.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity_before: float
    sparsity_after: float
    kept_energy: float


@dataclass(frozen=True)
class PruningReport:
    """The result of `prune_`, one entry a weight; ``print(report)`` shows a table."""

    method: str
    layers: tuple[LayerReport, ...]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned weights together."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        zeros = sum(n * layer.sparsity_after for n, layer in zip(sizes, self.layers, strict=True))
        return zeros / max(sum(sizes), 1)

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [
            f"{'layer':{width}}  {'shape':>13}  pattern       zeros before  after  kept energy"
        ]
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            lines.append(
                f"{layer.name:{width}}  {shape:>13}  {layer.pattern:12}  "
                f"{layer.sparsity_before:12.1%}  {layer.sparsity_after:5.1%}  "
                f"{layer.kept_energy:11.1%}"
            )
        lines.append(f"{self.method}: {len(self.layers)} weights, {self.sparsity:.1%} zeros in all")
        return "\n".join(lines)


def prune_(
    model: nn.Module,
    *,
    pattern: str,
    method: str = "magnitude",
    sparsity: float | None = None,
    calibration: Iterable[Any] | None = None,
    scope: str | None = None,
    include: Selector | None = None,
    exclude: Selector | None = None,
    as_mask: bool = False,
) -> PruningReport:
    """Sets the least important weights of a model to zero, once, in place.

    All masks are computed and checked before the first weight is written: after an error the model
    is what it was. Weights are written with in-place operations under ``no_grad``, so a compiled
    model notices; shared weights are scored with the inputs of every user and pruned once.

    Args:
        model: the model; its Linear layers, transformers' Conv1D and 1×1 Conv2d are considered.
        pattern: ``"2:4"`` or any ``"N:M"`` (N kept of each M consecutive inputs),
            ``"unstructured"``, blocks of rows × columns such as ``"16x16"`` or ``"4x1"``,
            ``"rows"`` (output features) or ``"columns"`` (input features).
        method: ``"magnitude"`` (Han et al., arXiv:1506.02626) or ``"wanda"`` (Sun et al.,
            arXiv:2306.11695). Wanda's input norms come from one pass of the dense model, where the
            paper's code prunes block after block and feeds each the output of the pruned ones.
        sparsity: fraction of the pattern's units to remove, strictly between 0 and 1, zeros that
            are already there included; not given for N:M.
        calibration: batches for methods that look at inputs: each a tensor, a tuple of positional
            or a mapping of keyword arguments of the model.
        scope: what competes with what: ``"row"`` (of output features), ``"layer"`` or
            ``"global"``. Default: what the method's paper does (row for Wanda), else the layer.
        include: glob patterns over module names, or a predicate (name, module) -> bool. Default:
            every linear layer except ``lm_head``, the model's output embedding and weights shared
            with an embedding.
        exclude: the same, for layers to leave alone.
        as_mask: keep the weights and attach the masks with ``torch.nn.utils.prune`` (the mask is
            part of the model, and fine-tuning keeps the zeros) instead of writing zeros.

    Returns:
        A `PruningReport`.

    Raises:
        PruningError: the request is not possible; the message says what to write instead.
    """
    how = parse_pattern(pattern)
    rule = criterion(method)
    _check_arguments(how, rule, sparsity, calibration, scope)
    layers = find_layers(model, include, exclude)
    for layer in layers:
        _check_layer(model, layer, how, as_mask)
    if rule.needs_inputs:
        assert calibration is not None
        collect_input_norms(model, layers, calibration)
    masks = _masks(layers, how, rule, sparsity, scope or _default_scope(how, rule))
    report = PruningReport(
        method,
        tuple(
            _layer_report(layer, mask, how, rule) for layer, mask in zip(layers, masks, strict=True)
        ),
    )
    for layer, mask in zip(layers, masks, strict=True):
        _write(layer, layer.like_weight(mask), as_mask)
    return report


def _default_scope(how: Pattern, rule: Criterion) -> str:
    single_row = isinstance(how, Units) and how.rows is not None and how.columns is not None
    return "row" if rule.per_row and single_row else "layer"


def _check_arguments(
    how: Pattern,
    rule: Criterion,
    sparsity: float | None,
    calibration: Iterable[Any] | None,
    scope: str | None,
) -> None:
    if isinstance(how, NM):
        if sparsity is not None:
            raise PruningError(
                f"{how.name} already fixes the sparsity at {1 - how.n / how.m:.0%}; "
                "leave sparsity out."
            )
        if scope is not None:
            raise PruningError(f"{how.name} chooses within each group of {how.m}; leave scope out.")
    elif sparsity is None:
        raise PruningError(f"pattern {how.name!r} needs sparsity, for example sparsity=0.6.")
    elif not 0 < sparsity < 1:
        percent = f"; write sparsity={sparsity / 100:g} for {sparsity:g} %"
        raise PruningError(
            f"sparsity={sparsity} is not a fraction between 0 and 1"
            f"{percent if 1 < sparsity < 100 else ''}."
        )
    if scope is not None and scope not in _SCOPES:
        raise PruningError(f"unknown scope {scope!r}.{nearest(scope, _SCOPES)}")
    if scope == "row" and isinstance(how, Units) and (how.rows is None or how.columns is None):
        raise PruningError(f"pattern {how.name!r} cannot compete within a row; use scope='layer'.")
    if rule.needs_inputs and calibration is None:
        raise PruningError(
            f"method {rule.name!r} looks at the layers' inputs: give calibration=[batch, ...], "
            "a list of model inputs."
        )
    if calibration is not None and not rule.needs_inputs:
        raise PruningError(
            f"method {rule.name!r} does not look at inputs; leave calibration out or use "
            "method='wanda'."
        )
    if isinstance(calibration, (torch.Tensor, dict, str)):
        raise PruningError("calibration is a list of batches; write calibration=[batch].")


def _check_layer(model: nn.Module, layer: Layer, how: Pattern, as_mask: bool) -> None:
    weight = layer.weight
    shape = (weight.shape[1], weight.shape[0]) if layer.transposed else (*weight.shape[:2],)
    why = how.refusal((shape[0], shape[1]))
    if why:
        raise PruningError(
            f"{layer.name} cannot be {how.name}: {why}; choose another pattern or "
            f"exclude={layer.name!r}."
        )
    if as_mask:
        owners = {
            name: module
            for name, module in model.named_modules()
            if any(p is weight for p in module._parameters.values())
        }
        others = [name for name, module in owners.items() if module not in layer.modules]
        if others:
            raise PruningError(
                f"{layer.name} shares its weight with {others[0]}, which a mask would not reach; "
                f"use as_mask=False or exclude={layer.name!r}."
            )


def _masks(
    layers: list[Layer], how: Pattern, rule: Criterion, sparsity: float | None, scope: str
) -> list[Tensor]:
    """A mask [out_features, in_features] for each layer, True where a weight stays."""
    if isinstance(how, NM):
        return [how.keep(_scores(layer, rule)) for layer in layers]
    assert sparsity is not None
    if scope == "global":
        units = [how.sum(_scores(layer, rule)) for layer in layers]
        kept = keep_largest(torch.cat([u.flatten().cpu() for u in units]), sparsity)
        parts = kept.split([u.numel() for u in units])
        chosen = [p.view(u.shape).to(u.device) for p, u in zip(parts, units, strict=True)]
        return [
            how.expand(c, layer.matrix().shape) for c, layer in zip(chosen, layers, strict=True)
        ]
    masks = []
    for layer in layers:
        scores = _scores(layer, rule)
        units_here = how.sum(scores)
        if scope == "row":
            chosen_here = keep_largest(units_here, sparsity)
        else:
            chosen_here = keep_largest(units_here.flatten(), sparsity).view(units_here.shape)
        masks.append(how.expand(chosen_here, scores.shape))
    return masks


def _scores(layer: Layer, rule: Criterion) -> Tensor:
    return rule.score(layer.matrix(), layer.input_norms)


def _layer_report(layer: Layer, mask: Tensor, how: Pattern, rule: Criterion) -> LayerReport:
    matrix, scores = layer.matrix(), _scores(layer, rule)
    total = scores.sum().item()
    size = max(matrix.numel(), 1)
    return LayerReport(
        name=layer.name,
        shape=(matrix.shape[0], matrix.shape[1]),
        pattern=how.name,
        sparsity_before=(matrix == 0).sum().item() / size,
        sparsity_after=1 - (mask & (matrix != 0)).sum().item() / size,
        kept_energy=(scores * mask).sum().item() / total if total else 1.0,
    )


def _write(layer: Layer, mask: Tensor, as_mask: bool) -> None:
    if as_mask:
        for module in layer.modules:
            torch_prune.custom_from_mask(module, "weight", mask)
        return
    # A weight made under inference_mode may only be written there.
    with torch.inference_mode(layer.weight.is_inference()), torch.no_grad():
        layer.weight.masked_fill_(~mask, 0)

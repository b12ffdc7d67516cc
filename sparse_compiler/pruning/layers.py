"""Which weights of a model are pruned, and the inputs they see.

A weight used by several modules is one `Layer`: it is scored with the inputs of all of them and
pruned once. Every weight is looked at as [out_features, in_features], whatever way round its module
keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_compiler.errors import nearest
from sparse_compiler.pruning.errors import PruningError

Selector = str | Sequence[str] | Callable[[str, nn.Module], bool]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2), a linear layer with weight [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map over features: Linear, Conv1D or a 1×1 Conv2d."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear) or is_conv1d(module)


@dataclass(eq=False)
class Layer:
    """One weight and the modules that use it as a linear map."""

    name: str
    modules: list[nn.Module]
    weight: Tensor
    transposed: bool
    input_norms: Tensor | None = field(default=None, repr=False)

    def matrix(self) -> Tensor:
        """The weight as a detached float64 matrix [out_features, in_features]."""
        weight = self.weight.detach()
        weight = weight.t() if self.transposed else weight.flatten(1)
        return weight.to(torch.float64)

    def like_weight(self, mask: Tensor) -> Tensor:
        """A mask [out_features, in_features] in the weight's own shape."""
        return mask.t() if self.transposed else mask.reshape(self.weight.shape)


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    if callable(selector):
        return bool(selector(name, module))
    patterns = [selector] if isinstance(selector, str) else selector
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_names(what: str, selector: Selector | None, names: list[str]) -> None:
    if selector is None or callable(selector):
        return
    for pattern in [selector] if isinstance(selector, str) else selector:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PruningError(
                f"{what}={pattern!r} matches no linear layer.{nearest(pattern, names[:20])} "
                "Patterns are matched against the whole module name: '*.mlp.*'."
            )


def _output_modules(model: nn.Module) -> set[nn.Module]:
    """The layer that turns features into logits: as the model says, or by the name lm_head."""
    found = {m for name, m in model.named_modules() if name.split(".")[-1] == "lm_head"}
    get = getattr(model, "get_output_embeddings", None)
    if callable(get):
        head = get()
        if isinstance(head, nn.Module):
            found.add(head)
    return found


def find_layers(
    model: nn.Module, include: Selector | None = None, exclude: Selector | None = None
) -> list[Layer]:
    """The linear layers to prune, in the order of ``named_modules``.

    Args:
        model: the model.
        include: glob patterns over module names, or a predicate (name, module) -> bool. Without it:
            every linear layer but the output layer of a language model (``lm_head``, or what
            ``get_output_embeddings`` returns) and weights shared with an embedding.
        exclude: the same, for layers to leave alone.

    Raises:
        PruningError: nothing is left to prune, a pattern matches nothing, or a chosen layer's
            weight is not one that can be pruned in place.
    """
    linear = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if is_linear(m)]
    names = [name for name, _ in linear]
    if not linear:
        raise PruningError(
            "the model has no Linear, Conv1D or 1x1 Conv2d layer: there is nothing to prune."
        )
    _check_names("include", include, names)
    _check_names("exclude", exclude, names)

    embeddings = {
        id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    }
    heads = _output_modules(model)
    layers: dict[int, Layer] = {}
    for name, module in linear:
        if exclude is not None and _matches(exclude, name, module):
            continue
        if include is not None:
            if not _matches(include, name, module):
                continue
        elif module in heads or id(getattr(module, "weight", None)) in embeddings:
            continue
        weight = _plain_weight(name, module)
        layer = layers.setdefault(id(weight), Layer(name, [], weight, is_conv1d(module)))
        if layer.transposed != is_conv1d(module):
            raise PruningError(
                f"{layer.name} and {name} share a weight but use it in different orientations; "
                f"leave one out with exclude={name!r}."
            )
        if module not in layer.modules:
            layer.modules.append(module)
    if not layers:
        raise PruningError("include and exclude leave no layer to prune; widen include.")
    return list(layers.values())


def _plain_weight(name: str, module: nn.Module) -> Tensor:
    """The module's weight, if it is an ordinary parameter with values that can be written."""
    if parametrize.is_parametrized(module, "weight"):
        raise PruningError(
            f"{name}.weight is parametrized, so writing to it has no effect; call "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first, or "
            f"exclude={name!r}."
        )
    if "weight_orig" in module._parameters:
        raise PruningError(
            f"{name} already carries a mask from torch.nn.utils.prune; call "
            f"torch.nn.utils.prune.remove(module, 'weight') first, or exclude={name!r}."
        )
    weight = module._parameters.get("weight")
    if weight is None:
        raise PruningError(
            f"{name} ({type(module).__name__}) has no weight parameter of its own; "
            f"exclude={name!r}."
        )
    if isinstance(weight, nn.UninitializedParameter):
        raise PruningError(f"{name} is not initialized yet; run the model once before pruning.")
    if weight.layout != torch.strided or not weight.is_floating_point():
        raise PruningError(
            f"{name}.weight is {weight.dtype} with layout {weight.layout}; only dense "
            f"floating-point weights are pruned. Prune before quantizing, or exclude={name!r}."
        )
    if weight.is_meta:
        raise PruningError(f"{name}.weight is on the meta device; load its values first.")
    if any(s == 0 and n > 1 for s, n in zip(weight.stride(), weight.shape, strict=True)):
        raise PruningError(
            f"{name}.weight is an expanded view; assign weight.clone() to the layer first."
        )
    if not torch.isfinite(weight.detach()).all():
        raise PruningError(
            f"{name}.weight has NaN or infinite values; repair them, or exclude={name!r}."
        )
    return weight


def _add_input(layer: Layer, module: nn.Module, value: Tensor) -> None:
    if isinstance(module, nn.Conv2d):
        rows, columns = module.stride
        value = value[..., ::rows, ::columns].movedim(-3, -1)
    value = value.detach().reshape(-1, value.shape[-1])
    # Summed in float64: a few hundred thousand squares of very different size.
    norms = torch.linalg.vector_norm(value, dim=0, dtype=torch.float64).square()
    layer.input_norms = norms if layer.input_norms is None else layer.input_norms + norms


def collect_input_norms(model: nn.Module, layers: list[Layer], calibration: Iterable[Any]) -> None:
    """Sets each layer's ``input_norms`` [in_features], the squared L2 norm of each input feature.

    The batches run once through the unchanged model, in eval mode. Padding is counted like any
    other position, so give batches without it.

    Raises:
        PruningError: there was no batch, a layer was not reached, or an activation was not finite.
    """
    for layer in layers:
        layer.input_norms = None
    modes = {module: module.training for module in model.modules()}

    def hook_for(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            _add_input(layer, module, value)

        return hook

    handles = [
        module.register_forward_pre_hook(hook_for(layer), with_kwargs=True)
        for layer in layers
        for module in layer.modules
    ]
    batches = 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in calibration:
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, (tuple, list)):
                    model(*batch)
                else:
                    model(batch)
                batches += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if not batches:
        raise PruningError("calibration held no batch; give a list of model inputs.")
    for layer in layers:
        if layer.input_norms is None:
            raise PruningError(
                f"no calibration batch reached {layer.name}; give inputs that use it, or "
                f"exclude={layer.name!r}."
            )
        if not torch.isfinite(layer.input_norms).all():
            raise PruningError(
                f"the calibration inputs of {layer.name} have NaN or infinite values; "
                "look at the model's output on the calibration batches."
            )

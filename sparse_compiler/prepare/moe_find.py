"""Where a module keeps its experts: modules in a container, or stacked parameters."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparse_compiler.experts import Experts, routed
from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.prepare.agree import attempt
from sparse_compiler.prepare.moe_record import Reading, draws, read

_MOST_PASSTHROUGH = 64
_MOST_MATRICES = 4


def containers(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Children that may hold experts, alike modules with parameters, by name; with their keys.

    The name ``""`` is the module itself.
    """
    found = {}
    for name, child in [("", module), *module.named_children()]:
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and name:
            continue
        if name == "" and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        keys = tuple(key for key, part in child.named_children() if _kind(part) is not None)
        groups: dict[Any, list[str]] = {}
        for key in keys:
            groups.setdefault(_kind(child._modules[key]), []).append(key)
        alike = max(groups.values(), key=len, default=[])
        if len(alike) > 1 and (name == "" or len(alike) == len(list(child.children()))):
            found[name] = tuple(alike)
    return found


def _kind(part: nn.Module | None) -> Any:
    """Equal for modules that may be experts next to each other; None for what is none."""
    if part is None:
        return None
    shapes = tuple((name, p.shape) for name, p in part.named_parameters())
    # A decoder's layer has more: attention, and norms.
    matrices = sum(p.dim() > 1 for p in part.parameters())
    return (type(part), shapes) if 2 <= matrices <= _MOST_MATRICES else None


def stacks(module: nn.Module) -> list[str]:
    """Parameters of a module that may hold several experts each: no library layer owns them."""
    own = {
        f"{path}.{name}".lstrip("."): parameter
        for path, part in module.named_modules()
        if not type(part).__module__.startswith("torch.nn.")
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.dim() in (2, 3)
    }
    if sum(parameter.dim() == 3 for parameter in own.values()) > 1:
        return list(own)
    # Experts below each other, [experts * hidden, features].
    alike = len({parameter.shape for parameter in own.values()}) == 1
    return list(own) if len(own) > 1 and alike else []


def hooked(module: nn.Module) -> bool:
    """Whether somebody listens to a module, or to one in it."""
    tables = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    return any(getattr(part, table, None) for part in module.modules() for table in tables)


def described(module: nn.Module) -> str:
    """What a module's computation depends on besides its weights' values; alike for copies."""
    found: list[object] = []
    for path, part in module.named_modules():
        state = vars(part)
        settings = sorted(
            (name, value)
            for name, value in state.items()
            if isinstance(value, (bool, int, float, str))
            and name != "training"
            and not name.startswith(("_is_", "_fsdp"))
        )
        shapes = [(name, tuple(p.shape)) for name, p in part._parameters.items() if p is not None]
        found += [path, settings, shapes]
        if part is not module:
            forward = state.get("forward")
            ours = isinstance(forward, functools.partial) and forward.args[:1] == (part,)
            replaced = forward is not None and not ours
            found += [type(part).__module__, type(part).__qualname__, replaced]
    found.append([hooked(child) for child in module.children()])
    return hashlib.sha256(repr(found).encode()).hexdigest()


def from_modules(twin: nn.Module, path: str, keys: tuple[str, ...]) -> tuple[Experts, int]:
    """Experts that are modules, and the features of their tokens.

    Raises:
        Refused: an expert is not two linear layers with a function between them, or they differ.
    """
    container = twin if path == "" else twin.get_submodule(path)
    parts: list[nn.Module] = [container.get_submodule(key) for key in keys]
    first = parts[0]
    parameters = {name: p.detach() for name, p in first.named_parameters()}
    features = _features(first)
    token = _random(first, 1, features)
    reading = read(
        lambda: functional_call(first, parameters, (token,)), token, parameters, stacked=False
    )
    experts = _experts(reading, path, keys, len(keys))
    rows = 2 * len(keys)
    x = _random(first, rows, features)
    ids = (torch.arange(rows, device=x.device) % len(keys)).unsqueeze(-1)
    with torch.no_grad():
        expected = torch.cat([parts[i % len(keys)](x[i : i + 1]) for i in range(rows)])
        actual = routed(twin, experts, x, ids)
    _same(
        actual,
        expected,
        "an expert does more than two linear layers and what is between them, or not all do the "
        "same",
    )
    return experts, features


def from_stack(
    twin: nn.Module, run: Callable[[Tensor, Tensor, Tensor], Any], choices: int, features: int
) -> Experts:
    """Experts whose weights are stacked in parameters of the module.

    Args:
        twin: the module.
        run: calls it with tokens [1, D], numbers and weights [1, K].
        choices: K.
        features: D.

    Raises:
        Refused: as for ``from_modules``.
    """
    parameters = {name: p.detach() for name, p in twin.named_parameters()}
    token = _random(twin, 1, features)
    gates = torch.full((1, choices), 1 / choices, device=token.device)

    def call(expert: int) -> Any:
        ids = torch.full((1, choices), expert, device=token.device)
        with torch.no_grad():
            return run(token, ids, gates)

    readings = [
        read(functools.partial(call, expert), token, parameters, stacked=True) for expert in (0, 1)
    ]
    shares = {name: readings[1].offsets[name] - at for name, at in readings[0].offsets.items()}
    if not all(shares.values()):
        raise Refused("its experts share a weight")
    number = min(parameters[name].numel() // size for name, size in shares.items())
    passthrough = 0
    while passthrough < _MOST_PASSTHROUGH:
        try:
            result = call(number + passthrough)
        except (RuntimeError, IndexError):
            break
        if result.shape[-1] != features or not torch.allclose(result.reshape(1, -1), token):
            break
        passthrough += 1
    return _experts(readings[0], None, (), number, passthrough)


def random_in_training(module: nn.Module, features: int) -> bool:
    """Whether an expert draws random numbers in training."""
    was = module.training
    module.train()
    try:
        token = _random(module, 1, features)
        return draws(lambda: module(token), token)
    finally:
        module.train(was)


def _experts(
    reading: Reading, path: str | None, keys: tuple[str, ...], number: int, passthrough: int = 0
) -> Experts:
    return Experts(
        path,
        keys,
        number,
        reading.inner,
        reading.inner_bias,
        reading.outer,
        reading.outer_bias,
        reading.body,
        passthrough,
    )


def _sizes(expert: nn.Module) -> Iterator[int]:
    """Sizes that an expert's tokens may have, the likely first."""
    seen = set()
    for part in expert.modules():
        size = getattr(part, "in_features", None)
        if isinstance(size, int) and size not in seen:
            seen.add(size)
            yield size
    for parameter in expert.parameters():
        for size in parameter.shape:
            if parameter.dim() > 1 and size not in seen:
                seen.add(size)
                yield size


def _features(expert: nn.Module) -> int:
    """The size of an expert's tokens."""
    why = "it has no matrix"
    for size in _sizes(expert):
        tokens = _random(expert, 2, size)
        result, error = attempt(functools.partial(expert, tokens))
        if isinstance(result, Tensor) and result.dim() == 2:
            return size
        why = error or "its result is no matrix"
    raise Refused(f"an expert takes no single tensor of tokens: {why}")


def _random(module: nn.Module, rows: int, features: int) -> Tensor:
    return torch.randn(rows, features, device=next(module.parameters()).device)


def _same(actual: Tensor, expected: Tensor, sentence: str) -> None:
    size = float(expected.abs().max())
    if actual.shape != expected.shape or not math.isfinite(size):
        raise Refused(sentence)
    if not float((actual - expected).abs().max()) <= 1e-4 * size:
        raise Refused(sentence)

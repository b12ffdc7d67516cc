"""Longformer and LED: a sliding window, global tokens, and two sets of projections.

The original cuts the sequence into overlapping chunks and gathers global tokens by ``nonzero()``,
which is O(n·w) by hand and 17 graphs for one layer. Its meaning is the sum of two attentions with
masks that share no row::

    local   rows that are neither global nor padding, projections query, key, value
            key k of row q:  |q - k| <= w and k is neither global nor padding, or k is global
    global  rows that are global, projections query_global, key_global, value_global
            key k:           k is not padding

``scaled_dot_product_attention`` gives zero to a row without keys, so the sum is the row's own
attention, and zero for padding. No shape depends on how many tokens are global. Compiled, tiles
outside of the window and rows without global tokens are skipped.

Source: Longformer (Beltagy et al., 2020).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_true
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparse_compiler.prepare.registry import Calls, Case, Preparer
from sparse_compiler.prepare.swap import original, replacement_of, replacing, untraced

_PROJECTIONS = ("query", "key", "value", "query_global", "key_global", "value_global")
_NUMBERS = ("num_heads", "head_dim", "one_sided_attn_window_size")
_PARAMETERS = (
    "hidden_states",
    "attention_mask",
    "is_index_masked",
    "is_index_global_attn",
    "is_global_attn",
    "output_attentions",
)


def attention_forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    is_index_masked: Tensor | None = None,
    is_index_global_attn: Tensor | None = None,
    is_global_attn: bool | None = None,
    output_attentions: bool = False,
) -> Any:
    """The original's ``forward``, as two masked attentions.

    Args:
        module: the original.
        hidden_states: [batch, n, width].
        attention_mask: [batch, n], 0 for a local token, below 0 for padding, above 0 for a global
            token.
        is_index_masked: bool [batch, n], True at padding.
        is_index_global_attn: bool [batch, n], True at global tokens.
        is_global_attn: whether there are any.
        output_attentions: whether attention probabilities are asked for; the original has them.

    Returns:
        A tuple with the output, [batch, n, width].
    """
    batch, n, width = hidden_states.shape
    window = module.one_sided_attn_window_size
    if (
        not replacing()
        or output_attentions
        or attention_mask is None
        or is_index_masked is None
        or is_index_global_attn is None
        or n % (2 * window)
    ):
        # What the original complains about, it shall complain about.
        masks = (attention_mask, is_index_masked, is_index_global_attn)
        return untraced(module, hidden_states, *masks, is_global_attn, output_attentions)

    def attend(query: nn.Module, key: nn.Module, value: nn.Module, mask: Tensor) -> Tensor:
        shape = (batch, n, module.num_heads, module.head_dim)
        q, k, v = (part(hidden_states).view(shape).transpose(1, 2) for part in (query, key, value))
        dropout = module.dropout if module.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
        return y.transpose(1, 2).reshape(batch, n, width)

    position = torch.arange(n, device=hidden_states.device)
    near = (position[:, None] - position[None, :]).abs() <= window
    near = near & (attention_mask == 0)[:, None, None, :]
    real_query = ~is_index_masked[:, None, :, None]
    # Not known while tracing counts as True: the masks say where the global tokens are, if any.
    if is_global_attn is None or not guard_or_true(is_global_attn):
        return (attend(module.query, module.key, module.value, near & real_query),)
    global_query = is_index_global_attn[:, None, :, None]
    local = (near | is_index_global_attn[:, None, None, :]) & ~global_query & real_query
    y = attend(module.query, module.key, module.value, local)
    everything = global_query & ~is_index_masked[:, None, None, :]
    y = y + attend(module.query_global, module.key_global, module.value_global, everything)
    return (y,)


class LongformerAttention(Preparer):
    """Self-attention with a window and global tokens, as in Longformer and LED's encoder."""

    name = "Longformer attention"

    def find(self, module: nn.Module) -> bool:
        parts = all(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)
        return parts and all(isinstance(getattr(module, name, None), int) for name in _NUMBERS)

    def refuse(self, module: nn.Module, calls: Calls | None) -> str | None:
        names = tuple(inspect.signature(module.forward).parameters)
        if names != _PARAMETERS:
            return f"its forward takes {', '.join(names)}; known is {', '.join(_PARAMETERS)}"
        if not isinstance(getattr(module, "dropout", None), float | int):
            return "its dropout is not a number, so it is not known where it is applied"
        if calls is None:
            return None
        if module not in calls:
            return "the example never reaches it: give example inputs that run it"
        if any(call.get("output_attentions") for call in calls[module]):
            return (
                "the example asks for attention probabilities, which a masked attention never "
                "builds: call the model without output_attentions"
            )
        return None

    def signature(self, module: Any) -> Hashable:
        return super().signature(module), module.one_sided_attn_window_size, module.num_heads

    def cases(self, module: Any, calls: Calls | None, thorough: bool) -> Iterable[Case]:
        window = module.one_sided_attn_window_size
        if not thorough:
            yield self._case(module, 1, 2 * window, True, "padding and global tokens")
            return
        yield self._case(module, 4, 2 * window, True, "padding and global tokens")
        yield self._case(module, 1, 6 * window, True, "a longer sequence")
        yield self._case(module, 2, 4 * window, False, "no global tokens")

    def forward(self) -> Callable[..., Any]:
        return attention_forward

    @staticmethod
    def _case(module: Any, batch: int, n: int, has_global: bool, name: str) -> Case:
        hidden = torch.randn(batch, n, module.num_heads * module.head_dim)
        valid = _valid(batch, n)
        flags = (torch.rand(batch, n) < 3 / n) & valid & has_global
        flags[0, n // 2] = has_global
        flags[2:] = False
        limits = torch.finfo(torch.float32)
        mask = torch.zeros(batch, n).masked_fill(~valid, limits.min)
        mask = mask.masked_fill(flags, limits.max)
        device = next(module.parameters()).device
        args = (hidden, mask, ~valid, flags)
        return Case(name, (*(t.to(device) for t in args), has_global))


class _PerhapsGlobal(TorchFunctionMode):
    """Answers ``.item()`` of a bool with True, where the value is not known."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.item and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


def encoder_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The original's ``forward``, without asking the data whether any token is global.

    The question, ``.any().item()``, cuts the graph and waits for the device. Yes is always a right
    answer for the replaced attention: without global tokens, the rows of their mask are empty.
    """
    attentions = kwargs.get("output_attentions")
    if attentions is None:
        attentions = getattr(module.config, "output_attentions", False)
    # Everything behind the inputs and their mask is given by keyword, output_attentions included.
    if not replacing() or attentions or len(args) > 2:
        return original(module, *args, **kwargs)
    with _PerhapsGlobal():
        return original(module, *args, **kwargs)


class LongformerEncoder(Preparer):
    """The stack of layers around replaced attention modules, which asks for global tokens."""

    name = "Longformer encoder"
    exact = False

    def find(self, module: nn.Module) -> bool:
        return any(
            isinstance(child, nn.ModuleList)
            and len(child) > 0
            and all(_attentions(layer) for layer in child)
            for child in module.children()
        )

    def refuse(self, module: nn.Module, calls: Calls | None) -> str | None:
        if any(replacement_of(item) is not attention_forward for item in _attentions(module)):
            return "an attention module in it was not replaced, and wants to know the answer"
        names = inspect.signature(module.forward).parameters
        if "attention_mask" not in names or not {"hidden_states", "inputs_embeds"} & set(names):
            return f"its forward takes {', '.join(names)}, neither hidden_states nor inputs_embeds"
        seen = [call for item in _attentions(module) for call in (calls or {}).get(item, ())]
        if calls is not None and not any(call.get("is_global_attn") for call in seen):
            return (
                "the example has no global tokens, so the model goes on asking for them: where "
                "there are none it saves their projections, at the price of a graph break"
            )
        return None

    def cases(self, module: Any, calls: Calls | None, thorough: bool) -> Iterable[Case]:
        parts = _attentions(module)
        n = math.lcm(*(2 * part.one_sided_attn_window_size for part in parts))
        parameter = next(module.parameters())
        width = parts[0].num_heads * parts[0].head_dim
        # Only where there are none does the answer differ from the original's.
        hidden, valid = torch.randn(1, n, width).to(parameter), _valid(1, n)
        if "inputs_embeds" in inspect.signature(type(module).forward).parameters:
            kwargs = {"inputs_embeds": hidden, "attention_mask": valid.long().to(hidden.device)}
            yield Case("no global tokens", (), kwargs)
        else:
            mask = torch.zeros(1, n, dtype=hidden.dtype)
            mask = mask.masked_fill(~valid, torch.finfo(hidden.dtype).min).to(hidden.device)
            yield Case("no global tokens", (hidden, mask))

    def forward(self) -> Callable[..., Any]:
        return encoder_forward


def _attentions(module: nn.Module) -> list[Any]:
    find = LongformerAttention().find
    return [part for part in module.modules() if find(part)]


def _valid(batch: int, n: int) -> Tensor:
    """Tokens that are not padding, bool [batch, n]: the first, all, the last, none of them."""
    position = torch.arange(n)
    valid = [position < n - n // 3, position >= 0, position >= n // 4, position < 0]
    return torch.stack(valid[:batch])

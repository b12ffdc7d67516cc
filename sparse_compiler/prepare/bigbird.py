"""BigBird's block-sparse attention: a window, two global blocks, and random blocks.

The original treats the first two, the last two and all other rows of blocks in five ways, with a
plan of random blocks drawn by numpy inside ``forward``: O(n·(5 + r)·block) by hand, but 10 graphs
for one layer and an [n, n] matrix of probabilities that nobody asked for. Its meaning::

    the first and the last block of queries see all keys
    every other block i sees blocks 0, i - 1, i, i + 1, the last, and its r random blocks
    nobody sees padding, and padding gets zero

A random block may be one that is seen already. It then counts twice, because softmax has its keys
twice: m times is log m added to the score. In eval mode the original's random blocks are all block
0, which counts 1 + r times: nothing but comparisons of indices is left. In training they depend on
the seed and the length alone, and are kept in buffers that are not saved.

Source: BigBird (Zaheer et al., 2020).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_compiler.prepare.registry import Calls, Case, Preparer
from sparse_compiler.prepare.swap import replacing, untraced

_NUMBERS = (
    "num_attention_heads",
    "attention_head_size",
    "block_size",
    "num_random_blocks",
    "max_seqlen",
)
_PLANNING = (
    "_bigbird_block_rand_mask",
    "_bigbird_block_rand_mask_with_head",
    "_get_rand_attn_plan",
)
_BUFFERS = "_blocks_"
_MASKS = ("band_mask", "from_mask", "to_mask", "from_blocked_mask", "to_blocked_mask")
# Lengths for which the original draws from a plan of the longest sequence.
_LONG = (1024, 3072, 4096)
# Bytes of the original's probabilities up to which the example's own length is checked.
_CHECKED = 2**28


class Plan(NamedTuple):
    """What a plan of random blocks depends on."""

    kind: type
    training: bool
    seed: int
    longest: int
    block: int
    random: int
    heads: int
    length: int


@functools.lru_cache(maxsize=128)
def block_counts(plan: Plan) -> Tensor:
    """How often each block of queries sees each block of keys: int64 [heads, blocks, blocks].

    One head if all are alike.
    """
    blocks = plan.length // plan.block
    i, j = np.arange(blocks)[:, None], np.arange(blocks)[None, :]
    edge = (i == 0) | (i == blocks - 1)
    seen = edge | (np.abs(i - j) <= 1) | (j == 0) | (j == blocks - 1)
    counts = np.repeat(seen[None].astype(np.int64), plan.heads, axis=0)
    heads, rows = np.arange(plan.heads)[:, None, None], np.arange(1, blocks - 1)[None, :, None]
    np.add.at(counts, (heads, rows, _draw(plan)), 1)
    if (counts == counts[:1]).all():
        counts = counts[:1]
    return torch.from_numpy(counts)


def _draw(plan: Plan) -> np.ndarray:
    """The random blocks of each head and block of queries but the first and the last."""
    # The planning methods read nothing but the mode; the numbers come as arguments.
    module: Any = object.__new__(plan.kind)
    vars(module)["training"] = plan.training
    length, block = plan.length, plan.block
    state = np.random.get_state()
    try:
        np.random.seed(plan.seed)
        if length in _LONG:
            drawn = [
                module._bigbird_block_rand_mask(
                    plan.longest, plan.longest, block, block, plan.random, last_idx=1024
                )[: length // block - 2]
                for _ in range(plan.heads)
            ]
        else:
            lengths, numbers = module._get_rand_attn_plan(length, block, plan.random)
            drawn = module._bigbird_block_rand_mask_with_head(
                from_seq_length=length,
                to_seq_length=length,
                from_block_size=block,
                to_block_size=block,
                num_heads=plan.heads,
                plan_from_length=lengths,
                plan_num_rand_blocks=numbers,
            )
    finally:
        np.random.set_state(state)
    return np.stack(drawn)


def _plan(module: Any, n: int) -> Plan:
    return Plan(
        type(module),
        module.training,
        module.seed,
        module.max_seqlen,
        module.block_size,
        module.num_random_blocks,
        module.num_attention_heads,
        n,
    )


@torch.compiler.assume_constant_result
def draws_block_0(module: Any) -> bool:
    """Whether all random blocks are block 0, at lengths of either way to draw them."""
    lengths = {_shortest(module) + module.block_size, *_LONG}
    return not any(
        _draw(_plan(module, n)).any()
        for n in lengths
        if _shortest(module) < n <= module.max_seqlen and n % module.block_size == 0
    )


@torch.compiler.assume_constant_result
def plan_buffers(module: Any, n: int) -> tuple[str, str]:
    """Names of the module's buffers [heads or 1, blocks, blocks] for sequences of n tokens.

    They are made while tracing where they are missing: bool, whether a block of queries sees a
    block of keys; and float, the logarithm of how often, with an empty name if never more than
    once.
    """
    plan = _plan(module, n)
    counts = block_counts(plan)
    names = [f"{_BUFFERS}{kind}_{n}_{plan.training}" for kind in ("seen", "often")]
    if names[0] not in module._buffers:
        weight = next(module.parameters())
        often = counts.clamp(min=1).double().log().to(weight)
        module.register_buffer(names[0], (counts > 0).to(weight.device), persistent=False)
        module.register_buffer(names[1], often, persistent=False)
    return names[0], names[1] if bool((counts > 1).any()) else ""


def attention_forward(
    module: Any,
    hidden_states: Tensor,
    band_mask: Tensor | None = None,
    from_mask: Tensor | None = None,
    to_mask: Tensor | None = None,
    from_blocked_mask: Tensor | None = None,
    to_blocked_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The original's ``forward``, as one masked attention.

    Args:
        module: the original.
        hidden_states: [batch, n, width].
        band_mask: the masks of the window; what they say is in the next two.
        from_mask: [batch, 1, n, 1], 1 for a token and 0 for padding.
        to_mask: [batch, 1, 1, n], likewise.
        from_blocked_mask: ``from_mask`` in blocks.
        to_blocked_mask: ``to_mask`` in blocks.
        **kwargs: ``output_attentions``, whether probabilities are asked for; the original has them.

    Returns:
        The output [batch, n, width], and None where the original has the probabilities.
    """
    batch, n, _ = hidden_states.shape
    block, heads = module.block_size, module.num_attention_heads
    if (
        not replacing()
        or kwargs.get("output_attentions")
        or from_mask is None
        or to_mask is None
        or n % block
        or n <= _shortest(module)
    ):
        # What the original complains about, it shall complain about.
        masks = (band_mask, from_mask, to_mask, from_blocked_mask, to_blocked_mask)
        return untraced(module, hidden_states, *masks, **kwargs)
    shape = (batch, n, heads, module.attention_head_size)
    q, k, v = (
        part(hidden_states).view(shape).transpose(1, 2)
        for part in (module.query, module.key, module.value)
    )
    position = torch.arange(n, device=q.device) // block
    i, j = position[:, None], position[None, :]
    real = (from_mask != 0) & (to_mask != 0)
    mask: Tensor
    if draws_block_0(module):
        edge = (i == 0) | (i == n // block - 1)
        seen = edge | ((i - j).abs() <= 1) | (j == 0) | (j == n // block - 1)
        repeated = torch.where((j == 0) & ~edge, math.log(1 + module.num_random_blocks), 0.0)
        mask = torch.where(seen & real, repeated.to(q.dtype), -torch.inf)
    else:
        seen, often = plan_buffers(module, n)
        mask = getattr(module, seen)[:, i, j] & real
        if often:
            mask = torch.where(mask, getattr(module, often)[:, i, j].to(q.dtype), -torch.inf)
    y = F.scaled_dot_product_attention(q, k, v, mask)
    return y.transpose(1, 2).reshape(batch, n, -1), None


def _shortest(module: Any) -> int:
    """The length up to which the models themselves switch to full attention."""
    return (5 + 2 * module.num_random_blocks) * module.block_size


class BigBirdAttention(Preparer):
    """Block-sparse self-attention, as in BigBird and BigBird-Pegasus."""

    name = "BigBird attention"

    def find(self, module: nn.Module) -> bool:
        parts = all(
            isinstance(getattr(module, name, None), nn.Module) for name in ("query", "key", "value")
        )
        return parts and all(isinstance(getattr(module, name, None), int) for name in _NUMBERS[:4])

    def refuse(self, module: Any, calls: Calls | None) -> str | None:
        missing = [name for name in (*_NUMBERS[4:], *_PLANNING) if not hasattr(module, name)]
        if missing:
            return f"it has no {missing[0]}, so its random blocks are not known"
        names = tuple(inspect.signature(module.forward).parameters)
        if names[:6] != ("hidden_states", *_MASKS):
            return f"its forward takes {', '.join(names)}; known is hidden_states, {_MASKS}"
        if not isinstance(module.seed, int):
            return "it has no seed, so its random blocks are others in every call: set module.seed"
        if calls is None:
            return None
        if module not in calls:
            return (
                f"the example never reaches it: models switch to full attention, for good, at up "
                f"to {_shortest(module)} tokens; give a longer example"
            )
        if any(call.get("kwargs", {}).get("output_attentions") for call in calls[module]):
            return (
                "the example asks for attention probabilities, which a masked attention never "
                "builds: call the model without output_attentions"
            )
        return None

    def signature(self, module: Any) -> Hashable:
        return super().signature(module), tuple(getattr(module, name) for name in _NUMBERS)

    def cases(self, module: Any, calls: Calls | None, thorough: bool) -> Iterable[Case]:
        short = _shortest(module) + module.block_size
        if not thorough:
            yield self._case(module, 1, short, True)
            return
        yield self._case(module, 2, short, False)
        yield self._case(module, 2, short, True)
        seen = {call["hidden_states"].shape[1] for call in (calls or {}).get(module, ())}
        for n in sorted(seen or {short + 3 * module.block_size}):
            if module.num_attention_heads * n * n * 4 > _CHECKED:
                # A shorter one that draws its plan in the same way.
                n = _LONG[0] if n in _LONG else short + 3 * module.block_size
            if _shortest(module) < n <= module.max_seqlen:
                yield self._case(module, 1, n, False)
                yield self._case(module, 1, n, True)

    def forward(self) -> Callable[..., Any]:
        return attention_forward

    def swap(self, module: nn.Module) -> Callable[[], None]:
        put_back = super().swap(module)

        def undo() -> None:
            put_back()
            for name in [name for name in module._buffers if name.startswith(_BUFFERS)]:
                delattr(module, name)

        return undo

    @staticmethod
    def _case(module: Any, batch: int, n: int, training: bool) -> Case:
        width = module.num_attention_heads * module.attention_head_size
        hidden = torch.randn(batch, n, width)
        valid = torch.ones(batch, n)
        valid[0, n // 2 - module.block_size // 2 :] = 0
        blocks = valid.view(batch, -1, module.block_size)
        band = torch.cat([blocks[:, 1:-3], blocks[:, 2:-2], blocks[:, 3:-1]], 2)
        band = torch.einsum("biq,bik->biqk", blocks[:, 2:-2], band).unsqueeze(1)
        masks = (band, valid[:, None, :, None], valid[:, None, None, :], blocks, blocks)
        device = next(module.parameters()).device
        kwargs = {key: mask.to(device) for key, mask in zip(_MASKS, masks, strict=True)}
        name = f"{n} tokens in {'training' if training else 'eval'} mode"
        return Case(name, (hidden.to(device),), kwargs, training)

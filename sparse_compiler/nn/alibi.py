"""ALiBi: a bias on the scores that grows with distance, instead of positions in the input."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """The slopes of Press et al. (2022): 2^(-8/H), 2^(-16/H), ... for H heads, a power of two.

    For other H, those of the next smaller power of two, then every second one of the next larger.

    Returns:
        float32 [heads].
    """
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive int, not {heads!r}: write alibi_slopes(8).")
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, device=device)


def alibi(
    heads: int,
    queries: int,
    keys: int | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """``-slope[h] · |q - k|``, to be added to the scores. It masks nothing by itself.

    With a causal mask this is the bias of Press et al. (2022), "Train Short, Test Long". As in
    ``masks``, the queries are the last of the keys.

    Returns:
        float32 [heads, queries, keys].
    """
    keys = queries if keys is None else keys
    if keys < queries:
        raise ValueError(f"{queries} queries are more than {keys} keys: write alibi(h, n, n).")
    q = torch.arange(queries, device=device)[:, None] + (keys - queries)
    k = torch.arange(keys, device=device)[None, :]
    return -alibi_slopes(heads, device=device)[:, None, None] * (q - k).abs()

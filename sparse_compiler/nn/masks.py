"""Masks as index comparisons: True where a query may look at a key.

Every builder returns a bool tensor that broadcasts to [batch, heads, queries, keys], ready for
``torch.nn.functional.scaled_dot_product_attention``, so masks are combined with ``&``, ``|`` and
``~``. Lengths come first, as ``(queries, keys)``; ``keys`` is ``queries`` if it is left out, and
with more keys than queries (a cache) the queries are the last ones, as in decoding.

``q`` and ``k`` below are positions, n the length. The cost is the number of (query, key) pairs
that are left, which is what a compiled model computes.

    mask = sliding_window(n, window=256)                                   # Mistral
    mask = local(n, radius=256) | global_tokens(flags)                     # Longformer
    mask = global_local(n, radius=96, count=64) | random(n, count=3, block=64, seed=0)  # BigBird
    mask = causal(n) & (sliding_window(n, window=s) | strided(n, stride=s))  # Sparse Transformer
    mask = causal(n) & documents(ids) & padding(attention_mask)            # packed, padded batch
"""

from __future__ import annotations

import torch
from torch import Tensor

Device = torch.device | str | None


def causal(queries: int, keys: int | None = None, *, device: Device = None) -> Tensor:
    """``k <= q``: no look at what comes later. About n²/2 pairs.

    Returns:
        bool [queries, keys].
    """
    q, k = _positions(queries, keys, device)
    return k <= q


def sliding_window(
    queries: int, keys: int | None = None, *, window: int, device: Device = None
) -> Tensor:
    """``0 <= q - k < window``: the last ``window`` keys, the query's own among them. n·w pairs.

    Source: Mistral 7B (Jiang et al., 2023); Longformer (Beltagy et al., 2020), causal form.

    Returns:
        bool [queries, keys].
    """
    _positive("window", window, "sliding_window(n, window=256)")
    q, k = _positions(queries, keys, device)
    return (k <= q) & (q - k < window)


def local(queries: int, keys: int | None = None, *, radius: int, device: Device = None) -> Tensor:
    """``|q - k| <= radius``: neighbours on both sides. n·w pairs, with w = 2·radius + 1.

    Source: Longformer (Beltagy et al., 2020), with ``radius = attention_window // 2``.

    Returns:
        bool [queries, keys].
    """
    _positive("radius", radius, "local(n, radius=256)", least=0)
    q, k = _positions(queries, keys, device)
    return (q - k).abs() <= radius


def dilated(
    queries: int,
    keys: int | None = None,
    *,
    radius: int,
    dilation: int,
    device: Device = None,
) -> Tensor:
    """``|q - k| <= radius · dilation`` and ``(q - k) mod dilation == 0``: a window with gaps.

    n·w pairs, w = 2·radius + 1: as many keys as ``local``, ``dilation`` times as far apart.
    ``& causal(n)`` keeps its left half.

    Source: Longformer (Beltagy et al., 2020), section 3.1.

    Returns:
        bool [queries, keys].
    """
    _positive("radius", radius, "dilated(n, radius=64, dilation=4)", least=0)
    _positive("dilation", dilation, "dilated(n, radius=64, dilation=4)")
    q, k = _positions(queries, keys, device)
    distance = q - k
    return (distance.abs() <= radius * dilation) & (distance % dilation == 0)


def strided(queries: int, keys: int | None = None, *, stride: int, device: Device = None) -> Tensor:
    """``(q - k) mod stride == 0``: every ``stride``-th key. n²/stride pairs.

    Source: Sparse Transformer (Child et al., 2019): the union of this with a window of the same
    size, both causal, costs n·√n with ``stride = √n``.

    Returns:
        bool [queries, keys].
    """
    _positive("stride", stride, "strided(n, stride=64)")
    q, k = _positions(queries, keys, device)
    return (q - k) % stride == 0


def global_local(
    queries: int,
    keys: int | None = None,
    *,
    radius: int,
    count: int,
    device: Device = None,
) -> Tensor:
    """``|q - k| <= radius`` or ``k < count`` or ``q < count``. n·(w + 2g) pairs, g = count.

    The first ``count`` positions see everything and are seen by everything. For global tokens
    elsewhere, ``local(...) | global_tokens(flags)``.

    Source: Longformer (Beltagy et al., 2020); BigBird-ITC (Zaheer et al., 2020).

    Returns:
        bool [queries, keys].
    """
    _positive("radius", radius, "global_local(n, radius=256, count=1)", least=0)
    _positive("count", count, "global_local(n, radius=256, count=1)", least=0)
    q, k = _positions(queries, keys, device)
    return ((q - k).abs() <= radius) | (k < count) | (q < count)


def global_tokens(flags: Tensor) -> Tensor:
    """``flags[b, q] or flags[b, k]``: marked tokens see and are seen by all. 2·n·g pairs.

    Args:
        flags: bool (or 0 and 1) [batch, n].

    Returns:
        bool [batch, 1, n, n].
    """
    marked = _flags("flags", flags, "global_tokens(ids == cls_token_id)")
    return marked[:, None, :, None] | marked[:, None, None, :]


def random(
    queries: int,
    keys: int | None = None,
    *,
    count: int,
    seed: int,
    block: int = 1,
    device: Device = None,
) -> Tensor:
    """``count`` random keys for each query, the same in every call. n·r pairs, r = count · block.

    With ``block > 1`` queries and keys come in blocks: each block of queries sees ``count`` blocks
    of keys, which is what hardware can skip. Draw the mask once and keep it as a buffer: a random
    generator inside ``forward`` breaks the graph of ``torch.compile``.

    Source: BigBird (Zaheer et al., 2020).

    Returns:
        bool [queries, keys].
    """
    example = "random(n, count=3, seed=0, block=64)"
    _positive("count", count, example, least=0)
    _positive("block", block, example)
    keys = _lengths(queries, keys)
    rows, columns = -(-queries // block), -(-keys // block)
    if count > columns:
        raise ValueError(
            f"count={count} keys of {columns} cannot be drawn without drawing one twice: "
            f"write count={columns}, or leave the mask out."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, columns, generator=generator).topk(count, dim=1).indices
    mask = torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, drawn, True)
    mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return mask[:queries, :keys].to(device)


def prefix(
    queries: int, keys: int | None = None, *, length: int | Tensor, device: Device = None
) -> Tensor:
    """``k < length`` or ``k <= q``: a prefix seen by all, causal behind it. About n²/2 pairs.

    Source: prefix language models: T5 (Raffel et al., 2020), UniLM (Dong et al., 2019).

    Args:
        queries: number of queries.
        keys: number of keys.
        length: of the prefix: one number, or int [batch] with one for each sequence.
        device: of the mask; that of ``length`` if it is a tensor.

    Returns:
        bool [queries, keys], or [batch, 1, queries, keys] for a tensor.
    """
    if isinstance(length, Tensor):
        if length.dim() != 1 or length.is_floating_point() or length.dtype == torch.bool:
            raise ValueError(
                f"length must be one int or an integer tensor [batch], not {_what(length)}: "
                "write prefix(n, length=torch.tensor([5, 9]))."
            )
        q, k = _positions(queries, keys, length.device)
        return (k < length[:, None, None, None]) | (k <= q)
    _positive("length", length, "prefix(n, length=32)", least=0)
    q, k = _positions(queries, keys, device)
    return (k < length) | (k <= q)


def documents(ids: Tensor, key_ids: Tensor | None = None) -> Tensor:
    """``ids[b, q] == ids[b, k]``: several documents in one sequence. Σ n_i² pairs.

    Source: sequence packing (Krell et al., 2021); NaViT (Dehghani et al., 2023).

    Args:
        ids: integers [batch, queries], which document each token belongs to.
        key_ids: integers [batch, keys], for keys that are not the queries' own.

    Returns:
        bool [batch, 1, queries, keys].
    """
    key_ids = ids if key_ids is None else key_ids
    for given in (ids, key_ids):
        if given.dim() != 2 or given.is_floating_point():
            raise ValueError(
                f"documents() takes integer ids [batch, n], not {_what(given)}: write "
                "documents(torch.tensor([[0, 0, 0, 1, 1]]))."
            )
    return ids[:, None, :, None] == key_ids[:, None, None, :]


def chunked(queries: int, keys: int | None = None, *, chunk: int, device: Device = None) -> Tensor:
    """``q // chunk == k // chunk``: blocks on the diagonal. n·c pairs, c = chunk.

    Source: Llama 4's chunked attention (with ``& causal(n)``).

    Returns:
        bool [queries, keys].
    """
    _positive("chunk", chunk, "chunked(n, chunk=1024)")
    q, k = _positions(queries, keys, device)
    return q // chunk == k // chunk


def padding(valid: Tensor) -> Tensor:
    """``valid[b, k]``: nobody looks at padding. n·Σ valid pairs.

    Args:
        valid: bool (or 0 and 1) [batch, keys], as a tokenizer's ``attention_mask``.

    Returns:
        bool [batch, 1, 1, keys].
    """
    return _flags("valid", valid, 'padding(batch["attention_mask"])')[:, None, None, :]


def _positions(queries: int, keys: int | None, device: Device) -> tuple[Tensor, Tensor]:
    """Query positions [queries, 1] and key positions [1, keys]; the queries are the last."""
    keys = _lengths(queries, keys)
    q = torch.arange(queries, device=device) + (keys - queries)
    return q[:, None], torch.arange(keys, device=device)[None, :]


def _lengths(queries: int, keys: int | None) -> int:
    """The number of keys; complains about lengths that cannot be."""
    for name, value in (("queries", queries), ("keys", keys)):
        if isinstance(value, Tensor):
            raise TypeError(
                f"{name} is a length, not a tensor: write causal(x.shape[1]) for x [batch, n, d]."
            )
    if queries < 0 or (keys is not None and keys < queries):
        raise ValueError(
            f"{queries} queries and {keys} keys: the queries are the last of the keys, so there "
            "can't be more of them. Write causal(queries, keys) with keys >= queries >= 0."
        )
    return queries if keys is None else keys


def _positive(name: str, value: object, example: str, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, not {value!r}: write {example}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}: write {example}.")


def _flags(name: str, value: Tensor, example: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
        given = _what(value) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name} must be bool or integer [batch, n], not {given}: write {example}."
        )
    return value.bool()


def _what(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

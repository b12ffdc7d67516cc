"""What is measured about attention: patterns, sizes, and the two spellings models use.

A pattern is one function of indices, `keep(batch, query, key, *state)`, in plain PyTorch. Models
call it on `arange`s that broadcast against each other, FlexAttention on scalars: every contestant
computes the same thing, and nobody is handed a mask that somebody else had to build.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

Keep = Callable[..., torch.Tensor]
State = tuple[torch.Tensor, ...]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SAMPLED_ROWS = 256


def _no_state(case: "Case") -> State:
    return ()


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A mask.

    Attributes:
        name: as it stands in the tables.
        keep: whether a query sees a key; indices and state in, bool out.
        state: tensors that `keep` reads: inputs of the model, so nothing is known about them when
            it is compiled.
    """

    name: str
    keep: Keep
    state: Callable[["Case"], State] = _no_state


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of a table; `queries` are the last ones before `keys`."""

    pattern: Pattern
    keys: int
    dtype: str = "fp32"
    head_dim: int = 64
    heads: int = 8
    kv_heads: int = 8
    batch: int = 1
    queries: int = 0

    @property
    def rows(self) -> int:
        """Queries; as many as keys unless said otherwise."""
        return self.queries or self.keys

    @property
    def name(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        length = f"{self.keys}" if self.rows == self.keys else f"{self.rows} of {self.keys}"
        return f"{self.pattern.name}, n {length}, {heads} heads of {self.head_dim}, {self.dtype}"

    def inputs(self) -> State:
        """Query, key, value [batch, heads, length, head_dim], as projections leave them."""
        generator = torch.Generator().manual_seed(0)

        def projected(heads: int, length: int) -> torch.Tensor:
            shape = (self.batch, length, heads, self.head_dim)
            return torch.randn(shape, generator=generator).to(DTYPES[self.dtype]).transpose(1, 2)

        q = projected(self.heads, self.rows)
        return q, projected(self.kv_heads, self.keys), projected(self.kv_heads, self.keys)

    def state(self) -> State:
        return self.pattern.state(self)

    def density(self) -> float:
        """Share of the query-key pairs that are kept, from `_SAMPLED_ROWS` queries."""
        step = max(1, self.rows // _SAMPLED_ROWS)
        queries = torch.arange(0, self.rows, step)
        return float(self.kept(queries).float().mean())

    def kept(self, queries: torch.Tensor) -> torch.Tensor:
        """[batch, 1, len(queries), keys] bool."""
        batch = torch.arange(self.batch)[:, None, None, None]
        keys = torch.arange(self.keys)[None, None, None, :]
        kept = self.pattern.keep(batch, queries[None, None, :, None], keys, *self.state())
        return kept.expand(self.batch, 1, len(queries), self.keys)

    def flops(self) -> float:
        """Of dense attention: two products over all pairs."""
        return 4.0 * self.batch * self.heads * self.rows * self.keys * self.head_dim

    def check(self, out: torch.Tensor) -> float:
        """Largest error of 64 output rows against float64, relative to their largest value."""
        rows = torch.linspace(0, self.rows - 1, 64).long().unique()
        q, k, v = (t.double() for t in self.inputs())
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        scores = q[:, :, rows] @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        kept = self.kept(rows)
        scores = scores.masked_fill(~kept, -math.inf)
        expected = torch.softmax(scores, -1) @ v
        return float((out[:, :, rows].double() - expected).abs().max() / expected.abs().max())


def window(width: int) -> Pattern:
    """Causal sliding window, as Mistral has it."""
    return Pattern(f"window {width}", lambda b, q, k: (k <= q) & (k > q - width))


def local(width: int) -> Pattern:
    """Symmetric window, as ModernBERT has it."""
    return Pattern(f"local ±{width}", lambda b, q, k: (q - k).abs() <= width)


def causal() -> Pattern:
    return Pattern("causal", lambda b, q, k: k <= q)


def _document_ids(case: Case) -> State:
    """[batch, keys]: documents of 64 to 1023 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(64, 1024, (case.keys // 64 + 1,), generator=generator)
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)[: case.keys]
    return (ids.expand(case.batch, -1).contiguous(),)


def documents() -> Pattern:
    """Causal within each of the documents packed into one sequence; their ids are an input."""
    return Pattern(
        "documents", lambda b, q, k, ids: (ids[b, q] == ids[b, k]) & (k <= q), _document_ids
    )


def longformer(width: int, everywhere: int) -> Pattern:
    """Symmetric window, and some first tokens that see and are seen by all."""
    return Pattern(
        f"longformer ±{width}, {everywhere} global",
        lambda b, q, k: ((q - k).abs() <= width) | (k < everywhere) | (q < everywhere),
    )


def _bigbird_plan(block: int, random: int) -> Callable[[Case], State]:
    def plan(case: Case) -> State:
        """[blocks, blocks] bool: neighbours, first and last block, and random ones."""
        count = math.ceil(case.keys / block)
        index = torch.arange(count)
        keep = (index[:, None] - index[None, :]).abs() <= 1
        keep[[0, -1]] = True
        keep[:, [0, -1]] = True
        noise = torch.rand(count, count, generator=torch.Generator().manual_seed(1))
        keep.scatter_(1, noise.topk(min(random, count), dim=1).indices, True)
        return (keep,)

    return plan


def bigbird(block: int = 64, random: int = 3) -> Pattern:
    """Blocks: neighbours, first, last, and some random ones that a table names."""
    return Pattern(
        f"bigbird {block}",
        lambda b, q, k, plan: plan[q // block, k // block],
        _bigbird_plan(block, random),
    )


def padded(pattern: Pattern | None, name: str) -> Pattern:
    """`pattern` (None: everything) and a padding mask, which is an input; all ones here."""

    def keep(b: torch.Tensor, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = mask[b, k]
        return seen if pattern is None else seen & pattern.keep(b, q, k)

    return Pattern(name, keep, lambda case: (torch.ones(case.batch, case.keys, dtype=torch.bool),))


def decode(width: int) -> Pattern:
    """Queries at a position that is a tensor, in a cache of which only a window is visible."""
    return Pattern(
        f"decode, window {width}",
        # Indexed, because FlexAttention wants scalars.
        lambda b, q, k, at: (k <= q + at[0]) & (k > q + at[0] - width),
        lambda case: (torch.tensor([case.keys - case.rows - 7]),),
    )


def _mask(case: Case, device: torch.device, state: State) -> torch.Tensor:
    """The mask as models build it, in the graph: [batch, 1, queries, keys] bool."""
    batch = torch.arange(case.batch, device=device)[:, None, None, None]
    query = torch.arange(case.rows, device=device)[None, None, :, None]
    key = torch.arange(case.keys, device=device)[None, None, None, :]
    kept = case.pattern.keep(batch, query, key, *state)
    return kept.expand(case.batch, -1, case.rows, case.keys)


def _repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """Each key-value head `times` times, as models do it before a masked attention."""
    if times == 1:
        return x
    batch, heads, length, width = x.shape
    wide = x[:, :, None].expand(batch, heads, times, length, width)
    return wide.reshape(batch, heads * times, length, width)


def sdpa(case: Case) -> Callable[..., torch.Tensor]:
    """`attn_implementation="sdpa"`: scaled_dot_product_attention with a bool mask."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *state: torch.Tensor
    ) -> torch.Tensor:
        k, v = (_repeated(x, case.heads // case.kv_heads) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(case, q.device, state))

    return attention


def eager(case: Case) -> Callable[..., torch.Tensor]:
    """`attn_implementation="eager"`: products, a mask of finfo.min, a softmax in float32."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *state: torch.Tensor
    ) -> torch.Tensor:
        k, v = (_repeated(x, case.heads // case.kv_heads) for x in (k, v))
        weights = torch.matmul(q, k.transpose(2, 3)) * case.head_dim**-0.5
        zero, least = torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min
        weights = weights + torch.where(_mask(case, q.device, state), zero, least)
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, v)

    return attention


def unmasked(case: Case) -> Callable[..., torch.Tensor]:
    """Dense attention without a mask: the rate of the machine, not the same result."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *state: torch.Tensor
    ) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=case.heads != case.kv_heads)

    return attention

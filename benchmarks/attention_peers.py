"""Attention as contestants: Inductor and this project on unmodified code, FlexAttention by hand.

A contestant that cannot run, or that would take too long or too much memory, raises `Unavailable`,
whose sentence goes into the table. Every result is compared with float64 before it is timed.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import attention_cases as cases
from benchmarks.attention_cases import Case
from benchmarks.contestants import OURS, Unavailable, require_backend

Call = Callable[[], Any]

SPELLINGS = {"sdpa": cases.sdpa, "eager": cases.eager}
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
# Smaller tiles than FlexAttention's default of 128 are 15 % faster on CPUs (window 256).
FLEX_BLOCK = 64
MOST_BYTES = 8e9
# What dense attention costs, roughly: for leaving out what nobody wants to wait for.
_FLOPS_PER_SECOND = 1e11
_SLOWER = {"dense": 1.0, "sdpa": 1.3, "eager": 2.5}
_BACKWARD = 3.5


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a dense contestant may take for one call; it is called about twenty times."""

    seconds: float
    bytes: float = MOST_BYTES

    def check(self, case: Case, spelling: str, training: bool = False) -> None:
        """Raises `Unavailable` if a dense contestant would exceed them."""
        seconds = case.flops() / _FLOPS_PER_SECOND * _SLOWER[spelling]
        seconds *= _BACKWARD if training else 1.0
        pairs = case.batch * case.rows * case.keys
        size = {"dense": 0, "sdpa": 5 * pairs, "eager": (5 + 12 * case.heads) * pairs}[spelling]
        if size > self.bytes:
            raise Unavailable(f"{spelling}: would take about {size / 1e9:.0f} GB")
        if seconds > self.seconds:
            raise Unavailable(f"{spelling}: would take about {seconds:.0f} s a call")


def told(rewrites: list[Any]) -> str:
    """What this project said about attention, alike verdicts together."""
    sentences: dict[str, int] = {}
    for rewrite in rewrites:
        skipped = f"{rewrite.pattern}, {rewrite.sparsity:.0%} of tiles skipped"
        sentence = f"{skipped if rewrite.applied else 'left dense'}: {rewrite.reason}"
        sentences[sentence] = sentences.get(sentence, 0) + 1
    each = (f"{times}x {sentence}" for sentence, times in sentences.items())
    return "; ".join(each) or "no verdict on attention"


@contextlib.contextmanager
def listening(rewrites: list[Any], left_dense: Callable[[], None] | None = None) -> Iterator[None]:
    """Collects verdicts on attention; where nothing is rewritten, `left_dense` may object."""
    from sparse_compiler import backend

    def listen(record: backend.CompiledGraph) -> None:
        rewrites.extend(r for r in record.rewrites if "attention" in r.kind)
        if left_dense is not None and not any(r.applied for r in rewrites):
            left_dense()

    backend.listeners.append(listen)
    try:
        yield
    finally:
        backend.listeners.remove(listen)


def _checked(case: Case, call: Call) -> Call:
    error = case.check(call())
    if not error <= TOLERANCE[case.dtype]:
        raise Unavailable(f"WRONG RESULT: differs from float64 by {error:.1e} (relative)")
    return call


def dense(case: Case, limits: Limits) -> Call:
    """No mask at all, uncompiled: the rate at which the machine does attention."""
    limits.check(case, "dense")
    function, inputs = cases.unmasked(case), case.inputs()
    return lambda: function(*inputs)


def inductor(case: Case, spelling: str, limits: Limits) -> Call:
    """`torch.compile` with its defaults."""
    limits.check(case, spelling)
    compiled = torch.compile(SPELLINGS[spelling](case), fullgraph=True, dynamic=False)
    inputs = (*case.inputs(), *case.state())
    return _checked(case, lambda: compiled(*inputs))


def sparse(case: Case, spelling: str, limits: Limits, rewrites: list[Any]) -> Call:
    """This project with its defaults, on the same function; `rewrites` get what it said."""
    require_backend()
    compiled = torch.compile(SPELLINGS[spelling](case), fullgraph=True, dynamic=False, backend=OURS)
    inputs = (*case.inputs(), *case.state())
    with listening(rewrites, lambda: limits.check(case, spelling)):
        return _checked(case, lambda: compiled(*inputs))


def flex(case: Case) -> tuple[Call, Call]:
    """FlexAttention by hand: with a mask built beforehand, and building it in every call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    # Compiled for a single query, the builder is C++ that g++ refuses (torch 2.13).
    build: Callable[..., Any] = create_block_mask
    if case.rows > 1:
        build = torch.compile(create_block_mask, dynamic=False)
    q, k, v = case.inputs()
    state = case.state()
    grouped = case.heads != case.kv_heads

    def keep(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return case.pattern.keep(b, i, j, *state)

    def mask() -> Any:
        batch = case.batch if state else None
        size = {"device": "cpu", "BLOCK_SIZE": FLEX_BLOCK}
        return build(keep, batch, None, case.rows, case.keys, **size)

    built = mask()
    return (
        _checked(case, lambda: attention(q, k, v, block_mask=built, enable_gqa=grouped)),
        _checked(case, lambda: attention(q, k, v, block_mask=mask(), enable_gqa=grouped)),
    )


def training_step(case: Case, spelling: str, backend: str, limits: Limits) -> Call:
    """Forward and backward; returns the output and the gradients of query, key and value.

    Args:
        backend: of `torch.compile`, or "uncompiled".
    """
    if backend == OURS:
        require_backend()
    limits.check(case, spelling, training=True)
    function = SPELLINGS[spelling](case)
    if backend != "uncompiled":
        function = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    leaves = [x.detach().requires_grad_() for x in case.inputs()]
    state = case.state()

    def step() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            out = function(*leaves, *state)
            return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    return step


def compare(case: Case, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    """Raises `Unavailable` if results or gradients differ from those of PyTorch uncompiled."""
    for ours, theirs in itertools.zip_longest(got, want):
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if not error <= 10 * TOLERANCE[case.dtype]:
            raise Unavailable(f"WRONG GRADIENT: differs from eager by {error:.1e} (relative)")

"""Linear layers as contestants: Inductor, DeepSparse, and this project's backend.

A contestant that cannot run raises `Unavailable`, whose sentence goes into the table; nothing is
left out silently.
"""

import time
from collections.abc import Callable

import torch

from benchmarks.deepsparse_env import DeepSparseUnavailable
from benchmarks.deepsparse_peer import DeepSparsePeer
from benchmarks.harness import Contestant, Local

OURS = "sparse"


class Unavailable(RuntimeError):
    """Why a contestant has no figure."""


def require_backend() -> None:
    """Raises `Unavailable` unless `torch.compile(backend="sparse")` is installed."""
    if OURS not in torch._dynamo.list_backends(exclude_tags=()):
        raise Unavailable('torch.compile has no backend "sparse": install the project first')


def _check(y: torch.Tensor, x: torch.Tensor, layer: torch.nn.Linear) -> None:
    """Compares up to 64 rows of `y` with float64, entry by entry.

    The bound is the usual one for a dot product of length K, |error| <= c * (|x| |w| + |b|), with c
    = K * 2^-24 for fp32 sums, plus 2^-8 of the result where it is rounded to bf16.
    """
    rows = torch.arange(x.shape[0])[:64]
    x64, weight, bias = x[rows].double(), layer.weight.double(), layer.bias.double()
    expected = torch.nn.functional.linear(x64, weight, bias)
    size = torch.nn.functional.linear(x64.abs(), weight.abs(), bias.abs())
    bound = size * x.shape[1] * 2.0**-24
    if x.dtype == torch.bfloat16:
        bound = bound + expected.abs() * 2.0**-8 + 1e-6
    worst = float(((y[rows].double() - expected).abs() / (bound + 1e-30)).max())
    if not worst <= 1.0:
        raise Unavailable(f"WRONG RESULT: error is {worst:.1f} times the bound")


def _compiled(
    name: str, layer: torch.nn.Linear, x: torch.Tensor, **compile_arguments: object
) -> tuple[Contestant, float]:
    start = time.perf_counter()
    # fullgraph turns every silent fallback to eager execution into an error.
    call: Callable[..., torch.Tensor] = torch.compile(  # type: ignore[call-overload]
        layer, fullgraph=True, dynamic=False, **compile_arguments
    )
    y = call(x)
    seconds = time.perf_counter() - start
    _check(y, x, layer)
    return Local(name, lambda: call(x)), seconds


def eager(layer: torch.nn.Linear, x: torch.Tensor) -> tuple[Contestant, float]:
    """PyTorch without compiling."""
    return Local("eager", lambda: layer(x)), 0.0


def inductor(layer: torch.nn.Linear, x: torch.Tensor) -> tuple[Contestant, float]:
    """`torch.compile` with its defaults, on the same pruned weight."""
    return _compiled("inductor", layer, x, backend="inductor")


def inductor_frozen(layer: torch.nn.Linear, x: torch.Tensor) -> tuple[Contestant, float]:
    """`torch.compile` with freezing and max-autotune: weights become constants of the code."""
    options = {"freezing": True, "max_autotune": True}
    return _compiled("inductor-frozen", layer, x, backend="inductor", options=options)


def sparse(layer: torch.nn.Linear, x: torch.Tensor) -> tuple[Contestant, float]:
    """This project, with its defaults."""
    require_backend()
    return _compiled(OURS, layer, x, backend=OURS)


class DeepSparse:
    """DeepSparse, started on first use; if it cannot start, every later cell repeats the reason."""

    def __init__(self) -> None:
        self._peer: DeepSparsePeer | None = None
        self._reason: str | None = None

    @property
    def state(self) -> str:
        """Version, or why it does not run; starts it if need be."""
        try:
            return self._start().version
        except Unavailable as reason:
            return str(reason)

    def _start(self) -> DeepSparsePeer:
        if self._reason is not None:
            raise Unavailable(self._reason)
        if self._peer is None:
            try:
                self._peer = DeepSparsePeer()
            except DeepSparseUnavailable as error:
                self._reason = f"unavailable: {error}"
                raise Unavailable(self._reason) from None
        return self._peer

    def __call__(self, layer: torch.nn.Linear, x: torch.Tensor) -> tuple[Contestant, float]:
        peer = self._start()
        if x.dtype != torch.float32:
            raise Unavailable("DeepSparse computes in fp32 or int8 only")
        start = time.perf_counter()
        try:
            y = peer.compile(x, layer.weight, layer.bias)
        except DeepSparseUnavailable as error:
            # A crash ends the worker; the next cell starts a new one.
            peer.close()
            self._peer = None
            raise Unavailable(f"failed: {error}") from None
        seconds = time.perf_counter() - start
        _check(y, x, layer)
        return peer, seconds

    def close(self) -> None:
        """Ends the worker process."""
        if self._peer is not None:
            self._peer.close()

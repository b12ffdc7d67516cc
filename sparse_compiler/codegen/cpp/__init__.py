"""The C++ kernels: which headers an operator needs, and the source a template starts from.

The headers (``*.h``) hold the kernels and know nothing of Inductor; ``LAYOUT.md`` is their
contract. ``linear.cpp.jinja`` joins one of them to Inductor's epilogue. All of it is pasted into
each generated file, so that a compiled kernel never depends on files of this package.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

_HERE = Path(__file__).parent
# Most rows of a tile, gradients stored at a time.
_TILE_ROWS = 16
PIECE = 4096
# Rows of a dense weight that make a task.
GEMV_BLOCK = 64
_COMMON = ("vec", "transpose", "panel", "multiply", "csr")
_ATTENTION = ("vec", "transpose", "math", "attention_math", "score")
_MOE = ("vec", "transpose", "math", "score", "dense", "moe_gemm", "moe")
_HEADERS = {
    "linear_dense": ("vec", "dense"),
    "linear_csr": (*_COMMON, "gemv", "linear"),
    "linear_bitmap": (
        *_COMMON,
        "gemv",
        "linear",
        "bitmap",
        "bitmap_expand",
        "bitmap_linear",
    ),
    "sampled_csr": (*_COMMON, "gemv", "linear", "sampled"),
    "attention_score": _ATTENTION,
    "attention_forward": (*_ATTENTION, "attention_forward"),
    "attention_decode": (*_ATTENTION, "attention_decode"),
    "attention_backward": (*_ATTENTION, "attention_backward_plan", "attention_backward"),
    "moe_forward": (*_MOE, "moe_forward"),
    "moe_backward": (*_MOE, "moe_backward"),
    "take": ("vec", "move"),
    "put": ("vec", "move"),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel with its literals.

    Attributes:
        name: of the operator.
        template: the Jinja file that wraps it.
        inputs: names of its tensor arguments in the source; ``X`` is the activation.
        strided: those that must be row-major but may have padded rows.
        literals: values the source is specialised to.
        tile: size of the largest tile handed to the epilogue; its strides are those of this size.
        ranges: C++ names of the start and end of a tile, for each dimension of the result.
    """

    name: str
    template: str
    inputs: tuple[str, ...]
    strided: tuple[str, ...]
    literals: dict[str, int]
    tile: tuple[int, ...]
    ranges: tuple[tuple[str, str], ...]


def linear_kernel(name: str, packed: tuple[str, ...], *, n_block: int, **literals: int) -> Kernel:
    """A linear layer: ``name`` is ``linear_csr``, ``linear_bitmap`` or ``linear_dense``."""
    return Kernel(
        name,
        "linear",
        ("X", *packed),
        ("X", "weight"),
        {"n_block": n_block, **literals},
        (_TILE_ROWS, n_block),
        (("m_start", "m_end"), ("n_start", "n_end")),
    )


def sampled_kernel(**literals: int) -> Kernel:
    """The gradient of a csr weight's stored values."""
    return Kernel(
        "sampled_csr",
        "sampled",
        ("G", "X", "columns", "segments"),
        ("G", "X"),
        {"piece": PIECE, **literals},
        (PIECE,),
        (("p_start", "p_end"),),
    )


def move_kernel(name: str, *arguments: str) -> Kernel:
    """``take`` or ``put``: values between a dense weight and stored order."""
    return Kernel(
        name,
        "move",
        ("X", *arguments),
        (),
        {"piece": PIECE},
        (PIECE,),
        (("p_start", "p_end"),),
    )


@functools.cache
def headers(name: str) -> str:
    """The text of the headers that a kernel needs, in order.

    Each is guarded: with Inductor's C++ wrapper all kernels of a graph are one file.
    """
    return "\n".join(
        f"#ifndef SC_{header.upper()}_H\n#define SC_{header.upper()}_H\n"
        f"{(_HERE / f'{header}.h').read_text()}#endif"
        for header in _HEADERS[name]
    )


@functools.cache
def template(name: str) -> str:
    """The Jinja source of a kernel's file."""
    return (_HERE / f"{name}.cpp.jinja").read_text()


@functools.cache
def digest() -> str:
    """A digest of everything that decides what the kernels compute and how they are called."""
    package = _HERE.parent.parent
    python = [*_HERE.parent.glob("*.py"), *(package / "score").glob("*.py")]
    operators = [package / "ops" / f"{name}.py" for name in ("linear", "attention", "moe")]
    files = sorted(
        [*_HERE.glob("*.h"), *_HERE.glob("*.jinja"), Path(__file__), *python, *operators]
    )
    text = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(text).hexdigest()[:16]

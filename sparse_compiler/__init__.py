"""A ``torch.compile`` backend that makes the zeros in PyTorch models pay.

``torch.compile(model, backend="sparse")`` needs no import of this package. What is here is for
looking inside: ``explain`` reports what was done and why, ``canonicalize`` and ``passes`` apply the
rewrites by hand, ``prepare`` and ``compile`` are for models that break Dynamo's graph, ``nn`` has
attention modules in plain PyTorch, ``pruning`` makes a model sparse.
"""

from __future__ import annotations

from sparse_compiler import nn, passes
from sparse_compiler.canonical import canonicalize
from sparse_compiler.errors import (
    CanonicalizationError,
    ExchangeError,
    OptionError,
    PassError,
    RegionError,
    SparseCompilerError,
    UnsupportedError,
    VerificationError,
)
from sparse_compiler.options import Options
from sparse_compiler.passes import Rewrite
from sparse_compiler.prepare import compile, prepare
from sparse_compiler.report import Report, explain
from sparse_compiler.runtime import refresh

__version__ = "0.1.0"

__all__ = [
    "CanonicalizationError",
    "ExchangeError",
    "OptionError",
    "Options",
    "PassError",
    "RegionError",
    "Report",
    "Rewrite",
    "SparseCompilerError",
    "UnsupportedError",
    "VerificationError",
    "canonicalize",
    "compile",
    "explain",
    "nn",
    "passes",
    "prepare",
    "refresh",
]

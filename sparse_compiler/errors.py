"""Errors the package raises. Every message says what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseCompilerError(Exception):
    """Base class of everything this package raises on purpose."""


class OptionError(SparseCompilerError, ValueError):
    """An option is unknown or has a value it cannot have."""


class UnsupportedError(SparseCompilerError, RuntimeError):
    """The installed torch, the platform or the device cannot do what was asked."""


class CanonicalizationError(SparseCompilerError):
    """A model or graph could not be brought into the canonical IR."""


class RegionError(SparseCompilerError):
    """A graph edit was refused because it would change what the graph computes."""


class PassError(SparseCompilerError):
    """A pass failed inside; raised only with ``on_error="raise"``."""


class ExchangeError(SparseCompilerError, RuntimeError):
    """Ranks that hold different experts could not exchange tokens."""


class VerificationError(SparseCompilerError):
    """A rewritten region disagreed with the original one (``verify=True``)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for a mistyped name, or the list of what exists if it is short."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(repr(n) for n in names)}." if len(names) <= 20 else ""

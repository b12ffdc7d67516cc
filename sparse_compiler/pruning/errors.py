"""The error of this package."""

from __future__ import annotations

from sparse_compiler.errors import SparseCompilerError


class PruningError(SparseCompilerError, ValueError):
    """A model cannot be pruned as asked; nothing in it was changed."""

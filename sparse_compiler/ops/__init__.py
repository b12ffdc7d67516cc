"""The operators that passes put into graphs; importing this package registers them."""

from sparse_compiler.ops import linear

__all__ = ["linear"]

"""The operators that passes put into graphs; importing this package registers them."""

from sparse_compiler.ops import linear, moe

__all__ = ["linear", "moe"]

"""Products of two activations, in index letters: queries with keys, weights with values.

``passes/contraction`` reads products with a static side; here both sides are computed. A letter of
each dimension says which are summed (not in the result) and which go together.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from sparse_compiler.passes.attention.lift_views import Index
from sparse_compiler.passes.attention.symbols import sizes_of
from sparse_compiler.score.expr import Expr
from sparse_compiler.score.node import ZERO

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Product:
    """result[out] = alpha * sum(left[...] * right[...]) + beta * bias.

    Attributes:
        node: the operator that computes it.
        left: one operand; ``left_letters`` names its dimensions.
        right: the other one.
        bias: added to it (``baddbmm``), or None.
        beta: what the bias is multiplied by; a node if it is known at run time only.
        alpha: what the product is multiplied by.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_letters: str
    right_letters: str
    out_letters: str
    bias: fx.Node | None = None
    beta: float | fx.Node = 1.0
    alpha: float | fx.Node = 1.0

    @property
    def summed(self) -> str:
        """Letters that are summed over."""
        both = set(self.left_letters) & set(self.right_letters)
        return "".join(a for a in self.left_letters if a in both - set(self.out_letters))

    def is_plain(self) -> bool:
        """Whether it sums over one dimension and takes no diagonals."""
        for letters in (self.left_letters, self.right_letters, self.out_letters):
            if len(set(letters)) != len(letters):
                return False
        outside = set(self.left_letters) ^ set(self.right_letters)
        return len(self.summed) == 1 and outside <= set(self.out_letters)

    def letters(self, operand: fx.Node) -> str:
        """The dimensions of one of the operands."""
        return self.left_letters if operand is self.left else self.right_letters

    def size(self, letter: str) -> sympy.Expr:
        """The size of a dimension; of a letter that broadcasts, the larger one."""
        for node, letters in (
            (self.node, self.out_letters),
            (self.left, self.left_letters),
            (self.right, self.right_letters),
        ):
            if letter in letters:
                return sizes_of(node)[letters.index(letter)]
        raise KeyError(letter)

    def index(self, operand: fx.Node, letters: str, at: dict[str, Expr]) -> Index:
        """The index of an operand, from those of the letters; 0 where it broadcasts."""
        pairs = zip(letters, sizes_of(operand), strict=True)
        return tuple(ZERO if size == 1 else at[letter] for letter, size in pairs)


def read_product(node: fx.Node) -> Product | None:
    """The product that a node computes, None if it computes no product of two tensors."""
    read = _SPELLINGS.get(node.target) if node.op == "call_function" else None
    found = read(node) if read is not None else None
    return found if found is not None and found.is_plain() else None


def is_product(node: fx.Node) -> bool:
    """Whether a node is a product of any kind: lifting never goes through one."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = str(node.target._schema.name).removeprefix("aten::")
    return name in _PRODUCTS


def _matmul(node: fx.Node) -> Product | None:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    dims = left.meta["val"].dim(), right.meta["val"].dim()
    if min(dims) < 2:
        return None
    batch = "".join(chr(ord("A") + i) for i in range(max(dims) - 2))
    a, b = (batch[len(batch) - (dim - 2) :] for dim in dims)
    return Product(node, left, right, a + "mc", b + "cn", batch + "mn")


def _baddbmm(node: fx.Node) -> Product | None:
    bias, left, right = node.args[:3]
    assert isinstance(bias, fx.Node) and isinstance(left, fx.Node) and isinstance(right, fx.Node)
    beta: Any = node.kwargs.get("beta", 1)
    alpha: Any = node.kwargs.get("alpha", 1)
    kept = None if beta == 0 else bias
    return Product(node, left, right, "Amc", "Acn", "Amn", kept, beta, alpha)


def _einsum(node: fx.Node) -> Product | None:
    operands: Any = node.args[1]
    text = str(node.args[0]).replace(" ", "")
    if len(operands) != 2:
        return None
    inputs, arrow, out = text.partition("->")
    a, b = inputs.split(",")
    if not arrow:
        out = "".join(sorted(x for x in set(a + b) if (a + b).count(x) == 1))
    if "..." in text:
        dims = [operand.meta["val"].dim() for operand in operands]
        unused = "".join(x for x in string.ascii_letters if x not in text)
        ranks = [dim - len(x) + 3 if "..." in x else 0 for dim, x in zip(dims, (a, b), strict=True)]
        batch = unused[: max(ranks)]
        a, b = (
            x.replace("...", batch[len(batch) - rank :])
            for x, rank in zip((a, b), ranks, strict=True)
        )
        out = out.replace("...", batch)
    return Product(node, operands[0], operands[1], a, b, out)


_SPELLINGS: dict[Any, Callable[[fx.Node], Product | None]] = {
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.einsum.default: _einsum,
}
_PRODUCTS = (
    "matmul", "bmm", "mm", "baddbmm", "addmm", "addbmm", "mv", "dot", "einsum", "linear",
    "bilinear", "conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention",
    "embedding",
)  # fmt: skip

"""Products of two tensors, however they are spelled, in index letters.

Unlike ``passes.contraction`` these may have letters that both operands and the result share (a
batch of experts), two operands that are both computed, and a bias of any shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sparse_compiler.passes.moe.axes import Axis, Layout, leaves, unify
from sparse_compiler.static import StaticValues, arguments

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Product:
    """One product: letters name the dimensions of its operands and of its result.

    Attributes:
        node: the operator.
        left, right: its operands; ``left`` is computed and ``right`` a weight, if one of them is.
        bias: what it adds, broadcast to the result, or None.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_letters: str
    right_letters: str
    out_letters: str
    bias: fx.Node | None = None

    def turned(self) -> Product:
        """The same with the operands in the other order."""
        return dataclasses.replace(
            self,
            left=self.right,
            right=self.left,
            left_letters=self.right_letters,
            right_letters=self.left_letters,
        )

    @property
    def contracted(self) -> str:
        """Letters that are summed over."""
        return "".join(
            a for a in self.left_letters if a in self.right_letters and a not in self.out_letters
        )

    def axes(self, left: Layout, right: Layout) -> dict[str, tuple[Axis, ...]] | None:
        """The axes of each letter; None if the operands' do not fit each other."""
        first = dict(zip(self.left_letters, left, strict=True))
        second = dict(zip(self.right_letters, right, strict=True))
        found: dict[str, tuple[Axis, ...]] = {}
        for letter in {**first, **second}:
            a, b = first.get(letter, ()), second.get(letter, ())
            if a and b and not unify(a, b):
                return None
            found[letter] = a or b
        resolved = leaves(tuple(found.values()))
        return dict(zip(found, resolved, strict=True))


def read_product(node: fx.Node) -> Product | None:
    """The product that a node computes, or None."""
    read = _SPELLINGS.get(node.target) if node.op == "call_function" else None
    found = read(node) if read is not None else None
    if found is None:
        return None
    letters = found.left_letters, found.right_letters, found.out_letters
    if any(len(set(item)) != len(item) for item in letters):
        return None
    left, right, out = (set(item) for item in letters)
    if (left ^ right) - out or out - (left | right):
        return None  # sums of one operand, or a diagonal
    return found


def read_linear(node: fx.Node, static: StaticValues) -> Product | None:
    """A product of a computed ``left`` and a static ``right``, or None."""
    found = read_product(node)
    if found is None or static.is_static(found.left) == static.is_static(found.right):
        return None
    return found if static.is_static(found.right) else found.turned()


def _linear(node: fx.Node) -> Product | None:
    given = arguments(node)
    x, weight = given["input"], given["weight"]
    if weight.meta["val"].dim() != 2:
        return None
    lead = _letters(x.meta["val"].dim() - 1)
    return Product(node, x, weight, lead + "k", "nk", lead + "n", given["bias"])


def _two(left: str, right: str, out: str) -> Callable[[fx.Node], Product | None]:
    def read(node: fx.Node) -> Product | None:
        given = arguments(node)
        if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
            return None
        names = [name for name in ("self", "mat1", "batch1", "mat2", "batch2") if name in given]
        a, b = (given[name] for name in names[-2:])
        bias = given["self"] if len(names) == 3 else None
        return Product(node, a, b, left, right, out, bias)

    return read


def _matmul(node: fx.Node) -> Product | None:
    given = arguments(node)
    left, right = given["self"], given["other"]
    dims = left.meta["val"].dim(), right.meta["val"].dim()
    batch = _letters(max(*dims, 2) - 2)

    def letters(dim: int, last: str, vector: str) -> str:
        return vector if dim == 1 else batch[len(batch) - (dim - 2) :] + last

    a, b = letters(dims[0], "mk", "k"), letters(dims[1], "kn", "k")
    out = batch + ("m" if dims[0] > 1 else "") + ("n" if dims[1] > 1 else "")
    return Product(node, left, right, a, b, out)


def _einsum(node: fx.Node) -> Product | None:
    given = arguments(node)
    text, operands = given["equation"].replace(" ", ""), given["tensors"]
    if len(operands) != 2 or "." in text or "->" not in text or given.get("path") is not None:
        return None
    inputs, out = text.split("->")
    a, b = inputs.split(",")
    return Product(node, operands[0], operands[1], a, b, out)


def _letters(count: int) -> str:
    return "".join(chr(ord("A") + i) for i in range(count))


_SPELLINGS: dict[Any, Callable[[fx.Node], Product | None]] = {
    aten.linear.default: _linear,
    aten.mm.default: _two("mk", "kn", "mn"),
    aten.addmm.default: _two("mk", "kn", "mn"),
    aten.bmm.default: _two("bmk", "bkn", "bmn"),
    aten.baddbmm.default: _two("bmk", "bkn", "bmn"),
    aten.matmul.default: _matmul,
    aten.einsum.default: _einsum,
}

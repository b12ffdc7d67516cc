"""Finds every product of an activation with a static matrix, however it is spelled.

``linear``, ``addmm``, ``mm``, ``matmul``, ``bmm``, two-operand ``einsum`` and 1x1 convolutions are
all the same thing: a contraction with one static side. Each spelling is read as index letters,
``bsk,nk->bsn``; from the letters alone follows how to see the weight as
[out_features, in_features], the input as [rows, in_features], and the product as the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from sparse_compiler.region import Builder
from sparse_compiler.static import StaticValues

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One linear layer of the graph, in index letters.

    Attributes:
        node: the operator that computes it.
        x: the activation; ``x_letters`` names its dimensions.
        weight: the static operand; a ``"."`` in ``w_letters`` is a dimension that repeats one
            matrix (of size 1, or expanded).
        bias: added along ``bias_letter`` of the result, or None.
        strides: steps of a strided 1x1 convolution along the last dimensions of x.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    x_letters: str
    w_letters: str
    out_letters: str
    bias: fx.Node | None = None
    strides: tuple[int, ...] = ()

    @property
    def row_letters(self) -> str:
        return "".join(a for a in self.x_letters if a in self.out_letters)

    @property
    def in_letters(self) -> str:
        return "".join(a for a in self.w_letters if a in self.x_letters)

    @property
    def out_feature_letters(self) -> str:
        return "".join(a for a in self.out_letters if a in self.w_letters)

    def is_linear(self) -> bool:
        """Whether the letters say "rows x in_features times in_features x out_features"."""
        for letters in (self.x_letters, self.w_letters.replace(".", ""), self.out_letters):
            if len(set(letters)) != len(letters):
                return False
        x, w, out = set(self.x_letters), set(self.w_letters) - {"."}, set(self.out_letters)
        return bool(x & w) and not (x & w & out) and x | w == out | (x & w)

    @property
    def rows(self) -> Any:
        """Number of rows of the input; a SymInt where shapes are dynamic."""
        sizes = dict(zip(self.out_letters, self.node.meta["val"].shape, strict=True))
        return math.prod(sizes[a] for a in self.row_letters)

    def matrix(self, value: torch.Tensor) -> torch.Tensor:
        """The weight's value as [out_features, in_features]."""
        for dim in reversed([i for i, a in enumerate(self.w_letters) if a == "."]):
            value = value.select(dim, 0)
        letters = self.w_letters.replace(".", "")
        order = self.out_feature_letters + self.in_letters
        value = value.permute([letters.index(a) for a in order])
        outs = len(self.out_feature_letters)
        # Not -1: a weight may be empty.
        return value.reshape(math.prod(value.shape[:outs]), math.prod(value.shape[outs:]))

    def build(self, build: Builder, product: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """The nodes of the layer, given those of y = product(x) on [rows, in_features]."""
        x = self.x
        for dim, step in enumerate(self.strides, len(self.x_letters) - len(self.strides)):
            if step != 1:
                x = build.call(aten.slice.Tensor, x, dim, 0, 2**63 - 1, step)
        x = _permuted(build, x, self.x_letters, self.row_letters + self.in_letters)
        rows = x
        flat = len(self.row_letters) == len(self.in_letters) == 1
        if not flat:
            features = math.prod(x.meta["val"].shape[len(self.row_letters) :])
            rows = build.call(aten.reshape.default, x, [-1, features])
        y = product(rows)
        if self.bias is not None:
            y = build.call(aten.add.Tensor, y, self.bias)
        natural = self.row_letters + self.out_feature_letters
        if not flat or len(self.out_feature_letters) != 1:
            result = self.node.meta["val"].shape
            sizes = dict(zip(self.out_letters, result, strict=True))
            outs = [sizes[a] for a in self.out_feature_letters]
            y = _unflatten(build, y, x, len(self.row_letters), outs)
        if natural == self.out_letters:
            return y
        y = _permuted(build, y, natural, self.out_letters)
        if y.meta["val"].stride() == self.node.meta["val"].stride():
            return y
        # What follows may view the result with the strides the operator gave it.
        return build.call(aten.contiguous.default, y)


def _permuted(build: Builder, node: fx.Node, have: str, want: str) -> fx.Node:
    if have == want:
        return node
    return build.call(aten.permute.default, node, [have.index(a) for a in want])


def _unflatten(build: Builder, y: fx.Node, x: fx.Node, dims: int, outs: list[Any]) -> fx.Node:
    """Give y [rows, out] with the first ``dims`` sizes of x and then ``outs``."""
    sizes: list[Any] = []
    for dim, size in enumerate(x.meta["val"].shape[:dims]):
        if isinstance(size, int):
            sizes.append(size)
        elif -1 not in sizes and 0 not in x.meta["val"].shape:
            sizes.append(-1)
        else:
            sizes.append(build.call(aten.sym_size.int, x, dim))
    return build.call(aten.reshape.default, y, [*sizes, *outs])


def find_contractions(gm: fx.GraphModule, static: StaticValues) -> Iterator[Contraction]:
    """Linear layers in graph order. The graph may be edited at each while iterating."""
    for node in list(gm.graph.nodes):
        read = _SPELLINGS.get(node.target) if node.op == "call_function" else None
        if read is None:
            continue
        found = read(node, static)
        if found is not None and static.is_static(found.weight) and found.is_linear():
            yield found


def _sides(
    node: fx.Node, static: StaticValues, left: Any, right: Any, letters: tuple[str, str, str]
) -> Contraction | None:
    """A contraction of two nodes of which exactly one is static."""
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if static.is_static(left) == static.is_static(right):
        return None
    a, b, out = letters
    if static.is_static(right):
        return Contraction(node, left, right, a, _dotted(right, b, a, out), out)
    return Contraction(node, right, left, b, _dotted(left, a, b, out), out)


def _dotted(weight: fx.Node, letters: str, x_letters: str, out_letters: str) -> str:
    """Batch letters along which one matrix repeats, as dots."""
    value = weight.meta["val"]

    def repeats(dim: int, letter: str) -> bool:
        batch = letter in x_letters and letter in out_letters
        return batch and (value.shape[dim] == 1 or value.stride(dim) == 0)

    return "".join("." if repeats(i, a) else a for i, a in enumerate(letters))


def _linear(node: fx.Node, static: StaticValues) -> Contraction | None:
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or static.is_static(x):
        return None
    if weight.meta["val"].dim() != 2:
        return None
    lead = _letters(x.meta["val"].dim() - 1)
    return Contraction(
        node,
        x,
        weight,
        lead + "k",
        "nk",
        lead + "n",
        bias if isinstance(bias, fx.Node) else None,
    )


def _addmm(node: fx.Node, static: StaticValues) -> Contraction | None:
    bias, left, right = node.args[:3]
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    found = _sides(node, static, left, right, ("mk", "kn", "mn"))
    if found is None or found.x is not left or not isinstance(bias, fx.Node):
        return None
    return dataclasses.replace(found, bias=bias)


def _mm(node: fx.Node, static: StaticValues) -> Contraction | None:
    return _sides(node, static, node.args[0], node.args[1], ("mk", "kn", "mn"))


def _bmm(node: fx.Node, static: StaticValues) -> Contraction | None:
    return _sides(node, static, node.args[0], node.args[1], ("bmk", "bkn", "bmn"))


def _matmul(node: fx.Node, static: StaticValues) -> Contraction | None:
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    dims = left.meta["val"].dim(), right.meta["val"].dim()
    batch = _letters(max(*dims, 2) - 2)

    def letters(dim: int, last: str, vector: str) -> str:
        return vector if dim == 1 else batch[len(batch) - (dim - 2) :] + last

    a, b = letters(dims[0], "mk", "k"), letters(dims[1], "kn", "k")
    out = batch + ("m" if dims[0] > 1 else "") + ("n" if dims[1] > 1 else "")
    found = _sides(node, static, left, right, (a, b, out))
    if found is None:
        return None
    # A size-1 batch dimension of x that the weight broadcasts is not a contraction.
    sizes = dict(zip(found.out_letters, node.meta["val"].shape, strict=True))
    x_sizes = zip(found.x_letters, found.x.meta["val"].shape, strict=True)
    return found if all(sizes.get(a, size) == size for a, size in x_sizes) else None


def _einsum(node: fx.Node, static: StaticValues) -> Contraction | None:
    operands: Any = node.args[1]
    text = str(node.args[0]).replace(" ", "")
    if len(operands) != 2 or "." in text or "->" not in text:
        return None
    inputs, out = text.split("->")
    a, b = inputs.split(",")
    return _sides(node, static, operands[0], operands[1], (a, b, out))


def _conv(node: fx.Node, static: StaticValues) -> Contraction | None:
    """A convolution whose kernel is one point: no padding, no groups."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    value = weight.meta["val"]
    spatial = value.dim() - 2
    if x.meta["val"].dim() != value.dim() or any(size != 1 for size in value.shape[2:]):
        return None
    if given.get("groups", 1) != 1 or any(p != 0 for p in _listed(given.get("padding", 0))):
        return None
    if static.is_static(x):
        return None
    strides = _listed(given.get("stride", 1))
    steps = tuple(strides * spatial if len(strides) == 1 else strides)
    space = _letters(spatial, start="p")
    return Contraction(
        node,
        x,
        weight,
        "bk" + space,
        "nk" + "." * spatial,
        "bn" + space,
        bias if isinstance(bias, fx.Node) else None,
        steps,
    )


def _listed(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _letters(count: int, start: str = "A") -> str:
    return "".join(chr(ord(start) + i) for i in range(count))


_SPELLINGS: dict[Any, Callable[[fx.Node, StaticValues], Contraction | None]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.matmul.default: _matmul,
    aten.mv.default: _matmul,
    aten.einsum.default: _einsum,
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
}

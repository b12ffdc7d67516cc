"""What score expressions mean: their values, computed with differentiable PyTorch operators.

``evaluate`` gives the dense scores [B, H, M, N], the oracle for everything else here.
``Evaluator`` gives the value of any sub-expression over chosen ranges of the four indices; a value
has size 1 in each dimension that it does not depend on.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparse_compiler.score.affine import Affine
from sparse_compiler.score.arithmetic import folded
from sparse_compiler.score.node import LOAD_TYPES, Expr

DIMENSIONS = {"b": 0, "h": 1, "q": 2, "k": 3}

Value = torch.Tensor | int | float | bool


def evaluate(
    expr: Expr,
    s: torch.Tensor,
    leaves: Sequence[torch.Tensor],
    ints: Sequence[int],
    batch: int,
    heads: int,
    queries: int,
    keys: int,
) -> torch.Tensor:
    """The values of ``expr`` everywhere.

    Gradients flow to ``s`` and to the float leaves. Indices of leaves are clamped into range:
    only branches that are not taken may leave it.

    Args:
        expr: an expression of any type.
        s: raw products of queries and keys, [B, H, M, N]; floats are computed in its dtype, or in
            float32 if that is narrower.
        leaves: what ``load`` reads, by slot.
        ints: the runtime integers.
        batch: B.
        heads: H.
        queries: M.
        keys: N.

    Returns:
        [B, H, M, N] of ``s.dtype`` (int64, bool for an expression of that type).
    """
    ranges = [range(size) for size in (batch, heads, queries, keys)]
    wide = torch.promote_types(s.dtype, torch.float32)
    found = Evaluator(leaves, ints, ranges, s.to(wide), device=s.device)(expr)
    dtypes = {"float": s.dtype, "int": torch.int64, "bool": torch.bool}
    full = torch.as_tensor(found, dtype=dtypes[expr.type], device=s.device)
    return full.expand(batch, heads, queries, keys)


class Evaluator:
    """Values of expressions over ranges of the indices, computed once for each distinct node.

    Args:
        leaves: what ``load`` reads, by slot.
        ints: the runtime integers.
        ranges: which b, h, q and k.
        s: the raw products over these ranges, if an expression reads them.
        dtype: of floats where there is no ``s``.
        device: where index values are made.
    """

    def __init__(
        self,
        leaves: Sequence[torch.Tensor],
        ints: Sequence[int],
        ranges: Sequence[range],
        s: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self._leaves = leaves
        self._ints = ints
        self._ranges = ranges
        self._s = s
        self._dtype = dtype if s is None else s.dtype
        self._device = device
        self._known: dict[Expr, Value] = {}

    def __call__(self, expr: Expr) -> Value:
        """The value of ``expr``: a number, or a tensor of four dimensions."""
        known = self._known
        if expr in known:
            return known[expr]
        waiting = [expr]
        while waiting:
            node = waiting[-1]
            missing = [item for item in _needed(node) if item not in known]
            if missing:
                waiting.extend(missing)
            else:
                known[node] = self._leaf(node) if node.op in _LEAVES else self._apply(node)
                waiting.pop()
        return known[expr]

    def region(self, load: Expr) -> torch.Tensor:
        """The elements that a ``load`` reads, or more: a view of its leaf."""
        leaf = self._leaves[load.slot].detach()
        found = self._view(leaf, load.operands)
        return leaf if found is None else found

    def _leaf(self, node: Expr) -> Value:
        if node.op == "const":
            number: Value = node.value
            return number
        if node.op == "int":
            return int(self._ints[node.slot])
        if node.op == "load":
            return self._load(node)
        if node.op == "s":
            if self._s is None:
                raise ValueError("the expression depends on s, of which there are no values")
            return self._s
        indices = self._ranges[DIMENSIONS[node.op]]
        values = torch.arange(indices.start, indices.stop, indices.step, device=self._device)
        return values.view([-1 if name == node.op else 1 for name in DIMENSIONS])

    def _apply(self, node: Expr) -> Value:
        values = [self._known[item] for item in node.operands]
        if node.op == "to_float":
            return torch.as_tensor(values[0], dtype=self._dtype, device=self._device)
        if not any(isinstance(value, torch.Tensor) for value in values):
            return _of_numbers(node.op, values)
        if node.op in _TENSORS_ONLY:
            dtypes = {"float": self._dtype, "int": torch.int64, "bool": torch.bool}
            values = [
                torch.as_tensor(value, dtype=dtypes[item.type], device=self._device)
                for value, item in zip(values, node.operands, strict=True)
            ]
        return _FUNCTIONS[node.op](*values)

    def _load(self, node: Expr) -> torch.Tensor:
        leaf = self._leaves[node.slot].detach() if node.type != "float" else self._leaves[node.slot]
        found = self._view(leaf, node.operands)
        if found is None:
            indices = (self(item) for item in node.operands)
            found = _gather(
                leaf, [_clamped(i, n) for i, n in zip(indices, leaf.shape, strict=True)]
            )
        kind = LOAD_TYPES[node.dtype]
        return found.to({"float": self._dtype, "int": torch.int64, "bool": torch.bool}[kind])

    def _view(self, leaf: torch.Tensor, indices: tuple[Expr, ...]) -> torch.Tensor | None:
        """A view of a leaf whose indices are constants and distinct b, h, q, k plus constants."""
        letters: list[str] = []
        for dim, index in reversed(list(enumerate(indices))):
            line = Line.of(index)
            if line is None or line.letter in letters:
                return None
            first, size, letter = line.start(self._ints), 1, line.letter
            if letter:
                letters.append(letter)
                wanted = self._ranges[DIMENSIONS[letter]]
                first, size = first + wanted.start, len(wanted)
                if line.factor != 1 or wanted.step != 1:
                    return None
            if first < 0 or first + size > leaf.shape[dim]:
                return None
            if not letter:
                leaf = leaf.select(dim, first)
            elif size != leaf.shape[dim]:
                leaf = leaf.narrow(dim, first, size)
        letters.reverse()
        order = sorted(range(len(letters)), key=lambda i: DIMENSIONS[letters[i]])
        if order != list(range(len(letters))):
            leaf = leaf.permute(order)
        for dim, letter in enumerate(DIMENSIONS):
            if letter not in letters:
                leaf = leaf.unsqueeze(dim)
        return leaf


@dataclasses.dataclass(frozen=True)
class Line:
    """``factor * letter + constant``, and multiples of runtime integers.

    The letter is b, h, q or k, or "" if there is none.
    """

    letter: str
    factor: int
    constant: int
    ints: tuple[tuple[int, int], ...]

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(expr: Expr) -> Line | None:
        """An int expression as a line, None if it is none."""
        letter, slope = "", 0
        ints: list[tuple[int, int]] = []
        sum_ = Affine.of(expr)
        for term, factor in sum_.terms:
            if term.op == "int":
                ints.append((term.slot, factor))
            elif term.op in DIMENSIONS and not letter:
                letter, slope = term.op, factor
            else:
                return None
        return Line(letter, slope, sum_.constant, tuple(ints))

    def start(self, ints: Sequence[int]) -> int:
        """The value where the letter is 0."""
        return self.constant + sum(int(ints[place]) * factor for place, factor in self.ints)


def _needed(node: Expr) -> tuple[Expr, ...]:
    """The operands to compute first; a load computes its indices only if it has to."""
    return () if node.op == "load" else node.operands


def _clamped(index: Value, size: int) -> Value:
    if isinstance(index, torch.Tensor):
        return index.clamp(0, max(size - 1, 0))
    return min(max(int(index), 0), max(size - 1, 0))


def _gather(leaf: torch.Tensor, indices: Sequence[Value]) -> torch.Tensor:
    if not leaf.numel():
        return leaf.new_zeros([1] * 4)
    picked = [i.to(leaf.device) if isinstance(i, torch.Tensor) else i for i in indices]
    found = leaf[tuple(picked)]  # type: ignore[index]
    return found if found.dim() == 4 else found.view([1] * 4)


def _of_numbers(op: str, values: Sequence[Any]) -> Value:
    if op in _NUMBERS:
        result: Value = _NUMBERS[op](*values)
        return result
    number = folded(op, values)
    return 0 if number is None else number  # an integer over 0, in a branch that is not taken


def _divided(
    left: torch.Tensor, right: torch.Tensor, function: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Integers over 0 raise in PyTorch, even in a branch that is not taken."""
    return function(left, right if right.is_floating_point() else right.masked_fill(right == 0, 1))


_LEAVES = ("const", "int", "load", "s", *DIMENSIONS)

_COMPARISONS: dict[str, Callable[..., Any]] = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}

_NUMBERS: dict[str, Callable[..., Any]] = {
    **_COMPARISONS,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "xor": operator.ne,
    "not": operator.not_,
    "where": lambda c, x, y: x if c else y,
    "neg": operator.neg,
    "to_bool": bool,
}

_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    **_COMPARISONS,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": functools.partial(_divided, function=torch.floor_divide),
    "mod": functools.partial(_divided, function=torch.remainder),
    "neg": torch.neg,
    "abs": torch.abs,
    "min": torch.minimum,
    "max": torch.maximum,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
    "not": torch.logical_not,
    "where": torch.where,
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "pow": torch.pow,
    "relu": torch.relu,
    "to_int": lambda x: x.to(torch.int64),
    "to_bool": lambda x: x != 0,
}

# These do not take Python numbers, or compute in another dtype if they do.
_TENSORS_ONLY = ("min", "max", "and", "or", "xor", "where", "floordiv", "mod", "pow")

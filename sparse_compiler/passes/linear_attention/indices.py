"""The indices that sums of products are written in, and how views take them apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = Any  # int or SymInt


class NotMultilinear(Exception):
    """A value has no form as a sum of products; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """A variable of the notation, compared by identity. It takes ``size`` values, never one."""

    size: Size


# For each dimension of a tensor the indices it runs over, row-major: none for size 1, several
# where a view has merged dimensions.
Dims = tuple[tuple[Index, ...], ...]
Renaming = Mapping[Index, tuple[Index, ...]]


def same(left: Size, right: Size) -> bool:
    """Whether two sizes are known to be equal; guards on nothing."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return statically_known_true(left == right)


def _quotient(size: Size, divisor: Size) -> Size | None:
    """``size / divisor`` if it is known to be whole."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    quotient = size // divisor
    return quotient if statically_known_true(quotient * divisor == size) else None


def hint(size: Size) -> int:
    """A size as a number: where it is dynamic, that of the example."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0


def numel(indices: Iterable[Index]) -> int:
    """How many values the indices take together, by their hints."""
    return math.prod(hint(index.size) for index in indices)


def renamed(dims: Dims, names: Renaming) -> Dims:
    """Dimensions with other indices."""
    return tuple(tuple(new for old in dim for new in names.get(old, (old,))) for dim in dims)


def _resolved(names: dict[Index, tuple[Index, ...]]) -> dict[Index, tuple[Index, ...]]:
    """A renaming whose results are not renamed again."""

    def end(index: Index) -> tuple[Index, ...]:
        if index not in names:
            return (index,)
        return tuple(last for new in names[index] for last in end(new))

    return {index: end(index) for index in names}


def unified(left: Sequence[Index], right: Sequence[Index]) -> dict[Index, tuple[Index, ...]]:
    """The renaming under which two readings of one dimension agree.

    Raises:
        NotMultilinear: their sizes do not match, or cannot be compared.
    """
    names: dict[Index, tuple[Index, ...]] = {}
    one, other = list(left), list(right)
    while one and other:
        x, y = one.pop(0), other.pop(0)
        if x is y:
            continue
        if same(x.size, y.size):
            names[y] = (x,)
        elif (rest := _quotient(y.size, x.size)) is not None:
            names[y] = (x, Index(rest))
            other.insert(0, names[y][1])
        elif (rest := _quotient(x.size, y.size)) is not None:
            names[x] = (y, Index(rest))
            one.insert(0, names[x][1])
        else:
            raise NotMultilinear("dimensions are split in ways that do not match")
    if one or other:
        raise NotMultilinear("dimensions are split in ways that do not match")
    return _resolved(names)


def viewed(dims: Dims, shape: Sequence[Size]) -> tuple[Dims, Renaming]:
    """The dimensions after a view to ``shape``, and the renaming that it takes.

    Raises:
        NotMultilinear: the new dimensions do not come from whole old ones, or parts of one.
    """
    atoms = [index for dim in dims for index in dim]
    names: dict[Index, tuple[Index, ...]] = {}
    result: list[tuple[Index, ...]] = []
    for size in shape:
        group: list[Index] = []
        missing = size
        while not same(missing, 1):
            if not atoms:
                raise NotMultilinear("a view does not match its input")
            index = atoms.pop(0)
            if (rest := _quotient(missing, index.size)) is not None:
                missing = rest
                group.append(index)
            elif (rest := _quotient(index.size, missing)) is not None:
                names[index] = (Index(missing), Index(rest))
                group.append(names[index][0])
                atoms.insert(0, names[index][1])
                missing = 1
            else:
                raise NotMultilinear("a view splits a dimension in a way that does not match")
        result.append(tuple(group))
    if atoms:
        raise NotMultilinear("a view does not match its input")
    return tuple(result), _resolved(names)

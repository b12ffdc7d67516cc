"""Constant tensors as expressions of their indices: a model's causal buffer is ``k <= q``.

Every guess is verified on every element, exactly, so an expression may stand for the tensor
wherever its indices are in range.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from sparse_compiler.score.evaluate import Evaluator
from sparse_compiler.score.expr import (
    FALSE,
    TRUE,
    B,
    Expr,
    H,
    K,
    Q,
    abs_,
    add,
    and_,
    const,
    eq,
    floordiv,
    ge,
    le,
    max_,
    min_,
    mod,
    mul,
    neg,
    not_,
    or_,
    sub,
    to_float,
    where,
)

_LETTERS = (B, H, Q, K)
# A line of truth values with more changes than this has no simple form.
_CHANGES = 8


def fit(values: torch.Tensor, indices: Sequence[Expr]) -> Expr | None:
    """An expression for ``load`` of a constant tensor at ``indices``, without the tensor.

    Known are constants, affine functions, clamped ones, blocks and periods of one index or of a
    difference of two; bands, triangles, dilations, global rows and columns, chunks; and choices
    between two numbers by one of these.

    Args:
        values: bool, integers or floats, of at most four dimensions that matter.
        indices: an int expression for each dimension.

    Returns:
        An expression of the type that ``load`` has, None if none is known.

    Raises:
        ValueError: another number of indices than dimensions.
    """
    if len(indices) != values.dim():
        raise ValueError(f"{values.dim()} dimensions, but {len(indices)} indices")
    small, kept = _reduced(values.detach())
    if small is None or len(kept) > 2:
        return None
    letters = _LETTERS[4 - len(kept) :]
    found = _fitted(small, letters)
    return None if found is None else found.substitute(_named(letters, indices, kept))


def factored(values: torch.Tensor, indices: Sequence[Expr]) -> tuple[torch.Tensor, Expr] | None:
    """A float tensor as a vector times a function of the other indices: ALiBi.

    Args:
        values: floats whose first dimension of more than one distinct value is the vector's.
        indices: an int expression for each dimension.

    Returns:
        The vector (the slopes) and the float expression it is multiplied with (a distance);
        None if there is none.
    """
    small, kept = _reduced(values.detach())
    if small is None or not small.is_floating_point() or len(kept) not in (2, 3):
        return None
    letters = _LETTERS[4 - len(kept) :]
    inner, size = letters[1:], small.shape[-1] - 1
    distances = [inner[-1], sub(inner[-1], size)]
    if len(inner) == 2:
        y, x = inner
        distances = [sub(x, y), neg(abs_(sub(y, x))), abs_(sub(y, x)), sub(y, x), *distances]
    for distance in distances:
        grid = _values(distance, small.shape[1:], inner).expand(small.shape[1:])
        ones = (grid.flatten().abs() == 1).nonzero().flatten()
        if not len(ones):
            continue
        place = int(ones[0])
        vector = small.flatten(1)[:, place] * int(grid.flatten()[place])
        products = vector.view([-1] + [1] * len(inner)) * grid.to(small.dtype)
        if torch.equal(products, small):
            return vector, to_float(distance).substitute(_named(letters, indices, kept))
    return None


def _named(
    letters: Sequence[Expr], indices: Sequence[Expr], kept: Sequence[int]
) -> dict[Expr, Expr]:
    return {letter: indices[dim] for letter, dim in zip(letters, kept, strict=True)}


def _reduced(values: torch.Tensor) -> tuple[torch.Tensor, list[int]] | tuple[None, list[int]]:
    """Without the dimensions along which nothing changes, and which dimensions are left."""
    kept = list(range(values.dim()))
    if not values.numel() or (values.is_floating_point() and bool(values.isnan().any())):
        return None, kept
    for dim in reversed(range(values.dim())):
        first = values.narrow(dim, 0, 1)
        if values.stride(dim) == 0 or values.shape[dim] == 1 or bool((values == first).all()):
            values = values.select(dim, 0)
            kept.remove(dim)
    return values, kept


def _values(expr: Expr, shape: Sequence[int], letters: Sequence[Expr]) -> torch.Tensor:
    """The values of an expression over the first indices of each of ``letters``."""
    sizes = dict(zip(letters, shape, strict=True))
    ranges = [range(sizes.get(letter, 1)) for letter in _LETTERS]
    found = torch.as_tensor(Evaluator((), (), ranges)(expr))
    if not found.dim():
        return found
    return found.reshape([found.shape[_LETTERS.index(letter)] for letter in letters])


def _right(expr: Expr | None, values: torch.Tensor, letters: Sequence[Expr]) -> bool:
    """Whether an expression has exactly these values."""
    if expr is None:
        return False
    found = _values(expr, values.shape, letters)
    if values.is_floating_point():
        # Nothing is lost: the values of float expressions are float32.
        wide = torch.promote_types(values.dtype, found.dtype)
        return bool((found.to(wide) == values.to(wide)).all())
    return bool((found == values).all())


def _fitted(values: torch.Tensor, letters: Sequence[Expr]) -> Expr | None:
    if not letters:
        return const(values.item())
    if values.dtype != torch.bool:
        low, high = torch.aminmax(values)
        top = values == high
        if bool((top | (values == low)).all()):
            chosen = _fitted(top, letters)
            return None if chosen is None else where(chosen, high.item(), low.item())
    guesses = _of_one if len(letters) == 1 else _of_two
    for guess in guesses(values, letters):
        expr = guess()
        if expr is not None and _right(expr, values, letters):
            return expr
    return None


Guess = Callable[[], Expr | None]


def _of_one(values: torch.Tensor, letters: Sequence[Expr]) -> list[Guess]:
    (x,) = letters
    if values.dtype == torch.bool:
        return [lambda: _runs(values, x), lambda: _period(values, x), lambda: _gaps(values, x)]
    return [
        lambda: _affine(values, x),
        lambda: _clamped(values, x),
        lambda: _valley(values, x),
        lambda: _blocks(values, x),
        lambda: _remainders(values, x),
    ]


def _of_two(values: torch.Tensor, letters: Sequence[Expr]) -> list[Guess]:
    y, x = letters
    if values.dtype == torch.bool:
        return [
            lambda: _of_difference(values, y, x),
            lambda: _crossed(values, y, x),
            lambda: not_(_crossed(~values, y, x) or FALSE),
            lambda: _chunks(values, y, x),
        ]
    return [lambda: _of_difference(values, y, x)]


def _edges(values: torch.Tensor) -> list[tuple[int, int]]:
    """First and last position of each run of true values."""
    padded = torch.nn.functional.pad(values.to(torch.int8), (1, 1))
    changes = padded[1:] - padded[:-1]
    firsts, lasts = (changes == 1).nonzero().flatten(), (changes == -1).nonzero().flatten() - 1
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def _inside(values: torch.Tensor, x: Expr, first: int, last: int) -> Expr:
    above = ge(x, first) if first else TRUE
    return and_(above, le(x, last)) if last < len(values) - 1 else above


def _runs(values: torch.Tensor, x: Expr) -> Expr | None:
    """Truth values as a few intervals."""
    changes = int((values[1:] != values[:-1]).sum())
    if changes > _CHANGES:
        return None
    return or_(FALSE, *(_inside(values, x, *edge) for edge in _edges(values)))


def _period(values: torch.Tensor, x: Expr) -> Expr | None:
    """A few intervals and, from one position to another, every so many positions."""
    edges = _edges(values)
    singles = [first for first, last in edges if first == last]
    runs = [edge for edge in edges if edge[0] != edge[1]]
    if len(singles) < 2 or len(runs) > _CHANGES:
        return None
    size = min(b - a for a, b in itertools.pairwise(singles))
    first, last = singles[0], singles[-1]
    # Intervals may hide the period at either end, and the ends of the line hide whether it ends.
    ends = (first if first >= size else 0), (last if last < len(values) - size else len(values) - 1)
    period = and_(eq(mod(sub(x, first), size), 0), _inside(values, x, *ends))
    return or_(period, *(_inside(values, x, *edge) for edge in runs))


def _gaps(values: torch.Tensor, x: Expr) -> Expr | None:
    """False at every so many positions."""
    found = _period(~values, x)
    return None if found is None else not_(found)


def _step(values: torch.Tensor) -> tuple[int | float, int | float]:
    return values[0].item(), (values[1] - values[0]).item()


def _affine(values: torch.Tensor, x: Expr) -> Expr | None:
    first, step = _step(values)
    if values.is_floating_point() and float(first).is_integer() and float(step).is_integer():
        return to_float(add(mul(x, int(step)), int(first)))
    return add(mul(x, step), first)


def _clamped(values: torch.Tensor, x: Expr) -> Expr | None:
    """An affine function between the least and the greatest value."""
    changes = (values[1:] != values[:-1]).nonzero().flatten()
    low, high = (end.item() for end in torch.aminmax(values))
    place = int(changes[len(changes) // 2])
    step = (values[place + 1] - values[place]).item()
    first = values[place].item() - place * step
    if values.is_floating_point() and not all(float(v).is_integer() for v in (step, first)):
        return None
    line = add(mul(x, int(step)), int(first))
    if values.is_floating_point():
        line = to_float(line)
    return min_(max_(line, low), high)


def _valley(values: torch.Tensor, x: Expr) -> Expr | None:
    """A multiple of the distance from a position, plus a constant."""
    for end in (values.argmin(), values.argmax()):
        middle = int(end)
        other = middle + 1 if middle + 1 < len(values) else middle - 1
        base, step = values[middle].item(), (values[other] - values[middle]).item()
        found = add(mul(abs_(sub(x, middle)), step), base)
        if _right(found, values, [x]):
            return found
    return None


def _blocks(values: torch.Tensor, x: Expr) -> Expr | None:
    """Runs of equal length, each one more than the one before."""
    size = int((values != values[0]).nonzero()[0])
    found = add(floordiv(x, size), int(values[0]))
    return to_float(found) if values.is_floating_point() else found


def _remainders(values: torch.Tensor, x: Expr) -> Expr | None:
    """0, 1, 2 and so on, again and again."""
    falls = (values[1:] < values[:-1]).nonzero().flatten()
    if not len(falls):
        return None
    found = mod(x, int(falls[0]) + 1)
    return to_float(found) if values.is_floating_point() else found


def _skewed(values: torch.Tensor) -> torch.Tensor:
    """[M, N] as [M, M + N - 1]: element (i, j) is in column i - j + N - 1, the rest is false."""
    rows, columns = values.shape
    wide = torch.nn.functional.pad(values.flip(1), (0, rows))
    return wide.flatten()[: rows * (rows + columns - 1)].view(rows, rows + columns - 1)


def _crossed(values: torch.Tensor, y: Expr, x: Expr) -> Expr | None:
    """A function of the difference, and whole rows and columns that are true."""
    rows, columns = values.all(1), values.all(0)
    for tall, wide in ((False, True), (True, False), (True, True)):
        whole = [
            (some, letter) for some, letter, use in ((rows, y, tall), (columns, x, wide)) if use
        ]
        if not all(bool(some.any()) for some, _ in whole):
            continue
        covered = (rows & tall).unsqueeze(1) | (columns & wide)
        line = _line(values, ~covered)
        if line is None:
            continue
        found = line.substitute({Q: add(sub(y, x), values.shape[1] - 1)})
        lines = [_fitted_line(some, letter) for some, letter in whole]
        if any(item is None for item in lines):
            continue
        total = or_(found, *(item for item in lines if item is not None))
        if _right(total, values, [y, x]):
            return total
    return None


def _line(values: torch.Tensor, seen: torch.Tensor) -> Expr | None:
    """A function of i - j + N - 1, named Q, that has these values where they are seen."""
    true, false = (_skewed(part & seen).any(0) for part in (values, ~values))
    known = (true | false).nonzero().flatten()
    if bool((true & false).any()) or not len(known):
        return None
    # A diagonal that is not seen goes with the one before, or with the first one that is.
    place = torch.where(true | false, torch.arange(len(true)), int(known[0])).cummax(0).values
    return _fitted_line(true[place], Q)


def _fitted_line(values: torch.Tensor, x: Expr) -> Expr | None:
    if bool(values.all()) or not bool(values.any()):
        return const(bool(values[0]))
    return _fitted(values, [x])


def _chunks(values: torch.Tensor, y: Expr, x: Expr) -> Expr | None:
    """Pairs in the same chunk, all or those up to the diagonal."""
    ends = (~values[:, 0]).nonzero()
    if not len(ends):
        return None
    size = int(ends[0])
    if not size:
        return None
    found = eq(floordiv(y, size), floordiv(x, size))
    return found if bool(values[0, :size].all()) else and_(found, le(x, y))


def _of_difference(values: torch.Tensor, y: Expr, x: Expr) -> Expr | None:
    """Numbers that depend on the difference alone."""
    if not bool((values[1:, 1:] == values[:-1, :-1]).all()):
        return None
    line = torch.cat([values[0].flip(0), values[1:, 0]])
    found = _fitted(line, [Q])
    if found is None:
        return None
    return found.substitute({Q: add(sub(y, x), values.shape[1] - 1)})

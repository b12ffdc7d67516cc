"""Names of the conditions under which a mask keeps a pair of a query and a key.

They come from the structure of the expressions: two comparisons of a query's position with a key's
are a window, whatever the positions are counted in, and equal numbers of two positions a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from sparse_compiler.score.affine import Affine, Comparison
from sparse_compiler.score.expr import Expr, K, Q, add, const, sub
from sparse_compiler.score.logic import parts
from sparse_compiler.score.node import FALSE, TRUE


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known beside an expression.

    Attributes:
        leaves: tensors that ``load`` reads, by slot; None for those that are not known.
        earlier: how many keys come before the first query's own, if keys and queries end together.
    """

    leaves: Sequence[torch.Tensor | None] = ()
    earlier: int = 0


@dataclasses.dataclass(frozen=True)
class Band:
    """``query - key >= reach``, or ``<= reach``: one side of a window.

    Attributes:
        side: ``"ge"`` or ``"le"``.
        reach: without q and k; where there is no query, the position that keys are compared with
            is in it.
        query: the query's position: q, its block, or what a tensor holds for it; None where the
            position is the same for all queries, as in a step of decoding.
        key: likewise the key's.
    """

    side: str
    reach: Expr
    query: Expr | None
    key: Expr

    @staticmethod
    def of(item: Expr) -> Band | None:
        """The band that a comparison is, else None."""
        found = Comparison.of(item)
        if found is None or found.op not in ("le", "ge"):
            return None
        keys = [(term, factor) for term, factor in found.terms if term.depends_on("k")]
        if len(keys) != 1 or abs(keys[0][1]) != 1 or not _is_position(keys[0][0], "k"):
            return None
        # Keys are what is subtracted.
        sign = -keys[0][1]
        total = Affine(found.terms, 0).scaled(sign)
        side = found.op if sign > 0 else {"le": "ge", "ge": "le"}[found.op]
        queries = [term for term, factor in total.terms if term.depends_on("q") and factor == 1]
        rest = without(total.terms, (keys[0][0], -1), *((term, 1) for term in queries))
        if len(queries) > 1 or rest.depends_on("hqk") or not _are_positions(queries):
            return None
        reach = sub(found.bound * sign, rest)
        if queries:
            return Band(side, reach, queries[0], keys[0][0])
        # A number for each batch is a length: what is behind it is padding.
        if keys[0][0] is not K or rest.op == "const" or rest.depends_on("b"):
            return None
        return Band(side, reach, None, K)

    @property
    def plain(self) -> bool:
        """Whether it compares q with k themselves."""
        return self.query is Q and self.key is K


def _is_position(term: Expr, letter: str) -> bool:
    """An index, its block, or an integer that a tensor holds for it."""
    if term.op == "floordiv":
        return term.operands[0].op == letter and term.operands[1].op == "const"
    other = "k" if letter == "q" else "q"
    return term.op == letter or (term.op == "load" and not term.depends_on(other))


def _are_positions(queries: Sequence[Expr]) -> bool:
    return all(_is_position(term, "q") for term in queries)


def without(terms: Sequence[tuple[Expr, int]], *removed: tuple[Expr, int]) -> Expr:
    """A sum less some terms."""
    rest = Affine(tuple(terms), 0)
    for term, factor in removed:
        rest = rest.plus(Affine(((term, factor),), 0), -1)
    return rest.expr()


def conjunction(keep: Expr, known: Known) -> list[str]:
    """Names of the conditions that all hold where a pair is kept."""
    if keep is TRUE:
        return []
    if keep is FALSE:
        return ["nothing kept"]
    found = parts("and", keep)
    bands: dict[tuple[Expr | None, Expr], list[Band]] = {}
    for item in found:
        band = Band.of(item)
        if band is not None:
            bands.setdefault((band.query, band.key), []).append(band)
    names = [name for group in bands.values() for name in _banded(group, known)]
    return names + [_name(item, known) for item in found if Band.of(item) is None]


def _banded(group: Sequence[Band], known: Known) -> list[str]:
    """Names of the comparisons of the same two positions."""
    below = [band.reach for band in group if band.side == "ge"]
    above = [band.reach for band in group if band.side == "le"]
    first = group[0]
    if first.query is None:
        return _at_a_position(below, above)
    if first.plain:
        return _window(below, above, known.earlier)
    names = _window(below, above)
    return [f"{' & '.join(names)} in {_unit(first.query, first.key)}"]


def _unit(query: Expr, key: Expr) -> str:
    """What positions are counted in, if not in tokens of this call."""
    if query.op == key.op == "floordiv" and query.operands[1] is key.operands[1]:
        return f"blocks of {key.operands[1]}"
    return "position ids" if "load" in (query.op, key.op) else "positions of two scales"


def _at_a_position(below: Sequence[Expr], above: Sequence[Expr]) -> list[str]:
    """Names of ``-k >= below`` and ``-k <= above``, which hold minus a position."""
    if len(below) == len(above) == 1:
        width = add(sub(above[0], below[0]), 1)
        if width.op == "const":
            return [f"sliding window {width} up to a position"]
    names = ["keys up to a position"] if below else []
    return names + (["keys from a position"] if above else [])


def _window(below: Sequence[Expr], above: Sequence[Expr], earlier: int = 0) -> list[str]:
    """Names of ``q - k >= below`` and ``q - k <= above``, of which some keys may come earlier."""
    names: list[str] = []
    if len(below) == len(above) == 1 and add(below[0], above[0]) is const(0):
        return [f"local window {above[0]} to either side"]
    for bound in below:
        if bound.op != "const" or bound.value == -earlier < 0:
            names.append("causal with an offset")
        elif bound.value == 0:
            names.append("causal")
        elif bound.value > 0:
            names.append(f"only keys at least {bound.value} back")
        else:
            names.append(f"at most {-bound.value} ahead")
    for bound in above:
        if below:
            names.append(f"sliding window {add(sub(bound, below[0]), 1)}")
        else:
            names.append("anti-causal" if bound is const(0) else f"at most {bound} back")
    return names


def _name(item: Expr, known: Known) -> str:
    """The name of one condition that is no band."""
    if item.op == "or":
        return _union(item, known)
    if not item.depends_on("q") and not item.depends_on("k"):
        return "a condition on the whole batch"
    if item.op == "eq":
        name = _chunks(item) or _same(*item.operands)
        if name:
            return name
    if not (item.depends_on("q") and item.depends_on("k")):
        return _one_sided(item)
    if item.op in ("load", "not") and item.loads():
        return _mask_tensor(item.loads()[0], known)
    return "an arbitrary mask" if item.loads() else "an arbitrary condition on positions"


def _one_sided(item: Expr) -> str:
    """The name of a condition on the key or the query alone."""
    side = "key" if item.depends_on("k") else "query"
    # What a tensor holds for each token or each batch is padding, a single number is not.
    if any(node.depends_on("b") or node.depends_on(side[0]) for node in item.loads()):
        return "padding" if side == "key" else "padded queries"
    found = Comparison.of(item)
    letter = K if side == "key" else Q
    if found is not None and found.terms == ((letter, 1),):
        signs = {"le": "up to", "ge": "from", "eq": "at", "ne": "other than"}
        plural = "keys" if side == "key" else "queries"
        return f"{plural} {signs[found.op]} {found.bound}"
    return f"a condition on the {side}"


def _chunks(item: Expr) -> str | None:
    """The name of an equality of two positions' quotients, which may count from elsewhere."""
    found = Comparison.of(item)
    terms = [] if found is None else [term for term, factor in found.terms if abs(factor) == 1]
    if found is None or len(terms) != 2 or len(found.terms) != 2:
        return None
    other, key = sorted(terms, key=lambda term: term.depends_on("k"))
    divided = key.op == other.op == "floordiv" and key.operands[1] is other.operands[1]
    if not divided or not _is_of(key, "k") or key.operands[1].op != "const":
        return None
    if _is_of(other, "q"):
        return f"chunks of {key.operands[1]}"
    return None if other.depends_on("hk") else f"chunk of {key.operands[1]} at a position"


def _same(left: Expr, right: Expr) -> str | None:
    """The name of ``f(q) == f(k)``, or of a remainder of q - k."""
    for one, other in ((left, right), (right, left)):
        if other.op == "const" and one.op == "mod" and one.operands[1].op == "const":
            rest = without(Affine.of(one.operands[0]).terms, (Q, 1), (K, -1))
            swapped = without(Affine.of(one.operands[0]).terms, (Q, -1), (K, 1))
            if not rest.depends_on("qk") or not swapped.depends_on("qk"):
                return f"dilated {one.operands[1].value}"
        if one.op == other.op == "load" and _is_of(one, "q") and _is_of(other, "k"):
            return "same document"
    if left.substitute({Q: K}) is not right and right.substitute({Q: K}) is not left:
        return None
    return "same document" if left.depends_on("load") else "same block"


def _is_of(item: Expr, letter: str) -> bool:
    return item.depends_on(letter) and not item.depends_on("k" if letter == "q" else "q")


def _union(item: Expr, known: Known) -> str:
    """The name of a disjunction: local and global attention, a prefix, strides."""
    found = parts("or", item)
    sides = [part for part in found if not (part.depends_on("q") and part.depends_on("k"))]
    others = [part for part in found if part not in sides]
    banded = [part for part in others if Band.of(part) is not None]
    if len(found) == 2 and banded and sides and sides[0].depends_on("k"):
        return "prefix LM"
    names = [" & ".join(conjunction(part, known)) for part in others]
    names = [name.replace("dilated", "strided") for name in names]
    return f"({' | '.join(dict.fromkeys([*names, *map(_global, sides)]))})"


def _global(side: Expr) -> str:
    """The name of keys that all queries see, or of queries that see all keys."""
    found = Comparison.of(side)
    terms = [term for term, _ in found.terms] if found is not None else []
    if [term.op for term in terms] == ["floordiv"] and terms[0].operands[1].op == "const":
        return f"global blocks of {terms[0].operands[1]}"
    return "global tokens"


def _mask_tensor(load: Expr, known: Known) -> str:
    """The name of a mask that is read from a tensor indexed by q and k."""
    sizes = {
        index.operands[1].value
        for index in load.operands
        if index.op == "floordiv" and index.operands[1].op == "const"
    }
    name = f"mask of blocks of {min(sizes)}" if sizes else "a mask tensor"
    value = known.leaves[load.slot] if known.leaves else None
    if value is None or value.dtype != torch.bool or not value.numel():
        return name
    rows_and_columns = [index.op for index in load.operands[-2:]] == ["floordiv", "floordiv"]
    kinds = (
        _kinds_of_blocks(value) if rows_and_columns and load.operands[-1].depends_on("k") else ""
    )
    if kinds:
        name = f"{kinds} blocks of {min(sizes)}"
    return f"{name} ({float(value.float().mean()):.0%} kept)"


def _kinds_of_blocks(mask: torch.Tensor) -> str:
    """``"global, window and random"``, of a bool [..., rows, columns] that is made of these."""
    mask = mask.reshape(-1, *mask.shape[-2:])
    rows, columns = mask.all(-1).all(0), mask.all(-2).all(0)
    i, j = (torch.arange(size, device=mask.device) for size in mask.shape[-2:])
    inner = ~rows[:, None] & ~columns[None, :]
    distance = (i[:, None] - j[None, :]).abs()
    width = 0
    while width < mask.shape[-1] and bool(mask[:, inner & (distance == width)].all()):
        width += 1
    if not inner.any() or width in (0, mask.shape[-1]) or not bool(rows.any() | columns.any()):
        return ""
    rest = bool(mask[:, inner & (distance >= width)].any())
    return "global, window and random" if rest else "global and window"

"""Forms of a lifted value, by which it is decided whether to read a tensor in its place."""

from __future__ import annotations

import torch

from sparse_compiler.passes.attention.leaves import LOADS
from sparse_compiler.score import expr as e
from sparse_compiler.score.expr import Expr


def covers(part: Expr, whole: Expr) -> bool:
    """Whether one expression depends on all indices that another depends on."""
    return all(part.depends_on(x) for x in "bhqk" if whole.depends_on(x))


def holds(dtype: torch.dtype, name: str) -> bool:
    """Whether a narrow float holds what is loaded from a tensor of the dtype called ``name``."""
    return name == LOADS[dtype] or name == "bool"


def is_choice(lifted: Expr) -> bool:
    """``not load``, or ``where(load, number, number)``: a mask in its plainest form."""
    if lifted.op == "not":
        return lifted.operands[0].op == "load"
    if lifted.op != "where" or lifted.type != "float":
        return False
    condition, yes, no = lifted.operands
    plain = condition.op == "load" or is_choice(condition)
    return plain and yes.op == no.op == "const"


def only_reads(lifted: Expr) -> bool:
    """Whether it depends on the indices only through what it loads."""
    waiting = [lifted]
    while waiting:
        node = waiting.pop()
        if node.op in ("b", "h", "q", "k", "int"):
            return False
        if node.op != "load":
            waiting.extend(node.operands)
    return True


def rounded(lifted: Expr, dtype: torch.dtype) -> Expr | None:
    """A choice between numbers with the numbers rounded, None for what is computed."""
    if lifted.op == "const":
        return e.const(torch.tensor(float(lifted.value), dtype=dtype).item())
    if lifted.op == "where":
        condition, *branches = lifted.operands
        yes, no = (rounded(branch, dtype) for branch in branches)
        return None if yes is None or no is None else e.where(condition, yes, no)
    return None

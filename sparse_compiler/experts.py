"""A mixture of experts as a call: tokens, experts chosen, weights; and where the experts' own are.

``routed`` is what ``prepare`` puts in the place of a loop over experts, and may be called by hand.
It is plain PyTorch around the operator ``sparse_compiler::moe``, traced by Dynamo as it is, with
any number of tokens in one graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows of a parameter that all experts have: a matrix [rows, columns], or a bias [rows].

    Attributes:
        name: the parameter's path, within an expert, or within the module that stacks them.
        start: first row.
        step: distance between rows.
        rows: how many.
        transposed: whether the parameter is stored as [columns, rows].
        matrix: whether it is a matrix.
    """

    name: str
    start: int
    step: int
    rows: int
    transposed: bool = False
    matrix: bool = True

    def of(self, parameter: Tensor) -> Tensor:
        """The piece, a view: of one expert's parameter, or of a stacked one [experts, ...]."""
        if self.matrix and self.transposed:
            parameter = parameter.transpose(-1, -2)
        dim = -2 if self.matrix else -1
        if self.step == 1 and self.start == 0 and parameter.shape[dim] == self.rows:
            return parameter
        stop = self.start + (self.rows - 1) * self.step + 1
        rows = slice(self.start, stop, self.step)
        return parameter[..., rows, :] if self.matrix else parameter[..., rows]


@dataclasses.dataclass(frozen=True)
class Experts:
    """Where a module keeps its experts, and what one computes.

    Attributes:
        path: of the container of expert modules, ``""`` for the module itself; None if weights are
            stacked.
        keys: of the experts in the container, in the order of their numbers.
        experts: how many.
        inner: the first linear layers, one for each part.
        inner_bias: their biases, or none.
        outer: the second linear layer.
        outer_bias: its bias.
        body: what is between them, in the operator's notation.
        passthrough: experts behind these that return the token itself.
    """

    path: str | None
    keys: tuple[str, ...]
    experts: int
    inner: tuple[Piece, ...]
    inner_bias: tuple[Piece, ...]
    outer: Piece
    outer_bias: Piece | None
    body: str
    passthrough: int = 0

    def modules(self, module: nn.Module) -> list[nn.Module]:
        """The expert modules, in the order of their numbers."""
        children: Any = _get(module, self.path or "")._modules
        return [children[key] for key in self.keys]

    def operands(
        self, module: nn.Module
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None]:
        """Inner weights and biases, outer weights and bias, as the operator takes them."""
        if self.path is None:
            inner = [self._stacked(module, piece) for piece in self.inner]
            bias = [self._stacked(module, piece) for piece in self.inner_bias]
            last = None if self.outer_bias is None else self._stacked(module, self.outer_bias)
            return inner, bias, [self._stacked(module, self.outer)], last
        parts = self.modules(module)
        inner = [piece.of(_get(part, piece.name)) for piece in self.inner for part in parts]
        bias = [
            torch.stack([piece.of(_get(part, piece.name)) for part in parts])
            for piece in self.inner_bias
        ]
        outer = [self.outer.of(_get(part, self.outer.name)) for part in parts]
        if self.outer_bias is None:
            return inner, bias, outer, None
        name, piece = self.outer_bias.name, self.outer_bias
        return inner, bias, outer, torch.stack([piece.of(_get(part, name)) for part in parts])

    def _stacked(self, module: nn.Module, piece: Piece) -> Tensor:
        parameter = _get(module, piece.name)
        wanted = 3 if piece.matrix else 2
        if parameter.dim() < wanted:  # experts stored below each other
            parameter = parameter.view(self.experts, -1, *parameter.shape[1:])
        if parameter.shape[0] != self.experts:  # experts that are only there by name
            parameter = parameter[: self.experts]
        return piece.of(parameter)


def _get(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        if name:
            found = getattr(found, name)
    return found


def routed(
    module: nn.Module,
    experts: Experts,
    x: Tensor,
    ids: Tensor,
    gates: Tensor | None = None,
    *,
    gates_on_input: bool = False,
) -> Tensor:
    """Each token through the experts it is routed to, weighted sum.

    Args:
        module: holds the experts' parameters.
        experts: where.
        x: tokens [T, features].
        ids: int64 [T, K]; numbers outside of the experts' are dropped.
        gates: weights [T, K]; 1 if left out.
        gates_on_input: whether a weight scales its token, not the expert's result.

    Returns:
        [T, out_features], in ``x``'s dtype.
    """
    inner, inner_bias, outer, outer_bias = experts.operands(module)
    if gates is None:
        gates = torch.ones_like(ids, dtype=x.dtype)
    call = (
        x, ids, gates, inner, inner_bias, outer, outer_bias,
        experts.body, experts.experts, experts.passthrough, gates_on_input,
    )  # fmt: skip
    wanted = any(tensor.requires_grad for tensor in (x, gates, *inner, *outer))
    if torch.is_grad_enabled() and wanted:
        # Keeps what the backward pass would compute again.
        return torch.ops.sparse_compiler.moe_training(*call)[0]
    return torch.ops.sparse_compiler.moe(*call)


def stacked(
    inner: Sequence[str],
    outer: str,
    module: nn.Module,
    body: str,
    *,
    inner_bias: Sequence[str] = (),
    outer_bias: str | None = None,
) -> Experts:
    """The description of parameters [E, I, D] (one for each part) and [E, O, I] of a module.

    Args:
        inner: paths of the first layers' weights.
        outer: path of the second layer's weight.
        module: the module.
        body: what is between them, in the operator's notation.
        inner_bias: paths of biases [E, I].
        outer_bias: path of a bias [E, O].
    """

    def piece(path: str, matrix: bool = True) -> Piece:
        return Piece(path, 0, 1, _get(module, path).shape[1], matrix=matrix)

    return Experts(
        path=None,
        keys=(),
        experts=_get(module, outer).shape[0],
        inner=tuple(piece(path) for path in inner),
        inner_bias=tuple(piece(path, False) for path in inner_bias),
        outer=piece(outer),
        outer_bias=None if outer_bias is None else piece(outer_bias, False),
        body=body,
    )

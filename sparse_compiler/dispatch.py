"""What a mixture of experts costs, as a model writes it and routed: the decision to be made.

The roofline decides where measuring is not wanted (``selection="model"``). Times in milliseconds.
"""

from __future__ import annotations

import dataclasses

import torch

# Bytes a nanosecond and multiply-adds a nanosecond, of one current server core.
_BYTES = 17.0
_RATE = {torch.float32: 50.0, torch.bfloat16: 110.0}
# Nanoseconds of a call of the routed operator, and of each operator of the written form.
_CALL, _STEP = 20e3, 5e3


@dataclasses.dataclass(frozen=True)
class MoeProblem:
    """Tokens through the experts they are routed to, to be decided.

    Attributes:
        tokens: T, as in this call.
        choices: K, experts a token.
        experts: E.
        features, hidden, out_features: D, I, O.
        parts: P, first linear layers of an expert: 2 with a gate, else 1.
        dtype: of the tokens and weights.
        body: what is between the linear layers, as the operator carries it.
        form: what the model does: ``"grouped"`` (routed already, in groups of tokens),
            ``"gathered"`` (copies a weight for each pair), ``"dense"`` (every expert on every
            token) or ``"capacity"`` (one-hot dispatch into slots).
        listed: whether each expert has tensors of its own.
        turned: whether weights are stored [in, out].
        bias: whether the linear layers have biases.
        slots: slots of each expert, of the form ``"capacity"``.
        training: whether gradients are computed as well.
        threads: threads that run it.
    """

    tokens: int
    choices: int
    experts: int
    features: int
    hidden: int
    out_features: int
    parts: int
    dtype: torch.dtype
    body: str
    form: str
    listed: bool = False
    turned: bool = False
    bias: bool = False
    slots: int = 0
    training: bool = False
    threads: int = 1

    @property
    def weights(self) -> int:
        """Elements of one expert's weights."""
        return self.hidden * (self.parts * self.features + self.out_features)

    @property
    def pairs(self) -> int:
        """Pairs of a token and an expert that are wanted."""
        return self.tokens * self.choices

    @property
    def written_pairs(self) -> int:
        """Pairs that the model computes as it is written."""
        if self.form == "dense":
            return self.tokens * self.experts
        return self.experts * self.slots if self.form == "capacity" else self.pairs


def written_ms(problem: MoeProblem) -> float:
    """Roofline of the model's own form."""
    pairs = problem.written_pairs
    if problem.form == "gathered":
        read = 3 * pairs * problem.weights  # each pair's weights are copied, then read
    else:
        read = _used(problem, pairs) * problem.weights
    dispatch = 0
    if problem.form == "capacity":
        width = problem.features + problem.out_features
        dispatch = problem.tokens * problem.experts * problem.slots * width
    steps = problem.experts * 6 if problem.listed or problem.form == "grouped" else 10
    return _ms(problem, read, pairs * problem.weights + dispatch, steps * _STEP)


def routed_ms(problem: MoeProblem) -> float:
    """Roofline of the routed operator."""
    read = _used(problem, problem.pairs) * problem.weights
    return _ms(problem, read, problem.pairs * problem.weights, _CALL)


def _used(problem: MoeProblem, pairs: int) -> int:
    return min(problem.experts, pairs)


def _ms(problem: MoeProblem, read: int, work: int, fixed: float) -> float:
    passes = 3 if problem.training else 1
    rate = _RATE.get(problem.dtype, _RATE[torch.float32])
    moved = read * problem.dtype.itemsize / _BYTES
    return passes * (max(moved, work / rate) / problem.threads + fixed) * 1e-6

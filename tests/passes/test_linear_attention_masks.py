"""Which masks are proved to be causal, and buffers that hold one."""

import functools

import pytest
import torch
from torch import nn

from tests.passes.linear_attention_spellings import (
    Model,
    assert_same,
    inputs,
    linearized,
    the_only,
)


def masked_by(make):
    def function(q, k, v):
        return (q @ k.mT).masked_fill(make(q.shape[-2]), 0.0) @ v

    return function


def position(n):
    return torch.arange(n)


LATER = {
    "not tril": lambda n: ~torch.ones(n, n, dtype=torch.bool).tril(),
    "logical_not": lambda n: torch.logical_not(torch.tril(torch.ones(n, n))),
    "tril == 0": lambda n: torch.tril(torch.ones(n, n)) == 0,
    "tril != 1": lambda n: torch.tril(torch.ones(n, n)) != 1,
    "1 - tril": lambda n: (1 - torch.tril(torch.ones(n, n))).bool(),
    "triu": lambda n: torch.triu(torch.ones(n, n, dtype=torch.bool), 1),
    "full": lambda n: torch.full((n, n), True).triu(1),
    "j > i": lambda n: position(n)[None, :] > position(n)[:, None],
    "i < j": lambda n: position(n).unsqueeze(1) < position(n).unsqueeze(0),
    "i - j < 0": lambda n: (position(n)[:, None] - position(n)[None]) < 0,
    "not i >= j": lambda n: ~(position(n).view(-1, 1) >= position(n).view(1, -1)),
    "i + 1 <= j": lambda n: position(n)[:, None] + 1 <= position(n)[None],
    "4-d": lambda n: torch.ones(1, 1, n, n).tril().expand(2, 3, n, n) < 1,
}


@pytest.mark.parametrize("name", LATER)
def test_causal_masks_are_proved(name):
    function = masked_by(LATER[name])
    args = inputs(130)
    graph, rewrites = linearized(function, *args)
    assert the_only(rewrites).applied and the_only(rewrites).pattern == "causal"
    assert_same(graph, function, args)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: torch.triu(torch.ones(n, n, dtype=torch.bool), 2),
        lambda n: torch.triu(torch.ones(n, n, dtype=torch.bool), -3),
        lambda n: position(n)[None] >= position(n)[:, None] + 2,
        lambda n: (
            (position(n)[None] > position(n)[:, None])
            | (position(n)[None] < position(n)[:, None] - 9)
        ),
        lambda n: position(n)[None] % 2 == position(n)[:, None] % 2,
        lambda n: position(n)[None] // 4 > position(n)[:, None] // 4,
    ],
)
def test_other_masks_are_not_taken_for_causal(make):
    function = masked_by(make)
    args = inputs(130)
    graph, rewrites = linearized(function, *args)
    rewrite = the_only(rewrites)
    assert not rewrite.applied
    assert "cannot be shown to be causal" in rewrite.reason
    assert torch.equal(graph(*args), function(*args))


def test_later_keys_only():
    function = masked_by(lambda n: torch.ones(n, n, dtype=torch.bool).tril(-1))
    _, rewrites = linearized(function, *inputs(130))
    assert the_only(rewrites).reason == (
        "each query sums over the positions behind it, not over those before it"
    )


def test_a_buffer_holds_the_mask():
    def function(q, k, v, bias):
        n = q.shape[-2]
        scores = (q @ k.mT).masked_fill(bias[:, :, :n, :n] == 0, 0.0)
        return scores @ v

    bias = torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256)
    args = inputs(200)
    graph, rewrites = linearized(Model(function, bias=bias), *args)
    assert the_only(rewrites).applied
    assert_same(graph, functools.partial(function, bias=bias), args)
    (derived,) = graph.meta["derived"]
    derived.remake(bias[:, :, :200, :200] == 0)
    with pytest.raises(Exception, match="not causal any more"):
        derived.remake(bias[:, :, :200, :200] == 1)


def test_a_buffer_of_dynamic_length():
    def function(q, k, v, bias):
        n = q.shape[-2]
        return (q @ k.mT).masked_fill(~bias[:n, :n], 0.0) @ v

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bias", torch.ones(2048, 2048, dtype=torch.bool).tril())

        def forward(self, q, k, v):
            return function(q, k, v, self.bias)

    n = torch.export.Dim("n", min=2, max=2047)
    graph, rewrites = linearized(Masked(), *inputs(200), dynamic=({2: n},) * 3)
    assert the_only(rewrites).applied
    for length in (5, 64, 333, 2047):
        args = inputs(length)
        want = function(*args, torch.ones(2048, 2048, dtype=torch.bool).tril())
        assert (graph(*args) - want).abs().max() <= 1e-12 * want.abs().max()


def test_a_buffer_that_is_no_triangle():
    def function(q, k, v, mask):
        return (q @ k.mT) * mask @ v

    mask = torch.tril(torch.ones(100, 100, dtype=torch.float64))
    mask[50, 3] = 0
    _, rewrites = linearized(Model(function, mask=mask), *inputs(100))
    assert "multiplied by mask" in the_only(rewrites).reason

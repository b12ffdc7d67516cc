"""Experts that are routed before the compiler sees them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparse_compiler as sc
from sparse_compiler import experts
from sparse_compiler.passes import Moe, PassContext
from sparse_compiler.score.expr import K, load, relu, to_text

FEATURES, HIDDEN, EXPERTS = 8, 12, 4


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, FEATURES, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(EXPERTS, FEATURES, HIDDEN, dtype=torch.float64))
        body = to_text(relu(load(0, "f32", K)))
        self.experts = experts.stacked(["up"], "down", self, body)

    def forward(self, x, ids, gates):
        return experts.routed(self, self.experts, x, ids, gates)


@pytest.mark.parametrize("training", [False, True])
def test_it_is_reported(training):
    torch.manual_seed(0)
    model = Routed()
    x = torch.randn(6, FEATURES, dtype=torch.float64)
    ids, gates = torch.randint(0, EXPERTS, (6, 2)), torch.rand(6, 2, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        graph = sc.canonicalize(model, x, ids, gates)
    context = PassContext(training=training)
    result = Moe(context)(graph)
    assert not result.modified
    (rewrite,) = context.rewrites
    assert rewrite.applied and rewrite.format == "routed" and rewrite.spelling == "prepared"
    assert rewrite.shape == (6, EXPERTS, 2, FEATURES, HIDDEN)
    assert rewrite.pattern == "top 2 of 4"
    assert "sc.prepare put it in the place of the model's own loop" in rewrite.reason
    torch.testing.assert_close(result.graph_module(x, ids, gates), model(x, ids, gates))

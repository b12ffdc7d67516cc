"""Results that parameters alone decide are computed once."""

import torch
from helpers import targets
from torch import nn

import sparse_compiler as sc
from sparse_compiler.options import Options
from sparse_compiler.passes import FoldStatic, PassContext


class Returning(nn.Module):
    """Hands out the masked weight as well, as torch.nn.utils.prune leaves it on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("mask", torch.rand(6, 4) > 0.5)

    def forward(self, x):
        weight = self.weight * self.mask
        return torch.nn.functional.linear(x, weight), weight


def run(**context):
    model, x = Returning(), torch.randn(2, 4)
    gm = sc.canonicalize(model, x)
    context = PassContext(**context)
    result = FoldStatic(context)(gm)
    return model, x, result, context.rewrites


def test_folded():
    model, x, result, (rewrite,) = run()
    assert result.modified and rewrite.applied
    assert rewrite.target == "weight and mask" and rewrite.kind == "constant"
    y, weight = result.graph_module(x)
    torch.testing.assert_close((y, weight), model(x))
    (derived,) = result.graph_module.meta["derived"]
    assert derived.exposed  # whoever gets it may write to it


def test_not_in_training():
    _, _, result, rewrites = run(training=True)
    assert not result.modified and rewrites == []


def test_fuel():
    _, _, result, (rewrite,) = run(options=Options(fuel=0))
    assert not result.modified and rewrite.reason == "options['fuel'] is used up"


def test_what_depends_on_the_input_stays():
    gm = sc.canonicalize(nn.Linear(4, 4), torch.randn(2, 4))
    before = targets(gm)
    assert not FoldStatic()(gm).modified and targets(gm) == before

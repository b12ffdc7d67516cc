"""What depends on parameters and buffers alone, and what does not."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import sparse_compiler as sc
from sparse_compiler.static import StaticValues, mutated_nodes

aten = torch.ops.aten


class Weighted(nn.Module):
    """A linear layer whose weight is made by ``make(weight, mask)``."""

    def __init__(self, make) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("mask", torch.rand(6, 4) > 0.5)
        self.make = make

    def forward(self, x):
        return torch.nn.functional.linear(x, self.make(self.weight, self.mask))


EXPRESSIONS = {
    "bare": lambda w, m: w,
    "product": lambda w, m: w * m,
    "where": lambda w, m: torch.where(m, w, 0.0),
    "where tensor": lambda w, m: torch.where(m, w, torch.zeros_like(w)),
    "masked_fill": lambda w, m: w.masked_fill(~m, 0),
    "transposed twice": lambda w, m: (w.t() * m.t()).t(),
    "cast": lambda w, m: (w.bfloat16() * m).float(),
    "view": lambda w, m: (w.view(2, 3, 4) * m.view(2, 3, 4)).reshape(6, 4),
    "split": lambda w, m: torch.cat([half * 2 for half in w.split(3)]),
    "threshold": lambda w, m: w * (w.abs() > 0.5),
    "arange": lambda w, m: w * (torch.arange(4) < 2),
}


def weight_of(gm):
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    return linear.args[1]


@pytest.mark.parametrize("name", [name for name in EXPRESSIONS if name != "arange"])
def test_expressions_over_parameters_and_buffers(name):
    model = Weighted(EXPRESSIONS[name])
    gm = sc.canonicalize(model, torch.randn(2, 4))
    static = StaticValues(gm, training=False)
    node = weight_of(gm)
    assert static.is_static(node)
    expected = EXPRESSIONS[name](model.weight, model.mask)
    value = static.value(node)
    assert torch.equal(value, expected) and not value.requires_grad
    # The expression can be evaluated again, for other values of its leaves.
    expression = static.expression(node)
    values = [
        torch.randn(6, 4) if v.is_floating_point() else ~v for v in static.leaf_values(expression)
    ]
    by_name = {static.name(leaf): v for leaf, v in zip(expression.leaves, values, strict=True)}
    again = EXPRESSIONS[name](by_name["weight"], by_name.get("mask", model.mask))
    assert torch.equal(expression.evaluate(values), again)


def test_the_input_is_not_static():
    gm = sc.canonicalize(Weighted(EXPRESSIONS["product"]), torch.randn(2, 4))
    static = StaticValues(gm, training=False)
    x = next(n for n in gm.graph.nodes if n.op == "placeholder")
    assert not static.is_static(x)
    assert static.value(x) is None and static.expression(x) is None
    (linear,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert not static.is_static(linear)


@pytest.mark.parametrize(
    "make",
    [
        lambda w, m: torch.nn.functional.dropout(w, 0.5, True),
        lambda w, m: w * torch.rand_like(w),
        lambda w, m: w.bernoulli(0.5),
    ],
)
def test_random_operators_are_not_static(make):
    gm = sc.canonicalize(Weighted(make), torch.randn(2, 4))
    assert not StaticValues(gm, training=False).is_static(weight_of(gm))


def test_a_mutated_buffer_is_not_static():
    class Mutating(Weighted):
        def forward(self, x):
            self.mask.logical_not_()
            return super().forward(x)

    gm = sc.canonicalize(Mutating(EXPRESSIONS["product"]), torch.randn(2, 4))
    static = StaticValues(gm, training=False)
    assert not static.is_static(weight_of(gm))


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y.view(-1).add_(1),
        lambda y: y.t()[0].zero_(),
        lambda y: y.reshape(8).mul_(2),
        lambda y: y.split(1)[0].neg_(),
        lambda y: y.contiguous().add_(1),
        lambda y: torch.add(y, 1, out=y),
    ],
)
def test_a_write_to_a_view_is_a_write_to_its_base(write):
    class Writes(nn.Module):
        def forward(self, x):
            y = x * 2
            write(y)
            return y

    class Traced(nn.Module):
        def forward(self, x):
            return x

    gm = sc.canonicalize(torch.fx.symbolic_trace(Writes()), torch.randn(2, 4))
    written = {node.name for node in mutated_nodes(gm.graph)}
    assert "mul" in written and "x" not in written


def test_pruned_and_parametrized_modules():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.rand(6, 4) > 0.5)

        def forward(self, weight):
            return weight * self.mask

    pruned_layer = nn.Sequential(nn.Linear(4, 6, bias=False))
    prune.random_unstructured(pruned_layer[0], "weight", 0.5)
    parametrized = nn.Sequential(nn.Linear(4, 6, bias=False))
    parametrize.register_parametrization(parametrized[0], "weight", Masked())
    for model in (pruned_layer, parametrized):
        gm = sc.canonicalize(model, torch.randn(2, 4))
        static = StaticValues(gm, training=True)
        node = weight_of(gm)
        assert torch.equal(static.value(node), model[0].weight)
        assert static.is_trainable(node)
        assert not StaticValues(gm, training=False).is_trainable(node)


def test_a_frozen_weight_is_not_trainable():
    model = Weighted(EXPRESSIONS["product"])
    model.weight.requires_grad_(False)
    gm = sc.canonicalize(model, torch.randn(2, 4))
    assert not StaticValues(gm, training=True).is_trainable(weight_of(gm))

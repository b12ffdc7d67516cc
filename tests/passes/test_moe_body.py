"""What stands between an expert's linear layers, read as an expression."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sparse_compiler as sc
from sparse_compiler.passes.moe.body import part, read_body
from sparse_compiler.passes.moe.site import Refused
from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import parse, to_text
from sparse_compiler.static import StaticValues

mm = torch.ops.aten.linear.default


class Expert(torch.nn.Module):
    """Two linear layers with something in between: what reads the parts ``gate`` and ``up``."""

    def __init__(self, body, training=False):
        super().__init__()
        self.gate = torch.nn.Linear(6, 5)
        self.up = torch.nn.Linear(6, 5)
        self.down = torch.nn.Linear(5, 6)
        self.scale = torch.nn.Parameter(torch.randn(5))
        self.body = body
        self.train(training)

    def forward(self, x):
        return self.down(self.body(self, self.gate(x), self.up(x)))


def read(body, training=False):
    """The body's expression and the nodes it was read from."""
    gm = sc.canonicalize(Expert(body, training).train(training), torch.randn(3, 6))
    linears = [node for node in gm.graph.nodes if node.target is mm]
    parts = {node: part(place) for place, node in enumerate(linears[:2])}
    static = StaticValues(gm, training=training)
    return read_body(linears[-1].args[0], parts.get, static, linears[-1])


def values(expression, *parts):
    size = (1, 1, 1, parts[0].numel())
    flat = [value.reshape(-1) for value in parts]
    found = evaluate(
        parse(to_text(expression)), torch.zeros(size, dtype=flat[0].dtype), flat, [], *size
    )
    return found.reshape(parts[0].shape)


def swiglu(self, g, u):
    return F.silu(g) * u


def gpt_oss(self, g, u):
    g, u = g.clamp(max=7.0), u.clamp(min=-7.0, max=7.0)
    return (u + 1) * (g * torch.sigmoid(g * 1.702))


def in_place(self, g, u):
    g.mul_(2.0)
    u.clamp_(min=-0.5)
    g.add_(u)
    return torch.relu_(g)


def in_float(self, g, u):
    return (F.silu(g.to(torch.float32)) * u.float()).to(g.dtype)


BODIES = {
    "silu": swiglu,
    "geglu": lambda self, g, u: F.gelu(g) * u,
    "geglu tanh": lambda self, g, u: F.gelu(g, approximate="tanh") * u,
    "relu": lambda self, g, u: F.relu(g),
    "relu squared": lambda self, g, u: F.relu(g).square(),
    "relu pow": lambda self, g, u: F.relu(g) ** 2,
    "reglu": lambda self, g, u: torch.relu(g) * u,
    "sigmoid glu": lambda self, g, u: g.sigmoid() * u,
    "quick gelu": lambda self, g, u: g * torch.sigmoid(1.702 * g),
    "gpt-oss": gpt_oss,
    "mish": lambda self, g, u: F.mish(g),
    "softplus": lambda self, g, u: F.softplus(g * 9, beta=2.0, threshold=5.0),
    "leaky relu": lambda self, g, u: F.leaky_relu(g, 0.2),
    "hardswish": lambda self, g, u: F.hardswish(g * 4),
    "hardsigmoid": lambda self, g, u: F.hardsigmoid(g * 4),
    "hardtanh": lambda self, g, u: F.hardtanh(g, -0.4, 0.6),
    "relu6": lambda self, g, u: F.relu6(g * 9),
    "tanh": lambda self, g, u: torch.tanh(g) * u,
    "elu": lambda self, g, u: F.elu(g, alpha=0.7),
    "selu": lambda self, g, u: F.selu(g),
    "celu": lambda self, g, u: F.celu(g, alpha=0.7),
    "log sigmoid": lambda self, g, u: F.logsigmoid(g),
    "softsign": lambda self, g, u: F.softsign(g),
    "tanhshrink": lambda self, g, u: F.tanhshrink(g),
    "erf": lambda self, g, u: 0.5 * g * (1 + torch.erf(g / math.sqrt(2))),
    "where": lambda self, g, u: torch.where(g > 0, g, 0.1 * u),
    "masked": lambda self, g, u: g.masked_fill(u < 0, 0.0),
    "full": lambda self, g, u: torch.maximum(g, torch.full_like(g, 0.25)),
    "in place": in_place,
    "in float": in_float,
    "no dropout": lambda self, g, u: F.dropout(g, 0.5, training=False) * u,
    "dropout of nothing": lambda self, g, u: F.dropout(g, 0.0, training=True) * u,
    "only up": lambda self, g, u: u * 1.0,
}


@pytest.mark.parametrize("name", BODIES)
def test_moe_body_has_the_values_of_what_it_was_read_from(name):
    torch.manual_seed(0)
    expression, nodes = read(BODIES[name])
    assert nodes and all(load.slot in (0, 1) for load in expression.loads())
    gate, up = (3 * torch.randn(64, dtype=torch.float64) for _ in range(2))
    expected = BODIES[name](None, gate.clone(), up.clone())
    # Some of it is computed in float32 by the original.
    bound = 1e-6 if name == "in float" else 1e-12
    torch.testing.assert_close(values(expression, gate, up), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    "name", ["silu", "geglu", "geglu tanh", "mish", "softplus", "gpt-oss", "elu"]
)
def test_moe_body_has_the_gradients_of_what_it_was_read_from(name):
    torch.manual_seed(1)
    expression, _ = read(BODIES[name])
    parts = [torch.randn(32, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    expected = BODIES[name](None, *(value * 1.0 for value in parts)).square().sum()
    actual = values(expression, *parts).square().sum()
    grads = [
        torch.autograd.grad(total, parts, allow_unused=True, materialize_grads=True)
        for total in (expected, actual)
    ]
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("large", [-200.0, -40.0, 40.0, 200.0])
@pytest.mark.parametrize("name", ["softplus", "mish", "log sigmoid", "elu", "silu", "geglu"])
def test_moe_body_of_large_values_is_finite(name, large):
    expression, _ = read(BODIES[name])
    gate = torch.full((4,), large, dtype=torch.float64)
    expected = BODIES[name](None, gate.clone(), torch.ones_like(gate))
    torch.testing.assert_close(values(expression, gate, torch.ones_like(gate)), expected)


@pytest.mark.parametrize(
    "body, training, sentence",
    [
        (
            lambda self, g, u: F.dropout(g, 0.5, training=True),
            True,
            "dropout in training is random",
        ),
        (lambda self, g, u: torch.softmax(g, -1), False, "softmax is not pointwise"),
        (lambda self, g, u: F.layer_norm(g, (5,)), False, "layer_norm is not pointwise"),
        (lambda self, g, u: g * self.scale, False, "it reads the tensor scale"),
        (lambda self, g, u: g.flip(-1), False, "flip is not pointwise"),
        (lambda self, g, u: g + torch.rand_like(g), False, "is random"),
        (lambda self, g, u: g.detach() * u, True, "detach is not pointwise"),
        (lambda self, g, u: g.cumsum(-1), False, "cumsum is not pointwise"),
        (lambda self, g, u: g.round() * u, False, "round is not pointwise"),
        (lambda self, g, u: torch.ones_like(g), False, "do not depend on the first"),
    ],
)
def test_moe_body_is_refused_with_the_reason(body, training, sentence):
    with pytest.raises(Refused, match=sentence):
        read(body, training)


def test_moe_body_written_through_a_part_is_refused():
    def body(self, g, u):
        g[:, :2].mul_(2.0)
        return g * u

    with pytest.raises(Refused, match="written to in place through a view"):
        read(body)


_OPERATORS = (
    lambda a, b: a * b,
    lambda a, b: a + b,
    lambda a, b: a - 2.0 * b,
    lambda a, b: F.silu(a) * b,
    lambda a, b: F.gelu(b) + a,
    lambda a, b: torch.tanh(a),
    lambda a, b: a.clamp(-1.0, 2.0) / (1.0 + b.abs()),
    lambda a, b: torch.where(a > b, a, 0.5 * b),
    lambda a, b: torch.maximum(a, b).add_(0.25),
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(range(len(_OPERATORS))), min_size=1, max_size=5), st.integers(0, 99)
)
def test_moe_body_of_any_chain_of_operators(chain, seed):
    def body(self, g, u):
        a, b = g, u
        for number in chain:
            a, b = b, _OPERATORS[number](a, b)
        return b + a + 0.0 * g

    expression, _ = read(body)
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(16, dtype=torch.float64, generator=generator) for _ in range(2)]
    expected = body(None, *(value.clone() for value in parts))
    torch.testing.assert_close(values(expression, *parts), expected, rtol=1e-9, atol=1e-9)

"""The meaning of the mixture-of-experts operators, against loops over pairs."""

from __future__ import annotations

import pytest
import torch

from sparse_compiler.ops import moe  # noqa: F401  registers the operators
from sparse_compiler.score.expr import K, load, mul, relu, to_text

BODY = to_text(mul(relu(load(0, "f32", K)), load(1, "f32", K)))
TOKENS, CHOICES, EXPERTS, FEATURES, HIDDEN = 6, 2, 3, 5, 4


def tensors(passthrough: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    shape = (TOKENS, CHOICES)
    return {
        "x": random(TOKENS, FEATURES),
        "gates": random(*shape),
        "up": random(EXPERTS, HIDDEN, FEATURES),
        "gate": random(EXPERTS, HIDDEN, FEATURES),
        "up_bias": random(EXPERTS, HIDDEN),
        "gate_bias": random(EXPERTS, HIDDEN),
        "down": random(EXPERTS, FEATURES, HIDDEN),
        "down_bias": random(EXPERTS, FEATURES),
        "ids": torch.randint(-1, EXPERTS + passthrough + 1, shape, generator=generator),
    }


def by_pairs(t: dict[str, torch.Tensor], passthrough: int, gates_on_input: bool) -> torch.Tensor:
    rows = []
    for token in range(TOKENS):
        row = torch.zeros(FEATURES, dtype=torch.float64)
        for choice in range(CHOICES):
            expert, gate = int(t["ids"][token, choice]), t["gates"][token, choice]
            x = t["x"][token]
            if 0 <= expert < EXPERTS:
                inside = x * gate if gates_on_input else x
                up = t["up"][expert] @ inside + t["up_bias"][expert]
                other = t["gate"][expert] @ inside + t["gate_bias"][expert]
                y = t["down"][expert] @ (up.relu() * other) + t["down_bias"][expert]
                row = row + (y if gates_on_input else gate * y)
            elif EXPERTS <= expert < EXPERTS + passthrough:
                row = row + gate * x
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["moe", "moe_training"])
@pytest.mark.parametrize("gates_on_input", [False, True])
@pytest.mark.parametrize("passthrough", [0, 2])
@pytest.mark.parametrize("listed", [False, True])
def test_values_and_gradients(name, gates_on_input, passthrough, listed):
    t = tensors(passthrough)
    inner, outer = [t["up"], t["gate"]], [t["down"]]
    if listed:
        inner = [*t["up"].unbind(0), *t["gate"].unbind(0)]
        outer = list(t["down"].unbind(0))
    got = getattr(torch.ops.sparse_compiler, name)(
        t["x"], t["ids"], t["gates"], inner, [t["up_bias"], t["gate_bias"]], outer,
        t["down_bias"], BODY, EXPERTS, passthrough, gates_on_input,
    )  # fmt: skip
    got = got if name == "moe" else got[0]
    want = by_pairs(t, passthrough, gates_on_input)
    torch.testing.assert_close(got, want)
    leaves = [value for key, value in t.items() if key != "ids"]
    grad = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view_as(want)
    for one, other in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["moe", "moe_training"])
def test_registration(name):
    t = tensors()
    operator = getattr(torch.ops.sparse_compiler, name).default
    call = (
        t["x"], t["ids"], t["gates"], [t["up"].transpose(1, 2).contiguous().transpose(1, 2),
        t["gate"]], [], [t["down"]], None, BODY, EXPERTS, 0, False,
    )  # fmt: skip
    found = torch.library.opcheck(operator, call)
    assert set(found.values()) == {"SUCCESS"}


def test_an_unused_gate_may_be_anything():
    t = tensors()
    gates = torch.full((TOKENS, CHOICES), float("nan"), dtype=torch.float64)
    ids = torch.full((TOKENS, CHOICES), -1)
    call = ([t["up"], t["gate"]], [], [t["down"]], None, BODY, EXPERTS, 0, False)
    out = torch.ops.sparse_compiler.moe(t["x"], ids, gates, *call)
    assert torch.equal(out, torch.zeros_like(out))

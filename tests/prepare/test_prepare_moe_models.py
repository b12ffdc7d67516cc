"""Mixtures of experts of the transformers library, their loops: prepared, one graph, equal."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from moe_models import CONFIGS, build, inputs

from sparse_compiler.prepare import prepare
from sparse_compiler.prepare.swap import always_replaced

# Where the loops are, and how many.
PREPARED = {
    "Mixtral": 2,
    "Qwen2Moe": 2,
    "Qwen3Moe": 2,
    "Olmoe": 2,
    "DeepseekV2": 1,
    "DeepseekV3": 1,
    "GptOss": 2,
    "Jamba": 2,
    "Phimoe": 2,
    "GraniteMoe": 2,
    "Dbrx": 2,
    "LongcatFlash": 1,
    "SwitchTransformers": 2,
    "NllbMoe": 4,
}


def gradients(model, given):
    for parameter in model.parameters():
        parameter.grad = None
    logits = model(**given).logits
    torch.manual_seed(3)
    (logits * torch.randn_like(logits)).sum().backward()
    return logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_every_configuration_is_looked_at():
    assert set(PREPARED) == set(CONFIGS) - {"JetMoe"}


@pytest.mark.parametrize("name", PREPARED)
def test_logits_and_gradients(name):
    model, given = build(name), inputs(name)
    original = copy.deepcopy(model)
    keys = list(model.state_dict())
    prepared = prepare(model, **given)
    assert len(prepared.swapped) == PREPARED[name] and not prepared.refused, str(prepared)
    assert list(model.state_dict()) == keys
    logits, wanted = gradients(original, given)
    with always_replaced():
        actual, found = gradients(model, given)
    torch.testing.assert_close(actual, logits, rtol=1e-4, atol=1e-5)
    # A router's gradient is exactly 0 where one expert is chosen whole: absent here or there.
    for key, gradient in wanted.items():
        other = found.get(key, torch.zeros_like(gradient))
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in PREPARED if name != "SwitchTransformers"])
def test_the_experts_are_one_graph_for_any_length(name):
    model, given = build(name), inputs(name)
    prepared = prepare(model, **given)
    graphs = []
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(
            model, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True, dynamic=True
        )
        for length in (7, 9, 12):
            given = inputs(name, length=length)
            actual = compiled(**given).logits
            torch.testing.assert_close(actual, model(**given).logits, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    calls = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("sparse_compiler.moe" in call for call in calls) == len(prepared.swapped)


def test_other_implementations_are_left_to_the_compiler():
    model = build("Mixtral")
    model.set_experts_implementation("grouped_mm")
    prepared = prepare(model, **inputs("Mixtral"))
    assert not prepared.swapped
    assert "is one graph already" in prepared.refused[0].reason


def test_in_half_precision():
    model = build("Mixtral").bfloat16()
    experts = model.model.layers[0].mlp.experts
    assert len(prepare(experts).swapped) == 1
    x = torch.randn(9, 32, dtype=torch.bfloat16)
    ids = torch.rand(9, 4).argsort(-1)[:, :2]
    weights = torch.rand(9, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = experts(x, ids, weights)
        with always_replaced():
            actual = experts(x, ids, weights)
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.03)


def test_a_block_of_switch_transformers_is_one_graph():
    # The whole model is not: Dynamo fails where transformers collects the routers' outputs.
    block = build("SwitchTransformers").encoder.block[1].layer[1].mlp
    assert len(prepare(block).swapped) == 1
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)
    for length in (7, 9):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(compiled(x), block(x))


def test_jetmoe_is_refused():
    model, given = build("JetMoe"), inputs("JetMoe")
    prepared = prepare(model, **given)
    assert not prepared.swapped and len(prepared.refused) == 2 * 4
    assert all("tokens come sorted" in refused.reason for refused in prepared.refused)

"""Graphs as Dynamo hands them over: any number of tokens, sizes that are symbols, x[:] in views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from moe_sites import apply, the_site
from test_moe_capacity import GShard, Ranked, Switch
from test_moe_dense import OnInput, Spelled, baddbmm, einsum, interleaved, one_product
from test_moe_unrolled import Spelled as Loop
from test_moe_unrolled import added_to_shared, columns, compared, selected, stacked
from torch import fx, nn

from sparse_compiler.canonical import canonicalize_dynamo
from sparse_compiler.passes.moe import capacity, dense, unrolled
from sparse_compiler.static import StaticValues

D, T = 6, 9


def run(find: Any, model: nn.Module, inputs: Sequence[torch.Tensor]) -> int:
    """Compare the model with its rewritten graphs; returns how many graphs there were."""
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def rewrite(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        canonical = canonicalize_dynamo(gm, examples)
        found = list(find(canonical, StaticValues(canonical, training=False)))
        graphs.append(apply(canonical, the_site(found)))
        return canonical

    model = model.double().eval()
    compiled = torch.compile(model, backend=rewrite, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)
    return len(graphs)


def tokens(*counts: int) -> list[torch.Tensor]:
    return [torch.randn(count, D, dtype=torch.float64) for count in counts]


@pytest.mark.parametrize("spelled", [einsum, baddbmm, one_product, interleaved])
def test_stacked_experts(spelled: Any) -> None:
    assert run(dense.find, Spelled(spelled), tokens(T, 4, 31)) == 1


def test_weights_on_the_input() -> None:
    assert run(dense.find, OnInput(), tokens(T, 4, 31)) == 1


@pytest.mark.parametrize("spelled", [stacked, columns, selected, compared, added_to_shared])
def test_loops(spelled: Any) -> None:
    assert run(unrolled.find, Loop(spelled), tokens(T, 4, 31)) == 1


def test_loops_over_batches() -> None:
    shapes = [(2, 5), (4, 3), (3, 17)]
    inputs = [torch.randn(*shape, D, dtype=torch.float64) for shape in shapes]
    assert run(unrolled.find, Loop(columns), inputs) == 1
    assert run(unrolled.find, Loop(compared), inputs) == 1


@pytest.mark.parametrize("model", [Switch, GShard])
def test_slots(model: Any) -> None:
    assert run(capacity.find, model(4), tokens(T, 4, 31)) == 1


def test_a_capacity_that_tokens_decide_is_one_graph_for_each() -> None:
    inputs = [torch.randn(2, length, D, dtype=torch.float64) for length in (4, 10)]
    assert run(capacity.find, Ranked(), inputs) >= 1


def test_llama4_with_batches() -> None:
    llama = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    configuration = pytest.importorskip("transformers.models.llama4.configuration_llama4")
    config = configuration.Llama4TextConfig(
        hidden_size=D, intermediate_size=8, intermediate_size_mlp=8, num_local_experts=4
    )

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = llama.Llama4TextMoe(config)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.moe(x)[0]
            return out

    shapes = [(2, 5), (4, 3), (3, 17)]
    inputs = [torch.randn(*shape, D, dtype=torch.float64) for shape in shapes]
    assert run(dense.find, Block(), inputs) == 1

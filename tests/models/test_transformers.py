"""Hugging Face architectures, small and random, pruned and compiled: same output as eager."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from sparse_compiler import backend
from sparse_compiler.passes import Rewrite
from sparse_compiler.pruning import prune_

pytest.importorskip("transformers", minversion="5.0")
from architectures import ARCHITECTURES, Architecture, llama, tokens

# Every legal layer is rewritten, however small, and checked; what fails inside fails the test.
ALWAYS = {"selection": "always", "on_error": "raise"}
FAST = ("bert", "llama", "t5")


@dataclasses.dataclass
class Seen:
    """What compilations did while they were watched."""

    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    graphs: int = 0

    def note(self, record: backend.CompiledGraph) -> None:
        self.rewrites += record.rewrites
        self.graphs += 1

    @property
    def applied(self) -> list[Rewrite]:
        return [rewrite for rewrite in self.rewrites if rewrite.applied]


@pytest.fixture
def seen() -> Iterator[Seen]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    found = Seen()
    backend.listeners.append(found.note)
    yield found
    backend.listeners.remove(found.note)
    torch._dynamo.reset()


def compiled(model: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="sparse", options=ALWAYS, **kwargs)


def pruned(name: str) -> tuple[nn.Module, Architecture, tuple[str, ...]]:
    """A model, how it was made, and the names of its pruned layers."""
    architecture = ARCHITECTURES[name]
    model = architecture.make().eval()
    share = {} if architecture.sparsity is None else {"sparsity": architecture.sparsity}
    report = prune_(model, pattern=architecture.pattern, **share)
    return model, architecture, tuple(layer.name for layer in report.layers)


def assert_same(got: Any, want: Any, bound: float = 1e-5) -> None:
    """Every tensor agrees to ``bound`` of its largest value."""
    pairs = list(zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True))
    assert pairs
    for have, expected in pairs:
        if not isinstance(expected, torch.Tensor):
            assert have == expected
            continue
        assert have.dtype == expected.dtype
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(have, expected, rtol=0, atol=bound * scale)


@contextlib.contextmanager
def no_warnings_of_ours() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert not [str(w.message) for w in caught if "sparse_compiler" in str(w.message)]


def graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_same_output_and_every_layer_reported(name, seen):
    model, architecture, layers = pruned(name)
    inputs = architecture.inputs()
    with torch.no_grad(), no_warnings_of_ours():
        want = dict(model(**inputs))
        torch._dynamo.utils.counters.clear()
        # Dynamo breaks graphs in front of the backend: this one costs nothing to compile.
        torch.compile(model, backend=lambda gm, _: gm)(**inputs)
        others = graph_breaks()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        got = dict(compiled(model)(**inputs))
    assert graph_breaks() <= others
    assert_same(got, want)
    verdicts = {rewrite.target: rewrite for rewrite in seen.rewrites}
    assert set(layers) <= set(verdicts)
    for layer in layers:
        assert verdicts[layer].applied, verdicts[layer].reason
        assert verdicts[layer].sparsity >= 0.49
        assert verdicts[layer].reason


def mask_linears(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            prune.l1_unstructured(module, "weight", amount=0.8)


def step(model: Callable[..., Any], parameters: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    loss = model(**inputs).loss
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def test_training_under_masks_has_the_gradients_of_eager(seen):
    model = llama(num_hidden_layers=1, attention_dropout=0.0)
    mask_linears(model)
    parameters = list(model.parameters())
    inputs = {"input_ids": tokens(2, 9), "labels": tokens(2, 9), "use_cache": False}
    with no_warnings_of_ours():
        want = step(model, parameters, inputs)
        fast = compiled(model)
        got = step(fast, parameters, inputs)
        assert_same(got, want)
        assert len(seen.applied) == 7
        with torch.no_grad():
            for parameter, gradient in zip(parameters, want[1:], strict=True):
                parameter -= 0.1 * gradient
        assert_same(step(fast, parameters, inputs), step(model, parameters, inputs))
    assert seen.graphs == 1


def test_one_dynamic_graph_serves_many_batches(seen):
    model, _, _ = pruned("llama")
    fast = compiled(model, dynamic=True)
    with torch.no_grad(), no_warnings_of_ours():
        for batch, length in ((2, 7), (3, 12), (5, 33), (2, 64)):
            inputs = {"input_ids": tokens(batch, length), "use_cache": False}
            assert_same(dict(fast(**inputs)), dict(model(**inputs)))
    assert seen.graphs == 1
    assert sum(rewrite.kind == "linear" for rewrite in seen.applied) == 14


def test_decoding_with_a_static_cache_gives_the_same_tokens(seen):
    model, _, _ = pruned("llama")
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    ids = tokens(1, 6)
    with torch.no_grad(), no_warnings_of_ours():
        want = model.generate(ids, **settings)
        model.forward = compiled(model.forward)
        got = model.generate(ids, **settings)
    assert got.tolist() == want.tolist()
    assert {rewrite.rows for rewrite in seen.applied} >= {(1,)}


@pytest.mark.slow
def test_bfloat16(seen):
    model, architecture, layers = pruned("llama")
    model = model.to(torch.bfloat16)
    inputs = architecture.inputs()
    with torch.no_grad(), no_warnings_of_ours():
        assert_same(dict(compiled(model)(**inputs)), dict(model(**inputs)), bound=3e-2)
    assert len(seen.applied) == len(layers)
    assert {rewrite.dtype for rewrite in seen.applied} == {"bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside, seen):
    """Weights stay float32; the cast is part of what is packed."""
    model, architecture, layers = pruned("bert")
    inputs = architecture.inputs()

    def call(**kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return dict(model(**kwargs))

    with torch.no_grad(), no_warnings_of_ours():
        want = call(**inputs)
        if inside:
            got = compiled(call)(**inputs)
        else:
            fast = compiled(model)
            with torch.autocast("cpu", torch.bfloat16):
                got = dict(fast(**inputs))
        assert_same(got, want, bound=3e-2)
    assert len(seen.applied) == len(layers)
    assert {rewrite.dtype for rewrite in seen.applied} == {"bfloat16"}

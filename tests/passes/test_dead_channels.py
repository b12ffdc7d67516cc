"""Dead channels: the cut graph gives what the model gives, infinities and NaN included."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparse_compiler as sc
from sparse_compiler.canonical import canonicalize
from sparse_compiler.formats.cost import AlwaysSelector, Comparison
from sparse_compiler.options import Options
from sparse_compiler.passes import DeadChannels, PassContext, Rewrite, SparseLinear
from sparse_compiler.runtime import live


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def cut(
    model: nn.Module, *args: Any, training: bool = False, **options: Any
) -> tuple[torch.fx.GraphModule, list[Rewrite]]:
    """The model's graph after the pass, and the verdicts."""
    given_options = {"selection": "always", "on_error": "raise", "verify": True, **options}
    context = PassContext(Options(**given_options), training=training)
    graph = sc.canonicalize(model.eval(), *args)
    DeadChannels(context)(graph)
    return graph, context.rewrites


def assert_same(graph: nn.Module, model: nn.Module, x: torch.Tensor, bad: int = 3) -> None:
    """Equal results on finite inputs, and on inputs with a few infinities or NaN."""
    inputs = [x]
    for number in (float("inf"), -float("inf"), float("nan")):
        for count in range(1, bad + 1):
            spoilt = x.clone()
            spoilt.view(-1)[torch.randperm(x.numel())[:count]] = number
            inputs.append(spoilt)
    mixed = x.clone()
    mixed.view(-1)[0], mixed.view(-1)[1] = float("inf"), -float("inf")
    for each in [*inputs, mixed]:
        torch.testing.assert_close(graph(each), model(each), rtol=1e-4, atol=1e-5, equal_nan=True)


LAYERS = ("aten.linear.default", "aten.conv2d.default")


def sizes(graph: torch.fx.GraphModule) -> list[tuple[int, ...]]:
    """Shapes of the weights that the layers now have."""
    return [
        tuple(node.args[1].meta["val"].shape)
        for node in graph.graph.nodes
        if node.op == "call_function" and str(node.target) in LAYERS
    ]


class MLP(nn.Module):
    def __init__(
        self,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu,
        bias: bool = True,
        features: tuple[int, int, int] = (8, 24, 6),
    ) -> None:
        super().__init__()
        self.up = nn.Linear(features[0], features[1], bias=bias)
        self.down = nn.Linear(features[1], features[2], bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "scaled": lambda x: 0.5 * x,
    "shifted": lambda x: x + 1,
    "clamped": lambda x: x.clamp(-1, 2),
    "squared_relu": lambda x: F.relu(x) ** 2,
    "by_hand": lambda x: x * torch.sigmoid(x),
    "dropout": lambda x: F.dropout(F.relu(x), 0.5, training=False),
    "identity": lambda x: x.contiguous(),
}


@given(
    name=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    features=st.tuples(st.integers(1, 12), st.integers(2, 40), st.integers(1, 9)),
    rows=st.integers(0, 20),
    columns=st.integers(0, 20),
    batch=st.sampled_from([(1,), (5,), (2, 3), (0,)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_mlp_gives_the_same(
    name: str,
    bias: bool,
    features: tuple[int, int, int],
    rows: int,
    columns: int,
    batch: tuple[int, ...],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        model = MLP(ACTIVATIONS[name], bias, features)
        order = torch.randperm(features[1])
        model.up.weight[order[:rows]] = -0.0
        model.down.weight[:, order[rows : rows + columns]] = 0
        x = torch.randn(*batch, features[0])
        graph, _ = cut(model, x)
        assert_same(graph, model, x, bad=min(3, features[0]) if x.numel() else 0) if (
            x.numel() > 1
        ) else torch.testing.assert_close(graph(x), model(x))


def test_zero_rows_are_removed_and_their_constants_folded() -> None:
    model = MLP(torch.sigmoid)
    model.up.weight[:10] = 0
    x = torch.randn(4, 8)
    graph, (rewrite,) = cut(model, x)
    assert rewrite.applied and rewrite.kind == "dead_channels" and rewrite.target == "up, down"
    assert rewrite.sparsity == pytest.approx(10 / 24)
    assert rewrite.pattern == "10 of 24 channels"
    assert "9 of 24 channels are dead and were removed" in rewrite.reason
    assert sizes(graph) == [(15, 8), (6, 15)]  # one zero row stays as the witness
    assert_same(graph, model, x)


def test_without_a_witness_an_infinity_would_be_lost() -> None:
    model = MLP(F.relu)
    model.up.weight.abs_()
    model.up.weight[:10] = 0
    model.up.bias[:] = 0
    x = torch.full((1, 8), -float("inf"))
    assert model(x).isnan().all()
    graph, _ = cut(model, torch.randn(1, 8))
    assert graph(x).isnan().all()


def test_ignored_channels_behind_relu_keep_as_many_witnesses_as_they_need() -> None:
    model = MLP(F.relu, features=(8, 64, 6))
    model.down.weight[:, 20:] = 0
    x = torch.randn(1, 8)
    graph, (rewrite,) = cut(model, x)
    assert rewrite.applied
    (kept, _), _ = sizes(graph)
    assert 20 < kept <= 20 + 8
    for row in range(8):  # every single infinity of either sign
        for number in (float("inf"), -float("inf")):
            spoilt = torch.randn(1, 8)
            spoilt[0, row] = number
            torch.testing.assert_close(graph(spoilt), model(spoilt), equal_nan=True)


def test_ignored_channels_that_are_all_positive_are_exact_behind_relu() -> None:
    model = MLP(F.relu)
    model.down.weight[:, 4:] = 0
    model.up.weight.abs_()
    graph, (rewrite,) = cut(model, torch.randn(2, 8))
    assert rewrite.applied
    spoilt = torch.randn(2, 8)
    spoilt[0, 3], spoilt[1, 3] = float("inf"), -float("inf")
    assert model(spoilt)[1].isfinite().all()
    torch.testing.assert_close(graph(spoilt), model(spoilt), equal_nan=True)


def test_kept_channels_fill_vectors() -> None:
    model = MLP(F.gelu, features=(64, 512, 64))
    model.up.weight[100:300] = 0
    graph, (rewrite,) = cut(model, torch.randn(64, 64), selection="model")
    assert rewrite.applied and rewrite.speedup is not None and rewrite.speedup > 1.4
    assert sizes(graph) == [(320, 64), (64, 320)]


class Gated(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        if fused:
            self.gate_up = nn.Linear(8, 48, bias=False)
        else:
            self.gate = nn.Linear(8, 24, bias=False)
            self.up = nn.Linear(8, 24, bias=False)
        self.down = nn.Linear(24, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["gate", "up", "down", "all"])
def test_gated_units(fused: bool, where: str) -> None:
    model = Gated(fused)
    gate = model.gate_up.weight[:24] if fused else model.gate.weight
    up = model.gate_up.weight[24:] if fused else model.up.weight
    if where in ("gate", "all"):
        gate[:5] = 0
    if where in ("up", "all"):
        up[3:10] = 0
    if where in ("down", "all"):
        model.down.weight[:, 18:22] = 0
    x = torch.randn(2, 3, 8)
    graph, rewrites = cut(model, x)
    dead = {"gate": 5, "up": 7, "down": 4, "all": 14}[where]
    assert rewrites[0].applied
    assert sizes(graph)[-1] == (8, 24 - dead + 1)
    assert_same(graph, model, x)


class Attention(nn.Module):
    def __init__(self, kv_heads: int = 4, rotary: bool = False) -> None:
        super().__init__()
        self.kv_heads, self.rotary = kv_heads, rotary
        self.q, self.o = nn.Linear(32, 32), nn.Linear(32, 32)
        self.k, self.v = nn.Linear(32, 8 * kv_heads), nn.Linear(32, 8 * kv_heads)

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.outer(torch.arange(x.shape[2]).float(), torch.ones(8))[None, None]
        half = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * angle.cos() + half * angle.sin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape

        def heads(y: torch.Tensor, count: int) -> torch.Tensor:
            return y.view(batch, length, count, 8).transpose(1, 2)

        q, k = heads(self.q(x), 4), heads(self.k(x), self.kv_heads)
        if self.rotary:
            q, k = self.turn(q), self.turn(k)
        y = F.scaled_dot_product_attention(
            q, k, heads(self.v(x), self.kv_heads), is_causal=True, enable_gqa=self.kv_heads != 4
        )
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize("rotary", [False, True])
def test_heads_that_the_output_projection_ignores(rotary: bool) -> None:
    model = Attention(rotary=rotary)
    model.o.weight[:, :24] = 0
    x = torch.randn(2, 5, 32)
    graph, (rewrite,) = cut(model, x)
    assert rewrite.applied and rewrite.pattern == "3 of 4 channels"
    assert sizes(graph) == [(16, 32), (16, 32), (16, 32), (32, 16)]
    assert_same(graph, model, x, bad=1)


def test_heads_without_values() -> None:
    model = Attention()
    model.v.weight[8:24], model.v.bias[8:24] = 0, 0
    x = torch.randn(2, 5, 32)
    graph, rewrites = cut(model, x)
    assert rewrites[0].applied and rewrites[0].pattern == "2 of 4 channels"
    assert_same(graph, model, x, bad=1)


def test_grouped_queries_go_with_their_keys() -> None:
    model = Attention(kv_heads=2)
    model.o.weight[:, 16:] = 0
    model.v.weight[:8], model.v.bias[:8] = 0, 0
    x = torch.randn(2, 5, 32)
    graph, rewrites = cut(model, x)
    assert rewrites[0].pattern == "2 of 2 channels"
    assert sizes(graph)[:2] == [(16, 32), (8, 32)]
    assert_same(graph, model, x, bad=1)


def test_a_single_query_head_of_a_group_stays() -> None:
    model = Attention(kv_heads=2)
    model.o.weight[:, 8:16] = 0
    _, (rewrite,) = cut(model, torch.randn(2, 5, 32))
    assert not rewrite.applied
    assert rewrite.reason == "its zero rows and columns belong to channels that others still use"


def test_attention_over_another_sequence_is_refused() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                layer(z).view(2, -1, 4, 8).transpose(1, 2)
                for layer, z in ((self.q, x), (self.k, y), (self.v, y))
            )
            out = F.scaled_dot_product_attention(q, k, v)
            return self.o(out.transpose(1, 2).reshape(2, -1, 32))

    model = Cross()
    model.o.weight[:, :16] = 0
    _, (rewrite,) = cut(model, torch.randn(2, 3, 32), torch.randn(2, 4, 32))
    assert not rewrite.applied
    assert rewrite.reason.startswith("an infinite input would be NaN through a removed channel")


def convolutions(inplace: bool, padding: int = 1) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 24, 3, padding=padding),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(24, 24, 3, padding=1, groups=24),
        nn.Conv2d(24, 8, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    model[1].running_mean.normal_()
    model[1].weight.normal_()
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions(inplace: bool, padding: int) -> None:
    model = convolutions(inplace, padding)
    model[0].weight[:6] = 0  # a constant behind batch norm: foldable without a border
    model[4].weight[:, 20:] = 0
    model[7].weight[:, :12] = 0
    model[10].weight[:, :12] = 0
    x = torch.randn(2, 3, 8, 8)
    graph, rewrites = cut(model, x)
    assert [r.applied for r in rewrites[:3]] == [True, True, True], rewrites
    assert_same(graph, model, x, bad=2)


class Residual(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 24, bias=False)
        self.inner = nn.Linear(24, 24, bias=False)
        self.last = nn.Linear(24, 4)
        self.norm = nn.LayerNorm(24) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = self.first(x)
        stream = stream + self.inner(F.relu(self.norm(stream)))
        return self.last(stream)


def test_a_residual_stream_is_cut_where_all_writers_and_readers_agree() -> None:
    model = Residual(norm=False)
    for layer in (model.first, model.inner):
        layer.weight[:9] = 0
    x = torch.randn(3, 8)
    graph, rewrites = cut(model, x)
    assert rewrites[0].applied
    assert sizes(graph) == [(16, 8), (16, 16), (4, 16)]
    assert_same(graph, model, x)


def test_a_residual_stream_is_kept_where_one_writer_differs() -> None:
    model = Residual(norm=False)
    model.first.weight[:9] = 0
    _, rewrites = cut(model, torch.randn(3, 8), selection="model")
    assert not rewrites[0].applied
    assert "belong to channels that others still use" in rewrites[0].reason


def test_layer_norm_mixes_channels() -> None:
    model = Residual(norm=True)
    for layer in (model.first, model.inner):
        layer.weight[:9] = 0
    _, rewrites = cut(model, torch.randn(3, 8), selection="model")
    assert not any(rewrite.applied for rewrite in rewrites)
    assert "no channel can be removed: layer_norm mixes channels" in {r.reason for r in rewrites}


class Exposed(MLP):
    def forward(self, x: torch.Tensor) -> Any:
        hidden = F.relu(self.up(x))
        return self.down(hidden), hidden


class Partial(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)).cumsum(-1))


class Written(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        alias = hidden.view(-1, 24)
        return self.down(F.relu_(hidden)) + self.down(alias)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Exposed(F.relu), "relu is an output of the graph"),
        (Partial(F.relu), "cumsum is not known to keep channels apart"),
        (Written(F.relu), "linear is written to in place and read elsewhere"),
        (MLP(lambda x: 1 / (x + 2)), "is not known to keep channels apart"),
        (MLP(lambda x: F.softmax(x, -1)), "softmax mixes channels"),
        (MLP(lambda x: x.flip(-1)), "flip is not known to keep channels apart"),
    ],
)
def test_refusals(model: nn.Module, sentence: str) -> None:
    model.up.weight[:9] = 0
    model.down.weight[:, 12:15] = 0
    _, rewrites = cut(model, torch.randn(3, 8), selection="model")
    assert not rewrites[0].applied
    assert rewrites[0].reason.startswith("no channel can be removed: ")
    assert sentence in rewrites[0].reason


def test_the_only_dead_head_stays_as_the_witness() -> None:
    model = Attention()
    model.o.weight[:, :8] = 0
    _, (rewrite,) = cut(model, torch.randn(2, 5, 32))
    assert not rewrite.applied
    assert rewrite.reason == (
        "what is dead has to stay, as the witness that makes NaN of infinite inputs"
    )


def test_bounded_activations_of_ignored_channels_are_refused() -> None:
    model = MLP(torch.tanh)
    model.down.weight[:, :9] = 0
    _, (rewrite,) = cut(model, torch.randn(3, 8))
    assert not rewrite.applied
    assert rewrite.reason.startswith("an infinite input would be NaN through a removed channel")


def test_weights_with_infinities_keep_their_channels() -> None:
    model = MLP(F.relu)
    model.down.weight[:, :9] = 0
    model.up.weight[:9, 2] = float("inf")
    _, (rewrite,) = cut(model, torch.randn(3, 8))
    assert not rewrite.applied


def test_few_channels_do_not_pay() -> None:
    model = MLP(F.relu, features=(64, 512, 64))
    model.up.weight[:9] = 0
    _, rewrites = cut(model, torch.randn(64, 64), selection="model")
    assert rewrites[0].reason == "9 of 512 channels are too few to pay"


def test_a_small_gain_does_not_pay() -> None:
    model = MLP(F.relu, features=(64, 512, 64))
    model.up.weight[:40] = 0
    _, rewrites = cut(model, torch.randn(64, 64), selection="model", min_speedup=1.5)
    assert rewrites[0].reason.startswith("not faster: the roofline model expects 1.0")


def test_the_gain_is_measured_where_it_is_to_be() -> None:
    class Stopwatch(AlwaysSelector):
        found = Comparison(3.0, 2.0, measured=True)

        def compare(self, before, after):
            return self.found

    selector = Stopwatch()
    model = MLP(F.relu, features=(64, 512, 64))
    model.up.weight[:100] = 0
    for found, said in (
        (Comparison(3.0, 2.0, measured=True), "channels are dead and were removed; measured 1.50x"),
        (Comparison(3.0, 2.95, measured=True), "not faster: measured 1.02x"),
        (Comparison(unknown="no time was left"), "no time was left"),
    ):
        selector.found = found
        context = PassContext(Options(on_error="raise"), False, selector)
        with torch.no_grad():
            DeadChannels(context)(canonicalize(model, torch.randn(64, 64)))
        assert context.rewrites[0].reason.endswith(said)
        assert context.rewrites[0].applied == ("removed" in said)


def test_float16_is_refused() -> None:
    model = MLP(F.relu).half()
    model.up.weight[:9] = 0
    _, rewrites = cut(model, torch.randn(3, 8).half())
    assert rewrites[0].reason == (
        "it is float16, in which a removed channel may overflow: use bfloat16"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = MLP(F.gelu).to(dtype)
    model.up.weight[:9] = 0
    x = torch.randn(3, 8, dtype=dtype)
    graph, (rewrite,) = cut(model, x)
    assert rewrite.applied
    bound = 3e-2 if dtype is torch.bfloat16 else 1e-12
    torch.testing.assert_close(graph(x), model(x), rtol=bound, atol=bound)


def test_training_is_left_alone() -> None:
    model = MLP(F.relu)
    model.up.weight[:9] = 0
    with torch.enable_grad():
        graph, (rewrite,) = cut(model, torch.randn(3, 8), training=True)
    assert not rewrite.applied and not graph.meta.get("edits")
    assert rewrite.reason.startswith("the weights are being trained and their zeros may not last")


def test_inference_tensors_are_refused() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.inference_mode():
                weight = torch.randn(24, 8)
                weight[:9] = 0
                self.register_buffer("weight", weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x @ self.weight.t()) @ self.weight

    _, (rewrite, *_) = cut(Buffers(), torch.randn(3, 8))
    assert "inference tensor" in rewrite.reason


def test_fuel_and_idempotence() -> None:
    model = MLP(F.relu)
    model.up.weight[:9] = 0
    _, (rewrite, *_) = cut(model, torch.randn(3, 8), fuel=0)
    assert rewrite.reason == "options['fuel'] is used up"
    for selection in ("always", "model"):
        model = MLP(F.relu, features=(64, 512, 64))
        model.up.weight[:200] = 0
        graph, _ = cut(model, torch.randn(64, 64), selection=selection)
        before = graph.code
        context = PassContext(Options(selection=selection, on_error="raise"))
        result = DeadChannels(context)(graph)
        assert not result.modified and graph.code == before
        assert not any(rewrite.applied for rewrite in context.rewrites)


def test_an_internal_error_leaves_the_region_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP(F.relu)
    model.up.weight[:9] = 0

    def broken(*args: Any) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("sparse_compiler.passes.dead_channels.find_dead", broken)
    with pytest.warns(UserWarning, match="broken on purpose"):
        graph, rewrites = cut(model, torch.randn(3, 8), on_error="fallback", selection="model")
    assert rewrites[0].error is not None and not graph.meta.get("edits")
    with pytest.raises(sc.PassError):
        cut(model, torch.randn(3, 8))


def test_tied_weights_are_cut_for_each_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 8))
            self.last = nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.last(F.relu(F.linear(x, self.weight)))
            return F.relu(F.linear(hidden, self.weight)) @ self.weight

    model = Tied()
    model.weight[5:15] = 0
    x = torch.randn(3, 8)
    graph, rewrites = cut(model, x)
    assert [rewrite.applied for rewrite in rewrites[:2]] == [True, True]
    assert_same(graph, model, x)


def test_shared_producers_need_every_reader_to_agree() -> None:
    class Two(MLP):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.other = nn.Linear(24, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = F.gelu(self.up(x))
            return self.down(hidden) * self.other(hidden)

    model = Two()
    model.down.weight[:, :12] = 0
    model.other.weight[:, 6:18] = 0
    x = torch.randn(3, 8)
    graph, (rewrite,) = cut(model, x)
    assert rewrite.applied and rewrite.pattern == "6 of 24 channels"
    assert_same(graph, model, x)


def test_dynamic_batch() -> None:
    model = nn.Sequential(Attention(), MLP(F.relu, features=(32, 48, 32))).eval()
    model[0].o.weight[:, :16] = 0
    model[1].up.weight[:20] = 0
    automatic = torch.export.Dim.AUTO
    program = torch.export.export(
        model, (torch.randn(2, 5, 32),), dynamic_shapes=({0: automatic, 1: automatic},)
    )
    graph = sc.canonicalize(program)
    context = PassContext(Options(selection="always", on_error="raise", verify=True))
    DeadChannels(context)(graph)
    assert [rewrite.applied for rewrite in context.rewrites] == [True, True]
    for batch, length in itertools.product((1, 3), (1, 7)):
        x = torch.randn(batch, length, 32)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_on_its_own_is_spread_out(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 96, bias=bias))
    model[0].weight[::2] = 0
    x = torch.randn(2, 3, 64)
    graph, (rewrite,) = cut(model, x)
    assert rewrite.applied and rewrite.format == "smaller dense, spread out"
    assert sizes(graph) == [(49, 64)]
    assert_same(graph, model, x)


def test_a_layer_on_its_own_that_is_sparse_is_left_to_the_sparse_kernels() -> None:
    model = nn.Sequential(nn.Linear(1024, 96))
    model[0].weight[::2] = 0
    model[0].weight[:, ::2] = 0
    _, (*_, rewrite) = cut(model, torch.randn(64, 1024), selection="model")
    assert rewrite.reason == (
        "its other rows are sparse, too: a sparse kernel skips zero rows by itself"
    )


def test_spreading_out_may_not_pay() -> None:
    model = nn.Sequential(nn.Linear(16, 96))
    model[0].weight[::2] = 0
    _, (rewrite,) = cut(model, torch.randn(64, 16), selection="model")
    assert rewrite.reason.startswith("not faster: with the result spread out again")


def test_what_is_left_may_become_sparse() -> None:
    model = MLP(F.relu, features=(64, 128, 64))
    model.up.weight[torch.rand(128, 64) < 0.9] = 0
    model.up.weight[:40] = 0
    x = torch.randn(8, 64)
    graph, rewrites = cut(model, x)
    SparseLinear(PassContext(Options(selection="always", on_error="raise")))(graph)
    applied = [r for r in graph.meta["rewrites"] if r.applied]
    assert rewrites[0].applied and [r.target for r in applied] == ["up"]
    assert applied[0].shape == (89, 64)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)
    names = {name for item in graph.meta["derived"] for name in item.attributes}
    assert names == set(graph.meta["constants"])


def test_changed_weights_are_noticed() -> None:
    model = MLP(F.gelu, features=(64, 128, 64)).eval()
    model.up.weight[torch.rand(128, 64) < 0.9] = 0
    model.up.weight[:40] = 0
    x = torch.randn(4, 64)
    options = {"selection": "always", "on_error": "raise", "verify": True}
    compiled = torch.compile(model, backend="sparse", options=options)

    def check() -> None:
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)

    check()
    (call,) = [item for item in live if item.uses({id(model.up.weight)})]
    model.down.weight.mul_(2)
    check()
    model.up.bias.add_(1)  # the constants that were folded change, too
    check()
    model.up.weight.mul_(-1)
    check()
    assert call.stale_calls == 0
    model.up.weight[3, 3] = 1  # a removed channel comes alive
    check()
    assert call.stale_calls == 1
    model.up.weight[3, 3] = 0
    check()

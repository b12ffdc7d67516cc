"""The pass over mixtures of experts: Hugging Face's models, any number of tokens, its verdicts."""

import pytest
import torch
from torch import nn

import sparse_compiler as sc
from sparse_compiler.canonical import canonicalize_dynamo
from sparse_compiler.formats.cost import AlwaysSelector, ModelSelector
from sparse_compiler.options import Options
from sparse_compiler.passes import Moe, PassContext, moe
from sparse_compiler.passes.moe import FINDERS, find_sites
from sparse_compiler.static import StaticValues
from tests.passes.moe_rewriting import calls, rewrite
from tests.passes.test_moe_gathered import Batched

transformers = pytest.importorskip("transformers")

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
_LATENT = {
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "topk_group": 1,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16},
    "Olmoe": {"num_experts": 4},
    "DeepseekV2": {**_LATENT, "n_group": 1},
    "DeepseekV3": {**_LATENT, "n_group": 2},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},
    "Jamba": {
        "num_experts": 4,
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "Phimoe": {"num_local_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
}
# Its router has an autograd.Function of its own, which a backend cannot trace a second time.
_NO_TRAINING = ("Phimoe",)


def make(name, implementation, dtype, layers=2):
    """A model of this family with weights that are not tiny."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **_SMALL, **MODELS[name], num_hidden_layers=layers, use_cache=False
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


class Rewriting:
    """A Dynamo backend that runs the rewritten graph as it is, without Inductor."""

    def __init__(self, training):
        self.training = training
        self.graphs = []
        self.rewrites = []

    def __call__(self, gm, example_inputs):
        graph = canonicalize_dynamo(gm, example_inputs)
        options = Options.parse({"on_error": "raise"})
        context = PassContext(options, self.training, AlwaysSelector())
        Moe(context)(graph)
        self.graphs.append(graph)
        self.rewrites.extend(context.rewrites)
        return graph.forward


def gradients(function, model, tokens):
    """Logits and all gradients."""
    model.zero_grad()
    logits = function(tokens).logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits.float() * weights).sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, want, dtype, least=0.0):
    """Relative to the largest value, or to ``least``: some gradients are nothing but rounding."""
    # A router's gradient is a difference of what each model rounds to bfloat16 in its own way.
    bound = 1e-4 if dtype is torch.float32 else 5e-2 if least == 0 else 1.5e-1
    scale = max(least, float(want.abs().max()))
    torch.testing.assert_close(got.float() / scale, want.float() / scale, rtol=0, atol=bound)


_FEW, _MANY = ((2, 9), (3, 7)), ((2, 9), (3, 7), (1, 1), (2, 12))


def check(name, implementation, dtype, training, shapes=_MANY, layers=2):
    torch._dynamo.reset()
    model = make(name, implementation, dtype, layers).train(training)
    backend = Rewriting(training)
    compiled = torch.compile(model, backend=backend)
    for tokens in shapes:
        ids = torch.randint(1, 64, tokens)
        if training:
            want, wanted = gradients(model, model, ids)
            got, found = gradients(compiled, model, ids)
            assert_close(got, want, dtype)
            assert set(wanted) == set(found)
            least = 0.01 * max(float(value.abs().max()) for value in wanted.values())
            for key, value in wanted.items():
                assert_close(found[key], value, dtype, least)
        else:
            with torch.no_grad():
                assert_close(compiled(ids).logits, model(ids).logits, dtype)
    assert backend.rewrites and all(item.applied for item in backend.rewrites)
    assert {item.spelling for item in backend.rewrites} == {implementation}
    assert {item.pattern for item in backend.rewrites} == {"top 2 of 4"}
    assert all(len(calls(graph)) == layers for graph in backend.graphs)
    # Of one shape, of any, and of a single token: no further one for more tokens.
    assert len(backend.graphs) <= 4
    left = [str(node.target) for graph in backend.graphs for node in graph.graph.nodes]
    assert not any("grouped_mm" in target or "aten.bmm" in target for target in left)


@pytest.mark.parametrize(
    "name, implementation",
    [("Mixtral", "grouped_mm"), ("GptOss", "batched_mm")],
)
def test_moe_models_become_routed(name, implementation):
    check(name, implementation, torch.float32, training=False, shapes=_FEW, layers=1)


def test_moe_models_train():
    check("Qwen3Moe", "grouped_mm", torch.float32, training=True, shapes=_FEW, layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_moe_every_model(name, implementation, dtype, training):
    if training and name in _NO_TRAINING:
        pytest.skip("its router's own autograd.Function cannot be traced a second time")
    check(name, implementation, dtype, training)


class Two(nn.Module):
    """Two mixtures, one behind the other with nothing in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Batched(), Batched(k=1)

    def forward(self, x):
        return self.second(self.first(x))


def test_moe_mixtures_one_behind_the_other():
    torch.manual_seed(0)
    model, x = Two(), torch.randn(5, 6)
    gm, rewrites = rewrite(model, x)
    assert [item.target for item in rewrites] == ["first", "second"]
    assert [item.pattern for item in rewrites] == ["top 2 of 4", "top 1 of 4"]
    assert len(calls(gm)) == 2 and all(item.applied for item in rewrites)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)


def test_moe_fuel_stops_rewriting():
    torch.manual_seed(0)
    gm, rewrites = rewrite(Two(), torch.randn(5, 6), fuel=1)
    assert [item.applied for item in rewrites] == [True, False]
    assert rewrites[1].reason == "options['fuel'] is used up" and len(calls(gm)) == 1


def test_moe_is_verified_on_random_inputs():
    torch.manual_seed(0)
    model, x = Two(), torch.randn(5, 6)
    gm, rewrites = rewrite(model, x, verify=True)
    assert all(item.applied for item in rewrites)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)


def test_moe_verdict_has_sizes_pairs_and_times():
    torch.manual_seed(0)
    gm = sc.canonicalize(Batched(), torch.randn(5, 6))
    context = PassContext(Options(), selector=ModelSelector(1.0))
    Moe(context)(gm)
    (verdict,) = context.rewrites
    assert verdict.kind == "moe" and verdict.shape == (5, 4, 2, 6, 5) and verdict.rows == (5,)
    assert verdict.dtype == "float32" and verdict.sparsity == 0.0
    assert verdict.reason.startswith("10 of 10 pairs are computed; the roofline model expects")
    assert verdict.baseline_ms > 0 and verdict.sparse_ms > 0 and verdict.speedup > 0
    assert verdict.applied == (verdict.format == "routed")


class Slow(AlwaysSelector):
    def dispatch(self, problem):
        from sparse_compiler.formats.cost import Decision

        return Decision(None, "not faster: as told")


def test_moe_that_does_not_pay_is_left_alone():
    gm = sc.canonicalize(Batched(), torch.randn(5, 6))
    context = PassContext(Options(), selector=Slow())
    assert not Moe(context)(gm).modified
    (verdict,) = context.rewrites
    assert not verdict.applied and verdict.reason.endswith("not faster: as told")
    assert not calls(gm) and "edits" not in gm.meta


def test_moe_in_float64_is_left_alone():
    gm, rewrites = rewrite(Batched().double(), torch.randn(5, 6, dtype=torch.float64))
    assert [item.reason for item in rewrites] == [
        "it is float64: the kernels take float32 and bfloat16"
    ]
    assert not calls(gm)


def test_moe_under_a_switch_of_gradients_is_left_alone():
    class Switched(Batched):
        def dispatch(self, x, ids, weights):
            y = self.results(x, ids.reshape(-1))
            with torch.no_grad():
                y = y * weights.reshape(-1, 1)
            return y.view(x.shape[0], self.k, -1).sum(1)

    backend = Rewriting(True)
    torch._dynamo.reset()
    model, x = Switched(), torch.randn(5, 6, requires_grad=True)
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(compiled(x), model(x))
    verdicts = [(item.applied, item.reason) for item in backend.rewrites]
    assert all(not applied for applied, _ in verdicts), verdicts


def test_moe_finder_that_fails_leaves_the_rest(monkeypatch):
    def broken(gm, static):
        raise KeyError("odd")

    monkeypatch.setattr(moe, "FINDERS", (broken, *FINDERS))
    gm = sc.canonicalize(Batched(), torch.randn(5, 6))
    context = PassContext(Options(), selector=AlwaysSelector())
    with pytest.warns(UserWarning, match="internal error"):
        Moe(context)(gm)
    failed, verdict = context.rewrites
    assert "KeyError" in failed.error and failed.target == "the whole graph"
    assert verdict.applied and len(calls(gm)) == 1
    with pytest.raises(KeyError):
        find_sites(gm, StaticValues(gm, training=False))


def test_moe_finders_see_nothing_in_other_models():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 3, 6))
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

        def forward(self, x, ids):
            return self.layers(x) + self.table[ids].sum(1)

    gm = sc.canonicalize(Other(), torch.randn(5, 6), torch.randint(0, 4, (5,)))
    static = StaticValues(gm, training=False)
    before = str(gm.graph)
    assert find_sites(gm, static) == []
    assert all(list(finder(gm, static)) == [] for finder in FINDERS)
    assert str(gm.graph) == before

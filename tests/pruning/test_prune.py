"""`prune_` on whole models: the right weights, exactly, and nothing after an error."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparse_compiler.errors import SparseCompilerError
from sparse_compiler.pruning import PruningError, prune_


class Tied(nn.Module):
    """A toy language model: tied head, and one weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.lm_head = nn.Linear(16, 10, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.second(self.first(self.embedding(tokens)).relu() * 5))


def mlp(*sizes: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_two_four_keeps_two_largest_of_each_four():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -4.0, 3.0, -2.0], [-1.0, 2.0, 3.0, -4.0]]))
    report = prune_(model, pattern="2:4")
    assert model[0].weight.tolist() == [[0, -4, 3, 0], [0, 0, 3, -4]]
    assert report.sparsity == 0.5
    assert report.layers[0].kept_energy == pytest.approx(50 / 60)


def test_wanda_weighs_by_the_norm_of_the_input():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    batch = torch.tensor([[30.0, 1.0, 1.0, 0.0], [40.0, 0.0, 1.0, 0.0]])
    prune_(model, pattern="2:4", method="wanda", calibration=[batch[:1], batch[1:]])
    assert model[0].weight.tolist() == [[1, 0, 3, 0]]


@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 4),
    sparsity=st.floats(0.05, 0.95),
    method=st.sampled_from(["magnitude", "wanda"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scope=st.sampled_from([None, "row", "layer", "global"]),
    seed=st.integers(0, 2**31),
)
def test_unstructured_removes_the_cheapest_and_exactly_as_many_as_asked(
    rows, groups, sparsity, method, dtype, scope, seed
):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4 * groups, rows, dtype=dtype))
    dense = model[0].weight.detach().double().clone()
    batches = [torch.randn(3, 4 * groups, dtype=dtype) for _ in range(2)]
    calibration = batches if method == "wanda" else None
    prune_(
        model,
        pattern="unstructured",
        sparsity=sparsity,
        method=method,
        calibration=calibration,
        scope=scope,
    )
    weight = model[0].weight.detach()
    per_row = scope == "row" or (scope is None and method == "wanda")
    wanted = (
        rows * round(sparsity * weight.shape[1]) if per_row else round(sparsity * weight.numel())
    )
    assert zeros(weight) == wanted
    assert torch.equal(weight.double()[weight != 0], dense[weight != 0])
    scores = dense.square()
    if method == "wanda":
        scores = scores * torch.cat(batches).double().square().sum(0)
    groups_of = zip(scores, weight, strict=True) if per_row else [(scores, weight)]
    for score, kept in groups_of:
        if (kept == 0).any() and (kept != 0).any():
            # The sums of squares differ by rounding: 12 terms of float64.
            assert score[kept == 0].max() <= score[kept != 0].min() * (1 + 1e-12)


@pytest.mark.parametrize(("pattern", "unit"), [("4x2", (4, 2)), ("rows", (1, 16))])
def test_blocks_and_rows_are_removed_whole(pattern, unit):
    model = mlp(16, 8)
    prune_(model, pattern=pattern, sparsity=0.5)
    tiles = model[0].weight.detach().unfold(0, unit[0], unit[0]).unfold(1, unit[1], unit[1])
    counts = (tiles != 0).flatten(2).sum(-1).flatten().tolist()
    assert sorted(set(counts)) == [0, unit[0] * unit[1]]
    assert counts.count(0) == len(counts) // 2


def test_wanda_takes_blocks_and_columns():
    model = mlp(16, 8)
    batch = torch.ones(2, 16)
    batch[:, :8] *= 100
    prune_(model, pattern="columns", sparsity=0.5, method="wanda", calibration=[batch])
    assert zeros(model[0].weight[:, 8:]) == 64
    prune_(mlp(16, 8), pattern="4x4", sparsity=0.5, method="wanda", calibration=[batch])


def test_global_scope_ranks_over_all_layers():
    model = mlp(8, 8, 8)
    with torch.no_grad():
        model[0].weight.mul_(1000)
    prune_(model, pattern="unstructured", sparsity=0.5, scope="global")
    assert zeros(model[0].weight) == 0
    assert zeros(model[2].weight) == 64


def test_zeros_already_there_count_and_negative_zero_is_one():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-0.0, 3.0, 0.0, 1.0]]))
    report = prune_(model, pattern="unstructured", sparsity=0.5)
    assert model[0].weight.tolist() == [[0, 3, 0, 1]]
    assert report.layers[0].sparsity_before == report.layers[0].sparsity_after == 0.5
    assert report.layers[0].kept_energy == 1.0


def test_tiny_weights_keep_their_order():
    """Squares of such weights underflow in fp32."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1e-30, 4e-30, 3e-30, 2e-30]]))
    prune_(model, pattern="2:4")
    assert (model[0].weight != 0).tolist() == [[False, True, True, False]]


def test_the_version_counter_moves_so_that_a_compiled_model_notices():
    model = mlp(8, 8)
    parameter, version = model[0].weight, model[0].weight._version
    prune_(model, pattern="2:4")
    assert model[0].weight is parameter
    assert parameter._version > version


def test_inference_tensors_are_pruned():
    with torch.inference_mode():
        model = mlp(8, 8)
    prune_(model, pattern="2:4")
    assert zeros(model[0].weight) == 32


def test_a_shared_weight_is_pruned_once_and_a_tied_head_not_at_all():
    model = Tied()
    embedding = model.embedding.weight.detach().clone()
    report = prune_(
        model, pattern="2:4", method="wanda", calibration=[torch.randint(0, 10, (2, 5))]
    )
    assert [layer.name for layer in report.layers] == ["first"]
    assert model.second.weight is model.first.weight
    assert zeros(model.first.weight) == 128
    assert torch.equal(model.embedding.weight, embedding)


def test_wanda_adds_the_inputs_of_all_users_of_a_shared_weight():
    model = Tied()
    tokens = torch.randint(0, 10, (2, 5))
    with torch.no_grad():
        hidden = model.embedding(tokens)
        inputs = torch.cat([hidden, model.first(hidden).relu() * 5])
    norms = inputs.double().flatten(0, 1).square().sum(0)
    scores = model.first.weight.detach().double().square() * norms
    prune_(model, pattern="unstructured", sparsity=0.25, method="wanda", calibration=[tokens])
    expected = torch.ones_like(scores).scatter(1, scores.argsort(1)[:, :4], 0)
    assert torch.equal(model.first.weight.detach() != 0, expected.bool())


def test_include_and_exclude_choose_layers():
    model = mlp(8, 8, 8, 8)
    report = prune_(model, pattern="2:4", include=["0", "2"], exclude=lambda name, _: name == "0")
    assert [layer.name for layer in report.layers] == ["2"]
    tied = Tied()
    prune_(tied, pattern="2:4", include="lm_head")
    assert zeros(tied.embedding.weight) == 80


def test_conv1d_is_pruned_along_its_inputs():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(6, 8)
    report = prune_(nn.Sequential(layer), pattern="2:4")
    assert report.layers[0].shape == (6, 8)
    assert (layer.weight.detach().t().reshape(6, 2, 4) != 0).sum(-1).eq(2).all()
    twin = nn.Sequential(transformers.pytorch_utils.Conv1D(6, 8))
    prune_(twin, pattern="2:4", as_mask=True)
    assert (twin[0].weight.detach().t().reshape(6, 2, 4) != 0).sum(-1).eq(2).all()


def test_pointwise_convolutions_are_pruned_and_others_left():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1, stride=2))
    report = prune_(model, pattern="2:4", method="wanda", calibration=[torch.randn(2, 3, 9, 9)])
    assert [layer.name for layer in report.layers] == ["1"]
    assert (model[1].weight.view(4, 2, 4) != 0).sum(-1).eq(2).all()


def test_as_mask_keeps_the_weights_and_the_model_computes_with_zeros():
    model, twin = mlp(8, 8, 8), mlp(8, 8, 8)
    prune_(twin, pattern="2:4")
    prune_(model, pattern="2:4", as_mask=True)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), twin(x))
    assert zeros(model[0].weight_orig) == 0
    assert torch_prune.is_pruned(model)


def test_calibration_leaves_modes_buffers_and_hooks_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8))
    model[2].eval()
    before = state(model[1])
    prune_(model, pattern="2:4", method="wanda", calibration=[{"input": torch.randn(4, 8)}])
    assert_same(model[1], before)
    assert model.training and model[0].training and not model[2].training
    assert not model[0]._forward_pre_hooks


def test_the_report_is_a_table():
    text = str(prune_(mlp(8, 8), pattern="2:4"))
    assert "2:4" in text and "50.0%" in text and "magnitude: 1 weights, 50.0% zeros" in text


def masked() -> nn.Module:
    model = mlp(8, 8)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def parametrized() -> nn.Module:
    model = mlp(8, 8)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def with_nan() -> nn.Module:
    model = mlp(8, 8, 8)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


def unreached() -> nn.Module:
    model = mlp(8, 8)
    model[0].spare = nn.Linear(8, 8)
    return model


def expanded() -> nn.Module:
    model = mlp(8, 8)
    model[0].weight = nn.Parameter(torch.ones(8).expand(8, 8))
    return model


BATCH = [torch.ones(1, 8)]
U = {"pattern": "unstructured"}
REFUSALS = [
    (mlp(8, 8), {"pattern": "2:4", "method": "magnitud"}, "Did you mean 'magnitude'?"),
    (mlp(8, 8), {"pattern": "2:4", "sparsity": 0.5}, "leave sparsity out"),
    (mlp(8, 8), {"pattern": "2:4", "scope": "layer"}, "leave scope out"),
    (mlp(8, 8), U, "needs sparsity, for example sparsity=0.6"),
    (mlp(8, 8), {**U, "sparsity": 60}, "write sparsity=0.6 for 60 %"),
    (mlp(8, 8), {**U, "sparsity": float("nan")}, "not a fraction between 0 and 1"),
    (mlp(8, 8), {**U, "sparsity": 0.5, "scope": "model"}, "unknown scope 'model'. Known:"),
    (mlp(8, 8), {"pattern": "rows", "sparsity": 0.5, "scope": "row"}, "use scope='layer'"),
    (mlp(8, 8), {"pattern": "2:4", "method": "wanda"}, "give calibration=[batch, ...]"),
    (mlp(8, 8), {"pattern": "2:4", "calibration": BATCH}, "leave calibration out"),
    (
        mlp(8, 8),
        {"pattern": "2:4", "method": "wanda", "calibration": BATCH[0]},
        "write calibration=[batch]",
    ),
    (mlp(8, 8), {"pattern": "2:4", "method": "wanda", "calibration": []}, "held no batch"),
    (
        mlp(8, 8),
        {"pattern": "2:4", "method": "wanda", "calibration": [BATCH[0] * float("inf")]},
        "calibration inputs of 0 have NaN or infinite values",
    ),
    (
        unreached(),
        {"pattern": "2:4", "method": "wanda", "calibration": BATCH},
        "no calibration batch reached 0.spare",
    ),
    (mlp(8, 6, 8), {"pattern": "2:4"}, "2 cannot be 2:4: its in_features 6 is not divisible by 4"),
    (mlp(8, 8, 6), {"pattern": "4x1", "sparsity": 0.5}, "its out_features 6 is not divisible by 4"),
    (mlp(8, 8), {"pattern": "2:4", "include": "fc*"}, "include='fc*' matches no linear layer"),
    (mlp(8, 8), {"pattern": "2:4", "exclude": ["0", "x"]}, "exclude='x' matches no linear layer"),
    (mlp(8, 8), {"pattern": "2:4", "exclude": "0"}, "leave no layer to prune"),
    (nn.ReLU(), {"pattern": "2:4"}, "there is nothing to prune"),
    (masked(), {"pattern": "2:4"}, "torch.nn.utils.prune.remove(module, 'weight')"),
    (parametrized(), {"pattern": "2:4"}, "remove_parametrizations(module, 'weight')"),
    (with_nan(), {"pattern": "2:4"}, "2.weight has NaN or infinite values"),
    (expanded(), {"pattern": "2:4"}, "assign weight.clone()"),
    (mlp(8, 8).to("meta"), {"pattern": "2:4"}, "is on the meta device"),
    (mlp(8, 8, dtype=torch.complex64), {"pattern": "2:4"}, "only dense floating-point weights"),
    (nn.Sequential(nn.LazyLinear(8)), {"pattern": "2:4"}, "run the model once before pruning"),
    (Tied(), {"pattern": "2:4", "include": "lm_head", "as_mask": True}, "mask would not reach"),
]


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"), REFUSALS, ids=[sentence for *_, sentence in REFUSALS]
)
def test_a_refusal_says_what_to_write_and_changes_nothing(model, arguments, sentence):
    before = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if not isinstance(value, nn.UninitializedParameter) and not value.is_meta
    }
    with pytest.raises(PruningError) as error:
        prune_(model, **arguments)
    assert sentence in str(error.value)
    now = dict(model.named_parameters())
    for name, value in before.items():
        torch.testing.assert_close(now[name].detach(), value, rtol=0, atol=0, equal_nan=True)
    assert isinstance(error.value, SparseCompilerError)


def test_a_failing_calibration_leaves_the_model_as_it_was():
    model = mlp(8, 8).train()
    before = copy.deepcopy(state(model))
    with pytest.raises(RuntimeError):
        prune_(model, pattern="2:4", method="wanda", calibration=[BATCH[0], torch.ones(1, 3)])
    assert_same(model, before)
    assert model.training and not model[0]._forward_pre_hooks

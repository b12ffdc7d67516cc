"""What SparseLinear refuses, and the sentence it refuses it with."""

import warnings

import pytest
import torch
from helpers import count, prune_layers, pruned, sparsified, sparsify
from torch import nn

import sparse_compiler as sc
from sparse_compiler.errors import PassError
from sparse_compiler.formats import bitmap, csr
from sparse_compiler.formats.cost import Decision
from sparse_compiler.formats.pattern import Pattern
from sparse_compiler.passes import PassContext, PassManager, SparseLinear
from sparse_compiler.passes.sparse_linear import refuse_pattern, refuse_tensor


def layer(weight: torch.Tensor, requires_grad: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False))
    model[0].weight = nn.Parameter(weight, requires_grad=requires_grad)
    return model


def verdict(weight: torch.Tensor, **options) -> sc.Rewrite:
    x = torch.randn(3, weight.shape[1], dtype=weight.dtype)
    gm, (rewrite,) = sparsified(layer(weight), x, **options)
    assert rewrite.applied == bool(gm.meta.get("edits"))
    assert rewrite.target == "0"
    return rewrite


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(8, 8), "the weight has no zeros"),
        (pruned(40, 40, 0.8), "19% zeros are too few for any format to pay"),
        (pruned(8, 8, 0.3).double(), "the weight is float64: sparse kernels take float32 and "),
        (pruned(8, 8, 0.3).half(), "the weight is float16, which CPUs compute through"),
        (pruned(8, 8, 0.3).to(torch.complex64), "the weight is complex: sparse kernels take"),
        (pruned(2, 65536, 0.01), "in_features 65536 is above 65535, which 16-bit columns can"),
    ],
)
def test_refusals(weight, reason):
    rewrite = verdict(weight)
    assert rewrite.reason.startswith(reason)
    assert not rewrite.applied and rewrite.format == "dense"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(4, 4).to_sparse(), "the weight is a torch.sparse_coo tensor: pass it dense"),
        (torch.zeros(4, 4).to_sparse_csr(), "the weight is a torch.sparse_csr tensor: pass it"),
        (torch.zeros(4, 4, device="meta"), "the weight is on meta: this version has kernels for"),
        (torch.zeros(4, 4, dtype=torch.int8), "the weight is torch.int8 (quantized?): sparse"),
        (torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "the weight is torch.float8_e4m3fn (quan"),
    ],
)
def test_refused_tensors(tensor, reason):
    assert refuse_tensor(tensor).startswith(reason)


def test_a_tensor_subclass_is_not_looked_into():
    class Special(torch.Tensor):
        pass

    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    gm = sc.canonicalize(prune_layers(model), torch.randn(2, 8))
    special = pruned(8, 8, 0.3).as_subclass(Special)
    del gm.get_submodule("0").weight
    gm.get_submodule("0").register_buffer("weight", special)
    gm, (rewrite,) = sparsify(gm)
    assert rewrite.reason == "the weight is a Special, a tensor subclass: not looked into"


def test_an_inference_tensor_is_refused():
    with torch.inference_mode():
        weight = pruned(8, 8, 0.3)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    gm = sc.canonicalize(prune_layers(model), torch.randn(2, 8))
    del gm.get_submodule("0").weight
    gm.get_submodule("0").register_buffer("weight", weight)
    gm, (rewrite,) = sparsify(gm)
    assert rewrite.reason == (
        "the weight is an inference tensor, whose changes cannot be seen: create the model "
        "outside torch.inference_mode()"
    )


@pytest.mark.parametrize(
    ("weight", "pattern", "format_name"),
    [
        (pruned(64, 64, 0.1), "unstructured", "csr"),
        (pruned(64, 64, 0.2, block=(16, 16)), "block 16x16", "block"),
        (pruned(64, 64, 0.3, block=(4, 1)), "block 4x1", "block"),
    ],
)
def test_verdicts_say_what_was_found(weight, pattern, format_name):
    rewrite = verdict(weight)
    assert (rewrite.pattern, rewrite.format, rewrite.applied) == (pattern, format_name, True)
    assert rewrite.shape == (64, 64) and rewrite.rows == (3,)
    assert rewrite.sparsity == pytest.approx(float((weight == 0).float().mean()))
    assert rewrite.dtype == "float32" and rewrite.packed_bytes > 0


def test_two_four_goes_to_bitmaps_at_few_rows():
    weight = torch.randn(64, 64)
    weight.view(-1, 4)[:, :2] = 0
    rewrite = verdict(weight)
    assert (rewrite.pattern, rewrite.format) == ("2:4", "bitmap")


def test_all_zero_weights_give_zeros():
    gm, (rewrite,) = sparsified(layer(torch.zeros(8, 8)), torch.randn(3, 8))
    assert rewrite.applied and rewrite.pattern == "all zero"
    assert not gm(torch.randn(3, 8)).any()


def test_fuel_stops_rewriting():
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    for fuel in range(5):
        gm, rewrites = sparsified(prune_layers(model, 0.3), torch.randn(2, 8), fuel=fuel)
        assert count(gm, "sparse_compiler.linear") == fuel
        assert [r.applied for r in rewrites] == [True] * fuel + [False] * (4 - fuel)
        for rewrite in rewrites[fuel:]:
            assert rewrite.reason == "options['fuel'] is used up"


def test_a_lost_measurement_leaves_the_layer_dense():
    class Never:
        def choose(self, problem, weight):
            return Decision(None, "dense is faster", 0.5, 1.0, 2.0)

    gm = sc.canonicalize(prune_layers(nn.Linear(8, 8)), torch.randn(2, 8))
    context = PassContext(selector=Never())
    result = PassManager([SparseLinear()], context)(gm)
    (rewrite,) = context.rewrites
    assert not result.modified and not rewrite.applied
    assert (rewrite.reason, rewrite.speedup) == ("dense is faster", 0.5)


@pytest.fixture
def broken(monkeypatch):
    """Packing csr weights fails."""

    def pack(*args, **kwargs):
        raise ZeroDivisionError("no room")

    monkeypatch.setattr(csr, "pack", pack)


def test_a_failure_inside_leaves_the_layer_dense_with_one_warning(broken):
    model, x = prune_layers(nn.Sequential(nn.Linear(8, 8))), torch.randn(2, 8)
    with pytest.warns(UserWarning) as caught:
        gm, (rewrite,) = sparsified(model, x, on_error="fallback")
    (warning,) = [w for w in caught if "sparse_compiler" in str(w.message)]
    assert "sparse_compiler left 0 dense after an internal error (ZeroDivisionError: no room)" in (
        str(warning.message)
    )
    assert not rewrite.applied and "ZeroDivisionError" in rewrite.error
    assert rewrite.reason == "an internal error left it dense: ZeroDivisionError: no room"
    torch.testing.assert_close(gm(x), model(x))


def test_a_failure_inside_raises_if_asked_to(broken):
    with pytest.raises(PassError, match="0: ZeroDivisionError: no room"):
        sparsified(prune_layers(nn.Sequential(nn.Linear(8, 8))), torch.randn(2, 8))


@pytest.fixture
def lossy(monkeypatch):
    """Packing forgets the first weight."""
    good_csr, good_bitmap = csr.pack, bitmap.pack

    def lossy(good):
        def pack(weight, **arguments):
            layout, values = good(weight, **arguments)
            values[0] = 0
            return layout, values

        return pack

    monkeypatch.setattr(csr, "pack", lossy(good_csr))
    monkeypatch.setattr(bitmap, "pack", lossy(good_bitmap))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_verify_catches_a_broken_format(lossy, density):
    model, x = layer(pruned(16, 16, density)), torch.randn(4, 16)
    with pytest.raises(sc.VerificationError, match="0: the rewrite differs from the original by"):
        sparsified(model, x, verify=True)
    with pytest.warns(UserWarning, match="VerificationError"):
        gm, (rewrite,) = sparsified(model, x, verify=True, on_error="fallback")
    assert not rewrite.applied
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("shape", [(3, 16), (0, 16), (2, 3, 16)])
def test_verify_accepts_what_is_right(shape):
    model, x = layer(pruned(16, 16, 0.3)), torch.randn(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, (rewrite,) = sparsified(model, x, verify=True)
    assert rewrite.applied


def test_verify_knows_that_nan_equals_nan():
    weight = pruned(8, 8, 0.5)
    weight[0, 0], weight[1, 1] = float("nan"), float("inf")
    model = nn.Linear(8, 8)
    model.weight.data = weight
    _, (rewrite,) = sparsified(model, torch.randn(3, 8), verify=True)
    assert rewrite.applied


@pytest.mark.parametrize(
    ("shape", "nonzeros", "trained", "reason"),
    [
        ((8, 70000), 100, False, "in_features 70000 is above 65535, which 16-bit columns can name"),
        ((70000, 8), 100, False, None),
        ((70000, 8), 100, True, "out_features 70000 is above 65535, which 16-bit columns can name"),
        (
            (65000, 65000),
            100,
            True,
            "it has more than 2**31 weights, which 32-bit positions cannot name",
        ),
        (
            (2**18, 65000),
            2**31,
            False,
            "more than 2**31 weights are kept, which 32-bit positions cannot name",
        ),
        ((64, 64), 3700, False, "10% zeros are too few for any format to pay"),
    ],
)
def test_patterns_that_no_format_can_hold(shape, nonzeros, trained, reason):
    assert refuse_pattern(Pattern(shape, nonzeros), trained=trained) == reason

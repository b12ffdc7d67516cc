"""Weights under a mask: folded in inference; sparse, with the dense gradients, in training."""

import copy

import pytest
import torch
from helpers import count, sparsify
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize, prune

import sparse_compiler as sc
from sparse_compiler.formats.masked import pack


class Mask(nn.Module):
    def __init__(self, mask) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


class Masked(nn.Module):
    """A linear layer that masks its weight in forward."""

    def __init__(self, mask, how, bias=True, dtype=torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(mask.shape).to(dtype))
        self.bias = nn.Parameter(torch.randn(mask.shape[0]).to(dtype)) if bias else None
        self.register_buffer("mask", mask)
        self.how = how

    def forward(self, x):
        weight = HOW[self.how](self.weight, self.mask)
        return torch.nn.functional.linear(x, weight, self.bias)


HOW = {
    "product": lambda w, m: w * m,
    "product of floats": lambda w, m: m.to(w.dtype) * w,
    "scaled": lambda w, m: w * (m * 2.5).to(w.dtype),
    "where": lambda w, m: torch.where(m, w, 0),
    "masked_fill": lambda w, m: w.masked_fill(~m, 0),
    "masked_fill negated mask": lambda w, m: w.masked_fill(m.logical_not(), 0.0),
    "transposed": lambda w, m: (w.t() * m.t()).t(),
}


def keep(rows, columns, density, block=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    high = -(-rows // block)
    mask = torch.rand(high, columns, generator=generator) < density
    return mask.repeat_interleave(block, 0)[:rows]


def layers() -> dict[str, nn.Module]:
    pruned_layer, parametrized = nn.Linear(12, 20), nn.Linear(12, 20)
    prune.random_unstructured(pruned_layer, "weight", 0.6)
    parametrize.register_parametrization(parametrized, "weight", Mask(keep(20, 12, 0.4)))
    spelled = {how: Masked(keep(20, 12, 0.4), how) for how in HOW}
    return {"torch prune": pruned_layer, "parametrize": parametrized, **spelled}


NAMES = ["torch prune", "parametrize", *HOW]


def gradients(function, model, x, grad):
    """Output, gradient for x, and gradients for the parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def compare(model, x, atol=1e-4, rtol=1e-4):
    """The sparse training graph against dense autograd in float64."""
    gm, rewrites = sparsify(sc.canonicalize(nn.Sequential(model), x), training=True)
    (rewrite,) = rewrites
    assert rewrite.applied, rewrite.reason
    assert count(gm, "masked_linear_csr") == 1
    y = model(x)
    grad = torch.randn_like(y)
    found = gradients(gm, model, x, grad)
    # torch.nn.utils.prune leaves its product on the module, which cannot be copied.
    vars(model).pop("weight", None)
    exact = copy.deepcopy(model).double()
    expected = gradients(exact, exact, x.double(), grad.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=rtol)
    return rewrite


@pytest.mark.parametrize("name", NAMES)
def test_gradients_in_training(name):
    rewrite = compare(layers()[name], torch.randn(5, 12))
    assert rewrite.format == "csr" and rewrite.shape == (20, 12)


@pytest.mark.parametrize("name", NAMES)
def test_folded_in_inference(name):
    model, x = layers()[name].eval(), torch.randn(5, 12)
    with torch.no_grad():
        gm, (rewrite,) = sparsify(sc.canonicalize(nn.Sequential(model), x))
        assert rewrite.applied and rewrite.sparsity == pytest.approx(0.6, abs=0.12)
        assert count(gm, "mul") == count(gm, "where") == count(gm, "masked_fill") == 0
        torch.testing.assert_close(gm(x), model(x))


@settings(max_examples=60)
@given(
    lead=st.lists(st.integers(1, 4), max_size=2),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.1, 0.5]),
    how=st.sampled_from(sorted(HOW)),
    bias=st.booleans(),
    block=st.sampled_from([1, 4, 8, 16]),
    seed=st.integers(0, 100),
)
def test_gradients_of_any_layer(lead, in_features, out_features, density, how, bias, block, seed):
    mask = keep(out_features, in_features, density, block, seed)
    if mask.float().mean() > 0.65:
        mask.zero_()
    rewrite = compare(Masked(mask, how, bias), torch.randn(*lead, in_features))
    assert rewrite.shape == (out_features, in_features)
    assert rewrite.sparsity == pytest.approx(1 - float(mask.float().mean()), abs=1e-6)


def test_gradients_in_bfloat16():
    model = Masked(keep(40, 33, 0.3), "product", dtype=torch.bfloat16)
    rewrite = compare(model, torch.randn(6, 33).bfloat16(), atol=0.1, rtol=0.05)
    assert (rewrite.format, rewrite.dtype) == ("csr", "bfloat16")


def test_gpt2s_transposed_weight():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 20))
            self.register_buffer("mask", keep(12, 20, 0.4))

        def forward(self, x):
            return x @ (self.weight * self.mask)

    rewrite = compare(Conv1D(), torch.randn(2, 3, 12))
    assert rewrite.shape == (20, 12)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: torch.nn.functional.linear(x, (self.weight * self.mask).bfloat16().float()),
        lambda self, x: torch.nn.functional.linear(x, self.weight.bfloat16() * self.mask.float()),
    ],
    ids=["cast twice", "promoted"],
)
def test_casts_that_change_values_stay_dense(forward):
    class Model(Masked):
        pass

    Model.forward = forward
    _, (rewrite,) = sparsify(
        sc.canonicalize(Model(keep(20, 12, 0.4), "product"), torch.randn(5, 12)), training=True
    )
    assert not rewrite.applied and "is being trained" in rewrite.reason


def test_one_cast_as_under_autocast():
    class Model(Masked):
        def forward(self, x):
            weight = (self.weight * self.mask).bfloat16()
            return torch.nn.functional.linear(x.bfloat16(), weight).float()

    model = Model(keep(20, 12, 0.4), "product", bias=False)
    rewrite = compare(model, torch.randn(5, 12), atol=0.1, rtol=0.05)
    assert (rewrite.format, rewrite.dtype) == ("csr", "bfloat16")


def test_block_masks_use_blocks():
    rewrite = compare(Masked(keep(64, 32, 0.3, block=16), "product"), torch.randn(5, 32))
    assert rewrite.format == "block" and rewrite.pattern == "block 16x1"


def test_masked_weights_get_no_gradient():
    model, x = Masked(keep(20, 12, 0.4), "product"), torch.randn(5, 12)
    gm, _ = sparsify(sc.canonicalize(model, x), training=True)
    gm(x).sum().backward()
    assert not model.weight.grad[~model.mask].any()
    assert model.weight.grad[model.mask].all()


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: torch.nn.functional.linear(x, self.weight),
        lambda self, x: torch.nn.functional.linear(x, torch.where(self.mask, self.weight, 1e-9)),
        lambda self, x: torch.nn.functional.linear(x, self.weight * self.weight.gt(0)),
        lambda self, x: torch.nn.functional.linear(x, self.weight + self.mask * 0),
    ],
    ids=["bare", "where other", "mask of the weight", "sum"],
)
def test_accidental_zeros_stay_dense_in_training(forward):
    class Model(Masked):
        pass

    Model.forward = forward
    model, x = Model(keep(20, 12, 0.3), "product"), torch.randn(5, 12)
    with torch.no_grad():
        model.weight.mul_(model.mask)
    gm, rewrites = sparsify(sc.canonicalize(model, x), training=True)
    assert not gm.meta.get("edits")
    for rewrite in rewrites:
        assert not rewrite.applied
        assert rewrite.reason in (
            "the weight has no zeros",
            "the weight is being trained and nothing in the model keeps its zeros: mask it "
            "(torch.nn.utils.prune), or compile under torch.no_grad() for inference",
        )


def test_a_trained_mask_is_no_structure():
    model, x = Masked(keep(20, 12, 0.4), "product"), torch.randn(5, 12)
    mask = model.mask.float()
    del model.mask
    model.mask = nn.Parameter(mask)
    _, (rewrite,) = sparsify(sc.canonicalize(model, x), training=True)
    assert not rewrite.applied and "is being trained" in rewrite.reason


@given(seed=st.integers(0, 50), block=st.sampled_from([1, 4]))
def test_a_mask_of_equal_density_fits_the_old_layout(seed, block):
    """Other masks with as many weights are packed into the same sizes, however they lie."""
    first = keep(64, 40, 0.3, block, seed)
    order = torch.randperm(64 // block).repeat_interleave(block) * block
    other = first[order + torch.arange(64) % block]
    places = torch.arange(first.numel()).view_as(first)
    old = pack(first.float(), places, torch.float32, group=block)
    new = pack(other.float(), places, torch.float32, group=block, like=old)
    for name, tensor in new.tensors.items():
        assert tensor.shape == old.tensors[name].shape and tensor.dtype == old.tensors[name].dtype


def test_what_16_bit_columns_cannot_name_stays_dense():
    model = nn.Sequential(Masked(torch.rand(70000, 8) < 0.2, "product"))
    _, (rewrite,) = sparsify(sc.canonicalize(model, torch.randn(2, 8)), training=True)
    assert rewrite.reason == "out_features 70000 is above 65535, which 16-bit columns can name"

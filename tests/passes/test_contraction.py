"""Every spelling of a linear layer is found, and gives the same result when it is rewritten."""

import pytest
import torch
from helpers import assert_product, count, prune_layers, pruned, sparsified, sparsify
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import sparse_compiler as sc


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is [in, out]."""

    def __init__(self, out: int, inside: int) -> None:
        super().__init__()
        self.out = out
        self.weight = nn.Parameter(torch.randn(inside, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        size = (*x.size()[:-1], self.out)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Spelled(nn.Module):
    """One static matrix of ``shape`` and a function of the input and of it."""

    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(20))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


def einsum(equation):
    return lambda x, w, b: torch.einsum(equation, x, w)


F = torch.nn.functional

# name: function of (x, weight, bias), shape of the weight, shape of x
SPELLINGS = {
    "linear": (lambda x, w, b: F.linear(x, w), (20, 12), (5, 12)),
    "linear with bias": (F.linear, (20, 12), (5, 12)),
    "linear 1-D": (F.linear, (20, 12), (12,)),
    "linear 3-D": (F.linear, (20, 12), (2, 3, 12)),
    "linear 5-D": (F.linear, (20, 12), (2, 1, 3, 2, 12)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), (12, 20), (5, 12)),
    "addmm transposed": (lambda x, w, b: torch.addmm(b, x, w.t()), (20, 12), (5, 12)),
    "mm": (lambda x, w, b: torch.mm(x, w), (12, 20), (5, 12)),
    "mm left": (lambda x, w, b: torch.mm(w, x), (20, 12), (12, 5)),
    "operator": (lambda x, w, b: x @ w + b, (12, 20), (5, 12)),
    "matmul 1-D": (lambda x, w, b: x @ w, (12, 20), (12,)),
    "matmul 3-D": (lambda x, w, b: x @ w, (12, 20), (2, 3, 12)),
    "matmul 4-D": (lambda x, w, b: x @ w.transpose(0, 1), (20, 12), (2, 3, 4, 12)),
    "matmul left": (lambda x, w, b: w @ x, (20, 12), (12, 5)),
    "matmul left 1-D": (lambda x, w, b: w @ x, (20, 12), (12,)),
    "matmul left 3-D": (lambda x, w, b: w @ x, (20, 12), (2, 12, 5)),
    "mv": (lambda x, w, b: torch.mv(w, x), (20, 12), (12,)),
    "bmm expanded": (
        lambda x, w, b: torch.bmm(x, w.expand(3, 12, 20)),
        (12, 20),
        (3, 5, 12),
    ),
    "bmm expanded left": (
        lambda x, w, b: torch.bmm(w[None].expand(3, 20, 12), x),
        (20, 12),
        (3, 12, 5),
    ),
    "bmm of one": (lambda x, w, b: torch.bmm(x, w), (1, 12, 20), (1, 5, 12)),
    "matmul broadcast": (lambda x, w, b: x @ w[None], (12, 20), (3, 5, 12)),
    "einsum": (einsum("bsk,nk->bsn"), (20, 12), (2, 3, 12)),
    "einsum weight first": (lambda x, w, b: torch.einsum("nk,bk->bn", w, x), (20, 12), (4, 12)),
    "einsum permuted": (einsum("bsk,nk->nbs"), (20, 12), (2, 3, 12)),
    "einsum permuted inside": (einsum("bsk,kn->bns"), (12, 20), (2, 3, 12)),
    "einsum heads": (einsum("bsk,khd->bhsd"), (12, 4, 5), (2, 3, 12)),
    "einsum heads back": (einsum("bhsd,hdn->bsn"), (4, 3, 20), (2, 4, 5, 3)),
    "einsum two dims": (einsum("bij,nij->bn"), (20, 3, 4), (2, 3, 4)),
    "conv1d": (F.conv1d, (20, 12, 1), (2, 12, 7)),
    "conv2d": (F.conv2d, (20, 12, 1, 1), (2, 12, 3, 5)),
    "conv2d no bias": (lambda x, w, b: F.conv2d(x, w), (20, 12, 1, 1), (2, 12, 3, 5)),
    "conv2d stride": (lambda x, w, b: F.conv2d(x, w, b, 2), (20, 12, 1, 1), (2, 12, 5, 6)),
    "conv2d strides": (lambda x, w, b: F.conv2d(x, w, b, (1, 3)), (20, 12, 1, 1), (2, 12, 5, 7)),
    "conv3d": (F.conv3d, (20, 12, 1, 1, 1), (2, 12, 2, 3, 2)),
    "viewed": (lambda x, w, b: F.linear(x, w.view(20, 12)), (240,), (5, 12)),
    "cast": (lambda x, w, b: F.linear(x.double().float(), w.bfloat16().float()), (20, 12), (5, 12)),
    "permuted input": (lambda x, w, b: F.linear(x.permute(1, 0, 2), w, b), (20, 12), (2, 3, 12)),
    "expanded input": (lambda x, w, b: F.linear(x.expand(4, 3, 12), w, b), (20, 12), (1, 3, 12)),
}


def check(model: nn.Module, *inputs: torch.Tensor, layers: int = 1) -> fx.GraphModule:
    """The model with all of its ``layers`` layers made sparse computes what it computed."""
    prune_layers(model, 0.4)
    if isinstance(model, Spelled) and model.weight.dim() == 1:
        model.weight.data.view(-1)[::2] = 0
    expected = model(*inputs)
    gm, rewrites = sparsified(model, *inputs)
    assert [r.reason for r in rewrites if not r.applied] == []
    assert len(rewrites) == layers == count(gm, "sparse_compiler.linear")
    with torch.no_grad():
        actual = gm(*inputs)
    torch.testing.assert_close(actual, expected)
    # What follows may view the result: it has the strides it had.
    assert actual.stride() == expected.stride() or actual.is_contiguous()
    return gm


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling(name):
    function, weight_shape, x_shape = SPELLINGS[name]
    check(Spelled(function, *weight_shape), torch.randn(x_shape))


@pytest.mark.parametrize("name", ["linear 3-D", "addmm", "matmul 4-D", "einsum heads", "conv2d"])
def test_an_empty_batch(name):
    function, weight_shape, (_, *rest) = SPELLINGS[name]
    check(Spelled(function, *weight_shape), torch.randn(0, *rest))


def test_conv1d_of_gpt2():
    check(Conv1D(20, 12), torch.randn(2, 3, 12))


def test_channels_last():
    x = torch.randn(2, 12, 4, 6).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(12, 20, 1, bias=True), nn.ReLU(), nn.Conv2d(20, 8, 1, stride=2))
    check(model.to(memory_format=torch.channels_last), x, layers=2)


def test_a_view_after_a_channels_last_convolution_is_still_legal():
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(12, 20, 1)

        def forward(self, x):
            return self.conv(x).permute(0, 2, 3, 1).view(-1, 20)

    x = torch.randn(2, 12, 4, 6).to(memory_format=torch.channels_last)
    check(Viewed(), x)


def test_tied_embeddings():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 16)
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    gm = check(Tied(), torch.randint(0, 30, (2, 5)))
    assert count(gm, "embedding") == 1


def test_one_weight_in_two_layers():
    layer = nn.Linear(12, 12)
    check(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 12), layers=2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (7, 12), (2, 3, 12), (0, 12), (2, 0, 3, 12)])
def test_leading_dimensions(shape, bias):
    check(nn.Sequential(nn.Linear(12, 20, bias=bias)), torch.randn(shape))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(12, 5).t(),
        lambda: torch.randn(5, 24)[:, ::2],
        lambda: torch.randn(1, 12).expand(5, 12),
        lambda: torch.randn(5, 16)[:, 4:],
        lambda: torch.randn(5, 1).expand(5, 12),
    ],
)
def test_inputs_that_are_not_contiguous(make):
    check(nn.Sequential(nn.Linear(12, 20)), make())


@pytest.mark.parametrize("name", ["linear 3-D", "matmul 3-D", "einsum permuted", "conv2d stride"])
def test_a_dynamic_batch(name):
    function, weight_shape, x_shape = SPELLINGS[name]
    model = prune_layers(Spelled(function, *weight_shape), 0.4).eval()
    dynamic = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(
        model, (torch.randn(x_shape),), dynamic_shapes=({**dynamic},), strict=False
    )
    with torch.no_grad():
        gm, (rewrite,) = sparsify(sc.canonicalize(program))
    assert rewrite.applied and len(rewrite.rows) > 1
    for batch in (2, 3, 11):
        x = torch.randn(batch, *x_shape[1:])
        torch.testing.assert_close(gm(x), model(x))


def test_several_dynamic_dimensions():
    model = prune_layers(nn.Sequential(nn.Linear(12, 20)), 0.4).eval()
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=64)}
    program = torch.export.export(
        model, (torch.randn(3, 4, 12),), dynamic_shapes=(dims,), strict=False
    )
    with torch.no_grad():
        gm, (rewrite,) = sparsify(sc.canonicalize(program))
    assert rewrite.applied
    for shape in ((2, 7, 12), (5, 2, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(gm(x), model(x))


class Both(nn.Module):
    """A product of two parameters, added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return x + self.a @ self.b


# What is no linear layer with one static side stays as it is.
REFUSED = {
    "batched weight": (Spelled(lambda x, w, b: torch.bmm(x, w), 3, 12, 20), (3, 5, 12)),
    "batched weight, matmul": (Spelled(lambda x, w, b: x @ w, 3, 12, 20), (3, 5, 12)),
    "batched einsum": (Spelled(einsum("bmk,bkn->bmn"), 3, 12, 20), (3, 5, 12)),
    "einsum of three": (
        Spelled(lambda x, w, b: torch.einsum("bk,nk,n->bn", x, w, b), 20, 12),
        (5, 12),
    ),
    "einsum diagonal": (Spelled(einsum("bk,kk->bk"), 12, 12), (5, 12)),
    "einsum summed out": (Spelled(einsum("bsk,nk->bn"), 20, 12), (2, 3, 12)),
    "einsum outer": (Spelled(einsum("b,nk->bnk"), 20, 12), (3,)),
    "two inputs": (Spelled(lambda x, w, b: x @ x.t(), 2, 2), (5, 12)),
    "addmm scaled": (Spelled(lambda x, w, b: torch.addmm(b, x, w, alpha=2), 12, 20), (5, 12)),
    "conv 3x3": (Spelled(F.conv2d, 20, 12, 3, 3), (2, 12, 5, 5)),
    "conv padded": (Spelled(lambda x, w, b: F.conv2d(x, w, b, 1, 1), 20, 12, 1, 1), (2, 12, 5, 5)),
    "conv groups": (
        Spelled(lambda x, w, b: F.conv2d(x, w, b, groups=2), 20, 6, 1, 1),
        (2, 12, 5, 5),
    ),
    "both static": (Both(), (6, 6)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_linear_layer_is_left_alone(name):
    model, shape = REFUSED[name]
    x = torch.randn(shape)
    gm, rewrites = sparsified(prune_layers(model, 0.4), x)
    assert rewrites == [] and not gm.meta.get("edits")
    torch.testing.assert_close(gm(x), model(x))


@settings(max_examples=60)
@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    in_features=st.integers(1, 40),
    out_features=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.1, 0.4]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    block=st.sampled_from([(1, 1), (4, 4), (8, 1), (16, 1)]),
    seed=st.integers(0, 100),
)
def test_any_linear_layer(lead, in_features, out_features, density, bias, dtype, block, seed):
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias))
    weight = pruned(out_features, in_features, density, block=block, seed=seed)
    model[0].weight.data.copy_(weight)
    model.to(dtype)
    x = torch.randn(*lead, in_features).to(dtype)
    gm, (rewrite,) = sparsified(model, x)
    if not rewrite.applied:
        assert rewrite.sparsity < 0.3
    with torch.no_grad():
        y = gm(x)
    if dtype is torch.float32:
        assert_product(y, x, model[0].weight, model[0].bias)
    else:
        torch.testing.assert_close(y, model(x), atol=0.05, rtol=0.02)

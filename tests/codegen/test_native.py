"""The C++ kernels without Inductor, against float64, for every instruction set of this machine."""

import contextlib

import pytest
import torch
from helpers import assert_product, pruned
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_compiler.codegen import cpp, inductor, native
from sparse_compiler.formats import bitmap, csr

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 2, 5, 9, 17, 33, 49, 64, 72, 130]
FORMATS = ["csr", "block4", "block8", "block16", "bitmap"]
# Inductor's setting that leaves vectors of this many bits.
SIMDLEN = {512: 512, 256: 256, 0: 1}


@contextlib.contextmanager
def forced(isa: int):
    """Kernels for this instruction set; skips where the machine does not have it."""
    if isa > inductor.vector_isa():
        pytest.skip(f"this machine has no vectors of {isa} bits")
    with inductor.patched(**{"cpp.simdlen": SIMDLEN[isa]}):
        assert inductor.vector_isa() == isa
        yield


def multiply(name: str, x: torch.Tensor, weight: torch.Tensor, k_block: int | None = None):
    """x times the weight packed as ``name``, by the kernel itself."""
    out = x.new_full((x.shape[0], weight.shape[0]), 77.0)
    if name == "bitmap":
        layout, values = bitmap.pack(weight)
        native.linear("linear_bitmap", x, (values, layout.bits, layout.starts), out)
        return out
    group = int(name.removeprefix("block")) if name != "csr" else 1
    blocked, values = csr.pack(weight, group=group, k_block=k_block)
    packed = (values, blocked.columns, blocked.segments)
    native.linear("linear_csr", x, packed, out, group=group, k_block=blocked.k_block)
    return out


SPECIAL = st.sampled_from(["nothing", "x nan", "x inf", "weight nan", "weight inf", "both"])


def spoil(special: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Put NaN and infinities at random places."""
    if not x.numel() or not weight.numel():
        return

    def put(tensor: torch.Tensor, value: float) -> None:
        tensor.view(-1)[torch.randint(tensor.numel(), (2,))] = value

    if special in ("x nan", "both"):
        put(x, float("nan"))
    if special in ("x inf", "both"):
        put(x, float("inf"))
        put(x, -float("inf"))
    if special in ("weight nan", "both"):
        put(weight, float("nan"))
    if special in ("weight inf", "both"):
        put(weight, float("inf"))


def check(name, rows, out_features, in_features, density, dtype, special, k_block, seed):
    torch.manual_seed(seed)
    weight = pruned(out_features, in_features, density, dtype, seed=seed)
    weight[weight == 0] *= -1  # every other zero is a negative one
    x = torch.randn(rows, in_features).to(dtype)
    spoil(special, x, weight)
    assert_product(multiply(name, x, weight, k_block), x, weight)


problem = given(
    rows=st.sampled_from(ROWS),
    out_features=st.sampled_from([1, 3, 16, 63, 64, 65, 130]),
    in_features=st.sampled_from([1, 2, 3, 31, 64, 65, 127, 128, 200, 333]),
    density=st.sampled_from([0.0, 0.03, 0.2, 0.5, 1.0]),
    special=SPECIAL,
    k_block=st.sampled_from([None, 1, 16, 64]),
    seed=st.integers(0, 2**16),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60)
@problem
def test_linear(name, dtype, rows, out_features, in_features, density, special, k_block, seed):
    check(name, rows, out_features, in_features, density, dtype, special, k_block, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["csr", "bitmap"])
@pytest.mark.parametrize("isa", [256, 0])
@settings(max_examples=40)
@problem
def test_linear_with_narrower_vectors(
    isa, name, dtype, rows, out_features, in_features, density, special, k_block, seed
):
    with forced(isa):
        check(name, rows, out_features, in_features, density, dtype, special, k_block, seed)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [512, 256, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=600)
@problem
def test_linear_thoroughly(
    isa, name, dtype, rows, out_features, in_features, density, special, k_block, seed
):
    with forced(isa):
        check(name, rows, out_features, in_features, density, dtype, special, k_block, seed)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows(name, dtype):
    weight = pruned(67, 131, 0.3, dtype)
    for rows in (*range(20), 31, 32, 33, 47, 48, 49, 63, 64, 65, 72, 80, 96, 97, 128, 129, 150):
        x = torch.randn(rows, 131).to(dtype)
        assert_product(multiply(name, x, weight), x, weight)


@pytest.mark.parametrize("name", ["csr", "bitmap", "block16"])
def test_a_tall_weight(name):
    """From 1024 outputs on n-blocks have 128 rows."""
    weight = pruned(1100, 70, 0.3)
    for rows in (1, 5, 70):
        x = torch.randn(rows, 70)
        assert_product(multiply(name, x, weight), x, weight)


@pytest.mark.parametrize("name", ["csr", "bitmap", "block16"])
def test_a_wide_weight(name):
    """Columns beyond 2**15 are read as unsigned."""
    weight = pruned(70, 65535, 0.01)
    weight[69, 65534] = 1.0
    for rows in (1, 5, 70):
        x = torch.randn(rows, 65535)
        assert_product(multiply(name, x, weight), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    rows=st.integers(1, 4),
    out_features=st.sampled_from([1, 3, 64, 65, 130]),
    in_features=st.sampled_from([1, 2, 31, 65, 300]),
    special=st.sampled_from([None, float("nan"), float("inf")]),
    seed=st.integers(0, 2**16),
)
def test_a_dense_weight_streamed(dtype, rows, out_features, in_features, special, seed):
    torch.manual_seed(seed)
    weight = torch.randn(out_features, in_features).to(dtype)
    x = torch.randn(rows, in_features).to(dtype)
    if special is not None:
        x[-1, -1] = special
    y = torch.empty(rows, out_features, dtype=dtype)
    native.linear("linear_dense", x, (weight,), y)
    assert_product(y, x, weight)


def sampled(grad: torch.Tensor, x: torch.Tensor, layout: csr.CsrLayout) -> torch.Tensor:
    per_unit = 4 // x.dtype.itemsize
    out = torch.zeros(layout.columns.numel() * layout.group * per_unit)
    native.sampled(
        grad,
        x,
        layout.columns,
        layout.segments,
        out,
        group=layout.group,
        k_block=layout.k_block,
    )
    return out


def check_sampled(rows, out_features, in_features, density, dtype, group, seed):
    torch.manual_seed(seed)
    weight = pruned(out_features, in_features, density, dtype, seed=seed)
    layout, _ = csr.pack(weight, group=group)
    grad = torch.randn(rows, out_features).to(dtype)
    x = torch.randn(rows, in_features).to(dtype)
    found = sampled(grad, x, layout)
    index = layout.element_index()
    inside = index < weight.numel()
    expected = (grad.double().t() @ x.double()).flatten()[index[inside]]
    size = (grad.double().abs().t() @ x.double().abs()).flatten()[index[inside]]
    error = (found[inside].double() - expected).abs()
    assert bool((error <= size * (rows + 2) * 2.0**-24 + 1e-30).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 8])
@given(
    rows=st.sampled_from(ROWS),
    out_features=st.sampled_from([1, 3, 64, 65, 130]),
    in_features=st.sampled_from([1, 2, 31, 65, 200]),
    density=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
    seed=st.integers(0, 2**16),
)
@example(rows=0, out_features=3, in_features=5, density=0.4, seed=0)
def test_gradient_of_kept_weights(dtype, group, rows, out_features, in_features, density, seed):
    check_sampled(rows, out_features, in_features, density, dtype, group, seed)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [512, 256, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 4, 8, 16])
def test_gradient_of_kept_weights_thoroughly(isa, dtype, group):
    with forced(isa):
        for seed, rows in enumerate(ROWS):
            check_sampled(rows, 67, 133, 0.3, dtype, group, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    size=st.sampled_from([1, 5, 4096, 9001]),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    filling=st.sampled_from([0, 7]),
    seed=st.integers(0, 2**16),
)
def test_values_put_into_a_dense_gradient(dtype, size, density, filling, seed):
    generator = torch.Generator().manual_seed(seed)
    places = (torch.rand(size, generator=generator) < density).nonzero().flatten()
    source = torch.randperm(len(places), generator=generator)
    values = torch.randn(len(places) + 1, generator=generator).to(dtype)
    expected = torch.zeros(size, dtype=dtype)
    expected[places] = values[source]
    padded = [
        torch.cat([t, t.new_full((filling,), end)]) for t, end in ((places, size), (source, 0))
    ]
    found = torch.full((size,), float("nan")).to(dtype)
    native.put(values, padded[0].int(), padded[1].int(), found)
    assert torch.equal(found, expected)
    # And back, in the order they came from.
    index = torch.full((len(values) + filling,), size)
    index[source] = places
    again = torch.full((len(index),), float("nan")).to(dtype)
    native.take(found, index.int(), again)
    kept = index < size
    assert torch.equal(again[kept], values[: len(kept)][kept[: len(values)]])
    assert bool((again[~kept] == 0).all())


def test_the_instruction_set_is_in_the_source_and_in_the_cache_key():
    sources = []
    for isa in (512, 256, 0):
        if isa <= inductor.vector_isa():
            with forced(isa):
                library = native._library("linear_csr", torch.float32, isa, n_block=64)
                assert library is native._library("linear_csr", torch.float32, isa, n_block=64)
                sources.append(library)
    assert len({id(library) for library in sources}) == len(sources)


@pytest.mark.parametrize("name", ["linear_csr", "linear_bitmap", "sampled_csr", "take", "put"])
def test_headers_stand_alone(name):
    """Nothing in a kernel's source includes a file of this package."""
    text = cpp.headers(name)
    assert '#include "' not in text
    assert len(cpp.digest()) == 16

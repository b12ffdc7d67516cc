"""Masked attention without Inductor, against float64 softmax over every pair of a query and a key.

The scores are written by hand where the compiler would generate them. All see a key k of a query q
if first[b] <= k <= q + shift and q + shift - k < window[h]; they differ in what else they see.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_compiler.codegen import cpp, inductor

HEADERS = ("vec", "transpose", "math", "attention_math", "attention_forward", "attention_decode")
BLOCK, SCALE, CAP = 64, 0.25, 3.0
INF, NAN = float("inf"), float("nan")
# Inductor's setting that leaves vectors of this many bits.
SIMDLEN = {512: 512, 256: 256, 0: 1}
DTYPES = [torch.float32, torch.bfloat16]

SOURCE = """
using V = sc::vf<sc::VL>;

// window: masked with -inf; filled: with -1e9; added: with a load of 0 or -1e4 that is added;
// capped: a soft-cap and a slope of each head, masked with -inf.
enum Mode { WINDOW, FILLED, ADDED, CAPPED };

template <int MODE>
struct Score {
  static constexpr bool trivial = MODE != CAPPED;
  static constexpr float scale = SCALEf;
  static constexpr bool finite_fill = MODE == FILLED || MODE == ADDED;
  static constexpr bool needs_bound = MODE == ADDED;
  const int64_t *window, *first;
  int64_t shift;

  template <bool FULL>
  V forward(V s, int64_t b, int64_t h, int64_t q, int64_t k, int count) const {
    V x = s * scale;
    if (MODE == CAPPED) {
      for (int i = 0; i < sc::VL; ++i)
        x[i] = std::tanh(x[i] * (1 / CAPf)) * CAPf - 0.01f * float(h * (q + shift - k - i));
    }
    if (FULL) return x;
    sc::vu<sc::VL> seen = {};
    for (int i = 0; i < count; ++i)
      seen[i] = -int(first[b] <= k + i && k + i <= q + shift && q + shift - k - i < window[h]);
    if (MODE == ADDED) return x + (seen ? V{} : V{} - 1e4f);
    return seen ? x : V{} + (MODE == FILLED ? -1e9f : -INFINITY);
  }
};

struct Call {
  sc::Attention a;
  const int64_t *window, *first;
  int64_t shift;
  int threads;
};

template <int D, int DV, int MODE>
void attend(const Call& c, bool decode) {
  const Score<MODE> score{c.window, c.first, c.shift};
  if (decode)
    sc::attention_decode<E, D, DV>(c.a, score, c.threads);
  else
    sc::attention_forward<E, D, DV>(c.a, score, c.threads);
}

extern "C" void run(const int64_t* n, void* const* p, const float* f, int combination, int decode) {
  Call c{};
  sc::Attention& a = c.a;
  a.B = n[0]; a.H = n[1]; a.HKV = n[2]; a.M = n[3]; a.N = n[4];
  for (int i = 0; i < 3; ++i) {
    a.q_stride[i] = n[5 + i];
    a.k_stride[i] = n[8 + i];
    a.v_stride[i] = n[11 + i];
    a.out_stride[i] = n[14 + i];
    a.sink_stride[i] = n[17 + i];
  }
  a.kinds_stride[0] = n[20]; a.kinds_stride[1] = n[21];
  a.seed = uint64_t(n[22]); c.shift = n[23]; c.threads = int(n[24]);
  a.q = p[0]; a.k = p[1]; a.v = p[2]; a.out = p[3];
  a.lse = (float*)p[4]; a.kinds = (const uint8_t*)p[5]; a.sink = (const float*)p[6];
  c.window = (const int64_t*)p[7]; c.first = (const int64_t*)p[8];
  a.empty = f[0]; a.dropout = f[1];
  switch (combination) {
COMBINATIONS
  }
}

extern "C" void exponentials(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += sc::VL)
    sc::store<sc::VL>(y + i, sc::exp<sc::VL>(sc::load<sc::VL>(x + i)));
}

// c [rows][3 vectors] += a b, a given by its strides; the padding of the last vector is b's.
extern "C" void product(const float* a, int64_t a_row, int64_t a_col, const float* b, float* c,
                        int rows, int depth, int accumulate) {
  sc::gemm<3>(a, a_row, a_col, b, 3 * sc::VL, c, 3 * sc::VL, rows, depth, accumulate);
}
extern "C" int width() { return 3 * sc::VL; }
"""

# mode, D, DV: all modes at a size of whole vectors, and sizes that are not.
COMBINATIONS = [
    ("window", 64, 64),
    ("window", 20, 36),
    ("filled", 16, 32),
    ("added", 7, 5),
    ("capped", 32, 16),
]


@contextlib.contextmanager
def forced(isa: int):
    """Kernels for this instruction set; skips where the machine does not have it."""
    if isa > inductor.vector_isa():
        pytest.skip(f"this machine has no vectors of {isa} bits")
    with inductor.patched(**{"cpp.simdlen": SIMDLEN[isa]}):
        assert inductor.vector_isa() == isa
        yield


@functools.cache
def library(dtype: torch.dtype, isa: int):
    directory = Path(cpp.__file__).parent
    cases = [
        f"    case {i}: return attend<{d}, {dv}, {mode.upper()}>(c, decode);"
        for i, (mode, d, dv) in enumerate(COMBINATIONS)
    ]
    text = [
        "#include <algorithm>",
        f"#define SC_ISA {isa}",
        *((directory / f"{name}.h").read_text() for name in HEADERS),
        f"using E = sc::{'F32' if dtype is torch.float32 else 'BF16'};",
        SOURCE.replace("SCALEf", f"{SCALE}f")
        .replace("CAPf", f"{CAP}f")
        .replace("COMBINATIONS", "\n".join(cases)),
    ]
    return inductor.load_library("\n".join(text))


@dataclasses.dataclass
class Problem:
    """Inputs of one call and what the score is made of."""

    q: torch.Tensor  # [B, H, M, D]
    k: torch.Tensor  # [B, HKV, N, D]
    v: torch.Tensor  # [B, HKV, N, DV]
    mode: str = "window"
    window: torch.Tensor | None = None  # int64 [H]
    first: torch.Tensor | None = None  # int64 [B]
    shift: int = 0
    sink: torch.Tensor | None = None  # float [B, H, M] or broadcast to it
    empty: float = 0.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self):
        (self.batch, self.heads, self.queries, self.d), self.keys = self.q.shape, self.k.shape[2]
        if self.window is None:
            self.window = torch.full((self.heads,), 2**40)
        if self.first is None:
            self.first = torch.zeros(self.batch, dtype=torch.int64)

    def seen(self) -> torch.Tensor:
        """Which keys queries see: bool [B, H, M, N]."""
        q = torch.arange(self.queries)[:, None] + self.shift
        k = torch.arange(self.keys)
        near = (k <= q) & (q - k < self.window[:, None, None])
        return near & (self.first[:, None, None, None] <= k)

    def kinds(self, spoil: float = 0.0) -> torch.Tensor:
        """The map; a share ``spoil`` of its tiles is said to be partial although it need not be."""
        seen = self.seen()
        # What no score depends on is broadcast.
        if bool((self.first == self.first[:1]).all()):
            seen = seen[:1]
        if bool((self.window == self.window[:1]).all()):
            seen = seen[:, :1]
        high, wide = (math.ceil(size / BLOCK) for size in seen.shape[2:])
        missing = (0, wide * BLOCK - self.keys, 0, high * BLOCK - self.queries)

        def pooled(value: bool) -> torch.Tensor:
            whole = torch.nn.functional.pad(seen, missing, value=value)
            tiles = whole.reshape(*seen.shape[:2], high, BLOCK, wide, BLOCK)
            return tiles.all(-1).all(3) if value else tiles.any(-1).any(3)

        kinds = torch.where(pooled(True), 2, torch.where(pooled(False), 1, 0)).to(torch.uint8)
        return torch.where(torch.rand(kinds.shape) < spoil, 1, kinds).to(torch.uint8).contiguous()

    def weights(self) -> tuple[torch.Tensor, ...]:
        """Weights [B, H, M, N], log-sum-exps [B, H, M] and the largest |score|, in float64."""
        k = self.k.double().repeat_interleave(self.heads // self.k.shape[1], 1)
        scores = (self.q.double() @ k.mT) * SCALE
        seen, size = self.seen(), self.q.double().abs() @ k.abs().mT * SCALE
        if self.mode == "capped":
            distance = torch.arange(self.queries)[:, None] + self.shift - torch.arange(self.keys)
            slopes = torch.arange(self.heads)[:, None, None] * 0.01 * distance
            scores = (scores / CAP).tanh() * CAP - slopes
            size = size + slopes.abs()
        if self.mode == "added":
            fill = torch.where(seen, 0.0, -1e4)
            scores, size = scores + fill, size - fill
        else:
            scores = scores.where(seen, -1e9 if self.mode == "filled" else -INF)
        columns = scores
        if self.sink is not None:
            sink = self.sink.double().expand(scores.shape[:3])
            columns = torch.cat([scores, sink.unsqueeze(-1)], -1)
        lse = columns.logsumexp(-1)
        weights = (scores - lse.unsqueeze(-1)).exp()
        # Float32 has no weights smaller than this, which matters beside infinite values.
        weights = weights.where((weights > 1e-45) | weights.isnan(), 0.0)
        nothing = (lse == -INF).unsqueeze(-1)
        counts = size.isfinite() & (weights > 0)
        largest = size.where(counts, 0.0).amax(-1) if self.keys else lse * 0
        return weights.masked_fill(nothing, 0.0), lse, largest

    def expected(self) -> tuple[torch.Tensor, ...]:
        """The result, its bound of error, the log-sum-exps and theirs, in float64."""
        weights, lse, largest = self.weights()
        v = self.v.double().repeat_interleave(self.heads // self.v.shape[1], 1)
        if self.dropout:
            kept = keeps(self.seed, tuple(weights.shape), self.dropout)
            weights = weights * kept / max(1 - self.dropout, 1e-300)
        out = weights @ v
        out = torch.where((lse == -INF).unsqueeze(-1), out + self.empty, out)
        # Scores are sums of D products; weights and values are rounded, summed and divided.
        relative = (2 * (self.d + 8) * largest + self.keys + 16) * 2.0**-24
        if self.v.dtype == torch.bfloat16:
            relative = relative + 2.0**-7
        finite = torch.nan_to_num(v, 0, 0, 0).abs()
        bound = relative.unsqueeze(-1) * (weights.nan_to_num() @ finite) + 1e-30
        exact = (2 * (self.d + 8) * largest + self.keys + 16 + lse.abs()) * 2.0**-23
        return out, bound, lse, exact


def mix(x: torch.Tensor) -> torch.Tensor:
    low = 2**32 - 1
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & low
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & low
    return x ^ (x >> 16)


def keeps(seed: int, shape: tuple[int, ...], probability: float) -> torch.Tensor:
    """Which weights [B, H, M, N] are kept, by the formula in attention_math.h."""
    batch, heads, queries, keys = shape
    low = 2**32 - 1
    start = mix(mix(torch.tensor(seed & low)) ^ (seed >> 32 & low))
    row = mix(start ^ torch.arange(batch * heads)).reshape(batch, heads, 1)
    row = mix(row ^ torch.arange(queries)).unsqueeze(-1)
    key = (torch.arange(keys) * 0x9E3779B1) & low
    threshold = min(int(torch.tensor(probability, dtype=torch.float32).double() * 2**32), low)
    return mix(row ^ key) >= threshold


def run(problem: Problem, kinds: torch.Tensor | None = None, *, decode: bool, threads: int = 1):
    """The result [B, H, M, DV] and log-sum-exps [B, H, M] of a kernel."""
    p, dv = problem, problem.v.shape[-1]
    out = torch.full((p.batch, p.queries, p.heads, dv), 77.0, dtype=p.q.dtype).transpose(1, 2)
    lse = torch.full((p.batch, p.heads, p.queries), 77.0)
    sink = None if p.sink is None else p.sink.float().expand(lse.shape)
    kinds = p.kinds() if kinds is None else kinds
    numbers = [
        *(p.batch, p.heads, p.k.shape[1], p.queries, p.keys),
        *(stride for t in (p.q, p.k, p.v, out) for stride in t.stride()[:3]),
        *((0, 0, 0) if sink is None else sink.stride()),
        *(0 if kinds.shape[i] == 1 else kinds.stride(i) for i in (0, 1)),
        *(p.seed, p.shift, threads),
    ]
    tensors = [p.q, p.k, p.v, out, lse, kinds, sink, p.window, p.first]
    library(p.q.dtype, inductor.vector_isa()).run(
        (ctypes.c_int64 * len(numbers))(*numbers),
        (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors)),
        (ctypes.c_float * 2)(p.empty, p.dropout),
        ctypes.c_int(COMBINATIONS.index((p.mode, p.d, dv))),
        ctypes.c_int(decode),
    )
    return out, lse


def assert_right(problem: Problem, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    out, lse = found
    expected, bound, expected_lse, lse_bound = problem.expected()
    finite = expected.isfinite()
    assert torch.equal(out.isfinite(), finite), "finite where it should not be, or the other way"
    assert torch.equal(out.isnan(), expected.isnan())
    infinite = ~finite & ~expected.isnan()
    assert torch.equal(out[infinite].double(), expected[infinite])
    error = ((out.double() - expected).abs() / bound)[finite]
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= 1, f"the error is {worst:.2f} times the bound"
    known = expected_lse.isfinite() & ~lse.isnan()
    assert bool(((lse.double() - expected_lse).abs() <= lse_bound)[known].all())
    assert torch.equal(lse == -INF, expected_lse == -INF)


def made(mode, d, dv, dtype, sizes, *, layout="whole", seed=0, **more) -> Problem:
    """Random inputs; ``sizes`` are batch, heads of queries, heads of keys, queries, keys."""
    torch.manual_seed(seed)
    batch, heads, key_heads, queries, keys = sizes

    def tensor(heads: int, rows: int, columns: int) -> torch.Tensor:
        if layout == "turned":
            return torch.randn(batch, rows, heads, columns).to(dtype).transpose(1, 2)
        if layout == "padded":
            return torch.randn(batch, heads, rows, columns + 3).to(dtype)[..., 1 : columns + 1]
        if layout == "shared":  # one batch, repeated
            return torch.randn(1, heads, rows, columns).to(dtype).expand(batch, -1, -1, -1)
        return torch.randn(batch, heads, rows, columns).to(dtype)

    q = tensor(heads, queries, d)
    return Problem(q, tensor(key_heads, keys, d), tensor(key_heads, keys, dv), mode, **more)


combinations = pytest.mark.parametrize(("mode", "d", "dv"), COMBINATIONS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
problem = given(
    heads=st.sampled_from([(1, 1, 1), (2, 2, 2), (2, 4, 2), (1, 6, 1)]),
    queries=st.sampled_from([1, 7, 16, 17, 63, 64, 65, 130]),
    keys=st.sampled_from([1, 5, 16, 63, 64, 65, 130, 600]),
    layout=st.sampled_from(["whole", "turned", "padded", "shared"]),
    window=st.sampled_from([None, "one", "many"]),
    padding=st.booleans(),
    shift=st.sampled_from([0, "last", -20]),
    sink=st.sampled_from([None, "head", "row", -INF]),
    empty=st.sampled_from([0.0, NAN]),
    dropout=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    spoil=st.sampled_from([0.0, 0.5, 1.0]),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**40),
)


def check(
    mode, d, dv, dtype, decode, *, heads, queries, keys, layout, window, padding, shift, sink,
    empty, dropout, spoil, threads, seed,
):  # fmt: skip
    batch, query_heads, _ = heads
    torch.manual_seed(seed)
    sinks = {
        None: None,
        "head": torch.randn(query_heads, 1) * 3,
        "row": torch.randn(batch, query_heads, queries) * 3,
        -INF: torch.full((query_heads, 1), -INF),
    }
    windows = {
        None: None,
        "one": torch.full((query_heads,), 70),
        "many": torch.randint(1, 200, (query_heads,)),
    }
    p = made(
        mode,
        d,
        dv,
        dtype,
        (*heads, queries, keys),
        layout=layout,
        seed=seed,
        window=windows[window],
        first=torch.randint(0, keys + 2, (batch,)) if padding else None,
        shift=keys - queries if shift == "last" else shift,
        sink=sinks[sink],
        empty=empty,
        dropout=dropout,
    )
    p.seed = seed
    kinds = p.kinds(spoil)
    found = run(p, kinds, decode=decode, threads=threads)
    assert_right(p, found)
    again = run(p, kinds, decode=decode, threads=3 - threads)
    assert all(
        torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(found, again, strict=True)
    )


@dtypes
@combinations
@settings(max_examples=20)
@problem
def test_many_queries(mode, d, dv, dtype, **drawn):
    check(mode, d, dv, dtype, False, **drawn)


@dtypes
@combinations
@settings(max_examples=20)
@problem
def test_few_queries(mode, d, dv, dtype, queries, **drawn):
    check(mode, d, dv, dtype, True, queries=queries % 8 + 1, **drawn)


@pytest.mark.slow
@pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
@pytest.mark.parametrize("isa", [512, 256, 0])
@dtypes
@combinations
@settings(max_examples=200)
@problem
def test_thoroughly(mode, d, dv, dtype, isa, decode, queries, **drawn):
    with forced(isa):
        check(mode, d, dv, dtype, decode, queries=queries % 8 + 1 if decode else queries, **drawn)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [256, 0])
@dtypes
def test_narrower_vectors_agree(isa, dtype):
    p = made("window", 64, 64, dtype, (2, 4, 2, 130, 600), shift=470)
    found = [run(p, decode=False)[0]]
    with forced(isa):
        found.append(run(p, decode=False)[0])
    # In bfloat16 the weights are rounded where a processor multiplies bfloat16, else they are not:
    # a difference of 2^-9 of the values' size, whatever size the sum has.
    rtol, atol = (2e-2, float(p.v.abs().max()) * 2**-9) if dtype is torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(*found, rtol=rtol, atol=atol)
    assert found[0].dtype == dtype


@dtypes
@pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
@pytest.mark.parametrize("sizes", [(1, 2, 1, 0, 5), (1, 2, 1, 5, 0), (0, 2, 1, 5, 5)])
@pytest.mark.parametrize("mode", ["window", "added"])
def test_nothing_to_attend_to(mode, sizes, decode, dtype):
    d, dv = (64, 64) if mode == "window" else (7, 5)
    p = made(mode, d, dv, dtype, sizes, empty=NAN)
    out, lse = run(p, decode=decode)
    assert out.shape == (sizes[0], 2, sizes[3], dv)
    assert bool(out.isnan().all()) and bool((lse == -INF).all())


@dtypes
@pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
def test_fully_masked_rows_of_finite_fills_are_averages(decode, dtype):
    """All keys of the first rows are filled: eager averages every value."""
    queries = 5 if decode else 100
    p = made("filled", 16, 32, dtype, (2, 2, 1, queries, 700), first=torch.tensor([690, 3]))
    p.shift = 690 - queries // 2
    found = run(p, decode=decode)
    assert_right(p, found)
    average = p.v[0, 0].double().mean(0)
    assert bool((found[0][0, 0, 0].double() - average).abs().max() < 0.02)


@dtypes
@pytest.mark.parametrize("decode", [False, True], ids=["forward", "decode"])
def test_products_beyond_the_bound_beat_an_added_fill(decode, dtype):
    """s + -1e4 is the largest score where s is larger still: such tiles cannot be skipped."""
    p = made("added", 7, 5, dtype, (1, 2, 2, 6 if decode else 100, 300), shift=40)
    p.q[0, 1, 3] = 100.0
    p.k[0, 1, 280] = 800.0
    found = run(p, decode=decode)
    assert_right(p, found)
    assert torch.equal(found[0][0, 1, 3], p.v[0, 1, 280])


@dtypes
@pytest.mark.parametrize("mode", ["window", "filled", "capped"])
@given(
    where=st.sampled_from(["q", "k", "v"]),
    value=st.sampled_from([NAN, INF, -INF]),
    position=st.integers(0, 299),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
@example(where="v", value=NAN, position=299, seed=0)
def test_what_is_not_finite_spreads_as_in_dense_attention(
    mode, where, value, position, seed, dtype
):
    """Also from keys and values that nobody sees: 0 times NaN is NaN."""
    d, dv = next((d, dv) for name, d, dv in COMBINATIONS if name == mode)
    p = made(mode, d, dv, dtype, (1, 4, 2, 200, 300), seed=seed, window=torch.full((4,), 50))
    tensor = getattr(p, where)
    tensor[0, 1, position % tensor.shape[2], seed % tensor.shape[3]] = value
    assert_right(p, run(p, decode=False))


@dtypes
@pytest.mark.parametrize("key_heads", [1, 2, 16])
def test_decode_is_cut_into_shares(key_heads, dtype):
    """Long caches; one query with 1, 8 and 16 rows to a head of keys; a window and padding."""
    p = made("window", 64, 64, dtype, (1, 16, key_heads, 1, 2200), shift=2199)
    for window in (p.window, torch.full((16,), 1500), torch.arange(16) * 130 + 1):
        for first in (0, 1900):
            p.window, p.first = window, torch.tensor([first])
            found = [run(p, decode=True, threads=threads) for threads in (1, 2)]
            assert_right(p, found[0])
            assert torch.equal(found[0][0], found[1][0])


def test_dropout_keeps_its_share():
    kept = keeps(12345678901, (2, 3, 100, 1000), 0.3).double()
    assert abs(float(kept.mean()) - 0.7) < 0.003
    # Neighbouring rows and keys are independent.
    centred = kept - 0.7
    for shifted in (centred.roll(1, -1), centred.roll(1, -2), centred.roll(1, 1)):
        assert abs(float((centred * shifted).mean())) < 0.003


@pytest.mark.parametrize(
    "isa", [512, pytest.param(256, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow)]
)
def test_exp(isa):
    steps = torch.arange(-(2**31), 2**31 - 1, 40009, dtype=torch.int64).to(torch.int32)
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, -103.9, -104.0, -1e30, 88.7, 88.8])
    x = torch.cat([steps.view(torch.float32), torch.linspace(-110, 90, 100000), special])
    x = torch.cat([x, x.new_zeros(-len(x) % 16)])
    y = torch.empty_like(x)
    with forced(isa):
        library(torch.float32, isa).exponentials(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(len(x))
        )
    expected = x.double().exp()
    assert torch.equal(y.isnan(), x.isnan())
    assert bool((y[x < -104] == 0).all()) and bool((y[x > 88.8] == INF).all())
    inside = (x >= -104) & (x <= 88.7)
    ulp = torch.maximum(2.0 ** (expected.log2().floor() - 23), torch.tensor(2.0**-149))
    assert bool(((y.double() - expected).abs() <= 2 * ulp)[inside].all())


@given(rows=st.integers(1, 40), depth=st.integers(0, 70), turned=st.booleans(), add=st.booleans())
@settings(max_examples=50)
def test_products(rows, depth, turned, add):
    kernels = library(torch.float32, inductor.vector_isa())
    a, b = torch.randn(rows, depth), torch.randn(depth, kernels.width())
    c = torch.randn(rows, kernels.width())
    expected = a.double() @ b.double() + (c.double() if add else 0)
    stored = a.T.contiguous() if turned else a
    strides = (1, rows) if turned else (depth, 1)
    kernels.product(
        ctypes.c_void_p(stored.data_ptr()),
        *map(ctypes.c_int64, strides),
        *(ctypes.c_void_p(t.data_ptr()) for t in (b, c)),
        *map(ctypes.c_int, (rows, depth, add)),
    )
    torch.testing.assert_close(c, expected.float(), rtol=1e-5, atol=1e-4)

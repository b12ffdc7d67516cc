"""The gradients of masked attention without Inductor, against float64 autograd through dense eager.

Five scores, written by hand where the compiler would generate them: a causal window (filled with
-inf), a soft-capped score within documents, causal scores with padding (filled with the smallest
float), a large number taken away from s, and a learned bias.
"""

import contextlib
import ctypes
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compiler.codegen import cpp, inductor

HEADERS = (
    "vec",
    "transpose",
    "math",
    "attention_math",
    "attention_backward_plan",
    "attention_backward",
)
SCALE, CAP = 0.25, 3.0
SMALLEST = torch.finfo(torch.float32).min
INF, NAN = float("inf"), float("nan")
SIMDLEN = {512: 512, 256: 256, 0: 1}

# Leaves: `ids` int64 [B, N] (documents) or [B, N] (1: a key to keep); `bias` float [H, M, N].
SOURCE = """
struct Given {
  int64_t window;
  const int64_t* ids;
  const float* bias;
  int64_t M, N;
};
using V = sc::vf<sc::VL>;
using I = sc::VecOf<int32_t, sc::VL>::type;

template <class F>
inline I lanes(int count, F&& f) {
  I c = {};
  for (int i = 0; i < count; ++i) c[i] = -int(f(i));
  return c;
}

struct Base : Given {
  static constexpr bool trivial = true, finite_fill = false, needs_bound = false, leaf_grad = false;
  static constexpr float scale = SCALEf;
  template <bool FULL>
  V leaf_slope(V, int64_t, int64_t, int64_t, int64_t, int) const { return V{}; }
};

struct Window : Base {
  I open(int64_t q, int64_t k, int count) const {
    return lanes(count, [&](int i) { return k + i <= q && q - k - i < window; });
  }
  template <bool FULL>
  V forward(V s, int64_t, int64_t, int64_t q, int64_t k, int count) const {
    return FULL || !trivial ? s * scale : open(q, k, count) ? s * scale : V{} - INFINITY;
  }
  template <bool FULL>
  V slope(V, int64_t, int64_t, int64_t q, int64_t k, int count) const {
    return FULL ? V{} + scale : open(q, k, count) ? V{} + scale : V{};
  }
};

struct Documents : Base {
  static constexpr bool trivial = false;
  I open(int64_t b, int64_t q, int64_t k, int count) const {
    return lanes(count, [&](int i) { return ids[b * N + q % N] == ids[b * N + k + i]; });
  }
  static V tanh(V x) {
    for (int i = 0; i < sc::VL; ++i) x[i] = std::tanh(x[i]);
    return x;
  }
  template <bool FULL>
  V forward(V s, int64_t b, int64_t, int64_t q, int64_t k, int count) const {
    const V capped = tanh(s * (SCALEf / CAPf)) * CAPf;
    return FULL ? capped : open(b, q, k, count) ? capped : V{} - INFINITY;
  }
  template <bool FULL>
  V slope(V s, int64_t b, int64_t, int64_t q, int64_t k, int count) const {
    const V t = tanh(s * (SCALEf / CAPf)), d = (1.f - t * t) * SCALEf;
    // As eager: the mask's zero comes first and is multiplied by a slope that may be NaN.
    return FULL ? d : (open(b, q, k, count) ? V{} + 1.f : V{}) * d;
  }
};

struct Padded : Base {
  static constexpr bool finite_fill = true;
  I open(int64_t b, int64_t q, int64_t k, int count) const {
    return lanes(count, [&](int i) { return k + i <= q && ids[b * N + k + i]; });
  }
  template <bool FULL>
  V forward(V s, int64_t b, int64_t, int64_t q, int64_t k, int count) const {
    return FULL || open(b, q, k, count) ? s * scale : V{} - std::numeric_limits<float>::max();
  }
  template <bool FULL>
  V slope(V, int64_t b, int64_t, int64_t q, int64_t k, int count) const {
    return FULL ? V{} + scale : open(b, q, k, count) ? V{} + scale : V{};
  }
};

struct Added : Base {
  static constexpr bool finite_fill = true, needs_bound = true;
  template <bool FULL>
  V forward(V s, int64_t b, int64_t, int64_t, int64_t k, int count) const {
    const I keep = lanes(count, [&](int i) { return ids[b * N + k + i]; });
    return s * scale + (keep ? V{} : V{} - float(window));
  }
  template <bool FULL>
  V slope(V, int64_t, int64_t, int64_t, int64_t, int) const { return V{} + scale; }
};

struct Biased : Base {
  static constexpr bool leaf_grad = true;
  template <bool FULL>
  V forward(V s, int64_t, int64_t h, int64_t q, int64_t k, int count) const {
    V x = s * scale;
    if (!FULL)
      for (int i = 0; i < count; ++i) x[i] += bias[(h * M + q) * N + k + i];
    return x;
  }
  template <bool FULL>
  V slope(V, int64_t, int64_t, int64_t, int64_t, int) const { return V{} + scale; }
  template <bool FULL>
  V leaf_slope(V, int64_t, int64_t, int64_t, int64_t, int) const {
    return V{} + (FULL ? 0.f : 1.f);
  }
};

struct Call {
  int64_t sizes[5], strides[9][3], kinds_stride[2];
  void* pointers[16];
  int64_t window;
  uint64_t seed;
  float empty, dropout;
};

template <int D, int DV, class Score>
void backward(const Call& c, int threads) {
  sc::Attention a{};
  sc::AttentionGrad g{};
  a.B = c.sizes[0], a.H = c.sizes[1], a.HKV = c.sizes[2], a.M = c.sizes[3], a.N = c.sizes[4];
  void* const* p = c.pointers;
  a.q = p[0], a.k = p[1], a.v = p[2], a.out = p[3];
  g.grad_out = p[4], g.dq = p[5], g.dk = p[6], g.dv = p[7];
  a.sink = (const float*)p[8], a.lse = (float*)p[9], a.kinds = (const uint8_t*)p[10];
  g.dsink = (float*)p[11], g.dleaf = (float*)p[12];
  int64_t* const to[] = {a.q_stride, a.k_stride, a.v_stride, a.out_stride, g.grad_out_stride,
                         g.dq_stride, g.dk_stride, g.dv_stride, a.sink_stride};
  for (int i = 0; i < 9; ++i) std::memcpy(to[i], c.strides[i], sizeof(c.strides[i]));
  std::memcpy(a.kinds_stride, c.kinds_stride, sizeof(c.kinds_stride));
  a.empty = c.empty, a.dropout = c.dropout, a.seed = c.seed;
  Score score;
  (Given&)score = Given{c.window, (const int64_t*)p[13], (const float*)p[14], a.M, a.N};
  sc::attention_backward<sc::ELEMENT, D, DV>(a, g, score, threads);
}

// Which weights dropout keeps, times 1 / (1 - p): [heads][M][N].
extern "C" void factors(uint64_t seed, float probability, int64_t heads, int64_t M, int64_t N,
                        float* to) {
  sc::Attention a{};
  a.seed = seed, a.dropout = probability;
  const sc::Dropout dropout(a);
  for (int64_t i = 0; i < heads * M; ++i)
    for (int64_t k = 0; k < N; ++k)
      to[i * N + k] = dropout.factor(dropout.row(i / M, i % M), k)[0];
}
"""
ENTRY = """
extern "C" void run_{name}_{d}_{dv}(const Call* c, int threads) {{
  backward<{d}, {dv}, {name}>(*c, threads);
}}
"""
SCORES = ("Window", "Documents", "Padded", "Added", "Biased")
WIDTHS = {"Window": [(64, 64), (20, 33)], "Padded": [(7, 130)]}


class Call(ctypes.Structure):
    _fields_ = (
        ("sizes", ctypes.c_int64 * 5),
        ("strides", ctypes.c_int64 * 27),
        ("kinds_stride", ctypes.c_int64 * 2),
        ("pointers", ctypes.c_void_p * 16),
        ("window", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("empty", ctypes.c_float),
        ("dropout", ctypes.c_float),
    )


def widths(score: str) -> list[tuple[int, int]]:
    return WIDTHS.get(score, [(16, 16)])


@functools.cache
def library(dtype: torch.dtype, isa: int):
    directory = Path(cpp.__file__).parent
    headers = "\n".join((directory / f"{name}.h").read_text() for name in HEADERS)
    source = SOURCE.replace("ELEMENT", "F32" if dtype is torch.float32 else "BF16")
    for name in ("SCALE", "CAP"):
        source = source.replace(f"{name}f", f"{globals()[name]!r}f")
    entries = "".join(
        ENTRY.format(name=name, d=d, dv=dv) for name in SCORES for d, dv in widths(name)
    )
    return inductor.load_library(f"#define SC_ISA {isa}\n{headers}\n{source}\n{entries}")


@contextlib.contextmanager
def forced(isa: int):
    if isa > inductor.vector_isa():
        pytest.skip(f"this machine has no vectors of {isa} bits")
    with inductor.patched(**{"cpp.simdlen": SIMDLEN[isa]}):
        yield


@dataclasses.dataclass
class Problem:
    """One call; ``leaf`` is the bias, ``ids`` the integers the masks read."""

    score: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    window: int = 64
    sink: torch.Tensor | None = None
    empty: str = "zero"
    dropout: float = 0.0
    ids: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    dense_kinds: bool = False

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def mask(self) -> torch.Tensor:
        """Keys that are open, [B or 1, H or 1, M, N]."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
        if self.score == "Window":
            return ((j <= i) & (i - j < self.window))[None, None]
        if self.score == "Documents":
            return (self.ids[:, i[:, 0] % max(keys, 1), None] == self.ids[:, None])[:, None]
        if self.score == "Padded":
            return (self.ids.bool()[:, None] & (j <= i))[:, None]
        if self.score == "Added":
            return self.ids.bool()[:, None, None].expand(-1, 1, queries, keys)
        return (self.bias > -INF)[None]

    def kinds(self) -> torch.Tensor:
        """EMPTY, PARTIAL or FULL for each tile; biased tiles are full where the bias is 0."""
        mask = self.mask()
        full = mask if self.score != "Biased" else (self.bias == 0)[None]
        sizes = [-(-size // 64) for size in mask.shape[2:]]
        pad = (0, sizes[1] * 64 - mask.shape[3], 0, sizes[0] * 64 - mask.shape[2])

        def tiles(x: torch.Tensor, value: bool) -> torch.Tensor:
            padded = torch.nn.functional.pad(x, pad, value=value)
            return padded.reshape(*mask.shape[:2], sizes[0], 64, sizes[1], 64).transpose(3, 4)

        any_open = tiles(mask, False).flatten(4).any(-1)
        all_open = tiles(full, True).flatten(4).all(-1)
        kinds = any_open.to(torch.uint8) + (any_open & all_open)
        return torch.ones_like(kinds) if self.dense_kinds else kinds.contiguous()

    def scores(self, s: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        mask = self.mask()
        if self.score == "Documents":
            return torch.where(mask, torch.tanh(s * (SCALE / CAP)) * CAP, -INF)
        if self.score == "Added":
            # As rounded in fp32, where nothing but the large number may be left of a sum.
            sums = s * SCALE - torch.where(mask, 0.0, self.window)
            return sums + (sums.float().double() - sums).detach()
        if self.score == "Biased":
            return s * SCALE + bias
        return torch.where(mask, s * SCALE, SMALLEST if self.score == "Padded" else -INF)

    def expected(self, factors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Dense eager in float64: the output, the log-sum-exp, the gradients, and their sizes.

        The size of a gradient is what it would be if nothing in it cancelled.
        """
        wide = {
            name: None if t is None else t.detach().double().requires_grad_()
            for name, t in vars(self).items()
            if name in ("q", "k", "v", "sink", "bias")
        }
        q, sink = wide["q"], wide["sink"]
        k, v = (wide[name].repeat_interleave(self.group, 1) for name in "kv")
        scores = self.scores(q @ k.transpose(-1, -2), wide["bias"])
        shape = (*q.shape[:3], 1)
        sinks = q.new_full(shape, -INF) if sink is None else sink.expand(shape[:3]).unsqueeze(-1)
        sinks.retain_grad() if sink is not None else None
        columns = torch.cat([scores, sinks], -1)
        lse = columns.logsumexp(-1)
        if self.empty == "zero":
            nothing = (columns == -INF).all(-1, keepdim=True)
            columns = torch.where(nothing, 0.0, columns)
            weights = torch.where(nothing, 0.0, columns.softmax(-1))[..., :-1]
        else:
            weights = columns.softmax(-1)[..., :-1]
        out = (weights * factors) @ v
        out.backward(self.grad.double())
        grad, weights = self.grad.double().abs(), weights.detach()
        terms = factors * (grad @ v.detach().abs().transpose(-1, -2))
        terms = weights * (terms + (weights * terms).sum(-1, keepdim=True))
        sizes = {
            "dq": SCALE * terms @ k.detach().abs(),
            "dk": SCALE * terms.transpose(-1, -2) @ q.detach().abs(),
            "dv": (weights * factors).transpose(-1, -2) @ grad,
            "dsink": terms.sum(-1) + 1,
            "dleaf": terms.sum(0),
        }
        for name in ("dk", "dv"):
            sizes[name] = sizes[name].unflatten(1, (-1, self.group)).sum(2)
        found = {f"size of {name}": size for name, size in sizes.items()}
        found |= {"out": out.detach(), "lse": lse.detach()}
        found |= {f"d{name}": wide[name].grad for name in "qkv"}
        if sink is not None:
            found["dsink"] = sinks.grad[..., 0]
        if self.bias is not None:
            found["dleaf"] = wide["bias"].grad
        return found

    def run(
        self, expected: dict[str, torch.Tensor], isa: int, seed: int, threads: int
    ) -> dict[str, torch.Tensor]:
        q, k, v, grad = self.q, self.k, self.v, self.grad
        lib = library(q.dtype, isa)
        out, lse = expected["out"].to(q.dtype), expected["lse"].float()
        # Stored as [B, M, H, D], like the forward's result.
        dq, dk, dv = (
            torch.full_like(
                t.transpose(1, 2), 77.0, memory_format=torch.contiguous_format
            ).transpose(1, 2)
            for t in (q, k, v)
        )
        shape = q.shape[:3]
        sink = None if self.sink is None else self.sink.expand(shape)
        dsink = None if sink is None else torch.full(shape, 77.0)
        leaf = self.score == "Biased"
        dleaf = torch.full((*shape, k.shape[2]), 77.0) if leaf else None
        kinds = self.kinds()
        call = Call()
        call.sizes[:] = (shape[0], shape[1], k.shape[1], shape[2], k.shape[2])
        strided = (q, k, v, out, grad, dq, dk, dv, sink)
        strides = [(0, 0, 0) if t is None else t.stride()[:3] for t in strided]
        call.strides[:] = [s for three in strides for s in three]
        call.kinds_stride[:] = [0 if kinds.shape[i] == 1 else kinds.stride(i) for i in (0, 1)]
        others = (lse, kinds, dsink, dleaf, self.ids, self.bias)
        pointers = [None if t is None else t.data_ptr() for t in (*strided, *others)]
        call.pointers[: len(pointers)] = pointers
        call.window, call.seed, call.dropout = self.window, seed, self.dropout
        call.empty = 0.0 if self.empty == "zero" else NAN
        entry = getattr(lib, f"run_{self.score}_{q.shape[3]}_{v.shape[3]}")
        entry(ctypes.byref(call), ctypes.c_int(threads))
        found = {"dq": dq, "dk": dk, "dv": dv}
        if dsink is not None:
            found["dsink"] = dsink
        if dleaf is not None:
            found["dleaf"] = dleaf
        return found


def factors_of(problem: Problem, isa: int, seed: int) -> torch.Tensor:
    batch, heads, queries, _ = problem.q.shape
    factors = torch.ones(batch, heads, queries, problem.k.shape[2])
    if problem.dropout:
        library(problem.q.dtype, isa).factors(
            ctypes.c_uint64(seed),
            ctypes.c_float(problem.dropout),
            *map(ctypes.c_int64, (batch * heads, queries, problem.k.shape[2])),
            ctypes.c_void_p(factors.data_ptr()),
        )
    return factors.double()


def check(problem: Problem, *, isa: int = -1, seed: int = 5, threads: int = 2) -> dict:
    """Gradients agree with float64 autograd, NaN where it has NaN; returns the kernel's."""
    isa = inductor.vector_isa() if isa < 0 else isa
    expected = problem.expected(factors_of(problem, isa, seed))
    found = problem.run(expected, isa, seed, threads)
    bound = 1e-5 if problem.q.dtype is torch.float32 else 1.5e-2
    for name, value in found.items():
        want, size = expected[name], expected[f"size of {name}"]
        if name == "dleaf":
            value = value.double().sum(0)
        finite = want.isfinite()
        assert torch.equal(value.isfinite(), finite), f"{name} is not finite elsewhere"
        finite &= size.isfinite()
        error = (value.double() - want).abs()[finite] / (size[finite] + 1e-3)
        assert (error <= bound).all(), f"{name}: off by {float(error.max()):.3g} of its size"
    return found


def build(
    score: str,
    sizes: tuple[int, int, int, int, int] = (2, 4, 2, 130, 200),
    dtype: torch.dtype = torch.float32,
    *,
    pick: int = 0,
    seed: int = 0,
    transposed: bool = False,
    **options,
) -> Problem:
    """A random problem; sizes are batch, query heads, kv heads, queries, keys."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, queries, keys = sizes

    def tensor(h: int, n: int, d: int) -> torch.Tensor:
        shape = (batch, n, h, d) if transposed else (batch, h, n, d)
        made = torch.randn(shape, generator=generator).to(dtype)
        return made.transpose(1, 2) if transposed else made

    d, dv = widths(score)[pick % len(widths(score))]
    q, k, v = tensor(heads, queries, d), tensor(kv_heads, keys, d), tensor(kv_heads, keys, dv)
    problem = Problem(score, q, k, v, tensor(heads, queries, dv), **options)
    if score == "Added":
        problem.window = 10**9
    if score == "Documents":
        ids = torch.randint(0, 3, (batch, keys), generator=generator).sort(-1).values
        problem.ids = ids
    elif score in ("Padded", "Added"):
        problem.ids = (torch.rand(batch, keys, generator=generator) < 0.7).long()
        problem.ids[0, 70:] = 0
    elif score == "Biased":
        bias = torch.randn(heads, queries, keys, generator=generator)
        open_ = torch.rand(heads, -(-queries // 64), -(-keys // 64), generator=generator) < 0.6
        open_ = open_.repeat_interleave(64, 1).repeat_interleave(64, 2)[:, :queries, :keys]
        problem.bias = torch.where(open_, bias, -INF)
        if queries > 64:
            problem.bias[:, :64, :64] = 0.0
    return problem


COUNTS = st.sampled_from([1, 2, 5, 17, 63, 64, 65, 100, 129, 200, 257])
cases = given(
    score=st.sampled_from(SCORES),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    queries=COUNTS,
    keys=COUNTS,
    window=st.sampled_from([1, 7, 64, 100, 1000]),
    sink=st.booleans(),
    transposed=st.booleans(),
    dropout=st.sampled_from([0.0, 0.0, 0.3]),
    dense_kinds=st.booleans(),
    empty=st.sampled_from(["zero", "nan"]),
    pick=st.integers(0, 1),
    seed=st.integers(0, 2**16),
)


def check_case(isa, dtype, score, batch, heads, queries, keys, sink, **options):
    sizes = (batch, *heads, queries, keys)
    options["sink"] = torch.randn(heads[0], 1) if sink else None
    check(build(score, sizes, dtype, **options), isa=isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=30)
@cases
def test_gradients(dtype, **case):
    check_case(-1, dtype, **case)


@pytest.mark.parametrize("isa", [256, 0])
@settings(max_examples=15)
@cases
def test_gradients_with_narrower_vectors(isa, **case):
    with forced(isa):
        check_case(isa, torch.float32, **case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", [512, 256, 0])
@settings(max_examples=150)
@cases
def test_gradients_thoroughly(isa, dtype, **case):
    with forced(isa):
        check_case(isa, dtype, **case)


@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("score", SCORES)
def test_what_is_not_finite_goes_where_eager_takes_it(score, name):
    """Into tiles that are skipped, too: 0 times NaN is NaN."""
    values = [("zero", NAN), ("zero", INF), ("nan", NAN), ("nan", -INF)]
    places = [(200, 200, 100), (150, 300, 5), (300, 150, 149), (100, 70, 69)]
    for (empty, value), (queries, keys, at) in zip(values, places, strict=True):
        problem = build(score, (1, 2, 1, queries, keys), empty=empty)
        getattr(problem, name)[0, 0, at, 3] = value
        check(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_a_finite_fill_leaves_uniform(dtype):
    """A row with every key filled weighs all keys alike: no tile of its queries may be skipped."""
    problem = build("Padded", (2, 2, 1, 200, 200), dtype)
    problem.ids[0, :90] = 0
    found = check(problem)
    assert float(found["dv"][0, 0, 199].abs().max()) > 0


def test_products_past_the_bound_of_the_map():
    """A key 20000 below the others still wins where s is larger than that."""
    problem = build("Added", (1, 1, 1, 70, 200))
    problem.window = 20000
    problem.ids[:] = 1
    problem.ids[:, 128:] = 0
    problem.q[0, 0, 3] = problem.k[0, 0, 150] = 75
    problem.grad[0, 0, 3, 0] = 1
    found = check(problem)
    assert float(found["dv"][0, 0, 150].abs().max()) > 0


@pytest.mark.parametrize("score", ["Window", "Documents", "Biased"])
def test_the_number_of_threads_changes_nothing(score):
    problem = build(score, (2, 4, 2, 300, 333), dropout=0.2, sink=torch.randn(4, 1))
    expected = problem.expected(torch.ones(()))
    runs = [problem.run(expected, inductor.vector_isa(), 3, threads) for threads in (1, 2, 7)]
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, other[name]), name


def test_many_chunks():
    """So many shares of dQ that there are fewer chunks than key tiles."""
    problem = build("Added", (1, 1, 1, 2560, 2560))
    problem.ids[:] = 1
    check(problem)


@pytest.mark.parametrize("score", SCORES)
def test_rows_with_gaps(score):
    problem = build(score)
    for name in ("q", "k", "v", "grad"):
        tensor = getattr(problem, name)
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), NAN)
        wide[..., : tensor.shape[-1]] = tensor
        setattr(problem, name, wide[..., : tensor.shape[-1]])
    check(problem)


@pytest.mark.parametrize(
    "sizes", [(0, 2, 1, 5, 5), (1, 0, 0, 5, 5), (1, 2, 1, 0, 5), (1, 2, 1, 5, 0)]
)
@pytest.mark.parametrize("score", ["Window", "Biased"])
def test_nothing(score, sizes):
    problem = build(score, sizes)
    batch, heads, _, queries, _ = sizes
    expected = {
        "out": torch.zeros(batch, heads, queries, problem.v.shape[3]),
        "lse": torch.full((batch, heads, queries), -INF),
    }
    found = problem.run(expected, inductor.vector_isa(), 0, 2)
    assert all((value == 0).all() for value in found.values())

"""Generated score functors against the meaning of their expressions, many in one library."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch

from sparse_compiler.codegen import cpp, inductor
from sparse_compiler.codegen.score import functor
from sparse_compiler.score.derivative import derivative
from sparse_compiler.score.evaluate import evaluate
from sparse_compiler.score.expr import S, parse
from sparse_compiler.score.masks import full_score

BATCH, HEADS, QUERIES, KEYS = 2, 3, 13, 37
SCORES = [
    "(mul s 0.125)",
    "(where (le k q) (mul s 0.125) -inf)",
    "(where (and (le k q) (lt (sub q k) 4)) s -3.4028234663852886e+38)",
    "(where (eq (load 0 i64 b q) (load 0 i64 b k)) s -inf)",
    "(where (and (load 1 bool b k) (le k (add q (int 0)))) s -1000000000.0)",
    "(add (mul s 0.5) (load 2 f32 h q k))",
    "(add s (load 2 f32 h 0 (add (sub k q) 12)))",
    "(add s (mul (load 3 f32 h) (to_float (sub k q))))",
    "(mul (tanh (mul s 0.02)) 50.0)",
    "(where (not (load 4 bool 0 0 q k)) -inf (mul s 0.25))",
    "(where (eq (mod (sub q k) 3) 0) s -inf)",
    "(where (eq (floordiv q 4) (floordiv k 4)) s -inf)",
    "(add s (load 5 bf16 b k))",
    "(where (lt (abs (sub q k)) 3) (sigmoid s) (exp (neg s)))",
    "(where (or (lt k 2) (ge (min q 5) k)) (max s 0.25) (div s 3.0))",
    "(where (ne (load 0 i64 b (load 6 i32 k)) 1) s -inf)",
    "(where (xor (le k q) (gt (add k 5) q)) s (relu (sub s 1.0)))",
    "(where (gt (mul (load 0 i64 b k) 4294967296) (load 0 i64 b q)) s -inf)",
    "(pow (add (mul s s) 1.0) 0.5)",
    "(add (floordiv s 0.1) (mod s -0.3))",
]
LEAVES = [
    torch.arange(BATCH * KEYS).view(BATCH, KEYS) // 7,
    torch.arange(BATCH * KEYS).view(BATCH, KEYS) % 5 != 0,
    torch.linspace(-2, 2, HEADS * 64 * 64).view(HEADS, 64, 64),
    torch.tensor([0.5, 0.25, 0.125]),
    torch.ones(1, 1, 64, 64, dtype=torch.bool).triu(1),
    torch.linspace(-1, 1, BATCH * KEYS).view(BATCH, KEYS).bfloat16(),
    torch.randperm(KEYS, generator=torch.Generator().manual_seed(0)).int(),
]
INTEGERS = [3]


@pytest.fixture(scope="module")
def library() -> Any:
    made = [functor(text, _wanted(text)) for text in SCORES]
    parts = ["#include <cmath>\n#include <cstdint>", f"#define SC_ISA {inductor.vector_isa()}"]
    parts.append(cpp.headers("attention_score"))
    for i, one in enumerate(made):
        fill = "".join(
            f"  score.leaf{slot}.data = (decltype(score.leaf{slot}.data))leaf[{slot}];\n"
            f"  for (int d = 0; d < {rank}; ++d) {{ score.leaf{slot}.size[d] = *sizes++;"
            f" score.leaf{slot}.stride[d] = *sizes++; }}\n"
            for slot, rank in enumerate(one.ranks)
            if rank
        )
        parts.append(
            f"""namespace n{i} {{
{one.source}
template <int WHAT, bool FULL> void loop(const Score& score, const float* s, float* out) {{
  constexpr int VL = sc::VL;
  for (int64_t b = 0; b < {BATCH}; ++b) for (int64_t h = 0; h < {HEADS}; ++h)
  for (int64_t q = 0; q < {QUERIES}; ++q) for (int64_t k = 0; k < {KEYS}; k += VL) {{
    const int count = k + VL <= {KEYS} ? VL : int({KEYS} - k);
    const int64_t at = ((b * {HEADS} + h) * {QUERIES} + q) * {KEYS} + k;
    sc::vf<VL> x{{}}, y;
    for (int i = 0; i < count; ++i) x[i] = s[at + i];
    if constexpr (WHAT == 0) y = score.forward<FULL>(x, b, h, q, k, count);
    else if constexpr (WHAT == 1) y = score.slope<FULL>(x, b, h, q, k, count);
    else y = score.leaf_slope<FULL>(x, b, h, q, k, count);
    for (int i = 0; i < count; ++i) out[at + i] = y[i];
  }}
}} }}
extern "C" void run{i}(int what, const float* s, float* out, void* const* leaf,
                       const int64_t* sizes, const int64_t* integers) {{
  n{i}::Score score{{}};
{fill}  score.integer = integers;
  if (what == 0) n{i}::loop<0, false>(score, s, out);
  if (what == 1) n{i}::loop<0, true>(score, s, out);
  if (what == 2) n{i}::loop<1, false>(score, s, out);
  if (what == 3) n{i}::loop<2, false>(score, s, out);
}}"""
        )
    return inductor.load_library("\n".join(parts))


def _wanted(text: str) -> int:
    """The leaf whose gradient is tested: the bias."""
    return 2 if "load 2" in text else -1


def _run(library: Any, number: int, what: int, s: torch.Tensor) -> torch.Tensor:
    one = functor(SCORES[number], _wanted(SCORES[number]))
    out = torch.full_like(s, math.nan)
    sizes = [
        n
        for slot, rank in enumerate(one.ranks)
        if rank
        for pair in zip(LEAVES[slot].shape, LEAVES[slot].stride(), strict=True)
        for n in pair
    ]
    getattr(library, f"run{number}")(
        what,
        ctypes.c_void_p(s.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        (ctypes.c_void_p * len(LEAVES))(*(leaf.data_ptr() for leaf in LEAVES)),
        (ctypes.c_int64 * max(len(sizes), 1))(*sizes),
        (ctypes.c_int64 * 1)(*INTEGERS),
    )
    return out


@pytest.mark.parametrize("number", range(len(SCORES)), ids=SCORES)
def test_functor(library: Any, number: int) -> None:
    s = torch.randn(BATCH, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(number))
    score = parse(SCORES[number])
    expected = [score, full_score(score), derivative(score, S)]
    if _wanted(SCORES[number]) >= 0:
        (read,) = (node for node in score.loads() if node.slot == 2)
        expected.append(derivative(score, read))
    for what, expression in enumerate(expected):
        want = evaluate(expression, s.double(), LEAVES, INTEGERS, *s.shape).expand(s.shape)
        got = _run(library, number, what, s)
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)

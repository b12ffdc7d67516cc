// What kernels of products and pointwise functions share: exp, a small matrix product, conversions.
//
// Products work on units (vec.h): with fp32, depth counts elements; with bf16 it counts pairs, and
// both factors hold pairs along the summed dimension.
namespace sc {

// a > b ? a : b lane by lane: b if either is NaN.
template <int L>
inline vf<L> larger(vf<L> a, vf<L> b) {
#if SC_ISA == 512
  if constexpr (L == 16) return (vf<L>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#if SC_ISA >= 256
  if constexpr (L == 8) return (vf<L>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

// a < b ? a : b lane by lane: b if either is NaN.
template <int L>
inline vf<L> smaller(vf<L> a, vf<L> b) {
#if SC_ISA == 512
  if constexpr (L == 16) return (vf<L>)_mm512_min_ps((__m512)a, (__m512)b);
#endif
#if SC_ISA >= 256
  if constexpr (L == 8) return (vf<L>)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}

// 0, 1, ..., VL - 1.
inline vu<VL> lane_numbers() {
  vu<VL> v;
  for (int i = 0; i < VL; ++i) v[i] = uint32_t(i);
  return v;
}

// The largest lane; NaN may be passed over.
template <int L>
inline float largest(vf<L> v) {
  if constexpr (L == 4) {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  } else {
    vf<L / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, (const char*)&v + sizeof(low), sizeof(high));
    return largest<L / 2>(larger<L / 2>(low, high));
  }
}

// exp within 2 ulp, subnormal results included: exactly 0 below -104, infinite above 88.8, NaN for
// NaN. 2^n exp(r), n = round(x / ln 2), with a polynomial for |r| <= ln(2) / 2 (error 2^-28).
template <int L>
inline vf<L> exp(vf<L> x) {
  const auto all = [](float c) { return vf<L>{} + c; };
  // In this order of operands NaN stays.
  x = larger<L>(all(-104.f), x);
  x = smaller<L>(all(89.f), x);
  const auto polynomial = [&](vf<L> r) {
    vf<L> p = fma<L>(all(1.38145405e-3f), r, all(8.36874545e-3f));
    p = fma<L>(p, r, all(4.16683890e-2f));
    p = fma<L>(p, r, all(1.66665211e-1f));
    p = fma<L>(p, r, all(4.99999940e-1f));
    p = fma<L>(p, r, all(1.f));
    return fma<L>(p, r, all(1.f));
  };
#if SC_ISA == 512
  if constexpr (L == 16) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps((__m512)x, _mm512_set1_ps(1.44269504f)),
                                          _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf<L> r = fma<L>((vf<L>)n, all(1.90465430e-9f), fma<L>((vf<L>)n, all(-0.693147182f), x));
    return (vf<L>)_mm512_scalef_ps((__m512)polynomial(r), n);
  }
#endif
  // Adding and taking away 1.5 * 2^23 rounds to an integer; the high part of ln 2 has few bits, so
  // that its product with n is exact without a fused operation, too.
  const vf<L> shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
  const vf<L> r = fma<L>(n, all(2.12194440e-4f), fma<L>(n, all(-0.693359375f), x));
  // 2^n in two steps, since it may be subnormal where the result is. Low bits of `shifted` are n.
  using I = typename VecOf<int32_t, L>::type;
  const I whole = (I)shifted - 0x4b400000, half = whole >> 1;
  return polynomial(r) * (vf<L>)((half + 127) << 23) * (vf<L>)((whole - half + 127) << 23);
}

// R rows x V vectors of c, in registers from the first unit of depth to the last.
template <class E, int R, int V>
__attribute__((noinline)) void gemm_block(const float* a, int64_t a_row, int64_t a_col,
                                          const float* b, int64_t ldb, float* c, int64_t ldc,
                                          int depth, bool accumulate) {
  vf<VL> acc[R][V];
  if (accumulate) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = load<VL>(c + r * ldc + v * VL);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = vf<VL>{};
  }
  for (int k = 0; k < depth; ++k) {
    vf<VL> bs[V];
    for (int v = 0; v < V; ++v) bs[v] = load<VL>(b + v * VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf<VL> w = splat<VL>(a + r * a_row);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] = mac<E, VL>(w, bs[v], acc[r][v]);
    }
    a += a_col;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store<VL>(c + r * ldc + v * VL, acc[r][v]);
}

// `rows` rows of V vectors: as many at a time as registers hold, then what is left.
template <class E, int R, int V>
inline void gemm_rows(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
                      float* c, int64_t ldc, int rows, int depth, bool accumulate) {
  int r = 0;
  for (; r + R <= rows; r += R)
    gemm_block<E, R, V>(a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, depth, accumulate);
  if constexpr (R > 1)
    if (r < rows)
      gemm_rows<E, R / 2, V>(a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, rows - r, depth,
                             accumulate);
}

// c[r][n] (+)= sum over k < depth of a[r * a_row + k * a_col] * b[k * ldb + n], for r < rows and
// n < nv * VL; all in units. 8 x 2 vectors at a time keep a product a cycle going with 32
// registers, 4 x 3 with 16.
template <class E>
inline void gemm_wide(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
                      float* c, int64_t ldc, int rows, int nv, int depth, bool accumulate) {
  constexpr int R = SC_ISA == 512 ? 8 : 4, V = SC_ISA == 512 ? 2 : 3;
  for (; nv >= V; nv -= V, b += V * VL, c += V * VL)
    gemm_rows<E, R, V>(a, a_row, a_col, b, ldb, c, ldc, rows, depth, accumulate);
  if (V == 3 && nv == 2)
    gemm_rows<E, R, 2>(a, a_row, a_col, b, ldb, c, ldc, rows, depth, accumulate);
  if (nv == 1) gemm_rows<E, R, 1>(a, a_row, a_col, b, ldb, c, ldc, rows, depth, accumulate);
}

template <int NV, class E = F32>
inline void gemm(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t ldb,
                 float* c, int64_t ldc, int rows, int depth, bool accumulate) {
  gemm_wide<E>(a, a_row, a_col, b, ldb, c, ldc, rows, NV, depth, accumulate);
}

// Vectors that hold n floats, and floats they hold.
constexpr int vectors(int n) { return (n + VL - 1) / VL; }
constexpr int padded(int n) { return vectors(n) * VL; }

// VL floats as bf16, to nearest even; NaN stays NaN.
inline void store_bf16(uint16_t* to, vf<VL> x) {
#if SC_ISA == 512 && defined(__AVX512BF16__)
  const __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
  __builtin_memcpy(to, &narrow, sizeof(narrow));
#else
  using U = vu<VL>;
  const U bits = (U)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U narrow = (bits & 0x7fffffff) > 0x7f800000 ? U{} + 0x7fc0 : rounded;
  for (int i = 0; i < VL; ++i) to[i] = uint16_t(narrow[i]);
#endif
}
inline void store_as(float* to, vf<VL> x) { store<VL>(to, x); }
inline void store_as(uint16_t* to, vf<VL> x) { store_bf16(to, x); }

// VL elements as floats.
inline vf<VL> load_as_float(const float* from) { return load<VL>(from); }
inline vf<VL> load_as_float(const uint16_t* from) {
#if SC_ISA == 512
  const __m256i narrow = _mm256_loadu_si256((const __m256i*)from);
  return (vf<VL>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#else
  typename VecOf<uint16_t, VL>::type narrow;
  __builtin_memcpy(&narrow, from, sizeof(narrow));
  return (vf<VL>)(__builtin_convertvector(narrow, vu<VL>) << 16);
#endif
}

// to[0 .. n) = from[0 .. n), n any number.
template <class T>
inline void store_some(T* to, const float* from, int n) {
  int i = 0;
  for (; i + VL <= n; i += VL) store_as(to + i, load<VL>(from + i));
  if (i == n) return;
  alignas(64) float last[VL] = {};
  T narrow[VL];
  std::memcpy(last, from + i, size_t(n - i) * sizeof(float));
  store_as(narrow, load<VL>(last));
  std::memcpy(to + i, narrow, size_t(n - i) * sizeof(T));
}
template <class T>
inline void load_some(float* to, const T* from, int n) {
  int i = 0;
  for (; i + VL <= n; i += VL) store<VL>(to + i, load_as_float(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

// The sum of squares of n elements.
template <class T>
inline float squared_norm(const T* x, int n) {
  vf<VL> sums = {};
  int i = 0;
  for (; i + VL <= n; i += VL) {
    const vf<VL> some = load_as_float(x + i);
    sums = fma<VL>(some, some, sums);
  }
  float total = reduce<VL>(sums);
  for (; i < n; ++i) total += to_float(x[i]) * to_float(x[i]);
  return total;
}

}  // namespace sc

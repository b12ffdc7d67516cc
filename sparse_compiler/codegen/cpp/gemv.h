// M = 1: y [N] = csr weight x one row of x, without scratch memory (but for a bf16 row of odd K).
//
// R = 1: the lanes of a vector are stored units of one row: contiguous values times gathered x, one
// sum a segment; short segments go 16 at a time as one stream of products (AVX-512).
// R >= 4: the lanes are R rows x (lanes / R) columns: contiguous values again, times x spread.
// Threads take n-blocks of LD rows and walk their segments in stored order, a forward stream.
namespace sc {

// x at L columns. AVX-512: broadcast loads merged under a mask, which need no shuffle unit, with
// the columns fetched four at a time; hardware gathers take twice as long on Zen 4.
template <int L>
inline vf<L> gather(const char* x, const uint16_t* c) {
  const auto at = [&](uint64_t col) __attribute__((always_inline)) {
    float v;
    __builtin_memcpy(&v, x + 4 * col, 4);
    return v;
  };
#if SC_ISA == 512
  if constexpr (L == 16) {
    const auto eight = [&](const uint16_t* cols) __attribute__((always_inline)) {
      uint64_t a, b;
      __builtin_memcpy(&a, cols, 8);
      __builtin_memcpy(&b, cols + 4, 8);
      __m256 v = _mm256_castps128_ps256(_mm_set_ss(at(a & 0xffff)));
      const auto put = [&](int lane, uint64_t col) __attribute__((always_inline)) {
        v = _mm256_mask_broadcastss_ps(v, __mmask8(1 << lane), _mm_set_ss(at(col)));
      };
      put(1, a >> 16 & 0xffff);
      put(2, a >> 32 & 0xffff);
      put(3, a >> 48);
      put(4, b & 0xffff);
      put(5, b >> 16 & 0xffff);
      put(6, b >> 32 & 0xffff);
      put(7, b >> 48);
      return v;
    };
    return (vf<L>)_mm512_insertf32x8(_mm512_castps256_ps512(eight(c)), eight(c + 8), 1);
  }
#endif
  vf<L> v{};
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) v[i] = at(c[i]);
  return v;
}

// x of the next VL / R columns, each repeated R times.
template <int R, int L>
inline vf<L> spread(const char* x, const uint16_t* c) {
  vf<L> v = splat<L>(x + 4 * int64_t(c[0]));
#pragma GCC unroll 4
  for (int i = 1; i < L / R; ++i) {
#if SC_ISA == 512
    if constexpr (L == 16) {
      const __mmask16 lanes = __mmask16(((1 << R) - 1) << (R * i));
      const __m128 one = _mm_load_ss((const float*)(x + 4 * int64_t(c[i])));
      v = (vf<L>)_mm512_mask_broadcastss_ps((__m512)v, lanes, one);
      continue;
    }
#endif
    const vf<L> one = splat<L>(x + 4 * int64_t(c[i]));
    for (int lane = R * i; lane < R * i + R; ++lane) v[lane] = one[lane];
  }
  return v;
}

template <class E>
inline float dot_row(const float* values, const uint16_t* cols, int count, const char* x) {
  vf<VL> a{}, b{};
  int p = 0;
  for (; p + 2 * VL <= count; p += 2 * VL) {
    a = mac<E, VL>(load<VL>(values + p), gather<VL>(x, cols + p), a);
    b = mac<E, VL>(load<VL>(values + p + VL), gather<VL>(x, cols + p + VL), b);
  }
  if (p + VL <= count) {
    a = mac<E, VL>(load<VL>(values + p), gather<VL>(x, cols + p), a);
    p += VL;
  }
  if (p < count) {
    // The lanes past the row hold neighbours; both factors are cleared, x may be infinite.
    vu<VL> lane{};
    for (int i = 0; i < VL; ++i) lane[i] = uint32_t(i);
    const vu<VL> keep = (vu<VL>)(lane < vu<VL>{} + uint32_t(count - p));
    const vf<VL> w = (vf<VL>)((vu<VL>)load<VL>(values + p) & keep);
    b = mac<E, VL>(w, (vf<VL>)((vu<VL>)gather<VL>(x, cols + p) & keep), b);
  }
  return reduce<VL>(a + b);
}

#if SC_ISA == 512
// 16 short segments, y[group] += their sums. The products of all of them are one stream without
// ragged ends; each segment then adds its stretch of it, and one transpose closes 16 sums.
constexpr int STREAM = 1024;

template <class E>
inline void dot_16_rows(const float* values, const uint16_t* cols, const Segment* segments,
                        const char* x, float* y) {
  float products[STREAM + 16];
  const int64_t start = segments[0].start;
  const int total = int(segments[15].start + segments[15].count - start);
  for (int p = 0; p < total; p += 16) {
    __builtin_prefetch(values + start + p + 512);
    __builtin_prefetch(cols + start + p + 512);
    store<16>(products + p, mac<E, 16>(load<16>(values + start + p),
                                       gather<16>(x, cols + start + p), vf<16>{}));
  }
  vf<16> sums[16];
  const float* from = products;
  for (int i = 0; i < 16; ++i) {
    const int count = segments[i].count;
    int p = 0;
    __m512 sum = _mm512_setzero_ps();
    for (; p + 16 < count; p += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(from + p));
    const __mmask16 rest = __mmask16(_bzhi_u32(0xffff, unsigned(count - p)));
    sums[i] = (vf<16>)_mm512_add_ps(sum, _mm512_maskz_loadu_ps(rest, from + p));
    from += count;
  }
  float out[16];
  reduce16(sums, out);
  for (int i = 0; i < 16; ++i) y[segments[i].group] += out[i];
}
#endif

// y[R] += R rows at once.
template <class E, int R>
inline void dot_group(const float* values, const uint16_t* cols, int count, const char* x,
                      float* y) {
  constexpr int L = R > VL ? VL : R, COLS = std::max(1, VL / R);
  if constexpr (R < VL) {
    vf<VL> acc[4] = {};
    int p = 0;
    for (; p + 4 * COLS <= count; p += 4 * COLS)
      for (int u = 0; u < 4; ++u)
        acc[u] = mac<E, VL>(load<VL>(values + int64_t(p + u * COLS) * R),
                            spread<R, VL>(x, cols + p + u * COLS), acc[u]);
    float lanes[VL];
    store<VL>(lanes, (acc[0] + acc[1]) + (acc[2] + acc[3]));
    vf<L> sum = load<L>(y);
    for (int i = 0; i < COLS; ++i) sum += load<L>(lanes + i * R);
    for (; p < count; ++p)
      sum = mac<E, L>(load<L>(values + int64_t(p) * R), splat<L>(x + 4 * int64_t(cols[p])), sum);
    store<L>(y, sum);
  } else {
    constexpr int V = R / L, U = V >= 4 ? 1 : 4 / V;
    vf<L> acc[U][V] = {};
    int p = 0;
    for (; p + U <= count; p += U)
      for (int u = 0; u < U; ++u) {
        const vf<L> xs = splat<L>(x + 4 * int64_t(cols[p + u]));
        for (int v = 0; v < V; ++v)
          acc[u][v] = mac<E, L>(load<L>(values + int64_t(p + u) * R + v * L), xs, acc[u][v]);
      }
    for (; p < count; ++p) {
      const vf<L> xs = splat<L>(x + 4 * int64_t(cols[p]));
      for (int v = 0; v < V; ++v)
        acc[0][v] = mac<E, L>(load<L>(values + int64_t(p) * R + v * L), xs, acc[0][v]);
    }
    for (int v = 0; v < V; ++v) {
      for (int u = 1; u < U; ++u) acc[0][v] += acc[u][v];
      store<L>(y + v * L, load<L>(y + v * L) + acc[0][v]);
    }
  }
}

template <class E, int R, int LD, class Epilogue>
void gemv_csr(const typename E::T* x, const CsrWeight& w, int num_threads, Epilogue&& epilogue) {
  Scratch padded;
  const bool nonfinite = any_nonfinite<E>(x, w.K);
  const typename E::T* row = x;
  if (w.K % E::per_unit) {
    // The last unit would reach one element past x.
    padded = scratch((w.K + 1) * int64_t(sizeof(*x)));
    std::memcpy(padded.get(), x, size_t(w.K) * sizeof(*x));
    std::memset(padded.get() + size_t(w.K) * sizeof(*x), 0, sizeof(*x));
    row = (const typename E::T*)padded.get();
  }
  const float* values = (const float*)w.values;
  const int64_t blocks = (w.N + LD - 1) / LD, k_blocks = num_k_blocks<E>(w);
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1) if (num_threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    alignas(64) float tile[LD];
    const int64_t n0 = block * LD, n1 = std::min(w.N, n0 + LD);
    const Segment* segments = w.segments + block * k_blocks * (LD / R);
    std::memset(tile, 0, sizeof(tile));
    for (int64_t i = 0; i < k_blocks * (LD / R); ++i) {
      const Segment s = segments[i];
#if SC_ISA == 512
      if constexpr (R == 1) {
        // Segments of a k-block come longest first.
        if (i % 16 == 0 && s.count * 16 <= STREAM) {
          dot_16_rows<E>(values, w.cols, segments + i, (const char*)row, tile);
          i += 15;
          continue;
        }
      }
#endif
      if constexpr (R == 1)
        tile[s.group] += dot_row<E>(values + s.start, w.cols + s.start, s.count, (const char*)row);
      else
        dot_group<E, R>(values + int64_t(s.start) * R, w.cols + s.start, s.count, (const char*)row,
                        tile + int64_t(s.group) * R);
    }
    if (nonfinite) fix_csr_row<E, R, LD>(x, w, n0, n1, tile);
    epilogue(int64_t(0), int64_t(1), n0, n1, (const float*)tile);
  }
}

}  // namespace sc

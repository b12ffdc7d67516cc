// linear_dense: few rows of x (M <= 4) times a weight without zeros, [N, K] as it lies in memory.
//
// Such a product is as fast as the weight can be read, and memory reads one stream faster than
// several: one row of the weight at a time against all rows of x, U x M vectors of sums in
// registers. A task is LD rows. What is left of K behind the last whole vector is copied between
// zeros first.
namespace sc {

struct DenseWeight {
  int64_t N, K;
  const void* values;  // [N][ld]
  int64_t ld;
};

// out[m] = x[m] . w, for M rows of x.
template <class E, int M>
inline void dot_rows(const typename E::T* const* x, const typename E::T* w, int64_t K, float* out) {
  using T = typename E::T;
  constexpr int STEP = VL * E::per_unit, U = M == 1 ? 8 : M == 2 ? 4 : 2;
  vf<VL> sums[U][M] = {};
  const T* row[M];
  for (int m = 0; m < M; ++m) row[m] = x[m];
  const auto step = [&](const T* from, int64_t at, vf<VL>* acc) __attribute__((always_inline)) {
    const vf<VL> weights = load<VL>(from);
    for (int m = 0; m < M; ++m) acc[m] = mac<E, VL>(weights, load<VL>(row[m] + at), acc[m]);
  };
  int64_t k = 0;
  for (; k + U * STEP <= K; k += U * STEP)
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) step(w + k + u * STEP, k + u * STEP, sums[u]);
  for (; k + STEP <= K; k += STEP) step(w + k, k, sums[0]);
  if (k < K) {
    T tail[1 + M][STEP] = {};
    std::memcpy(tail[0], w + k, size_t(K - k) * sizeof(T));
    for (int m = 0; m < M; ++m) {
      std::memcpy(tail[1 + m], row[m] + k, size_t(K - k) * sizeof(T));
      row[m] = tail[1 + m];
    }
    step(tail[0], 0, sums[0]);
  }
  for (int m = 0; m < M; ++m) {
    for (int u = 1; u < U; ++u) sums[0][m] += sums[u][m];
    out[m] = reduce<VL>(sums[0][m]);
  }
}

template <class E, int LD, int M, class Epilogue>
void linear_dense(const typename E::T* x, int64_t ldx, int64_t, const DenseWeight& w,
                  int num_threads, Epilogue&& epilogue) {
  static_assert(M >= 1 && M <= 4);
  const auto* const weight = (const typename E::T*)w.values;
  const typename E::T* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = x + m * ldx;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1) if (num_threads > 1)
  for (int64_t n0 = 0; n0 < w.N; n0 += LD) {
    alignas(64) float tile[M * LD];
    const int64_t n1 = std::min(w.N, n0 + LD);
    for (int64_t n = n0; n < n1; ++n) {
      float out[M];
      dot_rows<E, M>(rows, weight + n * w.ld, w.K, out);
      for (int m = 0; m < M; ++m) tile[m * LD + (n - n0)] = out[m];
    }
    epilogue(int64_t(0), int64_t(M), n0, n1, (const float*)tile);
  }
}

}  // namespace sc

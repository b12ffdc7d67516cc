// sampled_csr: the gradient of a csr weight, only where values are stored:
// dvalues[p] = sum_m dy[m, row(p)] * x[m, col(p)], fp32 sums for both element types.
//
// x and dy are rewritten 64 rows at a time as fp32 panels [K][64] and [N][64] (zeros past M). A
// task is an n-block: for each 64 rows, its segments in stored order, dy of the row in registers,
// 16 stored values at a time, whose 16 vectors of partial sums are added across in a transpose.
// Each value belongs to one task and rows come in order: no races, one order of additions.
namespace sc {

// fp32 panel [columns][64] of rows [m, m + 64) of x, columns [k0, k1), zeros past M.
template <class T>
inline void pack_floats(const T* x, int64_t ldx, int64_t M, int64_t m, int64_t k0, int64_t k1,
                        float* panel) {
  for (int64_t k = k0; k < k1; k += 16)
    for (int64_t i = 0; i < 64; ++i)
      for (int64_t j = k; j < std::min(k1, k + 16); ++j)
        panel[j * 64 + i] = m + i < M ? to_float(x[(m + i) * ldx + j]) : 0.f;
}

template <class E, int R, int LD>
void sampled_csr(const typename E::T* dy, int64_t ldy, const typename E::T* x, int64_t ldx,
                 int64_t M, const CsrWeight& w, float* dvalues, int num_threads) {
  constexpr int V = 64 / VL, PER = E::per_unit;
  const int64_t n_blocks = (w.N + LD - 1) / LD, per_block = num_k_blocks<E>(w) * (LD / R);
  // One column more than K, zero: the padding half of the last pair of an odd K.
  const int64_t columns = w.K + 1, rows = n_blocks * LD;
  const Scratch memory = scratch(4 * 64 * (columns + rows));
  float* const xs = (float*)memory.get();
  float* const dys = xs + 64 * columns;
  std::memset(xs + 64 * w.K, 0, 64 * 4);
  std::memset(dys + 64 * w.N, 0, size_t(64 * 4 * (rows - w.N)));
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  for (int64_t m = 0; m < std::max<int64_t>(M, 1); m += 64) {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < w.K; k += 64)
      pack_floats(x, ldx, M, m, k, std::min(w.K, k + 64), xs);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < w.N; n += 64)
      pack_floats(dy, ldy, M, m, n, std::min(w.N, n + 64), dys);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n_blocks * per_block; ++i) {
      const Segment s = w.segments[i];
      for (int r = 0; r < R; ++r) {
        const float* dy_row = dys + 64 * (i / per_block * LD + s.group * R + r);
        vf<VL> d[V];
        for (int v = 0; v < V; ++v) d[v] = load<VL>(dy_row + v * VL);
        for (int j = 0; j < s.count * PER; j += 16) {
          vf<VL> dot[16];
          for (int e = 0; e < 16; ++e) {
            const int at = std::min(j + e, s.count * PER - 1);
            const float* column = xs + 64 * (int64_t(w.cols[s.start + at / PER]) * PER + at % PER);
            dot[e] = d[0] * load<VL>(column);
            for (int v = 1; v < V; ++v) dot[e] = fma<VL>(d[v], load<VL>(column + v * VL), dot[e]);
          }
          float sums[16];
          reduce16(dot, sums);
          for (int e = 0; e < std::min(16, s.count * PER - j); ++e) {
            const int64_t p = s.start + (j + e) / PER;
            float* out = dvalues + (p * R + r) * PER + (j + e) % PER;
            *out = (m == 0 ? 0.f : *out) + sums[e];
          }
        }
      }
    }
  }
}

}  // namespace sc

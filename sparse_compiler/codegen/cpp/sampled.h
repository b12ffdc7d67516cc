// sampled_csr: the gradient of a csr weight, only where values are stored:
// dvalues[p] = sum_m dy[m, row(p)] * x[m, col(p)], fp32 sums for both element types.
//
// x is rewritten once as fp32 panels [tiles of 64 rows][K + 1][64] (zeros past M), shared by all
// threads. Each thread owns a stretch of n-blocks with its share of the values and walks them once
// per tile, tile outermost: the panel of a tile stays in L2, the values stream past it. Of an
// n-block, dy becomes a panel [LD][64]; then its segments in stored order, dy of the row in
// registers, 16 values at a time, whose 16 vectors of partial sums are added across in a transpose.
// Each value belongs to one thread and rows come in order: no races, one order of additions.
namespace sc {

// fp32 panel [k1 - k0][64] of rows [m, m + 64) and columns [k0, k1) of x, zeros past M.
template <class T>
inline void pack_floats(const T* x, int64_t ldx, int64_t M, int64_t m, int64_t k0, int64_t k1,
                        float* panel) {
  alignas(64) float rows[VL * VL];
  for (int64_t k = k0; k < k1; k += VL) {
    const int64_t columns = std::min<int64_t>(VL, k1 - k);
    alignas(64) float turned[VL * VL];
    for (int64_t i = 0; i < 64; i += VL) {
      for (int64_t r = 0; r < VL; ++r)
        for (int64_t j = 0; j < VL; ++j)
          rows[r * VL + j] =
              j < columns && m + i + r < M ? to_float(x[(m + i + r) * ldx + k + j]) : 0.f;
      transpose<VL>((const char*)rows, 4 * VL, VL - 1, (char*)turned, 4 * VL);
      for (int64_t j = 0; j < columns; ++j)
        store<VL>(panel + (k - k0 + j) * 64 + i, load<VL>(turned + j * VL));
    }
  }
}

// First n-block of thread i of n: the threads get equal numbers of stored units.
inline int64_t first_block(const CsrWeight& w, int64_t n_blocks, int64_t per_block, int i, int n) {
  if (i == n) return n_blocks;
  const Segment last = w.segments[n_blocks * per_block - 1];
  const int64_t wanted = (int64_t(last.start) + last.count) * i / n;
  int64_t block = 0;
  while (block < n_blocks && w.segments[block * per_block].start < wanted) ++block;
  return block;
}

// Adds the gradients of one segment's values in one row of its group.
template <class E, int R>
inline void sample_row(Segment s, const uint16_t* cols, const float* dy_row, const float* panel,
                       float* out, bool first) {
  constexpr int V = 64 / VL, PER = E::per_unit;
  vf<VL> d[V];
  for (int v = 0; v < V; ++v) d[v] = load<VL>(dy_row + v * VL);
  const int count = s.count * PER;
  const auto dot = [&](int j) __attribute__((always_inline)) {
    const float* column = panel + 64 * (int64_t(cols[s.start + j / PER]) * PER + j % PER);
    vf<VL> sum = d[0] * load<VL>(column);
    for (int v = 1; v < V; ++v) sum = fma<VL>(d[v], load<VL>(column + v * VL), sum);
    return sum;
  };
  for (int j = 0; j < count; j += 16) {
    const int some = std::min(16, count - j);
    vf<VL> dots[16];
    if (some == 16) {
#pragma GCC unroll 16
      for (int e = 0; e < 16; ++e) dots[e] = dot(j + e);
    } else {
      for (int e = 0; e < some; ++e) dots[e] = dot(j + e);
      for (int e = some; e < 16; ++e) dots[e] = vf<VL>{};
    }
    float sums[16];
    reduce16(dots, sums);
    for (int e = 0; e < some; ++e) {
      float* const at = out + ((s.start + (j + e) / PER) * int64_t(R)) * PER + (j + e) % PER;
      *at = first ? sums[e] : *at + sums[e];
    }
  }
}

// Adds one tile's share to the gradients of one n-block.
template <class E, int R, int LD>
inline void sample_block(const typename E::T* dy, int64_t ldy, int64_t M, const CsrWeight& w,
                         int64_t tile, int64_t block, const float* panel, float* dys,
                         float* dvalues) {
  const int64_t n0 = block * LD, n1 = std::min(w.N, n0 + LD);
  const int64_t per_block = num_k_blocks<E>(w) * (LD / R);
  pack_floats(dy, ldy, M, 64 * tile, n0, n1, dys);
  std::memset(dys + 64 * (n1 - n0), 0, size_t(64 * 4 * (n0 + LD - n1)));
  for (int64_t i = block * per_block; i < (block + 1) * per_block; ++i) {
    const Segment s = w.segments[i];
    for (int r = 0; r < R; ++r)
      sample_row<E, R>(s, w.cols, dys + 64 * (s.group * R + r), panel, dvalues + r * E::per_unit,
                       tile == 0);
  }
}

template <class E, int R, int LD>
void sampled_csr(const typename E::T* dy, int64_t ldy, const typename E::T* x, int64_t ldx,
                 int64_t M, const CsrWeight& w, float* dvalues, int num_threads) {
  constexpr int64_t CHUNK = 128;
  const int64_t n_blocks = (w.N + LD - 1) / LD, per_block = num_k_blocks<E>(w) * (LD / R);
  // Without rows all gradients are zero, which one tile of zeros gives.
  const int64_t tiles = std::max<int64_t>(1, (M + 63) / 64);
  const int64_t chunks = (w.K + CHUNK - 1) / CHUNK;
  // One column more than K, zero: the padding half of the last pair of an odd K.
  const int64_t panel_size = 64 * (w.K + 1);
  if (n_blocks * per_block == 0) return;
  const Scratch memory = scratch(4 * tiles * panel_size);
  float* const panels = (float*)memory.get();
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles * chunks; ++i) {
      const int64_t tile = i / chunks, k0 = i % chunks * CHUNK, k1 = std::min(w.K, k0 + CHUNK);
      float* const panel = panels + tile * panel_size;
      pack_floats(x, ldx, M, 64 * tile, k0, k1, panel + 64 * k0);
      if (k1 == w.K) std::memset(panel + 64 * w.K, 0, 64 * 4);
    }
    // A share is one iteration, whoever runs it: OpenMP may give fewer threads than asked for.
#pragma omp for schedule(static, 1) nowait
    for (int share = 0; share < num_threads; ++share) {
      const int64_t begin = first_block(w, n_blocks, per_block, share, num_threads);
      const int64_t end = first_block(w, n_blocks, per_block, share + 1, num_threads);
      const Scratch own = scratch(4 * 64 * LD);
      float* const dys = (float*)own.get();
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t block = begin; block < end; ++block)
          sample_block<E, R, LD>(dy, ldy, M, w, tile, block, panels + tile * panel_size, dys,
                                 dvalues);
    }
  }
}

}  // namespace sc

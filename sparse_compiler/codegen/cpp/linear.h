// linear_csr: y[m, n] = sum_k x[m, k] * w[n, k] with a csr weight; entry point and task loop.
//
// M = 1 goes to gemv.h. Otherwise all threads pack x into panels, then take (tile, n-block) tasks,
// tile outermost: the panel of a tile (K x 64) stays in L2 while the weights stream past it. A task
// walks the k-blocks, accumulating in y [NB][width] scratch, and hands 16 finished rows of x at a
// time to epilogue(m_start, m_end, n_start, n_end, const float* tile /*[m_end - m_start][NB]*/).
// M_STATIC >= 0 promises M, so that only the widths needed are compiled. NB = LD.
namespace sc {

// Runs body(std::integral_constant<int, W>) for the width of the tile.
template <int64_t M_STATIC, class Body>
inline void with_width(int width, Body&& body) {
  if constexpr (uses_width(M_STATIC, 64))
    if (width == 64) body(std::integral_constant<int, 64>());
  if constexpr (uses_width(M_STATIC, 32))
    if (width == 32) body(std::integral_constant<int, 32>());
  if constexpr (uses_width(M_STATIC, 16))
    if (width == 16) body(std::integral_constant<int, 16>());
  if constexpr (uses_width(M_STATIC, 8))
    if (width == 8) body(std::integral_constant<int, 8>());
  if constexpr (uses_width(M_STATIC, 4))
    if (width == 4) body(std::integral_constant<int, 4>());
}

// Packs all panels, shared by the threads of the enclosing parallel region; ends in a barrier.
template <class E>
inline void pack_panels(const typename E::T* x, int64_t ldx, Tiling tiles, int64_t K, float* panels,
                        int* nonfinite) {
  constexpr int64_t CHUNK = 128;
  const int64_t units = units_of<E>(K), chunks = (units + CHUNK - 1) / CHUNK;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < tiles.size() * chunks; ++i) {
    const Tile tile = tiles[i / chunks];
    const int64_t k0 = i % chunks * CHUNK, k1 = std::min(units, k0 + CHUNK);
    if (pack_panel<E>(x, ldx, tiles.M, K, tile, k0, k1, panels + tile.m * units))
      __atomic_store_n(nonfinite, 1, __ATOMIC_RELAXED);
  }
}

template <class E, int R, int LD, int64_t M_STATIC = -1, class Epilogue>
void linear_csr(const typename E::T* x, int64_t ldx, int64_t M, const CsrWeight& w, int num_threads,
                Epilogue&& epilogue) {
  static_assert(LD % 16 == 0 && LD % R == 0 && LD / R < 65536);
  if constexpr (M_STATIC >= 0) M = M_STATIC;
  if (M == 0 || w.N == 0) return;
  if constexpr (M_STATIC < 0 || M_STATIC == 1) {
    if (M == 1) return gemv_csr<E, R, LD>(x, w, num_threads, epilogue);
  }
  if constexpr (M_STATIC != 1) {
    const Tiling tiles{M};
    const int64_t units = units_of<E>(w.K), n_blocks = (w.N + LD - 1) / LD;
    const int64_t k_blocks = num_k_blocks<E>(w);
    const Scratch panel_memory = scratch(4 * units * tiles.rows());
    float* panels = (float*)panel_memory.get();
    int nonfinite = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
      const Scratch memory = scratch(4 * LD * 64);
      float* y = (float*)memory.get();
      pack_panels<E>(x, ldx, tiles, w.K, panels, &nonfinite);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < tiles.size() * n_blocks; ++i) {
        const Tile tile = tiles[i / n_blocks];
        const int64_t block = i % n_blocks;
        with_width<M_STATIC>(tile.width, [&](auto width) {
          if (k_blocks == 0) std::memset(y, 0, sizeof(float) * LD * width);
          for (int64_t kb = 0; kb < k_blocks; ++kb) {
            const Segment* segments = w.segments + (block * k_blocks + kb) * (LD / R);
            multiply_block<E, R, width>((const float*)w.values, w.cols + segments[0].start,
                                        segments, LD / R, panels + tile.m * units, y, kb == 0);
          }
        });
        const auto fix = [&](int64_t m, int64_t n0, int64_t n1, float* row) {
          if (nonfinite) fix_csr_row<E, R, LD>(x + m * ldx, w, n0, n1, row);
        };
        finish_tile<LD>(y, tile, M, block * LD, std::min(w.N, (block + 1) * LD), fix, epilogue);
      }
    }
  }
}

}  // namespace sc

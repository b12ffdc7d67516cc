// linear_bitmap: y[m, n] = sum_k x[m, k] * w[n, k] with a bitmap weight; entry point, M >= 9.
//
// M <= 8 with AVX-512 goes to bitmap_expand.h. Otherwise tasks are (n-block, up to 4 tiles of x):
// for each k-block the bits of NB rows become column lists in L1 scratch, one segment a row, and
// the panel kernel of csr runs on them for each tile, so that decoding is paid once for 256 rows of
// x. fp32 values are used where they lie; bf16 values are copied as filled pairs.
// y [tiles][NB][width] stays in L2 until the last k-block. NB = LD.
namespace sc {

template <class E, int NB, int64_t M_STATIC, class Epilogue>
void bitmap_panels(const typename E::T* x, int64_t ldx, int64_t M, const BitmapWeight& w,
                   int num_threads, Epilogue&& epilogue) {
  using T = typename E::T;
  constexpr int64_t CHUNK = 4;  // tiles of x that share one decoding
  constexpr int WORDS = E::per_unit, PER_WORD = 64 / E::per_unit, LIST = NB * 64 + 64;
  const Tiling tiles{M};
  const int64_t n_tiles = tiles.size(), chunks = (n_tiles + CHUNK - 1) / CHUNK;
  const int64_t units = units_of<E>(w.K), n_blocks = (w.N + NB - 1) / NB;
  const int64_t k_blocks = bitmap_k_blocks<E>(w);
  const Scratch panel_memory = scratch(4 * units * tiles.rows());
  float* panels = (float*)panel_memory.get();
  int nonfinite = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    const Scratch y_memory = scratch(4 * NB * 64 * std::min(CHUNK, n_tiles));
    const Scratch list_memory = scratch(6 * LIST);
    float* const y = (float*)y_memory.get();
    float* const pairs = (float*)list_memory.get();
    uint16_t* const cols = (uint16_t*)(pairs + LIST);
    Segment segments[NB];
    pack_panels<E>(x, ldx, tiles, w.K, panels, &nonfinite);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < chunks * n_blocks; ++i) {
      const int64_t t0 = i / n_blocks * CHUNK, t1 = std::min(n_tiles, t0 + CHUNK);
      const int64_t block = i % n_blocks, n0 = block * NB, n1 = std::min(w.N, n0 + NB);
      const uint64_t* bits = w.bits + block * k_blocks * NB * WORDS;
      const T* from = (const T*)w.values + w.start[block];
      for (int64_t kb = 0; kb < k_blocks; ++kb, bits += NB * WORDS) {
        const float* values = E::per_unit == 1 ? (const float*)from : pairs;
        int listed = 0;
        for (int n = 0; n < int(n1 - n0); ++n) {
          const int start = listed;
          for (int j = 0; j < WORDS; ++j)
            listed += decode_word<E>(bits[n * WORDS + j], int(kb * 64 + j * PER_WORD), from,
                                     cols + listed, pairs + listed);
          segments[n] = {start, uint16_t(listed - start), uint16_t(n)};
        }
        for (int64_t t = t0; t < t1; ++t)
          with_width<M_STATIC>(tiles[t].width, [&](auto width) {
            multiply_block<E, 1, width>(values, cols, segments, int(n1 - n0),
                                        panels + tiles[t].m * units, y + (t - t0) * NB * 64,
                                        kb == 0);
          });
      }
      const auto fix = [&](int64_t m, int64_t a, int64_t b, float* row) {
        if (nonfinite) fix_bitmap_row<E, NB>(x + m * ldx, w, a, b, row);
      };
      for (int64_t t = t0; t < t1; ++t)
        finish_tile<NB>(y + (t - t0) * NB * 64, tiles[t], M, n0, n1, fix, epilogue);
    }
  }
}

template <class E, int LD, int64_t M_STATIC = -1, class Epilogue>
void linear_bitmap(const typename E::T* x, int64_t ldx, int64_t M, const BitmapWeight& w,
                   int num_threads, Epilogue&& epilogue) {
  static_assert(LD % 16 == 0 && LD <= 1024);
  if constexpr (M_STATIC >= 0) M = M_STATIC;
  if (M == 0 || w.N == 0) return;
#if SC_ISA == 512
  if constexpr (can_expand<E> && M_STATIC <= 8) {
    if (M <= 8) return bitmap_expand<E, LD, M_STATIC>(x, ldx, M, w, num_threads, epilogue);
  }
#endif
  if constexpr (!can_expand<E> || M_STATIC < 0 || M_STATIC > 8)
    bitmap_panels<E, LD, M_STATIC>(x, ldx, M, w, num_threads, epilogue);
}

}  // namespace sc

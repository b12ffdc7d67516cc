// Bitmap weight x few rows of x (M <= 8): load as sparse, compute as dense (AVX-512).
//
// The values of 16 columns (bf16: 32) are expanded inside a register by 16 (32) bits of the map, so
// the cost is that of a dense row at the bytes of a sparse one. x of a k-block stays in registers
// for all rows of an n-block; each row has one vector of sums for each row of x, in L1.
// M = 5..8 are two passes over the n-block, the second one from L2.
// Zeros are multiplied like any value: NaN and infinities need no care here.
namespace sc {

#if SC_ISA == 512 && defined(__AVX512VBMI2__) && defined(__AVX512BF16__)
template <class E>
constexpr bool can_expand = true;
#elif SC_ISA == 512
template <class E>
constexpr bool can_expand = E::per_unit == 1;
#else
template <class E>
constexpr bool can_expand = false;
#endif

#if SC_ISA == 512
// For each 8 bits, the lane of the packed values that every column takes.
struct ExpandLanes {
  uint8_t of[256][8];
  constexpr ExpandLanes() : of() {
    for (int bits = 0; bits < 256; ++bits)
      for (int column = 0, lane = 0; column < 8; ++column)
        of[bits][column] = uint8_t(bits >> column & 1 ? lane++ : 0);
  }
};
alignas(64) static constexpr ExpandLanes expand_lanes;

// The next 16 (bf16: 32) columns of a row, zeros where a bit is clear. fp32 goes through a table
// and permutes, since vpexpandd takes 5 cycles on Zen 4 and far more from memory; for bf16, 32
// columns at once, the table does not pay, but load and expansion are kept apart all the same.
template <class E>
inline vf<16> expand(uint64_t bits, const typename E::T* values) {
  if constexpr (E::per_unit == 1) {
    const auto eight = [](uint32_t mask, const float* from) __attribute__((always_inline)) {
      const __m256i lanes = _mm256_cvtepu8_epi32(
          _mm_loadl_epi64((const __m128i*)expand_lanes.of[mask]));
      return _mm256_maskz_permutexvar_ps(__mmask8(mask), lanes, _mm256_loadu_ps(from));
    };
    const uint32_t low = bits & 0xff, high = bits >> 8 & 0xff;
    return (vf<16>)_mm512_insertf32x8(_mm512_castps256_ps512(eight(low, values)),
                                      eight(high, values + __builtin_popcount(low)), 1);
  } else {
#if defined(__AVX512VBMI2__)
    __m512i v = _mm512_loadu_si512(values);
    asm("" : "+v"(v));
    return (vf<16>)_mm512_maskz_expand_epi16(__mmask32(bits), v);
#endif
  }
}

// One n-block of `rows` rows x MR rows of x: out [MR][NB]. x_word(m, i): x[m] at word i, padded.
template <class E, int NB, int MR, class XWord>
inline void expand_block(const uint64_t* bits, const typename E::T* values, int64_t k_blocks,
                         int rows, XWord&& x_word, float* out) {
  constexpr int WORDS = E::per_unit, STEP = 16 * E::per_unit, PARTS = 4 / E::per_unit;
  vf<16> sums[NB][MR] = {};
  for (int64_t kb = 0; kb < k_blocks; ++kb, bits += NB * WORDS) {
    vf<16> xs[WORDS][PARTS][MR];
    for (int i = 0; i < WORDS; ++i)
      for (int part = 0; part < PARTS; ++part)
        for (int m = 0; m < MR; ++m)
          xs[i][part][m] = load<16>(x_word(m, kb * WORDS + i) + part * STEP);
    for (int r = 0; r < rows; ++r) {
      vf<16> acc[MR];
      for (int m = 0; m < MR; ++m) acc[m] = sums[r][m];
      __builtin_prefetch((const char*)values + 2048);
      __builtin_prefetch((const char*)values + 2048 + 64);
#pragma GCC unroll 2
      for (int i = 0; i < WORDS; ++i) {
        const uint64_t word = bits[r * WORDS + i];
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; ++part) {
          // Counted from the whole word, so that addresses do not wait for one another.
          const uint64_t before = part == 0 ? 0 : word & ((uint64_t(1) << (part * STEP)) - 1);
          const vf<16> w =
              expand<E>(word >> (part * STEP), values + __builtin_popcountll(before));
          for (int m = 0; m < MR; ++m) acc[m] = mac<E, 16>(w, xs[i][part][m], acc[m]);
        }
        values += __builtin_popcountll(word);
      }
      for (int m = 0; m < MR; ++m) sums[r][m] = acc[m];
    }
  }
  for (int r = 0; r < NB; r += 16)
    for (int m = 0; m < MR; ++m) {
      vf<16> of_row[16];
      for (int i = 0; i < 16; ++i) of_row[i] = sums[r + i][m];
      reduce16(of_row, out + m * NB + r);
    }
}

template <class E, int NB, int64_t M_STATIC, class Epilogue>
void bitmap_expand(const typename E::T* x, int64_t ldx, int64_t M, const BitmapWeight& w,
                   int num_threads, Epilogue&& epilogue) {
  using T = typename E::T;
  // The last, partial word of each row of x, and the word past it that an odd count of bf16 reads.
  T tail[8][64] = {}, zeros[64] = {};
  for (int64_t m = 0; m < M; ++m)
    std::memcpy(tail[m], x + m * ldx + w.K / 64 * 64, size_t(w.K % 64) * sizeof(T));
  const int64_t blocks = (w.N + NB - 1) / NB, k_blocks = bitmap_k_blocks<E>(w);
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1) if (num_threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    alignas(64) float out[8 * NB];
    const int64_t n0 = block * NB, n1 = std::min(w.N, n0 + NB);
    const auto pass = [&](auto rows_of_x, int64_t m0) {
      const auto x_word = [&](int m, int64_t word) __attribute__((always_inline)) -> const T* {
        // Rows past M repeat the last one; their outputs are not handed over.
        const int64_t row = std::min(m0 + m, M - 1);
        if (word < w.K / 64) return x + row * ldx + 64 * word;
        return word == w.K / 64 ? tail[row] : zeros;
      };
      expand_block<E, NB, rows_of_x>(w.bits + block * k_blocks * NB * E::per_unit,
                                     (const T*)w.values + w.start[block], k_blocks, int(n1 - n0),
                                     x_word, out + m0 * NB);
    };
    if constexpr (M_STATIC < 0 || M_STATIC == 1)
      if (M == 1) pass(std::integral_constant<int, 1>(), 0);
    if constexpr (M_STATIC < 0 || M_STATIC == 2)
      if (M == 2) pass(std::integral_constant<int, 2>(), 0);
    if constexpr (M_STATIC < 0 || M_STATIC > 2)
      for (int64_t m = 0; M > 2 && m < M; m += 4) pass(std::integral_constant<int, 4>(), m);
    epilogue(int64_t(0), M, n0, n1, (const float*)out);
  }
}
#endif

}  // namespace sc

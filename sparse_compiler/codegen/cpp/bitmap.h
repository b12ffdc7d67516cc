// The bitmap weight [N, K]: one bit an element plus the packed non-zeros; for about 40-75 % zeros.
//
// Rows are cut into n-blocks of NB, columns into k-blocks of 64 units, i.e. WORDS = 1 (fp32) or 2
// (bf16) words of bits. Bits and values lie in the order n-block, k-block, row, column, so that
// every kernel reads one forward stream and meets x of a k-block once for NB rows.
//   bits   uint64 [n-blocks][k-blocks][NB][WORDS], bit j of word i = element 64 i + j is stored
//   values elements in the order of the bits, 64 bytes of padding behind the last
//   start  [n-blocks + 1], first element of each n-block
// Half the bytes of csr at 50 % zeros. Here: the format, its non-finite rule, and the decoding of
// 64 bits to the lists (cols, and for bf16 filled pairs) that the csr kernels run on.
namespace sc {

struct BitmapWeight {
  int64_t N, K;          // output and input features, in elements
  const uint64_t* bits;  // [ceil(N / NB)][ceil(K / (64 * WORDS))][NB][WORDS]
  const void* values;    // [start[n-blocks]] elements
  const int32_t* start;  // [ceil(N / NB) + 1]
};

template <class E>
inline int64_t bitmap_k_blocks(const BitmapWeight& w) {
  return (w.K + 64 * E::per_unit - 1) / (64 * E::per_unit);
}

template <class E, int NB>
__attribute__((noinline)) void fix_bitmap_row(const typename E::T* x, const BitmapWeight& w,
                                              int64_t n0, int64_t n1, float* y) {
  constexpr int64_t WORDS = E::per_unit;
  const uint64_t* bits = w.bits + n0 * bitmap_k_blocks<E>(w) * WORDS;
  fix_row<E, NB>(x, w.K, n0, n1, y, [&](int64_t* stored) {
    for (int64_t k = 0; k < w.K; ++k) {
      if (!std::isinf(to_float(x[k]))) continue;
      const int64_t kb = k / (64 * WORDS), word = k / 64 % WORDS;
      for (int64_t n = 0; n < n1 - n0; ++n)
        stored[n] += bits[(kb * NB + n) * WORDS + word] >> (k % 64) & 1;
    }
  });
}

// Lists the units stored in one word of bits: appends their columns (from `unit` on) to cols and,
// for bf16, the filled pairs to `pairs`; advances `values`. Returns how many. May write 64 entries
// past the end of either list.
template <class E>
inline int decode_word(uint64_t word, int unit, const typename E::T*& values, uint16_t* cols,
                       float* pairs) {
  int count = 0;
  if constexpr (E::per_unit == 1) {
    count = __builtin_popcountll(word);
    values += count;
  }
#if SC_ISA == 512 && defined(__AVX512VBMI2__)
  alignas(64) static constexpr struct Iota {
    uint8_t at[64];
    constexpr Iota() : at() {
      for (int i = 0; i < 64; ++i) at[i] = uint8_t(i);
    }
  } iota;
  const __m512i base = _mm512_set1_epi16(short(unit));
  if constexpr (E::per_unit == 1) {
    const __m512i at = _mm512_maskz_compress_epi8(word, _mm512_load_si512(iota.at));
    const __m256i low = _mm512_castsi512_si256(at), high = _mm512_extracti64x4_epi64(at, 1);
    _mm512_storeu_si512(cols, _mm512_add_epi16(base, _mm512_cvtepu8_epi16(low)));
    _mm512_storeu_si512(cols + 32, _mm512_add_epi16(base, _mm512_cvtepu8_epi16(high)));
  } else {
    const uint64_t even = 0x5555555555555555u;
    const uint32_t kept = uint32_t(_pext_u64(word | word >> 1, even));
    const __m256i at = _mm256_maskz_compress_epi8(kept, _mm256_load_si256((const __m256i*)iota.at));
    _mm512_storeu_si512(cols, _mm512_add_epi16(base, _mm512_cvtepu8_epi16(at)));
    for (int half = 0; half < 2; ++half) {
      const uint32_t bits = uint32_t(word >> (32 * half));
      const __mmask16 units = __mmask16(kept >> (16 * half));
      const __m512i dense = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(values));
      _mm512_storeu_si512(pairs + count, _mm512_maskz_compress_epi32(units, dense));
      values += __builtin_popcount(bits);
      count += __builtin_popcount(units);
    }
  }
#else
  if constexpr (E::per_unit == 1) {
    for (int i = 0; word; ++i, word &= word - 1)
      cols[i] = uint16_t(unit + __builtin_ctzll(word));
  } else {
    while (word) {
      const int pair = __builtin_ctzll(word) / 2;
      uint32_t bits = 0;
      if (word >> (2 * pair) & 1) bits = *values++;
      if (word >> (2 * pair) & 2) bits |= uint32_t(*values++) << 16;
      __builtin_memcpy(pairs + count, &bits, 4);
      cols[count++] = uint16_t(unit + pair);
      word &= ~(uint64_t(3) << (2 * pair));
    }
  }
#endif
  return count;
}

}  // namespace sc

// Transposes of L x L blocks of 32-bit lanes, L = 4, 8, 16, in registers.
//
// Used twice: packing x [rows][k] into panels [k][rows], and turning finished accumulators
// [outputs][rows] into the row-major tile the epilogue reads. Strides are in bytes, since a row of
// bf16 may start at any even address. `last` is the last source row that exists: rows past it read
// that row again, so that a ragged edge costs nothing (its lanes are never looked at).
namespace sc {

template <int L>
inline void transpose(const char* src, int64_t src_stride, int64_t last, char* dst,
                      int64_t dst_stride) {
  const auto row = [&](int64_t i) { return src + std::min<int64_t>(i, last) * src_stride; };
#if SC_ISA == 512
  if constexpr (L == 16) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(row(i));
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
      const __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
      r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
      r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
      r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
      r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
      r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    }
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(dst + i * dst_stride, r[i]);
    return;
  }
#endif
#if SC_ISA >= 256
  if constexpr (L == 8) {
    __m256 r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps((const float*)row(i));
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
      r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
      r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
      r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      float* low = (float*)(dst + i * dst_stride);
      float* high = (float*)(dst + (4 + i) * dst_stride);
      _mm256_storeu_ps(low, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
      _mm256_storeu_ps(high, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
    }
    return;
  }
  if constexpr (L == 4) {
    __m128 a = _mm_loadu_ps((const float*)row(0)), b = _mm_loadu_ps((const float*)row(1));
    __m128 c = _mm_loadu_ps((const float*)row(2)), d = _mm_loadu_ps((const float*)row(3));
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps((float*)dst, a);
    _mm_storeu_ps((float*)(dst + dst_stride), b);
    _mm_storeu_ps((float*)(dst + 2 * dst_stride), c);
    _mm_storeu_ps((float*)(dst + 3 * dst_stride), d);
    return;
  }
#endif
  for (int i = 0; i < L; ++i) {
    const char* from = row(i);
    for (int k = 0; k < L; ++k)
      __builtin_memcpy(dst + k * dst_stride + 4 * i, from + 4 * k, 4);
  }
}

}  // namespace sc

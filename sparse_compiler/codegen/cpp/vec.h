// Vectors of 32-bit *units* and the two element types.
//
// A unit is one fp32 element, or two neighbouring bf16 elements (k, k + 1): both fill one 32-bit
// lane, so every kernel moves units without knowing what is inside, and only `mac` differs
// (an fma, or a bf16 pair dot product). Units travel in float vectors as raw bits.
//
// SC_ISA: 512 = AVX-512 F/BW/DQ/VL, 256 = AVX2 + FMA, 0 = GCC vector extensions only.
// Order of inclusion: vec.h, transpose.h, panel.h, multiply.h, csr.h, gemv.h, linear.h; then, where
// used, bitmap.h, bitmap_expand.h, bitmap_linear.h; sampled.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#if SC_ISA >= 256
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sc {

template <class S, int L>
struct VecOf {
  typedef S type __attribute__((vector_size(sizeof(S) * L)));
};
template <int L>
using vf = typename VecOf<float, L>::type;
template <int L>
using vu = typename VecOf<uint32_t, L>::type;

#if SC_ISA == 512
constexpr int VL = 16;
#elif SC_ISA == 256
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

struct F32 {
  using T = float;
  using Bits = uint32_t;
  static constexpr int per_unit = 1;
  static constexpr Bits inf = 0x7f800000u;
};

struct BF16 {
  using T = uint16_t;
  using Bits = uint16_t;
  static constexpr int per_unit = 2;
  static constexpr Bits inf = 0x7f80u;
};

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

template <int L>
inline vf<L> load(const void* p) {
  vf<L> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <int L>
inline void store(void* p, vf<L> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Broadcast of one unit; integer arithmetic, because its bits may be two bf16.
template <int L>
inline vf<L> splat(const void* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return (vf<L>)(vu<L>{} + bits);
}

// Broadcasts of four neighbouring units, by one load and four shuffles: the panel kernels are bound
// by loads, and a broadcast from memory costs them as much as a whole vector.
template <int L>
inline void splat4(const void* p, vf<L>* w) {
#if SC_ISA == 512
  if constexpr (L == 16) {
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps((const float*)p));
    w[0] = (vf<L>)_mm512_permute_ps(four, 0x00);
    w[1] = (vf<L>)_mm512_permute_ps(four, 0x55);
    w[2] = (vf<L>)_mm512_permute_ps(four, 0xaa);
    w[3] = (vf<L>)_mm512_permute_ps(four, 0xff);
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) w[i] = splat<L>((const char*)p + 4 * i);
}

// -ffp-contract=off is in force, so the fused operation has to be asked for.
template <int L>
inline vf<L> fma(vf<L> a, vf<L> b, vf<L> c) {
#if SC_ISA == 512
  if constexpr (L == 16) return (vf<L>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if SC_ISA >= 256
  if constexpr (L == 8) return (vf<L>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (L == 4) return (vf<L>)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
#endif
  return a * b + c;
}

// acc + the product of two units, lane by lane.
template <class E, int L>
inline vf<L> mac(vf<L> a, vf<L> b, vf<L> acc) {
  if constexpr (E::per_unit == 1) {
    return fma<L>(a, b, acc);
  } else {
#if SC_ISA == 512 && defined(__AVX512BF16__)
    if constexpr (L == 16)
      return (vf<L>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
    if constexpr (L == 8)
      return (vf<L>)_mm256_dpbf16_ps((__m256)acc, (__m256bh)a, (__m256bh)b);
    if constexpr (L == 4) return (vf<L>)_mm_dpbf16_ps((__m128)acc, (__m128bh)a, (__m128bh)b);
#endif
    const vu<L> ua = (vu<L>)a, ub = (vu<L>)b;
    acc = fma<L>((vf<L>)(ua << 16), (vf<L>)(ub << 16), acc);
    return fma<L>((vf<L>)(ua & 0xffff0000u), (vf<L>)(ub & 0xffff0000u), acc);
  }
}

// Sum of the lanes.
template <int L>
inline float reduce(vf<L> v) {
#if SC_ISA == 512
  if constexpr (L == 16) return _mm512_reduce_add_ps((__m512)v);
#endif
  if constexpr (L == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    vf<L / 2> low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, (const char*)&v + sizeof(low), sizeof(high));
    return reduce<L / 2>(low + high);
  }
}

// Sums of the lanes of 16 vectors of VL.
inline void reduce16(const vf<VL>* v, float* sums) {
#if SC_ISA == 512
  __m512 t[8], u[4], s[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i)
    s[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
  _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[1], 0x88),
                                       _mm512_shuffle_f32x4(s[0], s[1], 0xdd)));
#else
  for (int i = 0; i < 16; ++i) sums[i] = reduce<VL>(v[i]);
#endif
}

// Whether any of n elements is NaN or infinite.
template <class E>
inline bool any_nonfinite(const typename E::T* x, int64_t n) {
  using Bits = typename E::Bits;
  constexpr int L = VL * E::per_unit;
  typename VecOf<Bits, L>::type bad = {}, v;
  int64_t k = 0;
  for (; k + L <= n; k += L) {
    __builtin_memcpy(&v, x + k, sizeof(v));
    bad |= (typename VecOf<Bits, L>::type)((v & E::inf) == E::inf);
  }
  Bits any = 0;
  for (; k < n; ++k) {
    Bits bits;
    __builtin_memcpy(&bits, x + k, sizeof(bits));
    any |= Bits((bits & E::inf) == E::inf);
  }
  uint64_t words[sizeof(bad) / 8];
  __builtin_memcpy(words, &bad, sizeof(bad));
  for (uint64_t word : words) any |= Bits(word != 0);
  return any != 0;
}

// Asks for large pages for memory about to be written. A result of 64 MiB comes fresh from the system
// and costs 16384 page faults, a third of the time of a sparse layer that fills it.
inline void large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = uintptr_t(1) << 21;
  const uintptr_t begin = ((uintptr_t)memory + PAGE - 1) & ~(PAGE - 1);
  const uintptr_t end = ((uintptr_t)memory + uintptr_t(bytes)) & ~(PAGE - 1);
  // A hint: where it is refused nothing changes.
  if (begin + PAGE < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<char, Free>;

// Cache-line aligned memory for one call; freed when it goes out of scope.
inline Scratch scratch(int64_t bytes) {
  void* p = std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64 + 64));
  if (p == nullptr) throw std::bad_alloc();
  large_pages(p, bytes);
  return Scratch((char*)p);
}

}  // namespace sc

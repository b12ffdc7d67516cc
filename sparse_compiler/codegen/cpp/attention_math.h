// What the attention kernels share: packing of tiles, dropout, what a call hands over.
//
// Tiles are BLOCK queries x BLOCK keys. Order of inclusion: vec.h, transpose.h, math.h,
// attention_math.h, then what a score is written in, then the kernels.
namespace sc {

constexpr int BLOCK = 64;

// One call. Strides are in elements (batch, head, position); the innermost is 1.
struct Attention {
  int64_t B, H, HKV, M, N;
  const void *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3];
  void* out;
  int64_t out_stride[3];
  float* lse;            // [B, H, M], or nullptr
  const uint8_t* kinds;  // maps [ceil(M / 64)][ceil(N / 64)] of Kind
  int64_t kinds_stride[2];  // batch, head; 0 where one map serves all
  const float* sink;        // an extra logit of each row, or nullptr
  int64_t sink_stride[3];
  float empty;    // value of a row with nothing unmasked: 0 or NaN
  float dropout;  // probability; 0: none
  uint64_t seed;
};

enum Kind : uint8_t { EMPTY = 0, PARTIAL = 1, FULL = 2, OPEN = 3 };

// Whether a score has a form of its own for tiles in which all that leaves decide keeps.
template <class Score>
constexpr bool has_open() {
  if constexpr (requires { Score::has_open; }) return Score::has_open;
  return false;
}

// Tiles whose scores are all below DEAD for products within [-S_BOUND, S_BOUND] count as empty.
constexpr float DEAD = -5000.f, S_BOUND = 4096.f;

// What the kernels compute with for elements E: bf16 stays in pairs where there is an instruction
// for them, and is widened to fp32 while packing where there is none.
#if SC_ISA == 512 && defined(__AVX512BF16__)
template <class E>
using Compute = E;
#else
template <class E>
using Compute = F32;
#endif

// Units of a row of D elements.
template <class C>
constexpr int depth_of(int D) {
  return (D + C::per_unit - 1) / C::per_unit;
}

// `rows` rows of D elements as rows of `ld` >= depth_of<C>(D) units: C = E copies, C = F32 widens.
// A missing half of a last pair becomes 0; units past that, and rows past `rows`, are not written.
template <class E, class C, int D>
inline void pack_rows(const typename E::T* from, int64_t stride, int rows, float* to, int64_t ld) {
  for (int r = 0; r < rows; ++r, from += stride, to += ld) {
    if constexpr (C::per_unit == E::per_unit) {
      if constexpr (D % C::per_unit) to[depth_of<C>(D) - 1] = 0.f;
      std::memcpy(to, from, D * sizeof(*from));
    } else {
      load_some(to, from, D);
    }
  }
}

// Up to BLOCK rows of D elements turned: to [depth_of<C>(D)][BLOCK] units, zeros past `rows`.
// `rows_buffer` is room for BLOCK * padded(depth_of<C>(D)) units.
template <class E, class C, int D>
inline void pack_turned(const typename E::T* from, int64_t stride, int rows, float* to,
                        float* rows_buffer) {
  constexpr int U = depth_of<C>(D), LD = padded(U);
  const char* source = (const char*)from;
  int64_t step = stride * int64_t(sizeof(*from));
  if (rows < BLOCK || C::per_unit != E::per_unit || D % (VL * C::per_unit)) {
    std::memset(rows_buffer, 0, sizeof(float) * BLOCK * LD);
    pack_rows<E, C, D>(from, stride, rows, rows_buffer, LD);
    source = (const char*)rows_buffer;
    step = 4 * LD;
  }
  for (int u = 0; u < U; u += VL) {
    for (int r = 0; r < BLOCK; r += VL) {
      const char* block = source + r * step + 4 * u;
      if (u + VL <= U) {
        transpose<VL>(block, step, VL - 1, (char*)(to + u * BLOCK + r), 4 * BLOCK);
      } else {
        alignas(64) float turned[VL * VL];
        transpose<VL>(block, step, VL - 1, (char*)turned, 4 * VL);
        for (int i = 0; i < U - u; ++i)
          store<VL>(to + (u + i) * BLOCK + r, load<VL>(turned + i * VL));
      }
    }
  }
}

// Up to BLOCK rows of D elements for a product that sums over them: to [BLOCK / per_unit] rows of
// padded(D) units. fp32: rows as they are. bf16: unit d of row i is the pair (row 2 i, row 2 i + 1)
// of element d. Zeros past D and past `rows`.
template <class E, class C, int D>
inline void pack_summed(const typename E::T* from, int64_t stride, int rows, float* to) {
  constexpr int LD = padded(D);
  if (rows < BLOCK || D < LD) std::memset(to, 0, sizeof(float) * (BLOCK / C::per_unit) * LD);
  if constexpr (C::per_unit == 1) {
    pack_rows<E, C, D>(from, stride, rows, to, LD);
  } else {
    static const uint16_t none[D] = {};
    for (int r = 0; r < rows; r += 2, to += LD) {
      const uint16_t *even = from + r * stride, *odd = r + 1 < rows ? even + stride : none;
      int d = 0;
      for (; d + VL <= D; d += VL) {
        const vu<VL> low = (vu<VL>)load_as_float(even + d), high = (vu<VL>)load_as_float(odd + d);
        store<VL>(to + d, (vf<VL>)(low >> 16 | high));
      }
      for (; d < D; ++d) {
        const uint32_t pair = uint32_t(even[d]) | uint32_t(odd[d]) << 16;
        std::memcpy(to + d, &pair, 4);
      }
    }
  }
}

// Dropout keeps weight (b, h, q, k) where mix(row ^ k * 0x9e3779b1) >= p * 2^32 (p as a float, the
// right side rounded down and at most 2^32 - 1), all in 32 bits, with
//   row = mix(mix(mix(mix(seed % 2^32) ^ seed / 2^32) ^ (b * H + h)) ^ q)
//   mix(x): x ^= x >> 16, x *= 0x7feb352d, x ^= x >> 15, x *= 0x846ca68b, x ^= x >> 16
// and multiplies what it keeps by 1 / (1 - p).
template <class U>
inline U mix(U x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;

  explicit Dropout(const Attention& a)
      : seed(a.seed),
        threshold(uint32_t(std::min(double(a.dropout) * 4294967296., 4294967295.))),
        scale(a.dropout < 1.f ? 1.f / (1.f - a.dropout) : 0.f) {}

  uint32_t row(int64_t head, int64_t q) const {
    return mix(mix(mix(mix(uint32_t(seed)) ^ uint32_t(seed >> 32)) ^ uint32_t(head)) ^ uint32_t(q));
  }
  // 0 or `scale` for keys k .. k + VL - 1.
  vf<VL> factor(uint32_t row, int64_t k) const {
    const vu<VL> hash = mix((lane_numbers() + uint32_t(k)) * 0x9e3779b1u ^ row);
    return hash >= threshold ? vf<VL>{} + scale : vf<VL>{};
  }
};

// What the rows of a task end with. A row is its weighted sum of values `o`, relative to the weight
// exp(most) of its largest score, and the sum of its weights.
struct Rows {
  const Attention& a;
  int64_t b, h, q0;

  // The extra logit of a row.
  float sink(int64_t r) const {
    return a.sink == nullptr
               ? -INFINITY
               : a.sink[b * a.sink_stride[0] + h * a.sink_stride[1] + (q0 + r) * a.sink_stride[2]];
  }

  // Whether finite fills might weigh something in a row: the sum of all its weights is so small.
  bool low(int64_t r, float most, float sum) const {
    const float limit = DEAD + 104.f + std::log(float(std::max<int64_t>(a.N, 1)));
    const float extra = sink(r), top = std::max(most, extra);
    if (!(top < limit)) return false;
    return top == -INFINITY ||
           top + std::log(sum * std::exp(most - top) + std::exp(extra - top)) < limit;
  }

  // Writes row r of the result, and its log-sum-exp. `o` has padded(DV) lanes and is overwritten.
  template <class T, int DV>
  void write(int64_t r, float* o, float most, float sum) const {
    const float extra = sink(r);
    float factor = 1.f;
    if (extra != -INFINITY) {
      const float top = std::max(most, extra);
      factor = std::exp(most - top);
      sum = sum * factor + std::exp(extra - top);
      most = top;
    }
    // Added to an empty row: what is not finite in a value stays, since 0 times it is NaN.
    const float shift = sum == 0.f ? a.empty : 0.f;
    factor = sum == 0.f ? 1.f : factor / sum;
    for (int i = 0; i < padded(DV); i += VL) store<VL>(o + i, load<VL>(o + i) * factor + shift);
    const int64_t* const stride = a.out_stride;
    T* const to = (T*)a.out + b * stride[0] + h * stride[1] + (q0 + r) * stride[2];
    store_some(to, o, DV);
    if (a.lse) a.lse[(b * a.H + h) * a.M + q0 + r] = sum == 0.f ? -INFINITY : most + std::log(sum);
  }
};

// -inf past the first `some` lanes.
inline vf<VL> first_lanes(vf<VL> x, int some) {
  return lane_numbers() < uint32_t(some) ? x : vf<VL>{} - INFINITY;
}

}  // namespace sc

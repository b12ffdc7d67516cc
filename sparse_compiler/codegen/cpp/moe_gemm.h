// Rows of tokens times a block of one expert's weights, as they lie in the model's memory.
//
// c[r][n] (+)= sum over k of a[r][k] * w(n, k). Where k is contiguous in w nothing is packed: R rows
// of a and C rows of w are multiplied vector by vector along k, R x C sums in registers, K_BLOCK
// units at a time so that R rows of a stay in L1 while the block of w, which all rows use, stays
// in L2. Up to 4 rows one row of w at a time is streamed past them (dense.h): that is as fast as
// memory. Any other w is copied to a slab in L2 a block at a time: [n][k], or, where there are rows
// enough, [k][n], whose products need no sums across lanes; so are short rows of w, of which those
// sums are a large part.
namespace sc {

// Element (n, k) is data[n * n_stride + k * k_stride].
template <class E>
struct Matrix {
  const typename E::T* data;
  int64_t n_stride, k_stride;
  Matrix turned() const { return {data, k_stride, n_stride}; }
};

constexpr int M_BLOCK = 128;         // rows of a that are multiplied together
constexpr int N_BLOCK = 48;          // rows of w that make a task
constexpr int64_t K_BLOCK = 1024;    // units
constexpr int FEW_ROWS = 4;
constexpr int OUTER_ROWS = 48;
constexpr int64_t OUTER_UNITS = 512;
constexpr int C_PADDING = 16;
constexpr int C_BLOCK = N_BLOCK + C_PADDING;

template <class E>
constexpr int64_t slab_elements() {
  return (N_BLOCK + M_BLOCK) * (K_BLOCK + VL) * E::per_unit;
}

// Columns of sums that a row of a tile takes: C, or the next power of two.
constexpr int padded_columns(int C) { return C <= 2 ? 2 : C <= 4 ? 4 : 8; }

// sums[r * padded_columns(C) + j] = a[r] . b[j]; meanwhile `ahead`, the rows that are next in b's place, are asked
// for, which the processor does not see coming: they lie on other pages.
template <class E, int R, int C, bool AHEAD>
__attribute__((noinline)) void dot_block(const typename E::T* const* a,
                                         const typename E::T* const* b,
                                         const typename E::T* const* ahead, int64_t K,
                                         float* sums) {
  using T = typename E::T;
  constexpr int STEP = VL * E::per_unit, W = padded_columns(C), GROUPS = (R * W + 15) / 16;
  vf<VL> acc[GROUPS * 16] = {};
  int64_t k = 0;
  for (; k + STEP <= K; k += STEP) {
    vf<VL> bs[C];
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) bs[j] = load<VL>(b[j] + k);
    if constexpr (AHEAD)
      for (int j = 0; j < C; ++j) __builtin_prefetch(ahead[j] + k, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf<VL> x = load<VL>(a[r] + k);
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) acc[r * W + j] = mac<E, VL>(x, bs[j], acc[r * W + j]);
    }
  }
  if (k < K) {
    T tail[R + C][STEP] = {};
    for (int i = 0; i < R + C; ++i)
      std::memcpy(tail[i], (i < R ? a[i] : b[i - R]) + k, size_t(K - k) * sizeof(T));
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < C; ++j)
        acc[r * W + j] = mac<E, VL>(load<VL>(tail[r]), load<VL>(tail[R + j]), acc[r * W + j]);
  }
  for (int g = 0; g < GROUPS; ++g) reduce16(acc + 16 * g, sums + 16 * g);
}

// Units of VL columns of w from `from`, rows k and (in bf16) k + 1, `some` of them if not all; what
// is not inside is 0.
inline vu<VL> column_units(const float* from, const float*, int64_t stride, int some) {
  if (stride == 1 && some == VL) return (vu<VL>)load<VL>(from);
  vf<VL> v = {};
  for (int i = 0; i < some; ++i) v[i] = from[i * stride];
  return (vu<VL>)v;
}
inline vu<VL> column_units(const uint16_t* from, const uint16_t* next, int64_t stride, int some) {
  const auto wide = [&](const uint16_t* p) {
    typename VecOf<uint16_t, VL>::type v = {};
    if (p && stride == 1 && some == VL)
      __builtin_memcpy(&v, p, sizeof(v));
    else if (p)
      for (int i = 0; i < some; ++i) v[i] = p[i * stride];
    return __builtin_convertvector(v, vu<VL>);
  };
  return wide(from) | wide(next) << 16;
}

// slab[n][k], rows of `ld`, = w(n0 + n, k0 + k); what is past the block in the last vectors is junk.
template <class E>
void copy_block(Matrix<E> w, int64_t n0, int64_t n1, int64_t k0, int64_t k1, typename E::T* slab,
                int64_t ld) {
  using T = typename E::T;
  constexpr int U = E::per_unit;
  alignas(64) float units[VL][VL];  // [k][n]
  for (int64_t k = k0; k < k1; k += VL * U)
    for (int64_t n = n0; n < n1; n += VL) {
      const int some = int(std::min<int64_t>(VL, n1 - n));
      for (int i = 0; i < VL && k + i * U < k1; ++i) {
        const T* const from = w.data + n * w.n_stride + (k + i * U) * w.k_stride;
        const T* const next = k + i * U + 1 < k1 ? from + w.k_stride : nullptr;
        store<VL>(units[i], (vf<VL>)column_units(from, next, w.n_stride, some));
      }
      transpose<VL>((const char*)units, sizeof(units[0]), VL - 1,
                    (char*)(slab + (n - n0) * ld + (k - k0)), ld * int64_t(sizeof(T)));
    }
}

// units[k][n] = w(n0 + n, k0 + k), rows of N_BLOCK; columns past n1 are 0.
template <class E>
void copy_block_turned(Matrix<E> w, int64_t n0, int64_t n1, int64_t k0, int64_t k1, float* units) {
  using T = typename E::T;
  constexpr int U = E::per_unit;
  const int64_t depth = (k1 - k0 + U - 1) / U;
  alignas(64) float block[VL][VL];
  for (int64_t n = 0; n < N_BLOCK; n += VL) {
    const int some = int(std::clamp<int64_t>(n1 - n0 - n, 0, VL));
    const T* const column = w.data + (n0 + n) * w.n_stride + k0 * w.k_stride;
    if (some == VL && w.k_stride == 1) {
      int64_t k = 0;
      for (; k + VL <= (k1 - k0) / U; k += VL) {
        transpose<VL>((const char*)(column + k * U), w.n_stride * int64_t(sizeof(T)), VL - 1,
                      (char*)block, sizeof(block[0]));
        for (int i = 0; i < VL; ++i)
          std::memcpy(units + (k + i) * N_BLOCK + n, block[i], sizeof(block[i]));
      }
      for (; k < depth; ++k)
        for (int i = 0; i < VL; ++i) {
          const size_t bytes = sizeof(T) * size_t(std::min<int64_t>(U, k1 - k0 - k * U));
          float unit = 0.f;
          std::memcpy(&unit, column + i * w.n_stride + k * U, bytes);
          units[k * N_BLOCK + n + i] = unit;
        }
      continue;
    }
    for (int64_t k = 0; k < depth; ++k) {
      vu<VL> unit = {};
      if (some > 0) {
        const T* const from = column + k * U * w.k_stride;
        const T* const next = k0 + k * U + 1 < k1 ? from + w.k_stride : nullptr;
        unit = column_units(from, next, w.n_stride, some);
      }
      store<VL>(units + k * N_BLOCK + n, (vf<VL>)unit);
    }
  }
}

// `rows` rows of a, elements [k0, k1), as rows of `ld` units; a missing half of a pair is 0.
template <class E>
void copy_rows(const typename E::T* const* a, int rows, int64_t k0, int64_t k1, float* to,
               int64_t ld) {
  for (int r = 0; r < rows; ++r, to += ld) {
    if ((k1 - k0) % E::per_unit) to[ld - 1] = 0.f;
    std::memcpy(to, a[r] + k0, size_t(k1 - k0) * sizeof(**a));
  }
}

template <class E>
constexpr int64_t units_in(int64_t elements) {
  return (elements + E::per_unit - 1) / E::per_unit;
}

// Whether the block of w is better turned, so that whole vectors of columns are summed: for weights
// that lie so, and where rows are many and short, because sums along k are costly to finish.
template <class E>
inline bool outer_form(int rows, Matrix<E> w, int64_t K) {
  if (SC_ISA != 512) return false;
  return w.k_stride != 1 ? rows >= 8 : rows >= OUTER_ROWS && units_in<E>(K) <= OUTER_UNITS;
}

// Columns [n0, n1), at most N_BLOCK, of `rows` rows; `add` keeps what is in c. Rows of c have room for
// C_PADDING more columns, which are overwritten.
template <class E>
void multiply(const typename E::T* const* a, int rows, Matrix<E> w, int64_t n0, int64_t n1,
              int64_t K, float* c, int64_t ldc, bool add, typename E::T* slab) {
  using T = typename E::T;
  constexpr bool WIDE = SC_ISA == 512;
  const int columns = int(n1 - n0);
  if (w.k_stride == 1 && rows <= FEW_ROWS) {
    const auto stream = [&](auto count) {
      constexpr int M = decltype(count)::value;
      for (int j = 0; j < columns; ++j) {
        float sums[M];
        dot_rows<E, M>(a, w.data + (n0 + j) * w.n_stride, K, sums);
        for (int r = 0; r < M; ++r) c[r * ldc + j] = sums[r] + (add ? c[r * ldc + j] : 0.f);
      }
    };
    if (rows == 1) return stream(std::integral_constant<int, 1>());
    if (rows == 2) return stream(std::integral_constant<int, 2>());
    if (rows == 3) return stream(std::integral_constant<int, 3>());
    return stream(std::integral_constant<int, 4>());
  }
  constexpr int64_t BLOCK_K = K_BLOCK * E::per_unit, STEP = VL * E::per_unit;
  const int64_t blocks = (K + BLOCK_K - 1) / BLOCK_K;
  const int64_t depth = (K + blocks * STEP - 1) / (blocks * STEP) * STEP, ld = depth + STEP;
  if (outer_form<E>(rows, w, K)) {
    for (int64_t k0 = 0; k0 < K; k0 += depth) {
      const int64_t k1 = std::min(K, k0 + depth), units = units_in<E>(k1 - k0);
      float* const b = (float*)slab;
      float* const x = b + N_BLOCK * K_BLOCK;
      copy_block_turned<E>(w, n0, n1, k0, k1, b);
      copy_rows<E>(a, rows, k0, k1, x, units);
      gemm_rows<E, WIDE ? 8 : 4, N_BLOCK / VL>(x, units, 1, b, N_BLOCK, c, ldc, rows, int(units),
                                               add || k0 > 0);
    }
    return;
  }
  const T* columns_of[N_BLOCK];
  for (int64_t k0 = 0; k0 < K; k0 += depth) {
    const int64_t k1 = std::min(K, k0 + depth);
    const bool keep = add || k0 > 0;
    if (w.k_stride != 1) copy_block<E>(w, n0, n1, k0, k1, slab, ld);
    for (int j = 0; j < columns; ++j)
      columns_of[j] = w.k_stride == 1 ? w.data + (n0 + j) * w.n_stride + k0 : slab + j * ld;
    // Rows and columns past the end repeat the last one; their sums are dropped.
    const auto tiles = [&](int r0, auto height, auto width) {
      constexpr int R = decltype(height)::value, C = decltype(width)::value;
      const T* x[R];
      for (int r = 0; r < R; ++r) x[r] = a[std::min(r0 + r, rows - 1)] + k0;
      for (int j0 = 0; j0 < columns; j0 += C) {
        const T* y[C];
        for (int j = 0; j < C; ++j) y[j] = columns_of[std::min(j0 + j, columns - 1)];
        constexpr int W = padded_columns(C);
        alignas(64) float sums[(R * W + 15) / 16 * 16];
        if (r0 == 0 && w.k_stride == 1) {
          const T* next[C];
          for (int j = 0; j < C; ++j) next[j] = y[j] + C * w.n_stride;
          dot_block<E, R, C, true>(x, y, next, k1 - k0, sums);
        } else {
          dot_block<E, R, C, false>(x, y, y, k1 - k0, sums);
        }
        // Whole vectors: behind the C columns are zeros, which change nothing that is kept.
        for (int r = 0; r < std::min(R, rows - r0); ++r) {
          float* const to = c + (r0 + r) * ldc + j0;
          const vf<W> sum = load<W>(sums + r * W);
          store<W>(to, keep ? sum + load<W>(to) : sum);
        }
      }
      return r0 + R;
    };
    using Four = std::integral_constant<int, 4>;
    int r = 0;
    if constexpr (WIDE)
      while (rows - r > 4)
        r = tiles(r, std::integral_constant<int, 8>(), std::integral_constant<int, 3>());
    while (r < rows) r = tiles(r, Four(), std::integral_constant<int, WIDE ? 6 : 2>());
  }
}

}  // namespace sc

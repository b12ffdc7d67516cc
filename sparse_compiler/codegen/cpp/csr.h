// The csr weight [N, K] and its non-finite rule.
//
// Groups of R consecutive rows share one list of unit columns (R = 1: unstructured; 4, 8, 16:
// block-sparse). Rows are cut into n-blocks of NB, columns into k-blocks of KB units; a segment is
// what one group stores in one k-block. Segments lie in memory in the order the panel kernels read
// them: n-block, k-block, then by descending length, so that weights are one forward stream.
//   values   [units][R], R weights of one unit column
//   cols     [units], unit column in [0, K units)
//   segments [n-blocks][k-blocks][NB / R], groups past N with count 0
namespace sc {

struct CsrWeight {
  int64_t N, K;             // output and input features, in elements
  const void* values;       // [units][R] units
  const uint16_t* cols;     // [units], unit column
  const Segment* segments;  // [ceil(N / NB)][ceil(K units / KB)][NB / R]
  int64_t KB;               // units in a k-block
};

template <class E>
inline int64_t num_k_blocks(const CsrWeight& w) {
  return ((w.K + E::per_unit - 1) / E::per_unit + w.KB - 1) / w.KB;
}

inline bool is_nonzero(float w) { return w != 0; }
inline bool is_nonzero(uint16_t w) { return (w & 0x7fff) != 0; }

// 0 * Inf and 0 * NaN are NaN, and the kernels skip the zeros: one row of outputs made what dense
// gives. A NaN in x reaches every output; an infinity at k every output whose weight at k is zero.
// `count_stored(stored)` adds, for each n, the infinities of x that meet a non-zero weight of n.
template <class E, int NB, class Count>
inline void fix_row(const typename E::T* x, int64_t K, int64_t n0, int64_t n1, float* y,
                    Count&& count_stored) {
  int64_t infinities = 0;
  bool nan = false;
  for (int64_t k = 0; k < K; ++k) {
    const float v = to_float(x[k]);
    nan |= std::isnan(v);
    infinities += std::isinf(v);
  }
  if (!nan && infinities == 0) return;
  int64_t stored[NB] = {};
  if (!nan) count_stored(stored);
  for (int64_t n = n0; n < n1; ++n)
    if (nan || stored[n - n0] != infinities)
      y[n - n0] = std::numeric_limits<float>::quiet_NaN();
}

template <class E, int R, int NB>
__attribute__((noinline)) void fix_csr_row(const typename E::T* x, const CsrWeight& w, int64_t n0,
                                           int64_t n1, float* y) {
  const auto* values = (const typename E::T*)w.values;
  const int64_t per_block = num_k_blocks<E>(w) * (NB / R);
  fix_row<E, NB>(x, w.K, n0, n1, y, [&](int64_t* stored) {
    for (int64_t i = n0 / NB * per_block; i < (n0 / NB + 1) * per_block; ++i) {
      const Segment s = w.segments[i];
      for (int64_t j = 0; j < int64_t(s.count) * R * E::per_unit; ++j) {
        const int64_t p = s.start + j / (R * E::per_unit), r = j / E::per_unit % R;
        const int64_t k = int64_t(w.cols[p]) * E::per_unit + j % E::per_unit;
        stored[s.group * R + r] += k < w.K && std::isinf(to_float(x[k])) &&
                                   is_nonzero(values[int64_t(s.start) * R * E::per_unit + j]);
      }
    }
  });
}

}  // namespace sc

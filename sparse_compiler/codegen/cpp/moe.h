// What the mixture-of-experts kernels share: a call, and the pairs sorted by expert.
//
// A pair is a token and one of its choices, number t * K + k. `order` lists the pairs of expert 0,
// then those of expert 1, and so on, in their own order; `place` is the inverse, -1 for a pair of
// no expert. Activations are never sorted themselves: products read a token's row where it lies.
#include <vector>
namespace sc {

template <class E>
struct Moe {
  using T = typename E::T;
  int64_t tokens, choices, experts, features, hidden, out_features, passthrough;
  bool gates_on_input;
  const T* x;
  int64_t x_stride;
  const int64_t* ids;    // [tokens][choices]
  const float* gates;    // [tokens][choices]
  std::vector<Matrix<E>> inner, outer;  // part by part, expert by expert: (n, k) = (out, in)
  const T* inner_bias[2];               // [experts][hidden], nullptr: none
  int64_t inner_bias_stride[2];
  const T* outer_bias;  // [experts][out_features], nullptr: none
  int64_t outer_bias_stride;

  const T* row(int64_t pair) const { return x + pair / choices * x_stride; }
  bool passes(int64_t pair) const {
    return ids[pair] >= experts && ids[pair] < experts + passthrough;
  }
};

struct Routing {
  std::vector<int64_t> start;  // [experts + 1], into order
  std::vector<int64_t> order, place;
  std::vector<int64_t> hit;  // experts with pairs

  int64_t count(int64_t expert) const { return start[expert + 1] - start[expert]; }
};

// Counting sort of pairs [first, last): counts of each thread's share, then their places.
template <class E>
Routing route(const Moe<E>& m, int64_t first, int64_t last, int threads) {
  const int64_t pairs = last - first;
  if (pairs < 8192) threads = 1;
  Routing found;
  found.start.assign(m.experts + 1, 0);
  found.order.resize(pairs);
  found.place.resize(pairs);
  std::vector<int64_t> next(threads * m.experts, 0);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int i = 0; i < threads; ++i)
    for (int64_t p = first + pairs * i / threads; p < first + pairs * (i + 1) / threads; ++p)
      if (m.ids[p] >= 0 && m.ids[p] < m.experts) ++next[i * m.experts + m.ids[p]];
  int64_t total = 0;
  for (int64_t e = 0; e < m.experts; ++e) {
    found.start[e] = total;
    for (int i = 0; i < threads; ++i) {
      const int64_t count = next[i * m.experts + e];
      next[i * m.experts + e] = total;
      total += count;
    }
    if (total > found.start[e]) found.hit.push_back(e);
  }
  found.start[m.experts] = total;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int i = 0; i < threads; ++i)
    for (int64_t p = first + pairs * i / threads; p < first + pairs * (i + 1) / threads; ++p) {
      const bool one = m.ids[p] >= 0 && m.ids[p] < m.experts;
      const int64_t place = one ? next[i * m.experts + m.ids[p]]++ : -1;
      found.place[p - first] = place;
      if (one) found.order[place] = p;
    }
  return found;
}

// The pieces that a width is cut into.
inline int64_t blocks_of(int64_t width) { return (width + N_BLOCK - 1) / N_BLOCK; }

// body(expert, n0, n1) for every expert that has rows and every block of `width` columns, on all
// threads of the enclosing parallel region; ends in a barrier.
template <class Body>
inline void for_blocks(const std::vector<int64_t>& experts, int64_t width, Body&& body) {
  const int64_t blocks = blocks_of(width);
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < int64_t(experts.size()) * blocks; ++i) {
    const int64_t n0 = i % blocks * N_BLOCK;
    body(experts[i / blocks], n0, std::min(width, n0 + N_BLOCK));
  }
}

template <class T>
inline void add_scaled(float* sums, const T* from, float factor) {
  store<VL>(sums, fma<VL>(load_as_float(from), vf<VL>{} + factor, load<VL>(sums)));
}

// out[t] = the sum over k, in order, of rows[place[t, k]], plus factor(pair) * through[t] for pairs
// that pass their token through.
template <class E, class Factor>
inline void combine(const Moe<E>& m, const Routing& routing, int64_t t0, int64_t t1,
                    const float* rows, int64_t width, const typename E::T* through,
                    int64_t through_stride, Factor&& factor, typename E::T* out) {
#pragma omp for schedule(static)
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t n = 0; n < width; n += VL) {
      const int some = int(std::min<int64_t>(VL, width - n));
      alignas(64) float sums[VL] = {}, row[VL];
      const auto accumulate = [&](const auto* from, float factor) {
        if (some < VL) return load_some(row, from, some), add_scaled(sums, row, factor);
        add_scaled(sums, from, factor);
      };
      for (int64_t k = 0; k < m.choices; ++k) {
        const int64_t pair = t * m.choices + k, place = routing.place[pair - t0 * m.choices];
        if (place >= 0)
          accumulate(rows + place * width + n, 1.f);
        else if (m.passes(pair))
          accumulate(through + t * through_stride + n, factor(pair));
      }
      store_some(out + t * width + n, sums, some);
    }
}

}  // namespace sc

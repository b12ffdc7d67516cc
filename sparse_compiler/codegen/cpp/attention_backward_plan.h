// What the gradients of attention need to know before the first product, and how the work is cut.
//
// Two passes: over the keys (is something not finite?), and over the queries (delta = the sum of
// dO * out over a row; which tiles of queries have to be computed with all keys). Then the key
// tiles of each kv head are cut into chunks with about equal numbers of tiles to compute. The share
// of a chunk in dQ is a tile of memory for each tile of queries that it meets. The cut depends on
// the sizes and on which tiles are empty and on nothing else: threads do not change results.
//
// After attention_math.h; then attention_backward.h.
#include <vector>

namespace sc {

// Gradients of one call, whose Attention holds the `out` and `lse` that the forward pass gave.
struct AttentionGrad {
  const void* grad_out;  // [B, H, M, DV]
  int64_t grad_out_stride[3];
  void *dq, *dk, *dv;  // like q, k, v; dk and dv are sums over the query heads of a group
  int64_t dq_stride[3], dk_stride[3], dv_stride[3];
  float* dsink;  // [B, H, M] contiguous, what each row contributes; or nullptr
  float* dleaf;  // [B, H, M, N] contiguous, d loss / d leaf; or nullptr
};

struct BackwardPlan {
  int64_t group, q_tiles, k_tiles;  // query heads of a kv head; tiles of one head
  // [B, H, q_tiles * BLOCK]. A weight is exp(score - lse - rest); lse = inf: the row has none.
  std::vector<float> lse, rest, delta;
  std::vector<uint8_t> dense;      // [B, H, q_tiles]: to be computed with all keys
  int64_t chunks = 0, shares = 0;  // chunks of each kv head; tiles of memory for dQ
  std::vector<int64_t> first;      // [B, HKV, chunks + 1]: key tiles where chunks begin
  std::vector<int64_t> share;      // [B, HKV, chunks, group, q_tiles]: tile of memory, -1: none
};

template <class T>
inline T* row_of(T* base, const int64_t* stride, int64_t b, int64_t h, int64_t position) {
  return base + b * stride[0] + h * stride[1] + position * stride[2];
}

template <class E, int N>
inline float inner_product(const typename E::T* x, const typename E::T* y) {
  vf<VL> sum{};
  int i = 0;
  for (; i + VL <= N; i += VL) sum = fma<VL>(load_as_float(x + i), load_as_float(y + i), sum);
  float rest = 0.f;
  for (; i < N; ++i) rest += to_float(x[i]) * to_float(y[i]);
  return reduce<VL>(sum) + rest;
}

template <class Score>
inline Kind kind_of(const Attention& a, const BackwardPlan& p, int64_t b, int64_t h, int64_t qt,
                   int64_t kt) {
  if (p.dense[(b * a.H + h) * p.q_tiles + qt]) return PARTIAL;
  const uint8_t* const map = a.kinds + b * a.kinds_stride[0] + h * a.kinds_stride[1];
  const Kind kind = Kind(map[qt * p.k_tiles + kt]);
  if (kind == OPEN) return PARTIAL;
  // The score of full tiles has lost the leaf it could be differentiated by.
  return Score::leaf_grad && kind == FULL ? PARTIAL : kind;
}

// For each kv head whether a key or value is not finite, and the square of its largest key's norm.
template <class E, int D, int DV, class Score>
void look_at_keys(const Attention& a, std::vector<uint8_t>& not_finite,
                  std::vector<float>& largest, int num_threads) {
  using T = typename E::T;
  const int64_t tiles = (a.N + BLOCK - 1) / BLOCK, heads = a.B * a.HKV;
  std::vector<uint8_t> bad(heads * tiles);
  std::vector<float> most(heads * tiles);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t i = 0; i < heads * tiles; ++i) {
    const int64_t b = i / tiles / a.HKV, h = i / tiles % a.HKV, n0 = i % tiles * BLOCK;
    for (int64_t n = n0; n < std::min(a.N, n0 + BLOCK); ++n) {
      const T* const key = row_of((const T*)a.k, a.k_stride, b, h, n);
      const T* const value = row_of((const T*)a.v, a.v_stride, b, h, n);
      bad[i] |= any_nonfinite<E>(key, D) || any_nonfinite<E>(value, DV);
      if (Score::needs_bound) most[i] = std::max(most[i], squared_norm(key, D));
    }
  }
  not_finite.assign(heads, 0);
  largest.assign(heads, 0.f);
  for (int64_t i = 0; i < heads * tiles; ++i) {
    not_finite[i / tiles] |= bad[i];
    largest[i / tiles] = std::max(largest[i / tiles], most[i]);
  }
}

// lse and rest of the rows below `lowest` in tile i of queries, from all their scores. A float near
// a fill of -1e9 has no digits left for the logarithm of the number of keys, so lse becomes the
// largest score and rest the logarithm of the sum.
template <class E, int D, class Score>
void split_lse(const Attention& a, const Score& score, BackwardPlan& p, int64_t i, float lowest) {
  using C = Compute<E>;
  using T = typename E::T;
  constexpr int LD = padded(D);
  constexpr float INF = std::numeric_limits<float>::infinity();
  constexpr float LEAST = std::numeric_limits<float>::lowest();
  const int64_t b = i / p.q_tiles / a.H, h = i / p.q_tiles % a.H, m0 = i % p.q_tiles * BLOCK;
  const int queries = int(std::min<int64_t>(BLOCK, a.M - m0));
  const Scratch memory = scratch(4 * BLOCK * (3 * LD + BLOCK));
  float* const s = (float*)memory.get();
  float *const q = s + BLOCK * BLOCK, *const turned = q + BLOCK * LD;
  float* const room = turned + BLOCK * LD;
  float most[BLOCK], sum[BLOCK];
  for (int r = 0; r < queries; ++r) {
    most[r] = a.sink == nullptr ? LEAST : *row_of(a.sink, a.sink_stride, b, h, m0 + r);
    sum[r] = a.sink != nullptr;
  }
  pack_rows<E, C, D>(row_of((const T*)a.q, a.q_stride, b, h, m0), a.q_stride[2], queries, q, LD);
  for (int64_t n0 = 0; n0 < a.N; n0 += BLOCK) {
    const int keys = int(std::min<int64_t>(BLOCK, a.N - n0));
    pack_turned<E, C, D>(row_of((const T*)a.k, a.k_stride, b, h / p.group, n0), a.k_stride[2], keys,
                         turned, room);
    gemm<BLOCK / VL, C>(q, LD, 1, turned, BLOCK, s, BLOCK, queries, depth_of<C>(D), false);
    for (int r = 0; r < queries; ++r) {
      float* const row = s + r * BLOCK;
      vf<VL> top = vf<VL>{} + most[r], total{};
      for (int k = 0; k < keys; k += VL)
        store<VL>(row + k, score.template forward<false>(load<VL>(row + k), b, h, m0 + r, n0 + k,
                                                         std::min(VL, keys - k)));
      std::fill(row + keys, row + BLOCK, -INF);
      for (int k = 0; k < keys; k += VL) top = larger<VL>(top, load<VL>(row + k));
      sum[r] *= std::exp(most[r] - largest<VL>(top));
      most[r] = largest<VL>(top);
      for (int k = 0; k < keys; k += VL) total += exp<VL>(load<VL>(row + k) - most[r]);
      sum[r] += reduce<VL>(total);
    }
  }
  for (int r = 0; r < queries; ++r) {
    float& lse = p.lse[i * BLOCK + r];
    if (!(lse < lowest)) continue;
    lse = most[r];
    p.rest[i * BLOCK + r] = std::log(sum[r]);
  }
}

// delta, dsink, and which tiles of queries need all keys: those with a row whose skipped weights
// are not zero, or with something that is not finite, because 0 times that is NaN for every key.
template <class E, int D, int DV, class Score>
void look_at_queries(const Attention& a, const AttentionGrad& g, const Score& score,
                     BackwardPlan& p, int num_threads) {
  using T = typename E::T;
  constexpr float INF = std::numeric_limits<float>::infinity();
  constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
  const float lowest = DEAD + 104.f + std::log(float(std::max<int64_t>(a.N, 1)));
  const int64_t tiles = a.B * a.H * p.q_tiles;
  std::vector<uint8_t> not_finite;
  std::vector<float> largest;
  look_at_keys<E, D, DV, Score>(a, not_finite, largest, num_threads);
  p.dense.assign(tiles, 0);
  p.lse.assign(tiles * BLOCK, 0.f);
  p.rest.assign(tiles * BLOCK, 0.f);
  p.delta.assign(tiles * BLOCK, 0.f);
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 4) if (num_threads > 1)
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t b = i / p.q_tiles / a.H, h = i / p.q_tiles % a.H, m0 = i % p.q_tiles * BLOCK;
    const int64_t kv_head = b * a.HKV + h / p.group;
    bool all = not_finite[kv_head], low = false;
    for (int64_t m = m0; m < std::min(a.M, m0 + BLOCK); ++m) {
      const T* const query = row_of((const T*)a.q, a.q_stride, b, h, m);
      const T* const grad = row_of((const T*)g.grad_out, g.grad_out_stride, b, h, m);
      float lse = a.lse[(b * a.H + h) * a.M + m];
      float delta = inner_product<E, DV>(grad, row_of((const T*)a.out, a.out_stride, b, h, m));
      // An infinite sum meets an infinite term of its own sign, or was one of both signs.
      if (!(std::fabs(delta) < INF)) delta = NOT_A_NUMBER;
      if (lse == -INF && a.empty == 0.f) {
        lse = INF;
      } else {
        if (!(std::fabs(lse) < INF)) lse = NOT_A_NUMBER;
        all |= lse != lse;
        low |= Score::finite_fill && lse < lowest;
      }
      all |= delta != delta || any_nonfinite<E>(query, D) || any_nonfinite<E>(grad, DV);
      if (Score::needs_bound)
        all |= !(squared_norm(query, D) * largest[kv_head] <= 0.999f * S_BOUND * S_BOUND);
      p.lse[i * BLOCK + (m - m0)] = lse;
      p.delta[i * BLOCK + (m - m0)] = delta;
    }
    p.dense[i] = all || low;
    if (low) split_lse<E, D>(a, score, p, i, lowest);
    if (g.dsink == nullptr) continue;
    for (int64_t m = m0; m < std::min(a.M, m0 + BLOCK); ++m) {
      const int64_t r = i * BLOCK + (m - m0);
      const float x = *row_of(a.sink, a.sink_stride, b, h, m) - p.lse[r] - p.rest[r];
      g.dsink[(b * a.H + h) * a.M + m] = -std::exp(x) * p.delta[r];
    }
  }
}

// Cuts into enough chunks for some 32 threads, and few enough that the shares of dQ take at most
// about 8 times its memory.
template <class Score>
void cut_keys(const Attention& a, BackwardPlan& p, int num_threads) {
  constexpr int64_t TASKS = 64, SHARES = 8, FREE_SHARES = 1024;
  const int64_t heads = a.B * a.HKV, stripe = p.group * p.q_tiles;
  if (heads == 0 || p.k_tiles == 0) return;
  const auto kind = [&](int64_t head, int64_t s, int64_t kt) {
    const int64_t h = head % a.HKV * p.group + s / p.q_tiles;
    return kind_of<Score>(a, p, head / a.HKV, h, s % p.q_tiles, kt);
  };
  std::vector<int64_t> counts(heads * (p.k_tiles + 1));  // tiles of a head before each key tile
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t head = 0; head < heads; ++head) {
    int64_t* const before = counts.data() + head * (p.k_tiles + 1);
    for (int64_t s = 0; s < stripe; ++s)
      for (int64_t kt = 0; kt < p.k_tiles; ++kt) before[kt + 1] += kind(head, s, kt) != EMPTY;
    for (int64_t kt = 0; kt < p.k_tiles; ++kt) before[kt + 1] += before[kt];
  }
  p.chunks = std::min(p.k_tiles, (TASKS + heads - 1) / heads);
  for (;; p.chunks = (p.chunks + 1) / 2) {
    p.first.assign(heads * (p.chunks + 1), 0);
    p.share.assign(heads * p.chunks * stripe, -1);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t* const before = counts.data() + head * (p.k_tiles + 1);
      int64_t* const first = p.first.data() + head * (p.chunks + 1);
      for (int64_t c = 1; c < p.chunks; ++c)
        first[c] = std::lower_bound(before, before + p.k_tiles,
                                    before[p.k_tiles] * c / p.chunks) - before;
      first[p.chunks] = p.k_tiles;
      for (int64_t c = 0; c < p.chunks; ++c)
        for (int64_t s = 0; s < stripe; ++s)
          for (int64_t kt = first[c]; kt < first[c + 1]; ++kt)
            if (kind(head, s, kt) != EMPTY) p.share[(head * p.chunks + c) * stripe + s] = 0;
    }
    p.shares = 0;
    for (int64_t& share : p.share)
      if (share == 0) share = p.shares++;
    if (p.chunks == 1 || p.shares <= SHARES * heads * stripe + FREE_SHARES) return;
  }
}

}  // namespace sc

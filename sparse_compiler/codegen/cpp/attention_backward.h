// The gradients of masked attention, softmax(score(q k^T)) v over the tiles that are not empty.
//
// Five products a tile of 64 queries and 64 keys, with P = exp(score - lse) computed again:
//   S = Q K^T;  dP = dO V^T;  dV += P^T dO;  dS = P (dP - delta) slope;  dK += dS^T Q;  dQ += dS K
// A task is one kv head and a chunk of its key tiles. K, V, dK and dV of a few key tiles at a time
// stay in L2, while the tiles of queries of all heads of the group pass by. The share
// of a chunk in dQ goes to memory of its own; a last pass adds the shares in the order of chunks.
//
// Of a partial tile, blocks of 16 x 16 where P is zero are left out of the four products behind S:
// nearly half of the blocks of a causal diagonal.
namespace sc {

// f(begin, end, mask) for each stretch of equal masks that are not zero.
template <class F>
inline void stretches(const int (&masks)[4], F&& f) {
  for (int i = 0, end; i < 4; i = end) {
    for (end = i + 1; end < 4 && masks[end] == masks[i];) ++end;
    if (masks[i] != 0) f(i, end, masks[i]);
  }
}

// A matrix [BLOCK][BLOCK] as bf16 pairs of rows, [BLOCK / 2][BLOCK].
inline void pair_rows(const float* from, float* to) {
  uint16_t even[VL], odd[VL];
  for (int r = 0; r < BLOCK; r += 2)
    for (int i = 0; i < BLOCK; i += VL) {
      store_bf16(even, load<VL>(from + r * BLOCK + i));
      store_bf16(odd, load<VL>(from + (r + 1) * BLOCK + i));
      const vu<VL> low = (vu<VL>)load_as_float(even), high = (vu<VL>)load_as_float(odd);
      store<VL>(to + r / 2 * BLOCK + i, (vf<VL>)(low >> 16 | high));
    }
}

template <class C, int D, int DV>
struct KeyTile {
  static constexpr int PER = C::per_unit;
  alignas(64) float k_turned[depth_of<C>(D) * BLOCK];
  float v_turned[depth_of<C>(DV) * BLOCK], k[BLOCK / PER * padded(D)];
  float dk[BLOCK * padded(D)], dv[BLOCK * padded(DV)];
};

// The buffers of a task: C is what the products compute with.
template <class E, int D, int DV, class Score, class C = Compute<E>>
struct BackwardTile {
  using T = typename E::T;
  static constexpr int PER = C::per_unit, LD = padded(D), LDV = padded(DV);
  static constexpr int NV = BLOCK / VL, SV = 16 / VL;  // vectors of a tile's row; of a block's
  static constexpr int KEY_TILES = std::max(1, std::min(4, 512 / std::max(LD, LDV)));

  KeyTile<C, D, DV> key_tiles[KEY_TILES];
  // Rows of a tile of queries as summands (pairs of rows, if bf16), and as they are.
  alignas(64) float q[BLOCK / PER * LD], grad[BLOCK / PER * LDV];
  float q_rows[PER == 1 ? 1 : BLOCK * LD], grad_rows[PER == 1 ? 1 : BLOCK * LDV];
  float s[BLOCK * BLOCK], p[BLOCK * BLOCK], ds[BLOCK * BLOCK];
  float p_pairs[PER == 1 ? 1 : BLOCK / 2 * BLOCK], ds_pairs[PER == 1 ? 1 : BLOCK / 2 * BLOCK];
  float ds_rows[PER == 1 ? 1 : BLOCK * BLOCK / 2];
  // The pair of tiles at hand.
  const Score* score;
  int64_t b, h, m0, n0;
  int queries, keys;
  const float *lse, *rest, *delta;
  int blocks[4];  // of each 16 queries, the blocks of 16 keys with weights: a bit each

  void take_keys(KeyTile<C, D, DV>& t, const T* k, int64_t k_stride, const T* v, int64_t v_stride,
                 int count) {
    // The gradients' memory is free until the first product.
    pack_turned<E, C, D>(k, k_stride, count, t.k_turned, t.dk);
    pack_turned<E, C, DV>(v, v_stride, count, t.v_turned, t.dv);
    pack_summed<E, C, D>(k, k_stride, count, t.k);
    std::memset(t.dk, 0, sizeof(t.dk));
    std::memset(t.dv, 0, sizeof(t.dv));
  }

  void take_queries(const T* from, int64_t q_stride, const T* grad_from, int64_t grad_stride) {
    pack_summed<E, C, D>(from, q_stride, queries, q);
    pack_summed<E, C, DV>(grad_from, grad_stride, queries, grad);
    if constexpr (PER == 2) {
      pack_rows<E, C, D>(from, q_stride, queries, q_rows, LD);
      pack_rows<E, C, DV>(grad_from, grad_stride, queries, grad_rows, LDV);
    }
  }

  // P, and in `blocks` a stretch of bits around where it is not zero.
  template <bool FULL>
  void weights(bool all) {
    const int everything = (1 << (keys + 15) / 16) - 1;
    for (int r0 = 0; r0 < BLOCK; r0 += 16) {
      vu<VL> seen[NV] = {};
      for (int r = r0; r < std::min(queries, r0 + 16); ++r) {
        const vf<VL> shift = vf<VL>{} + lse[r];
        for (int v = 0; v < NV && v * VL < keys; ++v) {
          vf<VL> x = load<VL>(s + r * BLOCK + v * VL);
          if constexpr (FULL && Score::trivial)
            x *= Score::scale;
          else
            x = score->template forward<FULL>(x, b, h, m0 + r, n0 + v * VL,
                                              std::min(VL, keys - v * VL));
          x -= shift;
          if (!FULL) x -= rest[r];
          // No weight is above 1, however coarse the lse of large scores is.
          x = exp<VL>(smaller<VL>(vf<VL>{}, x));
          store<VL>(p + r * BLOCK + v * VL, x);
          if (!FULL) seen[v] |= (vu<VL>)x;
        }
      }
      int& bits = blocks[r0 / 16];
      bits = 0;
      for (int v = 0; v < NV; ++v) {
        uint32_t any = 0;
        for (int i = 0; i < VL; ++i) any |= seen[v][i];
        bits |= (any != 0) << v / SV;
      }
      bits &= everything;
      if (FULL || all)
        bits = everything;
      else if (bits != 0)
        bits = (2 << (31 - __builtin_clz(bits))) - (1 << __builtin_ctz(bits));
      if (r0 >= queries) bits = 0;
    }
  }

  // dP of queries [r0, r1) and the key blocks in the mask.
  void grad_weights(const float* v_turned, int r0, int r1, int mask) {
    const float* const a = (PER == 1 ? grad : grad_rows) + r0 * LDV;
    const int first = 16 * __builtin_ctz(mask);
    const auto product = [&](auto n) {
      gemm<decltype(n)::value * SV, C>(a, LDV, 1, v_turned + first, BLOCK, ds + r0 * BLOCK + first,
                                       BLOCK, r1 - r0, depth_of<C>(DV), false);
    };
    switch (__builtin_popcount(mask)) {
      case 1: return product(std::integral_constant<int, 1>{});
      case 2: return product(std::integral_constant<int, 2>{});
      case 3: return product(std::integral_constant<int, 3>{});
      default: return product(std::integral_constant<int, 4>{});
    }
  }

  // dS in place of dP, and what dropout left of P; of the same.
  template <bool FULL>
  void grad_scores(const Dropout& dropout, int64_t head, int r0, int r1, int mask, float* dleaf,
                   int64_t ldleaf) {
    const int begin = __builtin_ctz(mask) * SV;
    const int end = std::min((32 - __builtin_clz(mask)) * SV, vectors(keys));
    for (int r = r0; r < r1; ++r) {
      const vf<VL> shift = vf<VL>{} + delta[r];
      const uint32_t hash = dropout.threshold == 0 ? 0 : dropout.row(head, m0 + r);
      for (int v = begin; v < end; ++v) {
        const int count = std::min(VL, keys - v * VL), i = r * BLOCK + v * VL;
        const int64_t q = m0 + r, key = n0 + v * VL;
        const vf<VL> product = load<VL>(s + i), weight = load<VL>(p + i);
        vf<VL> d = load<VL>(ds + i);
        if (dropout.threshold != 0) {
          const vf<VL> factor = dropout.factor(hash, key);
          d *= factor;
          store<VL>(p + i, weight * factor);
        }
        d = weight * (d - shift);
        // A branch of the score that was not taken passes nothing on, not even NaN.
        const auto passed = [&](vf<VL> slope) { return slope == 0.f ? vf<VL>{} : d * slope; };
        if constexpr (FULL && Score::trivial)
          store<VL>(ds + i, d * Score::scale);
        else
          store<VL>(ds + i, passed(score->template slope<FULL>(product, b, h, q, key, count)));
        if constexpr (Score::leaf_grad) {
          const vf<VL> x = passed(score->template leaf_slope<FULL>(product, b, h, q, key, count));
          if (dleaf != nullptr) std::memcpy(dleaf + r * ldleaf + v * VL, &x, size_t(count) * 4);
        }
      }
    }
  }

  // P and dS as bf16 pairs. What a last pair lacks is zero.
  void narrow() {
    if (queries % 2 == 1) {
      std::memset(p + queries * BLOCK, 0, BLOCK * 4);
      std::memset(ds + queries * BLOCK, 0, BLOCK * 4);
    }
    if (keys % 2 == 1)
      for (int r = 0; r < queries; ++r) ds[r * BLOCK + keys] = 0.f;
    pair_rows(p, p_pairs);
    pair_rows(ds, ds_pairs);
    for (int i = 0; i < BLOCK * BLOCK; i += VL)
      store_bf16((uint16_t*)ds_rows + i, load<VL>(ds + i));
  }

  // All of one pair of tiles.
  template <bool FULL>
  __attribute__((noinline)) void run(KeyTile<C, D, DV>& t, const Dropout& dropout, int64_t head,
                                     bool all, float* dq, float* dleaf, int64_t ldleaf) {
    gemm<NV, C>(PER == 1 ? q : q_rows, LD, 1, t.k_turned, BLOCK, s, BLOCK, queries, depth_of<C>(D),
                false);
    weights<FULL>(all);
    stretches(blocks, [&](int begin, int end, int mask) {
      const int r0 = 16 * begin, r1 = std::min(16 * end, queries);
      grad_weights(t.v_turned, r0, r1, mask);
      grad_scores<FULL>(dropout, head, r0, r1, mask, dleaf, ldleaf);
    });
    if constexpr (PER == 2) narrow();
    const float* const ds_a = PER == 1 ? ds : ds_rows;
    stretches(blocks, [&](int begin, int end, int mask) {
      const int r0 = 16 * begin, r1 = std::min(16 * end, queries);
      const int k0 = 16 * __builtin_ctz(mask), k1 = std::min(16 * (32 - __builtin_clz(mask)), keys);
      gemm<LD / VL, C>(ds_a + (r0 * BLOCK + k0) / PER, BLOCK / PER, 1, t.k + k0 / PER * LD, LD,
                       dq + r0 * LD, LD, r1 - r0, (k1 - k0 + PER - 1) / PER, true);
    });
    int turned[4] = {};
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) turned[j] |= (blocks[i] >> j & 1) << i;
    stretches(turned, [&](int begin, int end, int mask) {
      const int k0 = 16 * begin, count = std::min(16 * end, keys) - k0;
      while (mask != 0) {
        const int low = __builtin_ctz(mask), run = __builtin_ctz(~(mask >> low));
        const int r0 = 16 * low, depth = (std::min(r0 + 16 * run, queries) - r0 + PER - 1) / PER;
        gemm<LDV / VL, C>((PER == 1 ? p : p_pairs) + r0 / PER * BLOCK + k0, 1, BLOCK,
                          grad + r0 / PER * LDV, LDV, t.dv + k0 * LDV, LDV, count, depth, true);
        gemm<LD / VL, C>((PER == 1 ? ds : ds_pairs) + r0 / PER * BLOCK + k0, 1, BLOCK,
                         q + r0 / PER * LD, LD, t.dk + k0 * LD, LD, count, depth, true);
        mask &= ~(((1 << run) - 1) << low);
      }
    });
  }
};

template <class T, int D>
inline void save_rows(const float* x, int rows, T* to, int64_t stride) {
  for (int r = 0; r < rows; ++r) store_some(to + r * stride, x + r * padded(D), D);
}

// One task: the key tiles of a chunk with all their tiles of queries.
template <class E, int D, int DV, class Score>
void backward_chunk(const Attention& a, const AttentionGrad& g, const Score& score,
                    const BackwardPlan& plan, int64_t task, float* shares) {
  using T = typename E::T;
  using Tile = BackwardTile<E, D, DV, Score>;
  const int64_t kv_head = task / plan.chunks, b = kv_head / a.HKV, hk = kv_head % a.HKV;
  const int64_t stripe = plan.group * plan.q_tiles;
  const int64_t* const bounds =
      plan.first.data() + kv_head * (plan.chunks + 1) + task % plan.chunks;
  const int64_t* const share = plan.share.data() + task * stripe;
  const Dropout dropout(a);
  std::vector<uint8_t> met(stripe);
  const Scratch memory = scratch(sizeof(Tile));
  Tile& tile = *(Tile*)memory.get();
  tile.score = &score;
  tile.b = b;
  const auto keys_of = [&](int64_t kt) { return int(std::min<int64_t>(BLOCK, a.N - BLOCK * kt)); };
  for (int64_t first = bounds[0], last; first < bounds[1]; first = last) {
    last = std::min(bounds[1], first + Tile::KEY_TILES);
    for (int64_t kt = first; kt < last; ++kt)
      tile.take_keys(tile.key_tiles[kt - first],
                     row_of((const T*)a.k, a.k_stride, b, hk, BLOCK * kt), a.k_stride[2],
                     row_of((const T*)a.v, a.v_stride, b, hk, BLOCK * kt), a.v_stride[2],
                     keys_of(kt));
    for (int64_t s = 0; s < stripe; ++s) {
      if (share[s] < 0 && g.dleaf == nullptr) continue;
      const int64_t h = tile.h = hk * plan.group + s / plan.q_tiles, qt = s % plan.q_tiles;
      const int64_t m0 = tile.m0 = BLOCK * qt, row = (b * a.H + h) * plan.q_tiles + qt;
      tile.queries = int(std::min<int64_t>(BLOCK, a.M - m0));
      tile.lse = plan.lse.data() + row * BLOCK;
      tile.rest = plan.rest.data() + row * BLOCK;
      tile.delta = plan.delta.data() + row * BLOCK;
      float* const dq = shares + share[s] * BLOCK * Tile::LD;
      bool taken = false;
      for (int64_t kt = first; kt < last; ++kt) {
        tile.n0 = BLOCK * kt;
        tile.keys = keys_of(kt);
        float* dleaf = nullptr;
        if (Score::leaf_grad && g.dleaf != nullptr) {
          dleaf = g.dleaf + ((b * a.H + h) * a.M + m0) * a.N + tile.n0;
          for (int r = 0; r < tile.queries; ++r)
            std::memset(dleaf + r * a.N, 0, size_t(tile.keys) * 4);
        }
        const Kind kind = kind_of<Score>(a, plan, b, h, qt, kt);
        if (kind == EMPTY) continue;
        if (!taken)
          tile.take_queries(row_of((const T*)a.q, a.q_stride, b, h, m0), a.q_stride[2],
                            row_of((const T*)g.grad_out, g.grad_out_stride, b, h, m0),
                            g.grad_out_stride[2]);
        taken = true;
        if (!met[s]) std::memset(dq, 0, BLOCK * Tile::LD * 4);
        met[s] = 1;
        auto& key = tile.key_tiles[kt - first];
        if (kind == FULL)
          tile.template run<true>(key, dropout, b * a.H + h, true, dq, dleaf, a.N);
        else
          tile.template run<false>(key, dropout, b * a.H + h, plan.dense[row], dq, dleaf, a.N);
      }
    }
    for (int64_t kt = first; kt < last; ++kt) {
      const auto& t = tile.key_tiles[kt - first];
      save_rows<T, D>(t.dk, keys_of(kt), row_of((T*)g.dk, g.dk_stride, b, hk, BLOCK * kt),
                      g.dk_stride[2]);
      save_rows<T, DV>(t.dv, keys_of(kt), row_of((T*)g.dv, g.dv_stride, b, hk, BLOCK * kt),
                       g.dv_stride[2]);
    }
  }
}

// dQ of one tile of queries: the sum of what the chunks of its kv head found.
template <class E, int D>
void add_shares(const Attention& a, const AttentionGrad& g, const BackwardPlan& plan, int64_t i,
                const float* shares) {
  constexpr int LD = padded(D);
  using T = typename E::T;
  const int64_t b = i / plan.q_tiles / a.H, h = i / plan.q_tiles % a.H, qt = i % plan.q_tiles;
  const int64_t stripe = plan.group * plan.q_tiles, s = h % plan.group * plan.q_tiles + qt;
  const int64_t* share =
      plan.share.data() + (b * a.HKV + h / plan.group) * plan.chunks * stripe + s;
  const int queries = int(std::min<int64_t>(BLOCK, a.M - BLOCK * qt));
  alignas(64) float sum[BLOCK * LD] = {};
  for (int64_t c = 0; c < plan.chunks; ++c, share += stripe) {
    if (*share < 0) continue;
    const float* const from = shares + *share * BLOCK * LD;
    for (int j = 0; j < queries * LD; j += VL)
      store<VL>(sum + j, load<VL>(sum + j) + load<VL>(from + j));
  }
  save_rows<T, D>(sum, queries, row_of((T*)g.dq, g.dq_stride, b, h, BLOCK * qt), g.dq_stride[2]);
}

template <class E, int D, int DV, class Score>
void attention_backward(const Attention& a, const AttentionGrad& g, const Score& score,
                        int num_threads) {
  BackwardPlan plan;
  plan.group = a.HKV == 0 ? 0 : a.H / a.HKV;
  plan.q_tiles = (a.M + BLOCK - 1) / BLOCK;
  plan.k_tiles = (a.N + BLOCK - 1) / BLOCK;
  look_at_queries<E, D, DV>(a, g, score, plan, num_threads);
  cut_keys<Score>(a, plan, num_threads);
  const Scratch memory = scratch(plan.shares * BLOCK * padded(D) * 4);
  float* const shares = (float*)memory.get();
  const int64_t tasks = a.B * a.HKV * plan.chunks, tiles = a.B * a.H * plan.q_tiles;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1) if (num_threads > 1)
  for (int64_t task = 0; task < tasks; ++task)
    backward_chunk<E, D, DV>(a, g, score, plan, task, shares);
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
  for (int64_t i = 0; i < tiles; ++i) add_shares<E, D>(a, g, plan, i, shares);
}

}  // namespace sc

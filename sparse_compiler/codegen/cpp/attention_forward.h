// attention_forward: softmax(score(q k^T)) v for many queries, over the tiles that are not empty.
//
// Keys and values are packed once, tile by tile (attention_math.h), and looked through for NaN and
// infinities. A task is one tile of BLOCK queries of one head. It takes up to CHUNK tiles of keys
// at a time, and for each ROWS of its queries: all products of these rows and keys, one maximum,
// exp, the weighted sum of values, so that scores stay in L1 and keys and values in L2. Between
// chunks sums are rescaled (online softmax). In partial tiles vectors of keys that are masked for
// all of the ROWS queries are left out like empty tiles.
// Exactness: a query tile is computed densely (every tile PARTIAL) where a skipped weight might not
// be 0: keys or values of its head that are not finite; with finite fills, rows whose scores are
// all so low that a fill counts, or products past the bound that tiles were classified for.
namespace sc {

// Keys and values of some heads, packed: [heads][tiles]. Tiles nobody visits stay unpacked.
template <class E, int D, int DV>
struct PackedHeads {
  using C = Compute<E>;
  using T = typename E::T;
  static constexpr int DEPTH = depth_of<C>(D);
  static constexpr int64_t K_SIZE = DEPTH * BLOCK, V_SIZE = BLOCK / C::per_unit * padded(DV);

  const Attention& a;
  int64_t tiles, first;  // of a head; first head that is here
  Scratch memory;
  float *keys, *values;
  float* norm;        // the largest squared norm of a tile's keys
  uint8_t *ok, *bad;  // packed; not finite

  PackedHeads(const Attention& a, int64_t heads, int64_t tiles)
      : a(a),
        tiles(tiles),
        first(0),
        memory(scratch(heads * tiles * (4 * (K_SIZE + V_SIZE + 1) + 2))),
        keys((float*)memory.get()),
        values(keys + heads * tiles * K_SIZE),
        norm(values + heads * tiles * V_SIZE),
        ok((uint8_t*)(norm + heads * tiles)),
        bad(ok + heads * tiles) {}

  int count(int64_t tile) const { return int(std::min<int64_t>(BLOCK, a.N - tile * BLOCK)); }
  const T* key_rows(int64_t head, int64_t tile) const {
    return (const T*)a.k + head / a.HKV * a.k_stride[0] + head % a.HKV * a.k_stride[1] +
           tile * BLOCK * a.k_stride[2];
  }
  const T* value_rows(int64_t head, int64_t tile) const {
    return (const T*)a.v + head / a.HKV * a.v_stride[0] + head % a.HKV * a.v_stride[1] +
           tile * BLOCK * a.v_stride[2];
  }

  // `buffer` holds BLOCK rows of keys.
  void pack(int64_t head, int64_t tile, float* key, float* value, float* buffer) const {
    pack_turned<E, C, D>(key_rows(head, tile), a.k_stride[2], count(tile), key, buffer);
    pack_summed<E, C, DV>(value_rows(head, tile), a.v_stride[2], count(tile), value);
  }

  // Whether some query of some head that reads these keys visits the tile.
  bool visited(int64_t head, int64_t tile) const {
    const int64_t group = a.H / a.HKV, queries = (a.M + BLOCK - 1) / BLOCK;
    for (int64_t g = 0; g < (a.kinds_stride[1] ? group : 1); ++g) {
      const uint8_t* map = a.kinds + head / a.HKV * a.kinds_stride[0] +
                           (head % a.HKV * group + g) * a.kinds_stride[1] + tile;
      // Most often the diagonal is.
      const int64_t start = tile * queries / tiles;
      for (int64_t i = 0; i < queries; ++i)
        if (map[(start + i) % queries * tiles] != EMPTY) return true;
    }
    return false;
  }

  void prepare(int64_t head, int64_t tile, bool with_norm, float* buffer) {
    const int64_t i = (head - first) * tiles + tile;
    float *key = keys + i * K_SIZE, *value = values + i * V_SIZE;
    ok[i] = visited(head, tile);
    bad[i] = 0;
    if (ok[i]) {
      pack(head, tile, key, value, buffer);
      bad[i] = any_nonfinite<C>((const typename C::T*)key, K_SIZE * C::per_unit) ||
               any_nonfinite<C>((const typename C::T*)value, V_SIZE * C::per_unit);
    } else {
      for (int r = 0; r < count(tile); ++r)
        bad[i] |= any_nonfinite<E>(key_rows(head, tile) + r * a.k_stride[2], D) ||
                  any_nonfinite<E>(value_rows(head, tile) + r * a.v_stride[2], DV);
    }
    if (with_norm) {
      norm[i] = 0.f;
      for (int r = 0; r < count(tile); ++r) {
        const T* row = key_rows(head, tile) + r * a.k_stride[2];
        norm[i] = std::max(norm[i], squared_norm(row, D));
      }
    }
  }

  bool finite(int64_t head) const {
    const uint8_t* flags = bad + (head - first) * tiles;
    return std::find(flags, flags + tiles, 1) == flags + tiles;
  }
  float largest_norm(int64_t head) const {
    const float* norms = norm + (head - first) * tiles;
    return tiles ? *std::max_element(norms, norms + tiles) : 0.f;
  }
};

template <class E, int D, int DV, class Score>
struct ForwardTask {
  using C = Compute<E>;
  using T = typename E::T;
  using Heads = PackedHeads<E, D, DV>;
  static constexpr int ROWS = 16, CHUNK = 8, V = BLOCK / VL, LDO = padded(DV);
  // Scores stay products until exp where all there is to them is a positive factor.
  static constexpr bool RAW = Score::trivial && Score::scale > 0.f;
  struct Part {
    int64_t tile;
    uint8_t kind;
    int begin, end;  // vectors of keys that the rows at hand see
    const float *key, *value;
  };

  const Attention& a;
  const Score& score;
  const Heads& heads;
  const Dropout dropout;
  Scratch memory;
  float *q, *s, *o, *most, *sum;  // [BLOCK][depth], [CHUNK][ROWS][BLOCK], [BLOCK][LDO], [BLOCK] x 2
  float *missing, *buffer;        // room for tiles that are not packed
  bool dense, skipped;            // no tile is to be left out; something was
  int64_t b, h, q0;
  int rows;

  static constexpr int64_t BUFFER = BLOCK * padded(Heads::DEPTH);
  ForwardTask(const Attention& a, const Score& score, const Heads& heads)
      : a(a),
        score(score),
        heads(heads),
        dropout(a),
        memory(scratch(4 * (BLOCK * Heads::DEPTH + CHUNK * ROWS * BLOCK + BLOCK * LDO + 2 * BLOCK +
                            BUFFER + CHUNK * (Heads::K_SIZE + Heads::V_SIZE)))) {
    s = (float*)memory.get();
    o = s + CHUNK * ROWS * BLOCK;
    most = o + BLOCK * LDO;
    sum = most + BLOCK;
    buffer = sum + BLOCK;
    q = buffer + BUFFER;
    missing = q + BLOCK * Heads::DEPTH;
  }

  // Narrows a partial tile to the vectors of keys that some of the rows see: a masked score is the
  // same whatever the product, even NaN. True of scores whose conditions do not ask for the
  // product, as those of trivial ones do not. Whether anything was left out.
  bool narrow(int64_t row, int n, Part& part) const {
    part.begin = 0;
    part.end = V;
    if (!Score::trivial || part.kind == FULL || dense) return false;
    if constexpr (has_open<Score>())
      if (part.kind == OPEN) return narrow_as<OPEN>(row, n, part);
    return narrow_as<PARTIAL>(row, n, part);
  }
  template <int KIND>
  bool narrow_as(int64_t row, int n, Part& part) const {
    const int count = heads.count(part.tile);
    const auto seen = [&](int v) {
      const int some = std::min(VL, count - v * VL);
      for (int r = 0; some > 0 && r < n; ++r) {
        const vf<VL> x = score_of<KIND>(vf<VL>{} + std::numeric_limits<float>::quiet_NaN(),
                                        q0 + row + r, part.tile * BLOCK + v * VL, some);
        if (!all_masked(first_lanes(x, some))) return true;
      }
      return false;
    };
    while (part.end > 0 && !seen(part.end - 1)) --part.end;
    while (part.begin < part.end && !seen(part.begin)) ++part.begin;
    return part.end - part.begin < V;
  }

  static bool all_masked(vf<VL> x) {
    const auto masked = Score::finite_fill ? x < DEAD : x == -INFINITY;
    uint64_t words[sizeof(x) / 8], both = ~uint64_t(0);
    std::memcpy(words, &masked, sizeof(x));
    for (uint64_t word : words) both &= word;
    return both == ~uint64_t(0);
  }

  template <int KIND>
  vf<VL> score_of(vf<VL> product, int64_t query, int64_t key, int some) const {
    if constexpr (KIND == OPEN)
      return score.open(product, b, h, query, key, some);
    else
      return score.template forward<KIND == FULL>(product, b, h, query, key, some);
  }

  // Scores in place of products, and the largest of each row in each lane.
  template <int KIND>
  void evaluate(float* s, int64_t row, int n, const Part& part, vf<VL>* high) const {
    const int count = heads.count(part.tile);
    for (int r = 0; r < n; ++r)
      for (int v = part.begin; v < part.end; ++v) {
        const int some = std::min(VL, count - v * VL);
        vf<VL> x = vf<VL>{} - INFINITY;
        if (some > 0)
          x = first_lanes(score_of<KIND>(load<VL>(s + r * BLOCK + v * VL), q0 + row + r,
                                         part.tile * BLOCK + v * VL, some),
                          some);
        high[r] = larger<VL>(x, high[r]);
        store<VL>(s + r * BLOCK + v * VL, x);
      }
  }

  // The largest product of each row in each lane.
  void largest_products(float* s, int n, const Part& part, vf<VL>* high) const {
    const int count = heads.count(part.tile);
    for (int r = 0; r < n; ++r) {
      if (count < BLOCK) std::fill(s + r * BLOCK + count, s + (r + 1) * BLOCK, -INFINITY);
      for (int v = 0; v < V; ++v) high[r] = larger<VL>(load<VL>(s + r * BLOCK + v * VL), high[r]);
    }
  }

  // Weights of `n` rows in place of their scores, and their sums.
  void weigh(float* s, int64_t row, int n, const Part* parts, int some, const float* base) {
    for (int r = 0; r < n; ++r) {
      const vf<VL> away = vf<VL>{} - base[r];
      const uint32_t hash = a.dropout > 0.f ? dropout.row(b * a.H + h, q0 + row + r) : 0;
      vf<VL> total = {};
      for (int t = 0; t < some; ++t) {
        float* const from = s + t * ROWS * BLOCK + r * BLOCK;
        const auto weight = [&](int v) __attribute__((always_inline)) {
          const vf<VL> x = load<VL>(from + v * VL);
          const vf<VL> shifted = RAW && parts[t].kind == FULL
                                     ? fma<VL>(x, vf<VL>{} + Score::scale, away)
                                     : x + away;
          vf<VL> w = exp<VL>(shifted);
          total += w;
          if (a.dropout > 0.f) w *= dropout.factor(hash, parts[t].tile * BLOCK + v * VL);
          return w;
        };
        if constexpr (C::per_unit == 1) {
          for (int v = parts[t].begin; v < parts[t].end; ++v) store<VL>(from + v * VL, weight(v));
        } else {
          uint16_t* const narrow = (uint16_t*)from;
          for (int v = parts[t].begin; v < parts[t].end; ++v)
            store_bf16(narrow + v * VL, weight(v));
        }
      }
      sum[row + r] += reduce<VL>(total);
    }
  }

  // One chunk of tiles for the rows `row` .. `row + n` of the task.
  void attend(int64_t row, int n, Part* parts, int some, bool first) {
    vf<VL> high[ROWS], products[ROWS];
    for (int r = 0; r < n; ++r) high[r] = products[r] = vf<VL>{} - INFINITY;
    for (int t = 0; t < some; ++t) {
      Part& part = parts[t];
      float* const tile = s + t * ROWS * BLOCK;
      skipped |= narrow(row, n, part);
      gemm_wide<C>(q + row * Heads::DEPTH, Heads::DEPTH, 1, part.key + part.begin * VL, BLOCK,
                   tile + part.begin * VL, BLOCK, n, part.end - part.begin, Heads::DEPTH, false);
      if (RAW && part.kind == FULL)
        largest_products(tile, n, part, products);
      else if (part.kind == FULL)
        evaluate<FULL>(tile, row, n, part, high);
      else if (part.kind == PARTIAL)
        evaluate<PARTIAL>(tile, row, n, part, high);
      else if constexpr (has_open<Score>())
        evaluate<OPEN>(tile, row, n, part, high);
    }

    alignas(64) float base[ROWS], shrink[ROWS] = {};
    for (int r = 0; r < n; ++r) {
      float top = std::max(most[row + r], largest<VL>(high[r]));
      if (RAW) top = std::max(top, Score::scale * largest<VL>(products[r]));
      // A row with nothing unmasked so far has no weights, which -inf minus -inf would not say.
      base[r] = top == -INFINITY ? 0.f : top;
      shrink[r] = most[row + r] - base[r];
      most[row + r] = top;
    }
    float* const to = o + row * LDO;
    if (!first) {
      for (int i = 0; i < ROWS; i += VL) store<VL>(shrink + i, exp<VL>(load<VL>(shrink + i)));
      for (int r = 0; r < n; ++r) {
        sum[row + r] *= shrink[r];
        for (int i = 0; i < LDO; i += VL)
          store<VL>(to + r * LDO + i, load<VL>(to + r * LDO + i) * shrink[r]);
      }
    }
    weigh(s, row, n, parts, some, base);
    for (int t = 0; t < some; ++t) {
      const int start = parts[t].begin * (VL / C::per_unit);
      gemm<LDO / VL, C>(s + t * ROWS * BLOCK + start, BLOCK, 1, parts[t].value + start * LDO, LDO,
                        to, LDO, n, parts[t].end * (VL / C::per_unit) - start, true);
    }
  }

  // All tiles of the query tile that `map` does not leave out, or all there are.
  void visit(int64_t head, const uint8_t* map) {
    Part parts[CHUNK];
    bool first = true;
    skipped = false;
    for (int i = 0; i < rows; ++i) {
      most[i] = -INFINITY;
      sum[i] = 0.f;
    }
    std::memset(o, 0, sizeof(float) * size_t(rows) * LDO);
    for (int64_t tile = 0; tile < heads.tiles;) {
      int some = 0;
      for (; tile < heads.tiles && some < CHUNK; ++tile) {
        const uint8_t kind = dense ? uint8_t(PARTIAL) : map[tile];
        skipped |= kind == EMPTY;
        if (kind == EMPTY) continue;
        const int64_t i = (head - heads.first) * heads.tiles + tile;
        const float* key = heads.keys + i * Heads::K_SIZE;
        const float* value = heads.values + i * Heads::V_SIZE;
        if (!heads.ok[i]) {
          float* const own = missing + some * (Heads::K_SIZE + Heads::V_SIZE);
          heads.pack(head, tile, own, own + Heads::K_SIZE, buffer);
          key = own;
          value = own + Heads::K_SIZE;
        }
        parts[some++] = {tile, has_open<Score>() || kind != OPEN ? kind : uint8_t(PARTIAL), 0, V, key, value};
      }
      if (some == 0) break;
      for (int row = 0; row < rows; row += ROWS)
        attend(row, std::min(ROWS, rows - row), parts, some, first);
      first = false;
    }
  }

  bool out_of_bounds(int64_t head, const T* from) const {
    float longest = 0.f;
    for (int r = 0; r < rows; ++r) {
      const float norm = squared_norm(from + r * a.q_stride[2], D);
      longest = norm > longest || norm != norm ? norm : longest;
    }
    return !(longest * heads.largest_norm(head) <= 0.999f * S_BOUND * S_BOUND);
  }

  void run(int64_t batch, int64_t query_head, int64_t tile) {
    b = batch;
    h = query_head;
    q0 = tile * BLOCK;
    rows = int(std::min<int64_t>(BLOCK, a.M - q0));
    const int64_t head = b * a.HKV + h / (a.H / a.HKV);
    const T* from = (const T*)a.q + b * a.q_stride[0] + h * a.q_stride[1] + q0 * a.q_stride[2];
    pack_rows<E, C, D>(from, a.q_stride[2], rows, q, Heads::DEPTH);
    const uint8_t* map =
        a.kinds + b * a.kinds_stride[0] + h * a.kinds_stride[1] + tile * heads.tiles;
    dense = !heads.finite(head);
    if constexpr (Score::needs_bound) dense = dense || out_of_bounds(head, from);
    visit(head, map);
    const Rows finish{a, b, h, q0};
    if constexpr (Score::finite_fill) {
      bool low = false;
      for (int r = 0; skipped && r < rows; ++r) low |= finish.low(r, most[r], sum[r]);
      dense |= low;
      if (low) visit(head, map);
    }
    for (int r = 0; r < rows; ++r)
      finish.template write<T, DV>(r, o + r * LDO, most[r], sum[r]);
  }
};

template <class E, int D, int DV, class Score>
void attention_forward(const Attention& a, const Score& score, int num_threads) {
  using Heads = PackedHeads<E, D, DV>;
  // As many heads at a time as caches hold, but enough for all threads.
  constexpr int64_t BYTES = int64_t(2) << 20, TASKS = 16;
  const int64_t q_tiles = (a.M + BLOCK - 1) / BLOCK, tiles = (a.N + BLOCK - 1) / BLOCK;
  const int64_t group = a.HKV ? a.H / a.HKV : 0, all = a.B * a.HKV;
  if (all * group * q_tiles == 0) return;
  const int64_t bytes = 4 * tiles * (Heads::K_SIZE + Heads::V_SIZE);
  const int64_t wave = std::min(all, std::max(BYTES / std::max<int64_t>(1, bytes),
                                              num_threads * TASKS / (q_tiles * group) + 1));
  Heads heads(a, wave, tiles);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && all * group * q_tiles > 1)
  {
    ForwardTask<E, D, DV, Score> task(a, score, heads);
    for (int64_t first = 0; first < all; first += wave) {
      const int64_t some = std::min(wave, all - first);
#pragma omp single
      heads.first = first;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < some * tiles; ++i)
        heads.prepare(first + i / tiles, i % tiles, Score::needs_bound, task.buffer);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < some * q_tiles * group; ++i) {
        const int64_t head = first + i / (q_tiles * group), member = i % group;
        task.run(head / a.HKV, head % a.HKV * group + member, i / group % q_tiles);
      }
    }
  }
}

}  // namespace sc

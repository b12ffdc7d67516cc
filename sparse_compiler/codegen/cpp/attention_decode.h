// attention_decode: softmax(score(q k^T)) v for few queries against a long cache of keys.
//
// Such a call is as fast as keys and values can be read, so they are read once, as they lie in
// memory, for all queries of all heads that share them; tiles that no head visits are not touched
// (nor looked through for NaN, other than in attention_forward.h). The visited tiles of a head are
// cut into shares, whose number depends on sizes and tiles only; each share gives weighted sums of
// its values relative to its own largest score, and the shares of a row are added in order: results
// do not depend on the number of threads.
// Scores with needs_bound, and rows whose scores are so low that a finite fill counts, are computed
// densely, as in attention_forward.h.
namespace sc {

// Rows of keys or values to ask for ahead of time where they come from memory: fp32 rows are used
// up faster than the hardware fetches them by itself. In caches it only costs.
constexpr int AHEAD = 32;

// s[0 .. 16) = one row of `units` against 16 rows of keys, `step` bytes apart, four at a time.
template <class C, bool FETCH>
inline void dots_16(const float* q, int units, const char* keys, int64_t step, float* s) {
  vf<VL> sums[16];
#pragma GCC unroll 4
  for (int j = 0; j < 16; j += 4, keys += 4 * step) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[j + i] = vf<VL>{};
    for (int u = 0; u < units; u += VL) {
      const vf<VL> row = load<VL>(q + u);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if constexpr (FETCH) __builtin_prefetch(keys + 4 * u + (i + AHEAD) * step);
        sums[j + i] = mac<C, VL>(load<VL>(keys + 4 * u + i * step), row, sums[j + i]);
      }
    }
  }
  reduce16(sums, s);
}

// R rows of o += weights times rows of values, V vectors of them; values are widened as they come.
template <class T, int R, int V, bool FETCH>
__attribute__((noinline)) void add_block(const float* weights, int64_t weights_row, const T* values,
                                         int64_t stride, int keys, float* o, int64_t ldo) {
  vf<VL> acc[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = load<VL>(o + r * ldo + v * VL);
  for (int k = 0; k < keys; ++k, values += stride) {
    vf<VL> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (FETCH) __builtin_prefetch(values + AHEAD * stride + v * VL);
      row[v] = load_as_float(values + v * VL);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf<VL> w = splat<VL>(weights + r * weights_row + k);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = fma<VL>(w, row[v], acc[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<VL>(o + r * ldo + v * VL, acc[r][v]);
}

template <class T, int R, bool FETCH>
inline void add_rows(const float* weights, int64_t weights_row, const T* values, int64_t stride,
                     int keys, float* o, int64_t ldo, int rows, int nv) {
  int r = 0;
  for (; r + R <= rows; r += R) {
    int v = 0;
    for (; v + 4 <= nv; v += 4)
      add_block<T, R, 4, FETCH>(weights + r * weights_row, weights_row, values + v * VL, stride,
                                keys, o + r * ldo + v * VL, ldo);
    for (; v < nv; ++v)
      add_block<T, R, 1, FETCH>(weights + r * weights_row, weights_row, values + v * VL, stride,
                                keys, o + r * ldo + v * VL, ldo);
  }
  if constexpr (R > 1)
    if (r < rows)
      add_rows<T, R / 2, FETCH>(weights + r * weights_row, weights_row, values, stride, keys,
                                o + r * ldo, ldo, rows - r, nv);
}

// FETCH: see AHEAD.
template <class E, int D, int DV, class Score, bool FETCH>
struct DecodeTask {
  using C = Compute<E>;
  using T = typename E::T;
  static constexpr int DEPTH = depth_of<C>(D), LDQ = padded(DEPTH), LDO = padded(DV);
  static constexpr int SPAN = 16, V = BLOCK / VL, WIDTH = SPAN * BLOCK;
  // From so many rows on, turning a tile for a matrix product costs less than it saves.
  static constexpr int MANY = 16;

  const Attention& a;
  const Score& score;
  const Dropout dropout;
  const int64_t group, rows, tiles;  // query heads of a head; queries of all of them; of keys
  Scratch memory;
  float *q, *s, *key, *turned, *value;  // [rows][LDQ], [rows][WIDTH]; room for one tile
  int64_t b = 0, head = 0;
  bool dense = false;

  // Sums of some tiles: [rows][LDO], [rows] x 2.
  struct State {
    float *o, *most, *sum;
  };
  static int64_t state_size(int64_t rows) { return rows * (LDO + 2); }
  State state(float* at) const { return {at, at + rows * LDO, at + rows * (LDO + 1)}; }

  DecodeTask(const Attention& a, const Score& score)
      : a(a),
        score(score),
        dropout(a),
        group(a.H / a.HKV),
        rows(group * a.M),
        tiles((a.N + BLOCK - 1) / BLOCK),
        memory(scratch(4 * (rows * (LDQ + WIDTH) + BLOCK * (LDQ + DEPTH + LDO)))) {
    q = (float*)memory.get();
    s = q + rows * LDQ;
    key = s + rows * WIDTH;
    turned = key + BLOCK * LDQ;
    value = turned + BLOCK * DEPTH;
  }

  uint8_t kind(int64_t member, int64_t tile) const {
    const int64_t h = head * group + member;
    return dense ? uint8_t(PARTIAL)
                 : a.kinds[b * a.kinds_stride[0] + h * a.kinds_stride[1] + tile];
  }

  void select(int64_t i, bool densely) {
    b = i / a.HKV;
    head = i % a.HKV;
    dense = densely;
  }

  // Products of all rows and the keys of one tile, to s at column `at`.
  void products(int64_t tile, int at) {
    const int count = int(std::min<int64_t>(BLOCK, a.N - tile * BLOCK));
    const T* const from = (const T*)a.k + b * a.k_stride[0] + head * a.k_stride[1] +
                          tile * BLOCK * a.k_stride[2];
    if (rows >= MANY) {
      pack_turned<E, C, D>(from, a.k_stride[2], count, turned, key);
      gemm<V, C>(q, LDQ, 1, turned, BLOCK, s + at, WIDTH, int(rows), DEPTH, false);
      return;
    }
    const char* rows_of_keys = (const char*)from;
    int64_t step = a.k_stride[2] * int64_t(sizeof(T));
    if (count < BLOCK || LDQ * C::per_unit != D || C::per_unit != E::per_unit) {
      std::memset(key, 0, sizeof(float) * BLOCK * LDQ);
      pack_rows<E, C, D>(from, a.k_stride[2], count, key, LDQ);
      rows_of_keys = (const char*)key;
      step = 4 * LDQ;
    }
    for (int k = 0; k < count; k += 16)
      for (int64_t r = 0; r < rows; ++r) {
        dots_16<C, FETCH>(q + r * LDQ, LDQ, rows_of_keys + k * step, step,
                          s + r * WIDTH + at + k);
      }
  }

  // Scores of row r in one tile in place of products; lane by lane the largest so far.
  vf<VL> evaluate(int64_t r, int64_t tile, int at, vf<VL> high) const {
    const int count = int(std::min<int64_t>(BLOCK, a.N - tile * BLOCK));
    const uint8_t what = kind(r / a.M, tile);
    const int64_t h = head * group + r / a.M, m = r % a.M;
    for (int v = 0; v < V; ++v) {
      float* const place = s + r * WIDTH + at + v * VL;
      const int some = std::min(VL, count - v * VL);
      const int64_t k = tile * BLOCK + v * VL;
      vf<VL> x = vf<VL>{} - INFINITY;
      if (some > 0 && what == FULL)
        x = first_lanes(score.template forward<true>(load<VL>(place), b, h, m, k, some), some);
      else if (some > 0 && what != EMPTY)
        x = first_lanes(score.template forward<false>(load<VL>(place), b, h, m, k, some), some);
      high = larger<VL>(x, high);
      store<VL>(place, x);
    }
    return high;
  }

  // Up to SPAN tiles join the sums.
  void attend(const int32_t* list, int some, const State& state) {
    for (int t = 0; t < some; ++t) products(list[t], t * BLOCK);
    for (int64_t r = 0; r < rows; ++r) {
      vf<VL> high = vf<VL>{} - INFINITY, total = {};
      for (int t = 0; t < some; ++t) high = evaluate(r, list[t], t * BLOCK, high);
      const float top = std::max(state.most[r], largest<VL>(high));
      const vf<VL> base = vf<VL>{} + (top == -INFINITY ? 0.f : top);
      if (top > state.most[r]) {
        const vf<VL> shrink = exp<VL>(state.most[r] - base);
        for (int i = 0; i < LDO; i += VL)
          store<VL>(state.o + r * LDO + i, load<VL>(state.o + r * LDO + i) * shrink);
        state.sum[r] *= shrink[0];
        state.most[r] = top;
      }
      const uint32_t hash =
          a.dropout > 0.f ? dropout.row(b * a.H + head * group + r / a.M, r % a.M) : 0;
      for (int t = 0; t < some; ++t)
        for (int v = 0; v < V; ++v) {
          float* const place = s + r * WIDTH + t * BLOCK + v * VL;
          vf<VL> w = exp<VL>(load<VL>(place) - base);
          total += w;
          if (a.dropout > 0.f) w *= dropout.factor(hash, int64_t(list[t]) * BLOCK + v * VL);
          store<VL>(place, w);
        }
      state.sum[r] += reduce<VL>(total);
    }
    for (int t = 0; t < some; ++t) {
      const int count = int(std::min<int64_t>(BLOCK, a.N - list[t] * int64_t(BLOCK)));
      const T* const from = (const T*)a.v + b * a.v_stride[0] + head * a.v_stride[1] +
                            list[t] * int64_t(BLOCK) * a.v_stride[2];
      if constexpr (DV % VL == 0) {
        add_rows<T, 4, FETCH>(s + t * BLOCK, WIDTH, from, a.v_stride[2], count, state.o, LDO,
                              int(rows), LDO / VL);
      } else {
        // Whole vectors would reach past the last row.
        pack_rows<E, F32, DV>(from, a.v_stride[2], count, value, LDO);
        add_rows<float, 4, false>(s + t * BLOCK, WIDTH, value, LDO, count, state.o, LDO, int(rows),
                                  LDO / VL);
      }
    }
  }

  // The sums of n tiles of the selected head.
  void run(const int32_t* list, int64_t n, const State& state) {
    std::memset(q, 0, sizeof(float) * size_t(rows) * LDQ);
    const T* const from = (const T*)a.q + b * a.q_stride[0] + head * group * a.q_stride[1];
    for (int64_t g = 0; g < group; ++g)
      pack_rows<E, C, D>(from + g * a.q_stride[1], a.q_stride[2], int(a.M), q + g * a.M * LDQ, LDQ);
    std::memset(state.o, 0, sizeof(float) * size_t(rows) * LDO);
    std::fill(state.most, state.most + rows, -INFINITY);
    std::fill(state.sum, state.sum + rows, 0.f);
    for (int64_t i = 0; i < n; i += SPAN)
      attend(list + i, int(std::min<int64_t>(SPAN, n - i)), state);
  }

  // Adds the sums of `from`.
  void merge(const State& into, const State& from) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float top = std::max(into.most[r], from.most[r]), base = top == -INFINITY ? 0.f : top;
      const float x = std::exp(into.most[r] - base), y = std::exp(from.most[r] - base);
      into.most[r] = top;
      into.sum[r] = into.sum[r] * x + from.sum[r] * y;
      for (int i = 0; i < LDO; i += VL) {
        float* const place = into.o + r * LDO + i;
        const vf<VL> more = load<VL>(from.o + r * LDO + i);
        store<VL>(place, fma<VL>(more, vf<VL>{} + y, load<VL>(place) * x));
      }
    }
  }

  // Rows of the result, computed again from `all` tiles where finite fills count.
  void finish(const State& state, const int32_t* all) {
    const auto row = [&](int64_t r) { return Rows{a, b, head * group + r / a.M, 0}; };
    if constexpr (Score::finite_fill) {
      bool low = false;
      for (int64_t r = 0; r < rows; ++r) low |= row(r).low(r % a.M, state.most[r], state.sum[r]);
      if (low && !dense) {
        dense = true;
        run(all, tiles, state);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      row(r).template write<T, DV>(r % a.M, state.o + r * LDO, state.most[r], state.sum[r]);
  }
};

// The tiles that some query head of a head of keys visits, for every map there is, then all.
struct VisitedTiles {
  int64_t tiles, maps;
  bool by_batch, by_head;
  int64_t most = 0;  // of any map
  std::unique_ptr<int32_t[]> list, count;

  VisitedTiles(const Attention& a, bool dense)
      : tiles((a.N + BLOCK - 1) / BLOCK), by_batch(a.kinds_stride[0]), by_head(a.kinds_stride[1]) {
    const int64_t batches = by_batch ? a.B : 1, heads = by_head ? a.HKV : 1;
    const int64_t group = by_head ? a.H / a.HKV : 1;
    maps = batches * heads;
    list.reset(new int32_t[(maps + 1) * tiles]);
    count.reset(new int32_t[maps]);
    for (int64_t map = 0; map < maps; ++map) {
      const uint8_t* const kinds =
          a.kinds + map / heads * a.kinds_stride[0] + map % heads * group * a.kinds_stride[1];
      int32_t n = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        bool visited = dense;
        for (int64_t g = 0; g < group; ++g) visited |= kinds[g * a.kinds_stride[1] + tile] != EMPTY;
        list[map * tiles + n] = int32_t(tile);
        n += visited;
      }
      count[map] = n;
      most = std::max<int64_t>(most, n);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) list[maps * tiles + tile] = int32_t(tile);
  }

  int64_t map(const Attention& a, int64_t i) const {
    return (by_batch ? i / a.HKV : 0) * (by_head ? a.HKV : 1) + (by_head ? i % a.HKV : 0);
  }
  const int32_t* all() const { return list.get() + maps * tiles; }
};

template <class E, int D, int DV, class Score, bool FETCH>
void decode_shares(const Attention& a, const Score& score, const VisitedTiles& visited,
                   int num_threads) {
  using Task = DecodeTask<E, D, DV, Score, FETCH>;
  // Enough shares for many cores, none of less than 8 tiles.
  constexpr int64_t SHARES = 64, LEAST = 8;
  const int64_t heads = a.B * a.HKV;
  const int64_t shares = std::max<int64_t>(
      1, std::min((SHARES + heads - 1) / heads, (visited.most + LEAST - 1) / LEAST));
  const int64_t size = Task::state_size(a.H / a.HKV * a.M);
  const Scratch memory = scratch(4 * heads * shares * size);
  float* const states = (float*)memory.get();
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    Task task(a, score);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads * shares; ++i) {
      const int64_t map = visited.map(a, i / shares), n = visited.count[map];
      const int64_t begin = i % shares * n / shares, end = (i % shares + 1) * n / shares;
      task.select(i / shares, Score::needs_bound);
      task.run(visited.list.get() + map * visited.tiles + begin, end - begin,
               task.state(states + i * size));
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads; ++i) {
      task.select(i, Score::needs_bound);
      float* const first = states + i * shares * size;
      for (int64_t j = 1; j < shares; ++j)
        task.merge(task.state(first), task.state(first + j * size));
      task.finish(task.state(first), visited.all());
    }
  }
}

template <class E, int D, int DV, class Score>
void attention_decode(const Attention& a, const Score& score, int num_threads) {
  // No threads for so few bytes; more than CACHED are not expected to be in a cache.
  constexpr int64_t FEW = int64_t(1) << 17, CACHED = int64_t(16) << 20;
  const int64_t heads = a.B * a.HKV;
  if (heads == 0 || a.H == 0 || a.M == 0) return;
  const VisitedTiles visited(a, Score::needs_bound);
  const int64_t bytes = heads * visited.most * BLOCK * (D + DV) * int64_t(sizeof(typename E::T));
  const int threads = bytes > FEW ? num_threads : 1;
  if constexpr (E::per_unit == 1)
    if (bytes > CACHED) return decode_shares<E, D, DV, Score, true>(a, score, visited, threads);
  decode_shares<E, D, DV, Score, false>(a, score, visited, threads);
}

}  // namespace sc

// The inner kernel: accumulators y [outputs][W] += sparse rows x one panel [K units][W].
//
// A segment is the stretch of one row (or of one group of R rows sharing columns) that falls into
// one k-block, small enough that the panel of a k-block stays in L1. Per stored unit: one broadcast
// of the weight, W / lanes vector macs straight from the panel, accumulators in registers for the
// whole segment. Segments come sorted by length, so that the trip count is almost always the one
// before it and the loop exit is predicted; they carry their row for that.
// R = 1: one row at a time. R >= 4: 4 rows x up to 64 lanes, a dense GEMM micro-kernel.
namespace sc {

struct Segment {
  int32_t start;   // first unit (of R values each) in values
  uint16_t count;  // stored units
  uint16_t group;  // row group inside its n-block
};

// R = 1: one row x V vectors. Four weights a step share one load; U sets of sums hide the latency
// of a mac where V vectors are too few to do it.
template <class E, int L, int V, int W>
inline void multiply_row(const float* values, const uint16_t* cols, int count, const float* panel,
                         float* y, bool first) {
  constexpr int U = V == 1 ? 4 : V == 2 || (E::per_unit == 2 && V <= 4) ? 2 : 1;
  vf<L> acc[U][V] = {};
  if (!first)
    for (int v = 0; v < V; ++v) acc[0][v] = load<L>(y + v * L);
  const auto step = [&](int p, vf<L> w, vf<L>* sums) __attribute__((always_inline)) {
    const float* x = panel + int64_t(cols[p]) * W;
    for (int v = 0; v < V; ++v) sums[v] = mac<E, L>(w, load<L>(x + v * L), sums[v]);
  };
  int p = 0;
  for (; p + 4 <= count; p += 4) {
    vf<L> w[4];
    splat4<L>(values + p, w);
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) step(p + u, w[u], acc[u % U]);
  }
  for (; p < count; ++p) step(p, splat<L>(values + p), acc[0]);
  for (int v = 0; v < V; ++v) {
    for (int u = 1; u < U; ++u) acc[0][v] += acc[u][v];
    store<L>(y + v * L, acc[0][v]);
  }
}

// R >= 4: ROWS rows x V vectors, `values` R units a column, rows of y W apart.
template <class E, int R, int ROWS, int L, int V, int W>
inline void multiply_rows(const float* values, const uint16_t* cols, int count, const float* panel,
                          float* y, bool first) {
  vf<L> acc[ROWS][V] = {};
  if (!first)
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = load<L>(y + r * W + v * L);
  for (int p = 0; p < count; ++p) {
    const float* x = panel + int64_t(cols[p]) * W;
    vf<L> xs[V];
    for (int v = 0; v < V; ++v) xs[v] = load<L>(x + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vf<L> w = splat<L>(values + int64_t(p) * R + r);
      for (int v = 0; v < V; ++v) acc[r][v] = mac<E, L>(w, xs[v], acc[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < V; ++v) store<L>(y + r * W + v * L, acc[r][v]);
}

// One (n-block, k-block): `segments` of it, y = accumulators of the n-block. `cols` lists the
// columns of the segments one after the other; their values may lie apart.
template <class E, int R, int W>
inline void multiply_block(const float* values, const uint16_t* cols, const Segment* segments,
                           int num_segments, const float* panel, float* y, bool first) {
  constexpr int L = std::min(W, VL);
  constexpr int ROWS = R >= 4 ? 4 : 1;
  // Accumulators that fit the register file: 16 of 32 with AVX-512, 8 of 16 otherwise.
  constexpr int V = std::min(W / L, (SC_ISA == 512 ? 16 : 8) / ROWS);
  for (int i = 0; i < num_segments; ++i) {
    const Segment s = segments[i];
    if (s.count == 0 && !first) continue;
    const float* v = values + int64_t(s.start) * R;
    for (int r = 0; r < R; r += ROWS)
      for (int lane = 0; lane < W; lane += L * V)
        if constexpr (R == 1)
          multiply_row<E, L, V, W>(v, cols, s.count, panel + lane, y + s.group * W + lane, first);
        else
          multiply_rows<E, R, ROWS, L, V, W>(v + r, cols, s.count, panel + lane,
                                             y + (s.group * R + r) * W + lane, first);
    cols += s.count;
  }
}

}  // namespace sc

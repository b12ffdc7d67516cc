// Gradients of moe, from the parts that moe_training kept.
//
// With g the gate of a pair, y = outer h + bias, h = body(a_0, a_1), a_p = inner_p x + bias_p:
//
//   dh  = outer^T dy         per (expert, block of hidden units), on the pairs' rows of grad
//   dg  = dh . h + dy . bias summed over the blocks in their order
//   da_p = g dh body_p'      kept [P][sorted pair][I], and g h for the second layer's gradient
//   dx  = sum inner_p^T da_p per (expert, block of features), summed over a token's pairs last
//   d inner_p = da_p^T x,  d outer = dy^T (g h)   per (expert, block of rows)
//
// With gates on the input g stands before x: then da_p has no g, dx = g (...), dg = (...) . x.
// Products with a transposed weight go through slabs (moe_gemm.h). The weights' gradients sum over
// pairs, whose rows are packed as floats, 64 columns of each factor at a time.
namespace sc {

template <class E>
struct MoeGrad {
  using T = typename E::T;
  const T* grad;   // [tokens][O]
  const T* parts;  // [P][tokens * choices][I]
  T* x;            // [tokens][D]
  float* gates;    // [tokens][choices]
  std::vector<Matrix<E>> inner, outer;  // as the weights; their data is written
  T* inner_bias[2];                     // [experts][I]
  T* outer_bias;                        // [experts][O]
};

template <class A, class B>
inline float dot_of(const A* a, const B* b, int64_t n) {
  vf<VL> sums = {};
  int64_t i = 0;
  for (; i + VL <= n; i += VL) sums = fma<VL>(load_as_float(a + i), load_as_float(b + i), sums);
  float total = reduce<VL>(sums);
  for (; i < n; ++i) total += to_float(a[i]) * to_float(b[i]);
  return total;
}

constexpr int TILE = 64;
constexpr int ROWS_AT_ONCE = 256;

// c[i][j] of one weight's gradient = sum over pairs of left[i] * right[j]; columns j are contiguous
// in `to` (k_stride 1) or its rows are, then the factors trade places.
template <class E, class Left, class Right>
void sum_of_products(Matrix<E> to, int64_t width, int64_t i0, int64_t i1,
                     int64_t count, Left&& left, Right&& right, float* memory) {
  using T = typename E::T;
  float* const a = memory;                        // [ROWS_AT_ONCE][TILE]
  float* const b = a + ROWS_AT_ONCE * TILE;       // [ROWS_AT_ONCE][TILE]
  float* const c = b + ROWS_AT_ONCE * TILE;       // [TILE][TILE]
  for (int64_t j0 = 0; j0 < width; j0 += TILE) {
    const int rows = int(i1 - i0), columns = int(std::min<int64_t>(TILE, width - j0));
    std::memset(c, 0, sizeof(float) * TILE * TILE);
    for (int64_t s = 0; s < count; s += ROWS_AT_ONCE) {
      const int depth = int(std::min<int64_t>(ROWS_AT_ONCE, count - s));
      for (int r = 0; r < depth; ++r) {
        if (j0 == 0 || count > ROWS_AT_ONCE) left(s + r, i0, rows, a + r * TILE);
        right(s + r, j0, columns, b + r * TILE);
      }
      if (to.k_stride == 1)
        gemm_wide<F32>(a, 1, TILE, b, TILE, c, TILE, rows, vectors(columns), depth, true);
      else
        gemm_wide<F32>(b, 1, TILE, a, TILE, c, TILE, columns, vectors(rows), depth, true);
    }
    T* const data = (T*)to.data + i0 * to.n_stride + j0 * to.k_stride;
    if (to.k_stride == 1)
      for (int r = 0; r < rows; ++r) store_some(data + r * to.n_stride, c + r * TILE, columns);
    else
      for (int j = 0; j < columns; ++j) store_some(data + j * to.k_stride, c + j * TILE, rows);
  }
}

template <class E, int P, class Body>
void moe_backward(const Moe<E>& m, const MoeGrad<E>& g, const Body& body, int threads) {
  using T = typename E::T;
  const int64_t K = m.choices, I = m.hidden, O = m.out_features, D = m.features;
  const int64_t all = m.tokens * K;
  const Routing routing = route(m, 0, all, threads);
  const int64_t pairs = routing.start[m.experts], ld = (I + 31) / 32 * 32;
  const int64_t pieces = blocks_of(I), x_pieces = blocks_of(D);
  const Scratch slopes_memory = scratch(P * pairs * ld * int64_t(sizeof(T)));
  const Scratch hidden_memory = scratch(pairs * ld * int64_t(sizeof(T)));
  const Scratch rows_memory = scratch(pairs * D * 4);
  const Scratch gates_memory = scratch(pairs * std::max(pieces, x_pieces) * 4);
  T* const slopes = (T*)slopes_memory.get();
  T* const hidden = (T*)hidden_memory.get();
  float* const rows = (float*)rows_memory.get();
  float* const gate_sums = (float*)gates_memory.get();
  std::vector<int64_t> every(m.experts);
  for (int64_t e = 0; e < m.experts; ++e) every[e] = e;
  const auto grad_row = [&](int64_t s) { return g.grad + routing.order[s] / K * O; };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Scratch tile_memory =
        scratch((M_BLOCK * C_BLOCK + 2 * ROWS_AT_ONCE * TILE + TILE * TILE) * 4);
    const Scratch slab_memory = scratch(slab_elements<E>() * int64_t(sizeof(T)));
    float* const tile = (float*)tile_memory.get();
    float* const factors = tile + M_BLOCK * C_BLOCK;
    T* const slab = (T*)slab_memory.get();
    const T* from[M_BLOCK];

    for_blocks(routing.hit, I, [&](int64_t e, int64_t n0, int64_t n1) {
      for (int64_t s = routing.start[e]; s < routing.start[e + 1]; s += M_BLOCK) {
        const int count = int(std::min<int64_t>(M_BLOCK, routing.start[e + 1] - s));
        for (int r = 0; r < count; ++r) from[r] = grad_row(s + r);
        multiply<E>(from, count, m.outer[e].turned(), n0, n1, O, tile, C_BLOCK, false, slab);
        for (int r = 0; r < count; ++r) {
          const int64_t pair = routing.order[s + r];
          const float gate = m.gates_on_input ? 1.f : m.gates[pair];
          float values[2][N_BLOCK] = {}, slope[2][N_BLOCK], h[N_BLOCK];
          vf<VL> dot = {};
          for (int p = 0; p < P; ++p)
            load_some(values[p], g.parts + (p * all + pair) * I + n0, int(n1 - n0));
          for (int n = 0; n < n1 - n0; n += VL) {
            const vf<VL> a = load<VL>(values[0] + n), b = load<VL>(values[1] + n);
            vf<VL> dh = load<VL>(tile + r * C_BLOCK + n);
            dh = lanes() < int32_t(n1 - n0 - n) ? dh : vf<VL>{};
            const vf<VL> now = body.forward(a, b);
            dot = fma<VL>(dh, lanes() < int32_t(n1 - n0 - n) ? now : vf<VL>{}, dot);
            store<VL>(h + n, now * gate);
            store<VL>(slope[0] + n, dh * gate * body.slope0(a, b));
            if constexpr (P == 2) store<VL>(slope[1] + n, dh * gate * body.slope1(a, b));
          }
          store_some(hidden + (s + r) * ld + n0, h, int(n1 - n0));
          for (int p = 0; p < P; ++p)
            store_some(slopes + (p * pairs + s + r) * ld + n0, slope[p], int(n1 - n0));
          gate_sums[(s + r) * pieces + n0 / N_BLOCK] = reduce<VL>(dot);
        }
      }
    });
    // Gates behind the second layer: their sums are complete here.
    if (!m.gates_on_input) {
#pragma omp for schedule(static)
      for (int64_t pair = 0; pair < all; ++pair) {
        const int64_t place = routing.place[pair];
        const T* const dy = g.grad + pair / K * O;
        float sum = 0.f;
        if (place >= 0) {
          for (int64_t i = 0; i < pieces; ++i) sum += gate_sums[place * pieces + i];
          if (m.outer_bias) sum += dot_of(dy, m.outer_bias + m.ids[pair] * m.outer_bias_stride, O);
        } else if (m.passes(pair)) {
          sum = dot_of(dy, m.row(pair), O);
        }
        g.gates[pair] = sum;
      }
    }

    for_blocks(routing.hit, D, [&](int64_t e, int64_t n0, int64_t n1) {
      for (int64_t s = routing.start[e]; s < routing.start[e + 1]; s += M_BLOCK) {
        const int count = int(std::min<int64_t>(M_BLOCK, routing.start[e + 1] - s));
        for (int p = 0; p < P; ++p) {
          for (int r = 0; r < count; ++r) from[r] = slopes + (p * pairs + s + r) * ld;
          multiply<E>(from, count, m.inner[p * m.experts + e].turned(), n0, n1, I, tile, C_BLOCK,
                      p > 0, slab);
        }
        for (int r = 0; r < count; ++r) {
          const int64_t pair = routing.order[s + r];
          const float gate = m.gates_on_input ? m.gates[pair] : 1.f;
          float* const dx = tile + r * C_BLOCK;
          if (m.gates_on_input)
            gate_sums[(s + r) * x_pieces + n0 / N_BLOCK] = dot_of(dx, m.row(pair) + n0, n1 - n0);
          for (int n = 0; n < n1 - n0; n += VL) store<VL>(dx + n, load<VL>(dx + n) * gate);
          store_some(rows + (s + r) * D + n0, dx, int(n1 - n0));
        }
      }
    });
    if (m.gates_on_input) {
#pragma omp for schedule(static)
      for (int64_t pair = 0; pair < all; ++pair) {
        const int64_t place = routing.place[pair];
        float sum = 0.f;
        if (place >= 0)
          for (int64_t i = 0; i < x_pieces; ++i) sum += gate_sums[place * x_pieces + i];
        else if (m.passes(pair))
          sum = dot_of(g.grad + pair / K * O, m.row(pair), O);
        g.gates[pair] = sum;
      }
    }
    combine(m, routing, 0, m.tokens, rows, D, g.grad, O,
            [&](int64_t pair) { return m.gates[pair]; }, g.x);

    // Weights and biases, of experts without a token too: their gradient is 0.
    const auto scaled = [&](int64_t s, float* row, int columns) {
      const float gate = m.gates_on_input ? m.gates[routing.order[s]] : 1.f;
      if (gate != 1.f)
        for (int j = 0; j < columns; j += VL) store<VL>(row + j, load<VL>(row + j) * gate);
    };
    const int64_t inner_blocks = (I + TILE - 1) / TILE, outer_blocks = (O + TILE - 1) / TILE;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < m.experts * P * inner_blocks; ++i) {
      const int64_t e = i / (P * inner_blocks), p = i / inner_blocks % P;
      const int64_t i0 = i % inner_blocks * TILE, i1 = std::min(I, i0 + TILE);
      const int64_t start = routing.start[e], count = routing.count(e);
      const T* const slope = slopes + (p * pairs + start) * ld;
      sum_of_products<E>(
          g.inner[p * m.experts + e], D, i0, i1, count,
          [&](int64_t s, int64_t at, int n, float* to) { load_some(to, slope + s * ld + at, n); },
          [&](int64_t s, int64_t at, int n, float* to) {
            load_some(to, m.row(routing.order[start + s]) + at, n);
            scaled(start + s, to, n);
          },
          factors);
      if (g.inner_bias[p]) {
        float sums[TILE] = {}, row[TILE] = {};
        for (int64_t s = 0; s < count; ++s) {
          load_some(row, slope + s * ld + i0, int(i1 - i0));
          for (int n = 0; n < i1 - i0; n += VL) add_scaled(sums + n, row + n, 1.f);
        }
        store_some(g.inner_bias[p] + e * I + i0, sums, int(i1 - i0));
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < m.experts * outer_blocks; ++i) {
      const int64_t e = i / outer_blocks, i0 = i % outer_blocks * TILE, i1 = std::min(O, i0 + TILE);
      const int64_t start = routing.start[e], count = routing.count(e);
      sum_of_products<E>(
          g.outer[e], I, i0, i1, count,
          [&](int64_t s, int64_t at, int n, float* to) { load_some(to, grad_row(start + s) + at, n); },
          [&](int64_t s, int64_t at, int n, float* to) {
            load_some(to, hidden + (start + s) * ld + at, n);
          },
          factors);
      if (g.outer_bias) {
        float sums[TILE] = {}, row[TILE] = {};
        for (int64_t s = 0; s < count; ++s) {
          const int64_t pair = routing.order[start + s];
          const float gate = m.gates_on_input ? 1.f : m.gates[pair];
          load_some(row, grad_row(start + s) + i0, int(i1 - i0));
          for (int n = 0; n < i1 - i0; n += VL) add_scaled(sums + n, row + n, gate);
        }
        store_some(g.outer_bias + e * O + i0, sums, int(i1 - i0));
      }
    }
  }
}

}  // namespace sc

// moe: every expert on the tokens that are routed to it.
//
// Tokens are taken in chunks, so that scratch memory has a bound. For each chunk: sort the pairs;
// then tasks (expert, block of hidden units): both first layers and the body between them, on up
// to M_BLOCK rows at a time, into hidden [sorted pair][I]; then tasks (expert, block of outputs):
// the second layer, bias and gate into rows [sorted pair][O]; then each token's rows are summed.
// Threads take tasks from a counter, experts in order, so that both work on one expert's rows.
namespace sc {

constexpr int64_t CHUNK_PAIRS = 16384;

template <class E, int P, class Body>
void moe_chunk(const Moe<E>& m, const Body& body, int64_t t0, int64_t t1, typename E::T* parts,
               typename E::T* out, int threads) {
  using T = typename E::T;
  const Routing routing = route(m, t0 * m.choices, t1 * m.choices, threads);
  const int64_t pairs = routing.start[m.experts], I = m.hidden, O = m.out_features;
  const int64_t hidden_ld = (I + 31) / 32 * 32;
  const Scratch hidden_memory = scratch(pairs * hidden_ld * int64_t(sizeof(T)));
  const Scratch rows_memory = scratch(pairs * O * 4);
  T* const hidden = (T*)hidden_memory.get();
  float* const rows = (float*)rows_memory.get();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Scratch tile_memory = scratch(M_BLOCK * P * C_BLOCK * 4);
    const Scratch slab_memory = scratch(slab_elements<E>() * int64_t(sizeof(T)));
    float* const tile = (float*)tile_memory.get();
    T* const slab = (T*)slab_memory.get();
    const T* from[M_BLOCK];
    for_blocks(routing.hit, I, [&](int64_t e, int64_t n0, int64_t n1) {
      for (int64_t s = routing.start[e]; s < routing.start[e + 1]; s += M_BLOCK) {
        const int count = int(std::min<int64_t>(M_BLOCK, routing.start[e + 1] - s));
        for (int r = 0; r < count; ++r) from[r] = m.row(routing.order[s + r]);
        for (int p = 0; p < P; ++p)
          multiply<E>(from, count, m.inner[p * m.experts + e], n0, n1, m.features,
                      tile + p * C_BLOCK, P * C_BLOCK, false, slab);
        float bias[P][N_BLOCK] = {};
        for (int p = 0; p < P; ++p)
          if (m.inner_bias[p])
            load_some(bias[p], m.inner_bias[p] + e * m.inner_bias_stride[p] + n0, int(n1 - n0));
        for (int r = 0; r < count; ++r) {
          const int64_t pair = routing.order[s + r];
          const float scale = m.gates_on_input ? m.gates[pair] : 1.f;
          float result[N_BLOCK];
          for (int n = 0; n < n1 - n0; n += VL) {
            vf<VL> values[2] = {};
            for (int p = 0; p < P; ++p) {
              float* const at = tile + (r * P + p) * C_BLOCK + n;
              values[p] = fma<VL>(load<VL>(at), vf<VL>{} + scale, load<VL>(bias[p] + n));
              store<VL>(at, values[p]);
            }
            store<VL>(result + n, body.forward(values[0], values[1]));
          }
          store_some(hidden + (s + r) * hidden_ld + n0, result, int(n1 - n0));
          if (parts)
            for (int p = 0; p < P; ++p)
              store_some(parts + (p * m.tokens * m.choices + pair) * I + n0,
                         tile + (r * P + p) * C_BLOCK, int(n1 - n0));
        }
      }
    });
    for_blocks(routing.hit, O, [&](int64_t e, int64_t n0, int64_t n1) {
      float bias[N_BLOCK] = {};
      if (m.outer_bias)
        load_some(bias, m.outer_bias + e * m.outer_bias_stride + n0, int(n1 - n0));
      for (int64_t s = routing.start[e]; s < routing.start[e + 1]; s += M_BLOCK) {
        const int count = int(std::min<int64_t>(M_BLOCK, routing.start[e + 1] - s));
        for (int r = 0; r < count; ++r) from[r] = hidden + (s + r) * hidden_ld;
        multiply<E>(from, count, m.outer[e], n0, n1, I, tile, C_BLOCK, false, slab);
        for (int r = 0; r < count; ++r) {
          const float gate = m.gates_on_input ? 1.f : m.gates[routing.order[s + r]];
          float* const result = tile + r * C_BLOCK;
          for (int n = 0; n < n1 - n0; n += VL)
            store<VL>(result + n, (load<VL>(result + n) + load<VL>(bias + n)) * gate);
          store_some(rows + (s + r) * O + n0, result, int(n1 - n0));
        }
      }
    });
    combine(m, routing, t0, t1, rows, O, m.x, m.x_stride,
            [&](int64_t pair) { return m.gates[pair]; }, out);
  }
}

// `parts` [P][tokens * choices][I] is written if it is not nullptr, but for pairs of no expert.
template <class E, int P, class Body>
void moe_forward(const Moe<E>& m, const Body& body, typename E::T* parts, typename E::T* out,
                 int threads) {
  const int64_t step = std::max<int64_t>(1, CHUNK_PAIRS / std::max<int64_t>(m.choices, 1));
  for (int64_t t = 0; t < m.tokens; t += step)
    moe_chunk<E, P>(m, body, t, std::min(m.tokens, t + step), parts, out, threads);
}

}  // namespace sc

// take and put: values between a dense weight and the order a csr layout stores them in.
//
// take: stored[i] = dense[index[i]], 0 where index[i] >= size (filling).
// put: dense[places[i]] = stored[source[i]], 0 elsewhere; places ascend, those >= size are filling.
// A task makes one piece of PIECE results in L1 and hands it over to
// epilogue(p_start, p_end, const float* tile).
namespace sc {

template <int PIECE, class T, class Epilogue>
void take(const T* dense, int64_t size, const int32_t* index, int64_t count, int num_threads,
          Epilogue&& epilogue) {
  // Stored neighbours lie rows apart in the dense weight: lines nobody but us can foresee.
  constexpr int64_t AHEAD = 48;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_threads > 1)
  for (int64_t p_start = 0; p_start < count; p_start += PIECE) {
    alignas(64) float tile[PIECE];
    const int64_t p_end = std::min<int64_t>(count, p_start + PIECE);
    for (int64_t i = p_start; i < p_end; ++i) {
      __builtin_prefetch(dense + std::min<int64_t>(index[std::min(i + AHEAD, count - 1)], size - 1));
      tile[i - p_start] = index[i] < size ? to_float(dense[index[i]]) : 0.f;
    }
    epilogue(p_start, p_end, (const float*)tile);
  }
}

template <int PIECE, class T, class Epilogue>
void put(const T* stored, const int32_t* places, const int32_t* source, int64_t count,
         int64_t size, int num_threads, Epilogue&& epilogue) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_threads > 1)
  for (int64_t p_start = 0; p_start < size; p_start += PIECE) {
    alignas(64) float tile[PIECE] = {};
    const int64_t p_end = std::min<int64_t>(size, p_start + PIECE);
    int64_t i = std::lower_bound(places, places + count, p_start) - places;
    for (; i < count && places[i] < p_end; ++i)
      tile[places[i] - p_start] = to_float(stored[source[i]]);
    epilogue(p_start, p_end, (const float*)tile);
  }
}

}  // namespace sc

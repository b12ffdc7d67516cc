// Panels: x [M, K] rewritten so that one non-zero weight is one broadcast times whole vectors.
//
// M is cut into tiles of `width` rows of x; the panel of a tile is [K units][width]: unit k of all
// its rows is contiguous. Tiles are 64 wide, then a tail of the narrowest widths that hold the
// rest (4, 8, 16, 32, 64; a rest of 33 to 48 takes 32 + the rest). All tiles before the last are
// full, so the panel of the tile that starts at row m starts at unit m * K of the buffer.
namespace sc {

struct Tile {
  int64_t m;
  int width;
};

constexpr int tail_width(int64_t rest) {
  return rest > 48 ? 64 : rest > 16 ? 32 : rest > 8 ? 16 : rest > 4 ? 8 : 4;
}

// Whether a linear layer with M rows (-1: any) uses tiles of this width.
constexpr bool uses_width(int64_t M, int width) {
  if (M < 0) return true;
  if (width == 64 && M >= 64) return true;
  int64_t rest = M % 64;
  while (rest > 0) {
    if (tail_width(rest) == width) return true;
    rest -= tail_width(rest);
  }
  return false;
}

struct Tiling {
  int64_t M;
  Tile operator[](int64_t i) const {
    const int64_t full = M / 64;
    if (i < full) return {64 * i, 64};
    const int64_t rest = M - 64 * full;
    const int first = tail_width(rest);
    if (i == full) return {64 * full, first};
    return {64 * full + first, tail_width(rest - first)};
  }
  int64_t size() const {
    const int64_t rest = M % 64;
    return M / 64 + (rest > 0) + (rest > 0 && rest > tail_width(rest));
  }
  // Rows of all tiles together, padding included.
  int64_t rows() const {
    const Tile last = (*this)[size() - 1];
    return last.m + last.width;
  }
};

template <class E>
inline int64_t units_of(int64_t K) {
  return (K + E::per_unit - 1) / E::per_unit;
}

// Packs units [k0, k1) of rows [m, m + L) into dst = the panel at lane 0 of those rows.
template <class E, int L>
inline void pack_lanes(const typename E::T* x, int64_t ldx, int64_t M, int64_t K, int64_t m,
                       int64_t k0, int64_t k1, float* dst, int width) {
  const int64_t whole = std::min(k1, K / E::per_unit), last = M - 1 - m;
  const int64_t stride = ldx * int64_t(sizeof(typename E::T));
  const char* src = (const char*)(x + m * ldx);
  int64_t k = k0;
  if (last >= 0 && whole - k0 >= L) {
    for (; k < whole; k += L) {
      k = std::min(k, whole - L);
      transpose<L>(src + 4 * k, stride, last, (char*)(dst + k * width), 4 * width);
    }
    k = whole;
  }
  for (; k < k1; ++k) {
    for (int64_t i = 0; i < L; ++i) {
      uint32_t bits = 0;
      const int64_t elements = std::min<int64_t>(E::per_unit, K - k * E::per_unit);
      const size_t bytes = size_t(elements) * sizeof(*x);
      if (i <= last) __builtin_memcpy(&bits, src + i * stride + 4 * k, bytes);
      __builtin_memcpy(dst + k * width + i, &bits, 4);
    }
  }
}

// Packs units [k0, k1) of one tile; returns whether a NaN or infinity was among them.
template <class E>
bool pack_panel(const typename E::T* x, int64_t ldx, int64_t M, int64_t K, Tile tile, int64_t k0,
                int64_t k1, float* panel) {
  for (int j = 0; j < tile.width;) {
    float* dst = panel + j;
    if (tile.width == 4) {
      pack_lanes<E, 4>(x, ldx, M, K, tile.m + j, k0, k1, dst, tile.width), j += 4;
    } else if (VL < 16 || tile.width == 8) {
      pack_lanes<E, 8>(x, ldx, M, K, tile.m + j, k0, k1, dst, tile.width), j += 8;
    } else {
      pack_lanes<E, VL>(x, ldx, M, K, tile.m + j, k0, k1, dst, tile.width), j += VL;
    }
  }
  bool bad = false;
  const int64_t begin = k0 * E::per_unit, end = std::min(K, k1 * E::per_unit);
  for (int64_t m = tile.m; m < std::min(M, tile.m + tile.width); ++m)
    bad |= any_nonfinite<E>(x + m * ldx + begin, end - begin);
  return bad;
}

// Hands accumulators y [outputs][width] over to the epilogue: 16 rows of x at a time, row-major
// [16][LD] in L1. `fix` repairs a row of the tile when x has NaN or infinities.
template <int LD, class Fix, class Epilogue>
__attribute__((noinline)) void finish_tile(const float* y, Tile tile, int64_t M, int64_t n0,
                                           int64_t n1, Fix&& fix, Epilogue&& epilogue) {
  alignas(64) float out[16 * LD];
  const int64_t m_end = std::min(M, tile.m + tile.width);
  const int64_t stride = 4 * tile.width;
  for (int64_t m = tile.m; m < m_end; m += 16) {
    const char* src = (const char*)(y + (m - tile.m));
    for (int64_t n = 0; n < n1 - n0; n += 16) {
      char* dst = (char*)(out + n);
      if (tile.width == 4) {
        for (int i = 0; i < 16; i += 4)
          transpose<4>(src + (n + i) * stride, stride, 3, dst + 4 * i, 4 * LD);
      } else if (tile.width == 8) {
        for (int i = 0; i < 16; i += 8)
          transpose<8>(src + (n + i) * stride, stride, 7, dst + 4 * i, 4 * LD);
      } else if (VL == 16) {
        transpose<16>(src + n * stride, stride, 15, dst, 4 * LD);
      } else {
        for (int i = 0; i < 16; i += 8)
          for (int j = 0; j < 16; j += 8)
            transpose<8>(src + (n + i) * stride + 4 * j, stride, 7, dst + 4 * (j * LD + i),
                         4 * LD);
      }
    }
    const int64_t end = std::min(m_end, m + 16);
    for (int64_t i = m; i < end; ++i) fix(i, n0, n1, out + (i - m) * LD);
    epilogue(m, end, n0, n1, (const float*)out);
  }
}

}  // namespace sc

// What generated score functors are written in: vectors of VL keys, and scalars of one query.
//
// A value that does not depend on the key is a scalar (int64_t, float, bool). One that does is a
// vector of VL lanes: vf<VL>, vi (32-bit integers, where they provably suffice), vl (64-bit), vm (a
// condition: 0 or -1 in each lane). `as_*` turns either into a vector.
namespace sc {

using vi = typename VecOf<int32_t, VL>::type;
using vl = typename VecOf<int64_t, VL>::type;
using vm = vi;

inline vi lanes() {
  vi v;
  for (int i = 0; i < VL; ++i) v[i] = i;
  return v;
}

inline vf<VL> as_vf(float x) { return vf<VL>{} + x; }
inline vf<VL> as_vf(vf<VL> x) { return x; }
inline vi as_vi(int64_t x) { return vi{} + int32_t(x); }
inline vi as_vi(vi x) { return x; }
inline vl as_vl(int64_t x) { return vl{} + x; }
inline vl as_vl(vi x) { return __builtin_convertvector(x, vl); }
inline vl as_vl(vl x) { return x; }
inline vm as_vm(bool x) { return vm{} - int32_t(x); }
inline vm as_vm(vm x) { return x; }
inline vm narrow(vl condition) { return __builtin_convertvector(condition, vm); }

inline vf<VL> to_float(vi x) { return __builtin_convertvector(x, vf<VL>); }
inline vf<VL> to_float(vl x) { return __builtin_convertvector(x, vf<VL>); }

inline vf<VL> select(vm c, vf<VL> a, vf<VL> b) { return c ? a : b; }
inline vi select(vm c, vi a, vi b) { return c ? a : b; }
inline vl select(vm c, vl a, vl b) { return __builtin_convertvector(c, vl) ? a : b; }

// Lane by lane, for what has no vector instruction.
template <class V, class F>
inline V each(V x, F&& f) {
  for (int i = 0; i < VL; ++i) x[i] = f(x[i]);
  return x;
}
template <class V, class F>
inline V each(V x, V y, F&& f) {
  for (int i = 0; i < VL; ++i) x[i] = f(x[i], y[i]);
  return x;
}

// Python's floor division and remainder. A zero divisor can only stand in a branch not taken.
inline int64_t floor_div(int64_t a, int64_t b) {
  if (b == 0) return 0;
  const int64_t q = a / b;
  return q - (q * b != a && (a < 0) != (b < 0));
}
inline int64_t floor_mod(int64_t a, int64_t b) { return b == 0 ? 0 : a - floor_div(a, b) * b; }
// Of floats as Python has them, too: the remainder is exact, and the quotient follows from it.
inline float floor_mod(float a, float b) {
  const float rest = std::fmod(a, b);
  return rest != 0.f && (b < 0.f) != (rest < 0.f) ? rest + b : rest;
}
inline float floor_div(float a, float b) {
  if (b == 0.f) return a / b;
  const float rest = std::fmod(a, b);
  const float whole = (a - rest) / b - float(rest != 0.f && (b < 0.f) != (rest < 0.f));
  const float down = std::floor(whole);
  return whole - down > 0.5f ? down + 1.f : down;
}

// As torch: NaN wins.
inline float minimum(float a, float b) { return a != a || a < b ? a : b; }
inline float maximum(float a, float b) { return a != a || a > b ? a : b; }
inline vf<VL> minimum(vf<VL> a, vf<VL> b) { return a != a ? a : (a < b ? a : b); }
inline vf<VL> maximum(vf<VL> a, vf<VL> b) { return a != a ? a : (a > b ? a : b); }

// tanh, for soft-caps. Near 0 the odd series of Cephes' tanhf, elsewhere 1 - 2 / (exp(2 x) + 1).
inline vf<VL> tanh_(vf<VL> x) {
  const vf<VL> z = x * x, size = x < 0.f ? -x : x;
  vf<VL> p = as_vf(-5.70498872745e-3f);
  p = fma<VL>(p, z, as_vf(2.06390887954e-2f));
  p = fma<VL>(p, z, as_vf(-5.37397155531e-2f));
  p = fma<VL>(p, z, as_vf(1.33314422036e-1f));
  p = fma<VL>(p, z, as_vf(-3.33332819422e-1f));
  const vf<VL> small = fma<VL>(p * z, x, x);
  const vf<VL> large = 1.f - 2.f / (exp<VL>(2.f * size) + 1.f);
  return size < 0.625f ? small : (x < 0.f ? -large : large);
}
inline float tanh_(float x) { return std::tanh(x); }

// erf, for GELU: 1 - (series in 1 / (1 + p x)) exp(-x^2), Abramowitz and Stegun 7.1.26, is good to
// 1.5e-7; near 0, where that loses digits, x times the Maclaurin series.
inline vf<VL> erf_(vf<VL> x) {
  const vf<VL> size = x < 0.f ? -x : x, z = x * x;
  const vf<VL> t = 1.f / fma<VL>(size, as_vf(0.3275911f), as_vf(1.f));
  vf<VL> p = as_vf(1.061405429f);
  p = fma<VL>(p, t, as_vf(-1.453152027f));
  p = fma<VL>(p, t, as_vf(1.421413741f));
  p = fma<VL>(p, t, as_vf(-0.284496736f));
  p = fma<VL>(p, t, as_vf(0.254829592f));
  const vf<VL> large = 1.f - p * t * exp<VL>(-z);
  vf<VL> q = as_vf(-7.5757576e-4f);
  q = fma<VL>(q, z, as_vf(4.6296296e-3f));
  q = fma<VL>(q, z, as_vf(-2.3809524e-2f));
  q = fma<VL>(q, z, as_vf(0.1f));
  q = fma<VL>(q, z, as_vf(-0.33333333f));
  const vf<VL> small = fma<VL>(q * z, x, x) * 1.1283791671f;
  return size < 0.5f ? small : (x < 0.f ? -large : large);
}
inline vf<VL> sigmoid(vf<VL> x) { return 1.f / (1.f + exp<VL>(-x)); }
inline float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

// A leaf tensor: `at` clamps indices that only a branch not taken would use.
template <class T, int R>
struct Leaf {
  const T* data;
  int64_t size[R ? R : 1], stride[R ? R : 1];

  static int64_t within(int64_t i, int64_t n) { return i < 0 ? 0 : i >= n ? n - 1 : i; }

  // Offset of an element but for its last dimension.
  template <class... I>
  int64_t row(I... index) const {
    const int64_t at[] = {int64_t(index)..., 0};
    int64_t offset = 0;
    for (size_t d = 0; d < sizeof...(I); ++d) offset += within(at[d], size[d]) * stride[d];
    return offset;
  }
};

inline float element(const float* p) { return *p; }
inline float element(const double* p) { return float(*p); }
inline bool element(const bool* p) { return *p; }
inline float element(const uint16_t* p) { return to_float(*p); }
inline int64_t element(const int64_t* p) { return *p; }
inline int64_t element(const int32_t* p) { return *p; }
inline int64_t element(const int16_t* p) { return *p; }
inline int64_t element(const int8_t* p) { return *p; }
inline int64_t element(const uint8_t* p) { return *p; }

template <class T>
struct Lanes {  // vector that a loaded element becomes
  using type = typename std::conditional<std::is_same<decltype(element((const T*)nullptr)), float>::value, vf<VL>,
      typename std::conditional<std::is_same<T, bool>::value, vm,
          typename std::conditional<std::is_same<T, int64_t>::value, vl, vi>::type>::type>::type;
};

// Elements at first, first + 1, ... of the last dimension, `count` of them.
template <class T, int R>
inline typename Lanes<T>::type load_row(const Leaf<T, R>& leaf, int64_t row, int64_t first, int count) {
  typename Lanes<T>::type v{};
  const int64_t n = leaf.size[R - 1], step = leaf.stride[R - 1];
  const T* const p = leaf.data + row;
  if constexpr (std::is_same<T, float>::value) {
    if (step == 1 && count == VL && first >= 0 && first + VL <= n) return load<VL>(p + first);
  } else if constexpr (std::is_same<T, bool>::value || std::is_same<T, int64_t>::value ||
                       std::is_same<T, int32_t>::value) {
    if (step == 1 && count == VL && first >= 0 && first + VL <= n) {
      using Stored = typename std::conditional<std::is_same<T, bool>::value, int8_t, T>::type;
      typename VecOf<Stored, VL>::type raw;
      std::memcpy(&raw, p + first, sizeof(raw));
      const auto lanes = __builtin_convertvector(raw, typename Lanes<T>::type);
      return std::is_same<T, bool>::value ? -lanes : lanes;
    }
  }
  for (int i = 0; i < count; ++i) {
    const auto x = element(p + Leaf<T, R>::within(first + i, n) * step);
    v[i] = std::is_same<T, bool>::value ? -int(x) : x;
  }
  return v;
}

// Elements at offsets computed lane by lane.
template <class T, int R, class F>
inline typename Lanes<T>::type gather(const Leaf<T, R>& leaf, int count, F&& offset) {
  typename Lanes<T>::type v{};
  for (int i = 0; i < count; ++i) {
    const auto x = element(leaf.data + offset(i));
    v[i] = std::is_same<T, bool>::value ? -int(x) : x;
  }
  return v;
}

}  // namespace sc

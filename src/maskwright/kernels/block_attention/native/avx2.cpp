// AVX2 and FMA: eight float32 a register. Float64 runs here on every CPU: it is there to check gradients by.
#include "kernels.inl"

namespace maskwright::attention {
namespace {

struct Avx2 {
  using A = float;
  using F = __m256;
  using N = __m256i;
  static constexpr int lanes = 8;
  static F zero() { return _mm256_setzero_ps(); }
  static F all(float v) { return _mm256_set1_ps(v); }
  static N all(int32_t v) { return _mm256_set1_epi32(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static N load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static bool any_above(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
  static float total(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static void totals(F a, F b, F c, F d, float* to) {
    const F both = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
  }
  static N inside(N p, N start, N stop) { return _mm256_andnot_si256(_mm256_cmpgt_epi32(start, p), _mm256_cmpgt_epi32(stop, p)); }
  // v where p lies in one of two intervals, else -infinity.
  static F only(F v, N p, N start, N stop, N start2, N stop2) {
    const N in = _mm256_or_si256(inside(p, start, stop), inside(p, start2, stop2));
    return _mm256_blendv_ps(all(-std::numeric_limits<float>::infinity()), v, _mm256_castsi256_ps(in));
  }
  static F exp2(F x) {
    x = max(all(-127.0f), x);
    const F whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = sub(x, whole);
    const N power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), all(127)), 23);
    return mul(polynomial<Avx2>(f), _mm256_castsi256_ps(power));
  }
};

// Float64 by the compiler's own vectors.
struct Wide {
  using A = double;
  typedef double F __attribute__((vector_size(32)));
  typedef int32_t N __attribute__((vector_size(16)));
  static constexpr int lanes = 4;
  static F zero() { return F{}; }
  static F all(double v) { return F{} + v; }
  static N all(int32_t v) { return N{} + v; }
  template <class T>
  static auto load(const T* p) {
    std::conditional_t<std::is_same_v<T, double>, F, N> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(double* p, F v) { std::memcpy(p, &v, sizeof v); }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F max(F a, F b) { return a > b ? a : b; }
  static bool any_above(F a, F b) { return a[0] > b[0] || a[1] > b[1] || a[2] > b[2] || a[3] > b[3]; }
  static double total(F v) { return v[0] + v[1] + v[2] + v[3]; }
  static void totals(F a, F b, F c, F d, double* to) {
    to[0] = total(a), to[1] = total(b), to[2] = total(c), to[3] = total(d);
  }
  static F only(F v, N p, N start, N stop, N start2, N stop2) {
    for (int i = 0; i < 4; ++i)
      if (!((start[i] <= p[i] && p[i] < stop[i]) || (start2[i] <= p[i] && p[i] < stop2[i])))
        v[i] = -std::numeric_limits<double>::infinity();
    return v;
  }
  static F exp2(F x) {
    for (int i = 0; i < 4; ++i) x[i] = std::exp2(x[i]);
    return x;
  }
};

}  // namespace

const Kernels& avx2() {
  static const Kernels table = kernels<Avx2, Wide>("avx2");
  return table;
}

}  // namespace maskwright::attention

// AVX-512 F, BW, VL, DQ: sixteen float32 a register.
#include "kernels.inl"

namespace maskwright::attention {
namespace {

struct Avx512 {
  using A = float;
  using F = __m512;
  using N = __m512i;
  static constexpr int lanes = 16;
  static F zero() { return _mm512_setzero_ps(); }
  static F all(float v) { return _mm512_set1_ps(v); }
  static N all(int32_t v) { return _mm512_set1_epi32(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static N load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static bool any_above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  static __m256 halves(F v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
  static float total(F v) { return _mm512_reduce_add_ps(v); }
  static void totals(F a, F b, F c, F d, float* to) {
    const __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(halves(a), halves(b)), _mm256_hadd_ps(halves(c), halves(d)));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
  }
  // v where p lies in one of two intervals, else -infinity.
  static F only(F v, N p, N start, N stop, N start2, N stop2) {
    const __mmask16 in = (_mm512_cmple_epi32_mask(start, p) & _mm512_cmplt_epi32_mask(p, stop)) |
                         (_mm512_cmple_epi32_mask(start2, p) & _mm512_cmplt_epi32_mask(p, stop2));
    return _mm512_mask_mov_ps(all(-std::numeric_limits<float>::infinity()), in, v);
  }
  static F exp2(F x) {
    x = max(all(-127.0f), x);
    const F whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = sub(x, whole);
    const N power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole), all(127)), 23);
    return mul(polynomial<Avx512>(f), _mm512_castsi512_ps(power));
  }
};

}  // namespace

const Kernels& avx512() {
  static const Kernels table = kernels<Avx512, void>("avx512");
  return table;
}

}  // namespace maskwright::attention

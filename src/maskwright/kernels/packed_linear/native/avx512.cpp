// AVX-512 F, BW, VL, VBMI2: sixteen columns a step by the expand instructions; with AVX512_BF16, thirty-two.
#include "rows.inl"

namespace maskwright {
namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int lanes = 16, ahead = 2048, dense_ahead = 2048;
  static unsigned mask(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return bits;
  }
  static F zero() { return _mm512_setzero_ps(); }
  static F all(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float total(F v) { return _mm512_reduce_add_ps(v); }
  static __m256i half_line(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m128i quarter_line(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static F upper(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

  static F widen(const float* p) { return _mm512_loadu_ps(p); }
  static F widen(const bf16* p) { return upper(half_line(p)); }
  static F widen(const f16* p) { return _mm512_cvtph_ps(half_line(p)); }
  static F widen(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter_line(p))); }
  static float narrow(float v) { return v; }
  static float narrow(bf16 v) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(v.bits << 16))); }
  static float narrow(f16 v) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(v.bits))); }
  static float narrow(int8_t v) { return v; }

  static F expand(const float* p, unsigned mask) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_loadu_ps(p));
  }
  static F expand(const bf16* p, unsigned mask) {
    return upper(_mm256_maskz_expand_epi16(static_cast<__mmask16>(mask), half_line(p)));
  }
  static F expand(const f16* p, unsigned mask) {
    return _mm512_cvtph_ps(_mm256_maskz_expand_epi16(static_cast<__mmask16>(mask), half_line(p)));
  }
  static F expand(const int8_t* p, unsigned mask) {
    const __m128i spread = _mm_maskz_expand_epi8(static_cast<__mmask16>(mask), quarter_line(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(spread));
  }
  template <class T>
  static constexpr float unit() { return 1.0f; }

  static F gather(const float* x, const uint8_t* offset, const int32_t* base) {
    const __m512i low = _mm512_castsi256_si512(_mm256_set1_epi32(base[0]));
    const __m512i start = _mm512_inserti64x4(low, _mm256_set1_epi32(base[1]), 1);
    return _mm512_i32gather_ps(_mm512_add_epi32(start, _mm512_cvtepu8_epi32(quarter_line(offset))), x, 4);
  }
};

// bfloat16 weights and x: thirty-two expanded entries meet their x in one instruction.
template <int B, bool STEADY>
void dot_row(const Job& job, int64_t r, int64_t at_b, const bf16* p) {
  constexpr int A = B == 1 ? 4 : 2;
  const int64_t bytes = (job.cols + 7) / 8, step = job.step * 4;
  const uint8_t* masks = job.bitmask + r * bytes;
  __m512 sum[B][A];
  for (auto& of_row : sum)
    for (auto& s : of_row) s = _mm512_setzero_ps();
  const uint16_t* x = job.x_bf16 + at_b * job.x_stride;
  for (int64_t at = 0; at < bytes; at += 16, x += 128) {
    prefetch(p, Avx512::ahead);
    prefetch(p, Avx512::ahead + 64);
    prefetch(masks + at, 2048);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t left = bytes - at - 8 * half;
      if (left <= 0) break;
      const uint64_t mask = load_mask(masks + at + 8 * half, left);
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const bf16* from = k == 0 ? p : STEADY ? p + step : p + count(mask & 0xffffffffu);
        const auto bits = static_cast<__mmask32>(mask >> (32 * k));
        const __m512i w = _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(from));
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          const __m512i in = _mm512_loadu_si512(x + b * job.x_stride + 64 * half + 32 * k);
          auto& s = sum[b][(2 * half + k) % A];
          s = _mm512_dpbf16_ps(s, (__m512bh)w, (__m512bh)in);
        }
      }
      p += STEADY ? 2 * step : count(mask);
    }
  }
  for (int b = 0; b < B; ++b) {
    __m512 total = sum[b][0];
    for (int a = 1; a < A; ++a) total = _mm512_add_ps(total, sum[b][a]);
    job.y[(at_b + b) * job.rows + r] = _mm512_reduce_add_ps(total);
  }
}

template <bool STEADY>
void dot_rows(const Job& job, int64_t first, int64_t last) {
  std::vector<bf16> copy;
  for (int64_t r = first; r < last; ++r) {
    const bf16* p = row_values<bf16>(job, job.row_offsets[r], row_kept(job, r), copy);
    int64_t b = 0;
    for (; b + 4 <= job.batch; b += 4) dot_row<4, STEADY>(job, r, b, p);
    switch (job.batch - b) {
      case 3: dot_row<3, STEADY>(job, r, b, p); break;
      case 2: dot_row<2, STEADY>(job, r, b, p); break;
      case 1: dot_row<1, STEADY>(job, r, b, p); break;
    }
  }
}

}  // namespace

const Kernels& avx512() {
  static const Kernels table = kernels<Avx512>("avx512");
  return table;
}

const Kernels& avx512_bf16() {
  static const Kernels table = [] {
    Kernels k = kernels<Avx512>("avx512_bf16");
    k.dot_bf16 = true;
    k.bitmask = [](Dtype d, const Job& job, int64_t first, int64_t last) {
      if (d != Dtype::bf16 || !job.x_bf16) return avx512().bitmask(d, job, first, last);
      job.step ? dot_rows<true>(job, first, last) : dot_rows<false>(job, first, last);
    };
    return k;
  }();
  return table;
}

}  // namespace maskwright

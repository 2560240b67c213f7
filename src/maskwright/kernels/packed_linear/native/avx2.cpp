// AVX2, FMA, BMI2, F16C: eight columns a step, expanded by a table over the mask byte.
#include "rows.inl"

namespace maskwright {
namespace {

// For each mask byte, a shuffle that spreads the next values over eight 32-bit lanes; absent lanes become 0.
struct Tables {
  alignas(64) uint8_t two[256][32] = {};    // bfloat16: into the upper half of a lane, where it is a float32
  alignas(64) uint8_t half[256][16] = {};   // float16: eight halves in a row
  alignas(64) uint8_t one[256][32] = {};    // int8: into the top byte of a lane (the value times 2^24)
  alignas(64) int32_t four[256][8] = {};    // float32: the source lane, negative where absent
  constexpr Tables() {
    for (int byte = 0; byte < 256; ++byte)
      for (int lane = 0, k = 0; lane < 8; ++lane) {
        const bool on = byte >> lane & 1;
        for (int at = 0; at < 4; ++at) two[byte][lane * 4 + at] = one[byte][lane * 4 + at] = 0x80;
        for (int at = 0; at < 2; ++at) {
          half[byte][lane * 2 + at] = static_cast<uint8_t>(on ? 2 * k + at : 0x80);
          if (on) two[byte][lane * 4 + 2 + at] = static_cast<uint8_t>(2 * k + at);
        }
        if (on) one[byte][lane * 4 + 3] = static_cast<uint8_t>(k);
        four[byte][lane] = on ? k : -1;
        k += on;
      }
  }
};
constinit const Tables table;  // made by the compiler: nothing here may run before the CPU was asked

struct Avx2 {
  using F = __m256;
  static constexpr int lanes = 8, ahead = 1024, dense_ahead = 0;
  static unsigned mask(const uint8_t* p) { return *p; }
  static F zero() { return _mm256_setzero_ps(); }
  static F all(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float total(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static __m128i half_line(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  static F widen(const float* p) { return _mm256_loadu_ps(p); }
  static F widen(const bf16* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_line(p)), 16)); }
  static F widen(const f16* p) { return _mm256_cvtph_ps(half_line(p)); }
  static F widen(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static float narrow(float v) { return v; }
  static float narrow(bf16 v) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(v.bits << 16))); }
  static float narrow(f16 v) { return _cvtsh_ss(v.bits); }
  static float narrow(int8_t v) { return v; }

  static F expand(const float* p, unsigned byte) {
    const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.four[byte]));
    const F spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), lane);
    return _mm256_blendv_ps(spread, zero(), _mm256_castsi256_ps(lane));
  }
  static F expand(const bf16* p, unsigned byte) {
    const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.two[byte]));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half_line(p)), lane));
  }
  static F expand(const f16* p, unsigned byte) {
    const __m128i lane = _mm_load_si128(reinterpret_cast<const __m128i*>(table.half[byte]));
    return _mm256_cvtph_ps(_mm_shuffle_epi8(half_line(p), lane));
  }
  static F expand(const int8_t* p, unsigned byte) {
    int64_t eight;
    std::memcpy(&eight, p, 8);
    const __m256i lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.one[byte]));
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), lane));
  }
  // What `expand` is too large by.
  template <class T>
  static constexpr float unit() { return sizeof(T) == 1 ? 0x1p-24f : 1.0f; }

  static F gather(const float* x, const uint8_t* offset, const int32_t* base) {
    // Loads and inserts: vgatherdps takes a quarter longer on the chips that have no more than AVX2.
    x += base[0];
    __m128 low = _mm_load_ss(x + offset[0]), high = _mm_load_ss(x + offset[4]);
    low = _mm_insert_ps(low, _mm_load_ss(x + offset[1]), 0x10);
    high = _mm_insert_ps(high, _mm_load_ss(x + offset[5]), 0x10);
    low = _mm_insert_ps(low, _mm_load_ss(x + offset[2]), 0x20);
    high = _mm_insert_ps(high, _mm_load_ss(x + offset[6]), 0x20);
    low = _mm_insert_ps(low, _mm_load_ss(x + offset[3]), 0x30);
    high = _mm_insert_ps(high, _mm_load_ss(x + offset[7]), 0x30);
    return _mm256_set_m128(high, low);
  }
};

}  // namespace

const Kernels& avx2() {
  static const Kernels table = kernels<Avx2>("avx2");
  return table;
}

}  // namespace maskwright

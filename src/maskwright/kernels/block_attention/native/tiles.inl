// Small pieces shared by forward and backward: scratch memory, products of tiles held in registers, transposition.
// Everything has internal linkage, so that code built for one instruction set is not linked into another.
//
// Scores are kept transposed, (keys, rows of queries): the rows fill the lanes, keys and values are read as they lie, one
// number for all lanes, so neither is packed; and the softmax runs down the columns without sums across lanes.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "attention.h"

namespace maskwright::attention {
namespace {

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

template <int N, class Do>
inline __attribute__((always_inline)) void each(Do&& run) {  // run(0) ... run(N - 1), unrolled, indices constant
  [&]<int... K>(std::integer_sequence<int, K...>) { (run(std::integral_constant<int, K>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

// 2^f for |f| <= 1/2, relative error 2e-9 before rounding.
template <class I>
inline __attribute__((always_inline)) typename I::F polynomial(typename I::F f) {
  auto r = I::all(1.53533618e-4f);
  r = I::fma(r, f, I::all(1.33988744e-3f));
  r = I::fma(r, f, I::all(9.61843736e-3f));
  r = I::fma(r, f, I::all(5.55033247e-2f));
  r = I::fma(r, f, I::all(2.40226479e-1f));
  r = I::fma(r, f, I::all(6.93147203e-1f));
  return I::fma(r, f, I::all(1.0f));
}

// A thread's memory, handed out piece by piece and kept between calls.
class Scratch {
  struct Block { char* data; size_t size; };
  Block blocks[32];
  int made = 0, at = 0;
  size_t used = 0;

 public:
  ~Scratch() {
    for (int k = 0; k < made; ++k) std::free(blocks[k].data);
  }
  void clear() { at = 0, used = 0; }
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 127) / 64 * 64;
    for (; at < made && used + bytes > blocks[at].size; ++at) used = 0;
    if (at == made) {
      if (made == 32) throw std::bad_alloc();
      const size_t size = std::max<size_t>(bytes, size_t{1} << 20);
      char* data = static_cast<char*>(std::aligned_alloc(64, size));
      if (!data) throw std::bad_alloc();
      blocks[made++] = {data, size};
    }
    T* out = reinterpret_cast<T*>(blocks[at].data + used);
    used += bytes;
    return out;
  }
};

inline Scratch& scratch() {
  static thread_local Scratch memory;
  memory.clear();
  return memory;
}

constexpr int TALL = 6;  // rows of a tile of sums; two registers wide: twelve sums, what 16 registers hold

// c (R, V registers) = a b, a given by rows. Not inlined: next to other loops GCC spills the sums.
template <class I, int R, int V>
__attribute__((noinline)) void rows_tile(const typename I::A* const* a, const typename I::A* b, int64_t ldb, int64_t depth,
                                         typename I::A* c, int64_t ldc) {
  typename I::F sum[R][V];
  const typename I::A* p[R];
  each<R>([&](auto r) {
    p[r] = a[r];
    each<V>([&](auto v) { sum[r][v] = I::zero(); });
  });
#pragma GCC unroll 2
  for (int64_t i = 0; i < depth; ++i, b += ldb) {
    typename I::F in[V];
    each<V>([&](auto v) { in[v] = I::load(b + v * I::lanes); });
    each<R>([&](auto r) {
      const auto w = I::all(p[r][i]);
      each<V>([&](auto v) { sum[r][v] = I::fma(w, in[v], sum[r][v]); });
    });
  }
  each<R>([&](auto r) { each<V>([&](auto v) { I::store(c + r * ldc + v * I::lanes, sum[r][v]); }); });
}

// c (R, V registers) += a^T b, a given by rows of which columns at .. at + R - 1 count.
template <class I, int R, int V>
__attribute__((noinline)) void columns_tile(const typename I::A* const* a, int64_t at, const typename I::A* b, int64_t ldb,
                                            int64_t depth, typename I::A* c, int64_t ldc) {
  typename I::F sum[R][V];
  each<R>([&](auto r) { each<V>([&](auto v) { sum[r][v] = I::load(c + r * ldc + v * I::lanes); }); });
#pragma GCC unroll 2
  for (int64_t i = 0; i < depth; ++i, b += ldb) {
    const typename I::A* p = a[i] + at;
    typename I::F in[V];
    each<V>([&](auto v) { in[v] = I::load(b + v * I::lanes); });
    each<R>([&](auto r) {
      const auto w = I::all(p[r]);
      each<V>([&](auto v) { sum[r][v] = I::fma(w, in[v], sum[r][v]); });
    });
  }
  each<R>([&](auto r) { each<V>([&](auto v) { I::store(c + r * ldc + v * I::lanes, sum[r][v]); }); });
}

// c (R rows, V registers from column at) += a b.
template <class I, int R, int V>
__attribute__((noinline)) void sums_tile(const typename I::A* a, int64_t lda, const typename I::A* b, int64_t ldb, int64_t depth,
                                         typename I::A* const* c, int64_t at) {
  typename I::F sum[R][V];
  const typename I::A* p[R];
  each<R>([&](auto r) {
    p[r] = a + r * lda;
    each<V>([&](auto v) { sum[r][v] = I::load(c[r] + at + v * I::lanes); });
  });
#pragma GCC unroll 2
  for (int64_t i = 0; i < depth; ++i, b += ldb) {
    typename I::F in[V];
    each<V>([&](auto v) { in[v] = I::load(b + v * I::lanes); });
    each<R>([&](auto r) {
      const auto w = I::all(p[r][i]);
      each<V>([&](auto v) { sum[r][v] = I::fma(w, in[v], sum[r][v]); });
    });
  }
  each<R>([&](auto r) { each<V>([&](auto v) { I::store(c[r] + at + v * I::lanes, sum[r][v]); }); });
}

// run(first, R as a constant) for n rows, TALL at a time; what is left over in halves, as two rows alone wait for the adder.
// Float64 is there to check by: fewer tiles, a shorter build.
template <class I, class Do>
inline __attribute__((always_inline)) void in_tiles(int64_t n, Do&& run) {
  int64_t at = 0;
  if constexpr (sizeof(typename I::A) == 8) {
    for (; n - at >= 4; at += 4) run(at, std::integral_constant<int, 4>{});
    for (; at < n; ++at) run(at, std::integral_constant<int, 1>{});
  } else {
    for (; n - at > 8 || n - at == TALL; at += TALL) run(at, std::integral_constant<int, TALL>{});
    if (n - at > 6) run(at, std::integral_constant<int, 4>{}), at += 4;
    switch (n - at) {
      case 1: return run(at, std::integral_constant<int, 1>{});
      case 2: return run(at, std::integral_constant<int, 2>{});
      case 3: return run(at, std::integral_constant<int, 3>{});
      case 4: return run(at, std::integral_constant<int, 4>{});
      case 5: return run(at, std::integral_constant<int, 5>{});
    }
  }
}

// c (n, V) = a b by rows of a; c (n, V) += a^T b by columns of a.
template <class I, int V, class A>
inline void by_rows(const A* const* a, int64_t n, const A* b, int64_t ldb, int64_t depth, A* c, int64_t ldc) {
  in_tiles<I>(n, [&](int64_t at, auto r) { rows_tile<I, r, V>(a + at, b, ldb, depth, c + at * ldc, ldc); });
}

template <class I, int V, class A>
inline void by_columns(const A* const* a, int64_t n, const A* b, int64_t ldb, int64_t depth, A* c, int64_t ldc) {
  in_tiles<I>(n, [&](int64_t at, auto r) { columns_tile<I, r, V>(a, at, b, ldb, depth, c + at * ldc, ldc); });
}

// Eight rows, from[k][at ...], each lane j times by[j], become eight columns: to[j][to_at + k].
inline void transpose(const float* const* from, int64_t at, const float* by, float* const* to, int64_t to_at) {
  __m256 r[8], s[8];
  const __m256 w = _mm256_loadu_ps(by);
  each<8>([&](auto k) { r[k] = _mm256_mul_ps(_mm256_loadu_ps(from[k] + at), w); });
  each<4>([&](auto k) {
    s[2 * k] = _mm256_unpacklo_ps(r[2 * k], r[2 * k + 1]);
    s[2 * k + 1] = _mm256_unpackhi_ps(r[2 * k], r[2 * k + 1]);
  });
  each<2>([&](auto h) {
    each<2>([&](auto k) {
      r[4 * h + 2 * k] = _mm256_shuffle_ps(s[4 * h + k], s[4 * h + k + 2], 0x44);
      r[4 * h + 2 * k + 1] = _mm256_shuffle_ps(s[4 * h + k], s[4 * h + k + 2], 0xEE);
    });
  });
  each<4>([&](auto k) {
    _mm256_storeu_ps(to[k] + to_at, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
    _mm256_storeu_ps(to[k + 4] + to_at, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
  });
}

inline void transpose(const double* const* from, int64_t at, const double* by, double* const* to, int64_t to_at) {
  for (int k = 0; k < 8; ++k)
    for (int j = 0; j < 8; ++j) to[j][to_at + k] = from[k][at + j] * by[j];
}

inline float widened(bf16 v) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(v.bits << 16))); }
inline float widened(float v) { return v; }
inline double widened(double v) { return v; }

inline void narrow(float v, bf16& to) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : up);
}
inline void narrow(float v, float& to) { to = v; }
inline void narrow(double v, double& to) { to = v; }

template <class S, class A>
inline void widen_row(const S* from, int64_t n, A* to) {
  for (int64_t k = 0; k < n; ++k) to[k] = widened(from[k]);
}

template <class A, class S>
inline void narrow_row(const A* from, int64_t n, S* to) {
  for (int64_t k = 0; k < n; ++k) narrow(from[k], to[k]);
}

}  // namespace
}  // namespace maskwright::attention

// The kernels, written once over an instruction set `I`. Included by one source file per set: everything here has
// internal linkage, so that code built for one set is not linked into another.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "rows.h"

namespace maskwright {
namespace {

inline uint64_t load_mask(const uint8_t* from, int64_t bytes) {
  uint64_t mask = 0;
  if (bytes >= 8) std::memcpy(&mask, from, 8);
  else std::memcpy(&mask, from, bytes);
  return mask;
}

inline int count(uint64_t mask) { return __builtin_popcountll(mask); }

// Always inlined: GCC takes a function that only prefetches for one without effect, and drops its calls.
template <class T>
inline __attribute__((always_inline)) void prefetch(const T* from, int64_t bytes) {
  _mm_prefetch(reinterpret_cast<const char*>(from) + bytes, _MM_HINT_T0);
}

// The values of row r, readable 128 bytes past their end: a register, from up to 48 bytes past it (see dot_row).
template <class T>
inline const T* row_values(const Job& job, int64_t start, int64_t kept, std::vector<T>& copy) {
  const T* values = static_cast<const T*>(job.values) + start;
  const int64_t spare = (job.kept - start - kept) * static_cast<int64_t>(sizeof(T));
  if (spare >= 128) return values;
  copy.assign(kept + 128 / sizeof(T), T{});
  std::memcpy(static_cast<void*>(copy.data()), values, kept * sizeof(T));
  return copy.data();
}

inline int64_t row_kept(const Job& job, int64_t r) {
  return (r + 1 < job.rows ? job.row_offsets[r + 1] : job.kept) - job.row_offsets[r];
}

template <int N, class Do>
inline __attribute__((always_inline)) void each(Do&& run) {  // run(0) ... run(N - 1), unrolled, indices constant
  [&]<int... K>(std::integer_sequence<int, K...>) { (run(std::integral_constant<int, K>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}

// y = x W^T for B rows of x, R rows of W side by side: expand I::lanes columns at a time, in registers.
// Not inlined: next to other loops GCC spills the row pointers, at half the speed. The order of a sum depends on B alone,
// so a row's result does not depend on which rows stand beside it.
template <class I, class T, int B, int R, bool STEADY>
__attribute__((noinline)) void bitmask_tile(const Job& job, int64_t r, int64_t at_b, const T* const (&values)[R]) {
  constexpr int W = I::lanes, BYTES = W / 8, A = B == 1 ? 4 : B == 2 ? 2 : 1;
  const int64_t bytes = (job.cols + 7) / 8, step = job.step * BYTES, stride = job.x_stride;
  const uint8_t* masks = job.bitmask + r * bytes;
  const float* x = job.x + at_b * stride;
  const T* p[R];
  typename I::F sum[R][B][A];
  each<R>([&](auto k) {
    p[k] = values[k];
    each<B>([&](auto b) { each<A>([&](auto a) { sum[k][b][a] = I::zero(); }); });
  });
  const auto columns = [&](auto a, const auto& bits) __attribute__((always_inline)) {
    typename I::F w[R];
    each<R>([&](auto k) {
      const unsigned mask = bits(k);
      w[k] = I::expand(p[k], mask);
      p[k] += STEADY ? step : __builtin_popcount(mask);
    });
    each<B>([&](auto b) {
      const auto in = I::load(x + b * stride);
      each<R>([&](auto k) { sum[k][b][a] = I::fma(w[k], in, sum[k][b][a]); });
    });
    masks += BYTES;
    x += W;
  };
  const uint8_t* const end = masks + bytes;
  while (masks + 8 <= end) {
    each<R>([&](auto k) {  // at most two lines of values a step; the masks' own line comes round far less often
      prefetch(p[k], I::ahead);
      if (sizeof(T) == 4) prefetch(p[k], I::ahead + 64);
    });
    // Not unrolled further: with R pointers in flight they would spill.
#pragma GCC unroll 1
    for (int s = 0; s < 8; s += BYTES * A)
      each<A>([&](auto a) { columns(a, [&](auto k) { return I::mask(masks + k * bytes); }); });
  }
  while (masks < end) {
    const int64_t left = std::min<int64_t>(BYTES, end - masks);
    columns(std::integral_constant<int, 0>{}, [&](auto k) { return static_cast<unsigned>(load_mask(masks + k * bytes, left)); });
  }
  each<R>([&](auto k) {
    const float scale = job.scale ? job.scale[r + k] : 1.0f;
    each<B>([&](auto b) {
      auto total = sum[k][b][0];
      each<A - 1>([&](auto a) { total = I::add(total, sum[k][b][a + 1]); });
      job.y[(at_b + b) * job.rows + r + k] = I::total(total) * I::template unit<T>() * scale;
    });
  });
}

// R rows against every row of x, four of those at a time: the values are in the first cache for all but the first.
template <class I, class T, int R, bool STEADY>
inline void bitmask_against_all(const Job& job, int64_t r, std::vector<T> (&copies)[R]) {
  const T* values[R];
  for (int k = 0; k < R; ++k) values[k] = row_values<T>(job, job.row_offsets[r + k], row_kept(job, r + k), copies[k]);
  int64_t b = 0;
  for (; b + 4 <= job.batch; b += 4) bitmask_tile<I, T, 4, R, STEADY>(job, r, b, values);
  switch (job.batch - b) {
    case 3: return bitmask_tile<I, T, 3, R, STEADY>(job, r, b, values);
    case 2: return bitmask_tile<I, T, 2, R, STEADY>(job, r, b, values);
    case 1: return bitmask_tile<I, T, 1, R, STEADY>(job, r, b, values);
  }
}

template <class I, class T, int R, bool STEADY>
void bitmask_rows(const Job& job, int64_t first, int64_t last) {
  std::vector<T> copies[R], copy[1];
  int64_t r = first;
  for (; r + R <= last; r += R) bitmask_against_all<I, T, R, STEADY>(job, r, copies);
  for (; r < last; ++r) bitmask_against_all<I, T, 1, STEADY>(job, r, copy);
}

// Adds value * x[column] over kept entries, one lane per row of x, to `sums`: work falls with the density.
template <class I, int V>
inline void by_lanes(const float* x, const float* value, const int32_t* column, int64_t kept, float* sums) {
  constexpr int W = I::lanes, A = V == 1 ? 4 : 2;
  typename I::F sum[A][V];
  each<V>([&](auto v) {
    sum[0][v] = I::load(sums + v * W);
    each<A - 1>([&](auto a) { sum[a + 1][v] = I::zero(); });
  });
  int64_t k = 0;
  for (; k + A <= kept; k += A)
    each<A>([&](auto a) {
      const auto w = I::all(value[k + a]);
      const float* in = x + static_cast<int64_t>(column[k + a]) * (V * W);
      each<V>([&](auto v) { sum[a][v] = I::fma(w, I::load(in + v * W), sum[a][v]); });
    });
  for (; k < kept; ++k)
    each<V>([&](auto v) {
      sum[0][v] = I::fma(I::all(value[k]), I::load(x + static_cast<int64_t>(column[k]) * (V * W) + v * W), sum[0][v]);
    });
  each<V>([&](auto v) {
    each<A - 1>([&](auto a) { sum[0][v] = I::add(sum[0][v], sum[a + 1][v]); });
    I::store(sums + v * W, sum[0][v]);
  });
}

inline void finish_lanes(const Job& job, int64_t r, const float* sums) {
  const float scale = job.scale ? job.scale[r] : 1.0f;
  for (int64_t b = 0; b < job.batch; ++b) job.y[b * job.rows + r] = sums[b] * scale;
}

template <class I, class T>
inline void widen_all(const T* from, int64_t kept, float* to) {  // both may be touched up to 64 bytes past the end
  for (int64_t k = 0; k < kept; k += I::lanes) I::store(to + k, I::widen(from + k));
}

template <class I, class T>
void indexed_rows(const Job& job, int64_t first, int64_t last) {
  constexpr int W = I::lanes, G = W / 8;  // groups of 8 in a register
  std::vector<T> copy;
  for (int64_t r = first; r < last; ++r) {
    int64_t g = job.row_groups[r];
    const int64_t end = job.row_groups[r + 1];
    const T* p = row_values<T>(job, g * 8, (end - g) * 8, copy);
    auto one = I::zero(), two = I::zero();
    for (; g + 2 * G <= end; g += 2 * G, p += 2 * W) {
      prefetch(p, I::ahead);
      prefetch(job.offsets + g * 8, 1024);
      one = I::fma(I::widen(p), I::gather(job.x, job.offsets + g * 8, job.bases + g), one);
      two = I::fma(I::widen(p + W), I::gather(job.x, job.offsets + (g + G) * 8, job.bases + g + G), two);
    }
    float rest = 0;
    for (; g < end; ++g, p += 8) {
      alignas(64) float w[W];
      I::store(w, I::widen(p));
      for (int k = 0; k < 8; ++k) rest += w[k] * job.x[job.bases[g] + job.offsets[g * 8 + k]];
    }
    job.y[r] = (I::total(I::add(one, two)) + rest) * (job.scale ? job.scale[r] : 1.0f);
  }
}

template <class I, class T, int V>
void indexed_lanes(const Job& job, int64_t first, int64_t last) {
  std::vector<T> copy;
  std::vector<int32_t> columns;
  std::vector<float> values;
  for (int64_t r = first; r < last; ++r) {
    const int64_t g = job.row_groups[r], kept = (job.row_groups[r + 1] - g) * 8;
    const T* p = row_values<T>(job, g * 8, kept, copy);
    columns.resize(kept + 16);
    values.resize(kept + 16);
    for (int64_t k = 0; k < kept; ++k) columns[k] = job.bases[g + k / 8] + job.offsets[g * 8 + k];
    widen_all<I>(p, kept, values.data());
    alignas(64) float sums[V * I::lanes] = {};
    by_lanes<I, V>(job.x, values.data(), columns.data(), kept, sums);
    finish_lanes(job, r, sums);
  }
}

// Rows of a dense weight, R at a time against B rows of x. The honest baseline, and the fallback for dense layers.
// As above, the order of a sum depends on B alone.
template <class I, class T, int R, int B>
inline void dense_tile(const Job& job, int64_t r, const float* x, float* y) {
  constexpr int W = I::lanes, A = B == 1 ? 2 : 1;
  const T* p = static_cast<const T*>(job.values) + r * job.cols;
  typename I::F sum[R][B][A];
  for (auto& of_row : sum)
    for (auto& of : of_row)
      for (auto& s : of) s = I::zero();
  int64_t c = 0;
  for (; c + A * W <= job.cols; c += A * W)
#pragma GCC unroll 2
    for (int a = 0; a < A; ++a) {
      typename I::F in[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) in[b] = I::load(x + b * job.x_stride + c + a * W);
#pragma GCC unroll 8
      for (int k = 0; k < R; ++k) {
        const T* from = p + k * job.cols + c + a * W;
        if (I::dense_ahead) prefetch(from, I::dense_ahead);
        const auto w = I::widen(from);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) sum[k][b][a] = I::fma(w, in[b], sum[k][b][a]);
      }
    }
  for (int k = 0; k < R; ++k)
    for (int b = 0; b < B; ++b) {
      auto total = sum[k][b][0];
      if (A == 2) total = I::add(total, sum[k][b][A - 1]);
      float out = I::total(total);
      for (int64_t t = c; t < job.cols; ++t) out += I::narrow(p[k * job.cols + t]) * x[b * job.x_stride + t];
      y[b * job.rows + r + k] = out * (job.scale ? job.scale[r + k] : 1.0f);
    }
}

template <class I, class T, int R, int B>
inline void dense_rows(const Job& job, int64_t first, int64_t last, int64_t at) {
  const float* x = job.x + at * job.x_stride;
  float* y = job.y + at * job.rows;
  int64_t r = first;
  for (; r + R <= last; r += R) dense_tile<I, T, R, B>(job, r, x, y);
  for (; r < last; ++r) dense_tile<I, T, 1, B>(job, r, x, y);
}

template <class I, class T>
void dense_any(const Job& job, int64_t first, int64_t last) {
  if (job.batch == 1) return dense_rows<I, T, 8, 1>(job, first, last, 0);
  // Blocks of rows that stay in the cache while x passes over them, four of its rows at a time.
  const int64_t rows = std::max<int64_t>(6, (int64_t{1} << 17) / std::max<int64_t>(1, job.cols * sizeof(T)) / 6 * 6);
  for (int64_t r = first; r < last; r += rows) {
    const int64_t end = std::min(r + rows, last);
    int64_t b = 0;
    for (; b + 4 <= job.batch; b += 4) dense_rows<I, T, 3, 4>(job, r, end, b);
    for (; b + 2 <= job.batch; b += 2) dense_rows<I, T, 6, 2>(job, r, end, b);
    if (b < job.batch) dense_rows<I, T, 8, 1>(job, r, end, b);
  }
}

template <class I, class T>
void expand_rows(const Job& job, int64_t first, int64_t last, float* out) {
  constexpr int W = I::lanes;
  const int64_t bytes = (job.cols + 7) / 8;
  std::vector<T> copy;
  for (int64_t r = first; r < last; ++r, out += job.cols) {
    const T* p = row_values<T>(job, job.row_offsets[r], row_kept(job, r), copy);
    const auto unit = I::all(I::template unit<T>()), scale = I::all(job.scale ? job.scale[r] : 1.0f);
    for (int64_t c = 0; c < job.cols; c += W) {
      const uint8_t* masks = job.bitmask + r * bytes + c / 8;
      const unsigned mask = static_cast<unsigned>(W == 8 ? *masks : load_mask(masks, std::min<int64_t>(2, bytes - c / 8)));
      const auto w = I::mul(I::mul(I::expand(p, mask), unit), scale);
      p += count(mask);
      if (c + W <= job.cols) {
        I::store(out + c, w);
      } else {
        alignas(64) float part[W];
        I::store(part, w);
        std::memcpy(out + c, part, (job.cols - c) * sizeof(float));
      }
    }
  }
}

template <class I, class T>
void expand_indexed(const Job& job, int64_t first, int64_t last, float* out) {
  std::memset(out, 0, (last - first) * job.cols * sizeof(float));
  const T* values = static_cast<const T*>(job.values);
  for (int64_t r = first; r < last; ++r, out += job.cols) {
    const float scale = job.scale ? job.scale[r] : 1.0f;
    // Added, not set: the padding of a row's last group points at its first column with the value 0.
    for (int64_t k = job.row_groups[r] * 8; k < job.row_groups[r + 1] * 8; ++k)
      out[job.bases[k / 8] + job.offsets[k]] += I::narrow(values[k]) * scale;
  }
}

template <class Do>
inline void with_type(Dtype dtype, Do&& run) {
  switch (dtype) {
    case Dtype::f32: return run(float{});
    case Dtype::bf16: return run(bf16{});
    case Dtype::f16: return run(f16{});
    case Dtype::i8: return run(int8_t{});
  }
}

// LANES as a constant: as many registers as the rows of x fill.
template <class I, class Use>
inline void with_registers(int64_t batch, Use&& use) {
  if constexpr (I::lanes < MOST)
    if (batch > I::lanes) return use(std::integral_constant<int, MOST / I::lanes>{});
  use(std::integral_constant<int, 1>{});
}

template <class I>
Kernels kernels(const char* name) {
  Kernels k{};
  k.name = name;
  k.lanes = I::lanes;
  k.bitmask = [](Dtype d, const Job& job, int64_t first, int64_t last) {
    with_type(d, [&](auto t) {
      using T = decltype(t);
      // One row of x: memory is the limit, one stream a thread is best. More: three rows of W share what is read of x.
      if (job.batch > 1) return bitmask_rows<I, T, 3, false>(job, first, last);
      job.step ? bitmask_rows<I, T, 1, true>(job, first, last) : bitmask_rows<I, T, 1, false>(job, first, last);
    });
  };
  k.indexed = [](Dtype d, const Job& job, int64_t first, int64_t last) {
    with_type(d, [&](auto t) { indexed_rows<I, decltype(t)>(job, first, last); });
  };
  k.indexed_lanes = [](Dtype d, const Job& job, int64_t first, int64_t last) {
    with_type(d, [&](auto t) {
      with_registers<I>(job.batch, [&](auto v) { indexed_lanes<I, decltype(t), v>(job, first, last); });
    });
  };
  k.dense = [](Dtype d, const Job& job, int64_t first, int64_t last) {
    with_type(d, [&](auto t) { dense_any<I, decltype(t)>(job, first, last); });
  };
  k.expand = [](Dtype d, const Job& job, int64_t first, int64_t last, float* out) {
    with_type(d, [&](auto t) { expand_rows<I, decltype(t)>(job, first, last, out); });
  };
  k.expand_indexed = [](Dtype d, const Job& job, int64_t first, int64_t last, float* out) {
    with_type(d, [&](auto t) { expand_indexed<I, decltype(t)>(job, first, last, out); });
  };
  return k;
}

}  // namespace
}  // namespace maskwright

// The operator of the library. Its schema is declared in Python.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "noise.h"

namespace maskwright::noise {
namespace {

constexpr int64_t SPAN = 1 << 16;  // entries a thread takes at least; a multiple of 8, so that its bits begin at a byte

const Passes& chosen(c10::string_view name) {
  const bool two = __builtin_cpu_supports("avx2");
  const bool wide = two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide && (name.empty() || name == "avx512")) return avx512();
  TORCH_CHECK(two && (name.empty() || name == "avx2"), "noise: no instruction set ", name, " here");
  return avx2();
}

bool flat(const at::Tensor& x, at::ScalarType type, int64_t size) {
  return x.scalar_type() == type && x.is_contiguous() && x.numel() == size;
}

void move(at::Tensor& row, int64_t start, int64_t increment, int64_t place, const at::Tensor& table,
          const std::optional<at::Tensor>& bits, at::ArrayRef<double> scales, double decay, c10::string_view impl) {
  const int64_t n = row.numel();
  TORCH_CHECK(flat(row, at::kFloat, n), "noise: a row is contiguous float32, got ", row.scalar_type(), " ", row.sizes());
  TORCH_CHECK(flat(table, at::kFloat, 2 * SEGMENTS), "noise: the table has ", SEGMENTS, " chords of float32");
  TORCH_CHECK(!bits || flat(*bits, at::kByte, (n + 7) / 8), "noise: ", n, " entries have ", (n + 7) / 8, " bytes of bits");
  TORCH_CHECK(place >= 0, "noise: a stream has no entry ", place);
  const Passes& set = chosen(impl);
  const std::vector<float> each(scales.begin(), scales.end());
  const Chord* chords = static_cast<const Chord*>(table.const_data_ptr());
  const uint8_t* kept = bits ? bits->const_data_ptr<uint8_t>() : nullptr;
  float* to = row.mutable_data_ptr<float>();
  const int64_t spans = (n + SPAN - 1) / SPAN;
  at::parallel_for(0, spans, 1, [&](int64_t from, int64_t until) {
    const int64_t at = from * SPAN;
    const Stream stream{static_cast<uint64_t>(start), static_cast<uint64_t>(increment), static_cast<uint64_t>(place + at)};
    set.move(to + at, std::min(until * SPAN, n) - at, stream, chords, kept == nullptr ? nullptr : kept + at / 8, each.data(),
             static_cast<int64_t>(each.size()), static_cast<float>(decay));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(maskwright, CPU, m) { m.impl("noise_move", &move); }

}  // namespace maskwright::noise

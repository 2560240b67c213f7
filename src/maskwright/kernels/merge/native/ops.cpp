// The operators of the library. Their schemas are declared in Python.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <vector>

#include "merge.h"

namespace maskwright::merging {
namespace {

const Passes& chosen(c10::string_view name) {
  const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool wide = two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide && (name.empty() || name == "avx512")) return avx512();
  TORCH_CHECK(two && (name.empty() || name == "avx2"), "merge: no instruction set ", name, " here");
  return avx2();
}

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK(false, "merge: pieces are float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

Piece piece(const at::Tensor& x, int64_t n) {
  TORCH_CHECK(x.dim() == 1 && x.numel() == n && x.is_contiguous(), "merge: pieces are flat and equally long, got ", x.sizes());
  return {x.const_data_ptr(), dtype_of(x)};
}

int64_t* counted(at::Tensor& counts, int64_t size) {
  TORCH_CHECK(counts.scalar_type() == at::kLong && counts.numel() == size && counts.is_contiguous(), "merge: needs ", size,
              " int64 counts");
  return counts.mutable_data_ptr<int64_t>();
}

void histogram(at::Tensor& counts, const at::Tensor& base, const at::Tensor& tuned, c10::string_view impl) {
  const int64_t n = base.numel();
  chosen(impl).histogram(piece(base, n), piece(tuned, n), n, counted(counts, 1 << (31 - LOW)));
}

std::vector<int64_t> within(at::Tensor& counts, const at::Tensor& base, const at::Tensor& tuned, at::IntArrayRef first,
                            at::IntArrayRef wide, c10::string_view impl) {
  const int64_t n = base.numel(), number = static_cast<int64_t>(first.size());
  TORCH_CHECK(wide.size() == first.size(), "merge: every window has a begin and a width");
  int64_t room = 0;
  for (int64_t k = 0; k < number; ++k) {
    TORCH_CHECK(first[k] >= 0 && wide[k] >= 0 && first[k] + wide[k] < 1 << (31 - LOW), "merge: a window lies beyond the bins");
    room += wide[k] << LOW;
  }
  int64_t* to = counted(counts, room);
  std::vector<Window> windows;
  for (int64_t k = 0; k < number; to += wide[k] << LOW, ++k)
    windows.push_back({static_cast<int32_t>(first[k]), static_cast<int32_t>(wide[k]), to, 0});
  chosen(impl).within(piece(base, n), piece(tuned, n), n, windows.data(), number);
  std::vector<int64_t> above;
  for (const Window& window : windows) above.push_back(window.above);
  return above;
}

std::vector<int64_t> equal(const at::Tensor& base, const at::Tensor& tuned, at::IntArrayRef levels, c10::string_view impl) {
  const int64_t n = base.numel();
  std::vector<int64_t> counts(levels.size(), 0);
  chosen(impl).equal(piece(base, n), piece(tuned, n), n, levels.data(), static_cast<int64_t>(levels.size()), counts.data());
  return counts;
}

// `keeps` has 8 numbers a model, in the order of `Keep`.
std::vector<int64_t> combine(at::Tensor& out, const at::Tensor& base, at::TensorList tuned, at::IntArrayRef keeps,
                             const c10::List<std::optional<at::Tensor>>& masks, at::ArrayRef<double> factors,
                             at::ArrayRef<double> weights, bool elect, double divisor, double leaning, double scale,
                             c10::string_view impl) {
  const int64_t n = base.numel(), number = static_cast<int64_t>(tuned.size());
  TORCH_CHECK(number > 0 && static_cast<int64_t>(keeps.size()) == 8 * number && static_cast<int64_t>(masks.size()) == number &&
                  static_cast<int64_t>(factors.size()) == number && static_cast<int64_t>(weights.size()) == number,
              "merge: every model needs its choice, factor and weight");
  std::vector<Model> models(number);
  std::vector<at::Tensor> held(number);
  for (int64_t m = 0; m < number; ++m) {
    const int64_t* k = keeps.data() + 8 * m;
    Keep keep{static_cast<int32_t>(k[0]), static_cast<int32_t>(k[2]), k[1], k[3],
              static_cast<uint64_t>(k[4]), static_cast<uint64_t>(k[5]), static_cast<uint64_t>(k[6]), k[7], nullptr};
    const std::optional<at::Tensor> mask = masks.get(m);
    if (mask) {
      held[m] = *mask;
      TORCH_CHECK(mask->scalar_type() == at::kBool && mask->dim() == 1 && mask->numel() == n && mask->is_contiguous(),
                  "merge: a mask is flat, bool and as long as its piece");
      keep.mask = held[m].const_data_ptr<bool>();
    }
    models[m] = {piece(tuned[m], n), keep, static_cast<float>(factors[m]), static_cast<float>(weights[m])};
  }
  piece(out, n);
  const Rule rule{elect, divisor != 0, static_cast<float>(divisor), static_cast<float>(leaning), static_cast<float>(scale)};
  const Refused refused = chosen(impl).combine(piece(base, n), models.data(), number, rule, n, dtype_of(out), out.mutable_data_ptr());
  return {refused.differences, refused.results};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskwright, CPU, m) {
  m.impl("merge_histogram", &histogram);
  m.impl("merge_within", &within);
  m.impl("merge_equal", &equal);
  m.impl("merge_combine", &combine);
}

}  // namespace maskwright::merging

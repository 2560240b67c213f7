// The operators: checks, threads, and the choice of instruction set. Their schemas are declared in Python.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "rows.h"

namespace maskwright {
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2");
}

const Kernels& chosen(c10::string_view name) {
  if (name.empty()) {
    static const Kernels& best = *[]() -> const Kernels* {
      if (has_avx512() && __builtin_cpu_supports("avx512bf16")) return &avx512_bf16();
      if (has_avx512()) return &avx512();
      TORCH_CHECK(has_avx2(), "packed_linear: this CPU has neither AVX2 nor AVX-512");
      return &avx2();
    }();
    return best;
  }
  if (name == "avx2" && has_avx2()) return avx2();
  if (name == "avx512" && has_avx512()) return avx512();
  if (name == "avx512_bf16" && has_avx512() && __builtin_cpu_supports("avx512bf16")) return avx512_bf16();
  TORCH_CHECK(false, "packed_linear: no instruction set ", name, " here");
}

Dtype dtype_of(const at::Tensor& values) {
  switch (values.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    case at::kChar: return Dtype::i8;
    default: TORCH_CHECK(false, "packed_linear: values of dtype ", values.scalar_type());
  }
}

void check_flat(const at::Tensor& t, at::ScalarType dtype, int64_t size, const char* what) {
  TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && t.numel() == size, "packed_linear: ", what, " must be ",
              size, " contiguous ", dtype, ", got ", t.sizes(), " ", t.scalar_type());
}

void check_bias(const std::optional<at::Tensor>& bias, int64_t rows) {
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->numel() == rows), "packed_linear: a bias of ", bias->sizes(), " for ", rows,
              " rows");
}

// x as float32 rows padded with zeros (and as bfloat16 where asked), or transposed into lanes.
struct Input {
  std::vector<float> f32;
  std::vector<uint16_t> half;
  int64_t stride = 0;

  template <class Use>
  static void typed(const at::Tensor& x, Use&& use) {
    switch (x.scalar_type()) {
      case at::kFloat: return use(x.const_data_ptr<float>());
      case at::kBFloat16: return use(x.const_data_ptr<at::BFloat16>());
      default: return use(x.const_data_ptr<at::Half>());
    }
  }

  template <class To>
  static void each(const at::Tensor& x, int64_t batch, int64_t cols, To&& to) {
    typed(x, [&](auto* p) {
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t c = 0; c < cols; ++c) to(b, c, static_cast<float>(p[b * cols + c]));
    });
  }

  void rows(const at::Tensor& x, int64_t batch, int64_t cols, bool with_half) {
    stride = (cols + PAD - 1) / PAD * PAD + PAD;
    f32.assign(batch * stride, 0.0f);
    each(x, batch, cols, [&](int64_t b, int64_t c, float v) { f32[b * stride + c] = v; });
    if (!with_half) return;
    half.assign(batch * stride, 0);
    const auto* p = x.const_data_ptr<at::BFloat16>();
    for (int64_t b = 0; b < batch; ++b) std::memcpy(half.data() + b * stride, p + b * cols, cols * 2);
  }

  void lanes(const at::Tensor& x, int64_t batch, int64_t cols, int64_t width) {
    stride = width;
    f32.assign(cols * width, 0.0f);
    each(x, batch, cols, [&](int64_t b, int64_t c, float v) { f32[c * width + b] = v; });
  }
};

// float32 sums, bias added, in the dtype of x.
at::Tensor finished(const std::vector<float>& y, const at::Tensor& x, int64_t batch, int64_t rows,
                    const std::optional<at::Tensor>& bias) {
  auto sizes = x.sizes().vec();
  sizes.back() = rows;
  at::Tensor out = at::empty(sizes, x.options());
  std::vector<float> add(rows, 0.0f);
  check_bias(bias, rows);
  if (bias) {
    const at::Tensor plain = bias->contiguous();
    Input::each(plain, 1, rows, [&](int64_t, int64_t r, float v) { add[r] = v; });
  }
  auto write = [&](auto* to) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t r = 0; r < rows; ++r) to[b * rows + r] = static_cast<std::remove_pointer_t<decltype(to)>>(y[b * rows + r] + add[r]);
  };
  switch (x.scalar_type()) {
    case at::kFloat: write(out.mutable_data_ptr<float>()); break;
    case at::kBFloat16: write(out.mutable_data_ptr<at::BFloat16>()); break;
    default: write(out.mutable_data_ptr<at::Half>());
  }
  return out;
}

struct Call {
  at::Tensor x;
  Job job{};
  Dtype dtype;
  const Kernels& set;

  Call(const at::Tensor& given, const at::Tensor& values, const std::optional<at::Tensor>& scale, int64_t rows,
       c10::string_view impl)
      : x(given.contiguous()), dtype(dtype_of(values)), set(chosen(impl)) {
    TORCH_CHECK(x.dim() >= 1 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 ||
                                 x.scalar_type() == at::kHalf),
                "packed_linear: x must be float32, bfloat16 or float16 with one dimension or more, got ", x.sizes(), " ",
                x.scalar_type());
    TORCH_CHECK(values.is_contiguous(), "packed_linear: values must be contiguous");
    job.values = values.const_data_ptr();
    job.rows = rows;
    job.cols = x.size(-1);
    job.kept = values.numel();
    job.batch = 1;
    for (const int64_t size : x.sizes().slice(0, x.dim() - 1)) job.batch *= size;
    if (scale) {
      check_flat(*scale, at::kFloat, rows, "scale");
      job.scale = scale->const_data_ptr<float>();
    }
  }

  template <class Rows>
  at::Tensor run(const std::optional<at::Tensor>& bias, const Input& input, Rows&& kernel) {
    std::vector<float> y(job.batch * job.rows);
    job.x = input.f32.data();
    job.x_bf16 = input.half.empty() ? nullptr : input.half.data();
    job.x_stride = input.stride;
    job.y = y.data();
    // A thread must have work worth its start: some 30 microseconds.
    const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 17) / std::max<int64_t>(1, job.cols * job.batch));
    at::parallel_for(0, job.rows, grain, [&](int64_t first, int64_t last) { kernel(dtype, job, first, last); });
    return finished(y, x, job.batch, job.rows, bias);
  }
};

// Blocks of the dense weight in a buffer that stays in the cache, multiplied by torch's own matmul. With bfloat16
// instructions and bfloat16 on both sides that runs in bfloat16 (AMX where the chip has it), else in float32.
template <class Expand>
at::Tensor by_blocks(const Call& call, const std::optional<at::Tensor>& bias, Expand&& expand) {
  const Job& job = call.job;
  check_bias(bias, job.rows);
  const bool half = call.set.dot_bf16 && call.dtype == Dtype::bf16 && call.x.scalar_type() == at::kBFloat16;
  const auto kind = call.x.options().dtype(half ? at::kBFloat16 : at::kFloat);
  const at::Tensor x = call.x.reshape({job.batch, job.cols}).to(kind.dtype().toScalarType());
  at::Tensor out = at::empty({job.batch, job.rows}, kind);
  const int64_t most = std::max<int64_t>(16, (int64_t{1} << 21) / std::max<int64_t>(1, job.cols));
  at::Tensor block = at::empty({std::min(most, job.rows), job.cols}, call.x.options().dtype(at::kFloat));
  float* to = block.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, job.cols));
  for (int64_t first = 0; first < job.rows; first += most) {
    const int64_t last = std::min(first + most, job.rows);
    at::parallel_for(first, last, grain, [&](int64_t a, int64_t b) {
      expand(call.dtype, job, a, b, to + (a - first) * job.cols);
    });
    at::Tensor part = block.narrow(0, 0, last - first);
    if (half) part = part.to(at::kBFloat16);
    at::Tensor slice = out.narrow(1, first, last - first);
    at::mm_out(slice, x, part.t());
  }
  if (bias) out = out.to(at::kFloat).add_(*bias);
  auto sizes = call.x.sizes().vec();
  sizes.back() = job.rows;
  return out.to(call.x.scalar_type()).reshape(sizes);
}

// At most MOST rows of x at a time through `some`, which takes (x, bias).
template <class Some>
at::Tensor in_parts(const Call& call, Some&& some) {
  const Job& job = call.job;
  const at::Tensor x = call.x.reshape({job.batch, job.cols});
  std::vector<at::Tensor> parts;
  for (int64_t at = 0; at < job.batch; at += MOST) parts.push_back(some(x.narrow(0, at, std::min<int64_t>(MOST, job.batch - at))));
  auto sizes = call.x.sizes().vec();
  sizes.back() = job.rows;
  return parts.empty() ? at::empty(sizes, call.x.options()) : at::cat(parts).reshape(sizes);
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& bitmask,
                         const at::Tensor& row_offsets, const std::optional<at::Tensor>& scale,
                         const std::optional<at::Tensor>& bias, int64_t step, int64_t dense_from, c10::string_view impl) {
  Call call(x, values, scale, bitmask.size(0), impl);
  Job& job = call.job;
  check_flat(bitmask, at::kByte, job.rows * ((job.cols + 7) / 8), "bitmask");
  check_flat(row_offsets, at::kLong, job.rows, "row_offsets");
  job.bitmask = bitmask.const_data_ptr<uint8_t>();
  job.row_offsets = row_offsets.const_data_ptr<int64_t>();
  job.step = step;
  if (job.batch >= dense_from) return by_blocks(call, bias, call.set.expand);
  if (job.batch > MOST || job.batch == 0)
    return in_parts(call, [&](const at::Tensor& part) {
      return packed_linear(part, values, bitmask, row_offsets, scale, bias, step, dense_from, impl);
    });
  Input input;
  const bool half = call.set.dot_bf16 && call.dtype == Dtype::bf16 && x.scalar_type() == at::kBFloat16;
  input.rows(call.x, job.batch, job.cols, half);
  return call.run(bias, input, call.set.bitmask);
}

at::Tensor indexed_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& offsets, const at::Tensor& bases,
                          const at::Tensor& row_groups, const std::optional<at::Tensor>& scale,
                          const std::optional<at::Tensor>& bias, int64_t dense_from, c10::string_view impl) {
  TORCH_CHECK(row_groups.numel() > 0, "packed_linear: row_groups is empty");
  Call call(x, values, scale, row_groups.numel() - 1, impl);
  Job& job = call.job;
  check_flat(offsets, at::kByte, values.numel(), "offsets");
  check_flat(bases, at::kInt, values.numel() / 8, "bases");
  check_flat(row_groups, at::kLong, job.rows + 1, "row_groups");
  job.offsets = offsets.const_data_ptr<uint8_t>();
  job.bases = bases.const_data_ptr<int32_t>();
  job.row_groups = row_groups.const_data_ptr<int64_t>();
  if (job.batch >= dense_from) return by_blocks(call, bias, call.set.expand_indexed);
  if (job.batch > MOST || job.batch == 0)
    return in_parts(call, [&](const at::Tensor& part) {
      return indexed_linear(part, values, offsets, bases, row_groups, scale, bias, dense_from, impl);
    });
  Input input;
  if (job.batch == 1) {
    input.rows(call.x, 1, job.cols, false);
    return call.run(bias, input, call.set.indexed);
  }
  input.lanes(call.x, job.batch, job.cols, job.batch > call.set.lanes ? MOST : call.set.lanes);
  return call.run(bias, input, call.set.indexed_lanes);
}

at::Tensor dense_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                        const std::optional<at::Tensor>& bias, c10::string_view impl) {
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && weight.size(1) == x.size(-1), "dense_linear: x ", x.sizes(), ", weight ",
              weight.sizes());
  Call call(x, weight, scale, weight.size(0), impl);
  if (call.job.batch > MOST || call.job.batch == 0)
    return in_parts(call, [&](const at::Tensor& part) { return dense_linear(part, weight, scale, bias, impl); });
  Input input;
  input.rows(call.x, call.job.batch, call.job.cols, false);
  return call.run(bias, input, call.set.dense);
}

std::string instructions() {
  if (!has_avx2()) return "";
  return chosen("").name;
}

}  // namespace

TORCH_LIBRARY_IMPL(maskwright, CPU, m) {
  m.impl("packed_linear", &packed_linear);
  m.impl("indexed_linear", &indexed_linear);
  m.impl("dense_linear", &dense_linear);
}

TORCH_LIBRARY_IMPL(maskwright, CompositeExplicitAutograd, m) { m.impl("instructions", &instructions); }

}  // namespace maskwright

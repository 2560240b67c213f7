// One call of an operator: checks, the choice of instruction set, units of work and threads.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <numeric>
#include <vector>

#include "attention.h"

namespace maskwright::attention {
namespace {

using Maybe = std::optional<at::Tensor>;

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Float64 runs on AVX2 everywhere.
const Kernels& chosen(c10::string_view name, Dtype dtype) {
  TORCH_CHECK(has_avx2(), "block_attention: this CPU has no AVX2");
  const bool known = name.empty() || name == "avx2" || (name == "avx512" && has_avx512()) || name == "brgemm" ||
                     (name == "plain brgemm" && dtype == Dtype::bf16);
  TORCH_CHECK(known, "block_attention: no instruction set ", name, " here");
  return has_avx512() && name != "avx2" && dtype != Dtype::f64 ? avx512() : avx2();
}

void torch_brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                  const uint16_t* b, float* c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c);
}

// The same in plain loops, so that what is packed for it can be tested on any chip.
void plain_brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                  const uint16_t* b, float* c) {
  const auto wide = [](uint16_t bits) { return static_cast<float>(c10::BFloat16(bits, c10::BFloat16::from_bits())); };
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = add ? c[i * ldc + j] : 0.0f;
      for (int64_t l = 0; l < k; ++l) sum += wide(a[i * lda + l]) * wide(b[l / 2 * ldb * 2 + j * 2 + l % 2]);
      c[i * ldc + j] = sum;
    }
}

// What multiplies bfloat16: torch's matrix tiles where the chip has them and the width fits, else null.
Brgemm brgemm_of(c10::string_view name, Dtype dtype, int64_t width) {
  if (dtype != Dtype::bf16 || width % 16 != 0) return nullptr;
  if (name == "plain brgemm") return plain_brgemm;
  static const bool has = has_avx512() && at::native::cpublas::could_pack(at::kBFloat16);
  TORCH_CHECK(name != "brgemm" || has, "block_attention: this CPU has no matrix tiles for bfloat16");
  return has && (name.empty() || name == "brgemm") ? torch_brgemm : nullptr;
}

Dtype dtype_of(const at::Tensor& q) {
  switch (q.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kDouble: return Dtype::f64;
    default: TORCH_CHECK(false, "block_attention: q of dtype ", q.scalar_type());
  }
}

// Every unit once, by whichever thread is free, `end` once a thread; the order of the sums within one does not depend on the thread.
template <class Run, class End>
void share_out(int64_t units, Run&& run, End&& end) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(units, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t k; (k = next++) < units;) run(k);
    end();
  });
}

template <class Run>
void share_out(int64_t units, Run&& run) {
  share_out(units, run, [] {});
}

at::Tensor with_rows(const at::Tensor& t) { return t.size(3) < 2 || t.stride(3) == 1 ? t : t.contiguous(); }

View view_of(const at::Tensor& t) {
  const auto step = [&](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  return {t.const_data_ptr(), step(0), step(1), step(2)};
}

// Of the shape of t, as near its memory order as can be: what q gives, the output has (and its gradient).
at::Tensor like(const at::Tensor& t) {
  return t.size(3) < 2 || t.stride(3) == 1 ? at::empty_like(t) : at::empty(t.sizes(), t.options());
}

View written(const at::Tensor& t) {
  TORCH_CHECK(t.size(3) < 2 || t.stride(3) == 1, "block_attention: the output's rows are not contiguous");
  View view = view_of(t);
  view.data = t.mutable_data_ptr();
  return view;
}

void check_flat(const at::Tensor& t, at::ScalarType dtype, int64_t size, const char* what) {
  TORCH_CHECK(t.scalar_type() == dtype && t.is_contiguous() && (size < 0 || t.numel() == size), "block_attention: ", what,
              " must be ", size, " contiguous ", dtype, ", got ", t.sizes(), " ", t.scalar_type());
}

struct Call {
  at::Tensor q, k, v, bias;
  Job job{};
  Dtype dtype;
  const Kernels& set;
  at::ScalarType kind;  // of sums
  int64_t list_batch = 1, list_heads = 1, groups = 1, rows;

  Call(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const Maybe& bounds, const Maybe& offsets,
       const Maybe& starts, const Maybe& stops, at::IntArrayRef shape, int64_t rows_, const Maybe& positions,
       const Maybe& bias_, double scale, c10::string_view impl)
      : dtype(dtype_of(q_)), set(chosen(impl, dtype)), kind(dtype == Dtype::f64 ? at::kDouble : at::kFloat) {
    TORCH_CHECK(q_.dim() == 4 && k_.dim() == 4 && k_.sizes() == v_.sizes() && k_.size(0) == q_.size(0) &&
                    k_.size(3) == q_.size(3) && k_.size(1) > 0 && q_.size(1) % k_.size(1) == 0,
                "block_attention: q ", q_.sizes(), ", k ", k_.sizes(), ", v ", v_.sizes());
    TORCH_CHECK(k_.scalar_type() == q_.scalar_type() && v_.scalar_type() == q_.scalar_type(), "block_attention: q of ",
                q_.scalar_type(), ", k of ", k_.scalar_type(), ", v of ", v_.scalar_type());
    TORCH_CHECK(q_.size(3) > 0 && q_.size(3) <= 1024, "block_attention: width ", q_.size(3));
    TORCH_CHECK(k_.size(2) < (int64_t{1} << 31) - 64 && q_.size(2) < (int64_t{1} << 31), "block_attention: too long");
    q = with_rows(q_), k = with_rows(k_), v = with_rows(v_);
    job.batch = q.size(0), job.heads = q.size(1), job.queries = q.size(2), job.width = q.size(3);
    job.kv_heads = k.size(1), job.keys = k.size(2), job.scale = scale;
    job.q = view_of(q), job.k = view_of(k), job.v = view_of(v);
    if (bounds) {
      const auto b = bounds->sizes();
      TORCH_CHECK(b.size() == 5 && (b[0] == 1 || b[0] == job.batch) && (b[1] == 1 || b[1] == job.heads) &&
                      b[2] == job.queries && b[3] == 2 && b[4] == 2,
                  "block_attention: bounds of ", b, " for q ", q.sizes());
      check_flat(*bounds, at::kInt, -1, "bounds");
      job.bounds = bounds->const_data_ptr<int32_t>();
      job.bounds_head = b[1] == 1 ? 0 : 4 * b[2], job.bounds_batch = b[0] == 1 ? 0 : 4 * b[1] * b[2];
    }
    if (positions) {
      check_flat(*positions, at::kInt, job.keys, "positions");
      job.positions = positions->const_data_ptr<int32_t>();
    }
    if (bias_) {
      const int64_t full[] = {job.batch, job.heads, job.queries, job.keys};
      TORCH_CHECK(bias_->dim() == 4, "block_attention: bias of ", bias_->sizes());
      for (int d = 0; d < 4; ++d)
        TORCH_CHECK(bias_->size(d) == 1 || bias_->size(d) == full[d], "block_attention: bias of ", bias_->sizes(), " for q ",
                    q.sizes(), ", k ", k.sizes());
      bias = bias_->to(kind);
      const View view = view_of(bias);
      job.bias = view.data, job.bias_batch = view.batch, job.bias_head = view.head, job.bias_row = view.row;
      job.bias_key = bias.size(3) == 1 ? 0 : bias.stride(3);
    }
    rows = std::max<int64_t>(job.queries, 1);
    if (offsets) lists(*offsets, starts, stops, shape, rows_);
  }

  void lists(const at::Tensor& offsets, const Maybe& starts, const Maybe& stops, at::IntArrayRef shape, int64_t rows_) {
    TORCH_CHECK(starts && stops && shape.size() == 3 && rows_ > 0, "block_attention: lists of keys need starts, stops and a shape");
    list_batch = shape[0], list_heads = shape[1], groups = shape[2], rows = rows_;
    TORCH_CHECK((list_batch == 1 || list_batch == job.batch) && list_heads > 0 && job.heads % list_heads == 0 &&
                    groups == (job.queries + rows - 1) / rows,
                "block_attention: lists of keys ", shape, " with ", rows, " rows each for q ", q.sizes(), ", k ", k.sizes());
    const int64_t count = list_batch * list_heads * groups;
    check_flat(offsets, at::kLong, count + 1, "offsets");
    check_flat(*starts, at::kInt, -1, "starts");
    check_flat(*stops, at::kInt, starts->numel(), "stops");
    job.offsets = offsets.const_data_ptr<int64_t>();
    job.starts = starts->const_data_ptr<int32_t>(), job.stops = stops->const_data_ptr<int32_t>();
    TORCH_CHECK(job.offsets[0] == 0 && job.offsets[count] == starts->numel(), "block_attention: offsets do not span the runs");
    std::atomic<bool> good{true};
    at::parallel_for(0, count, 4096, [&](int64_t a, int64_t b) {
      for (int64_t l = a; l < b; ++l) {
        const int64_t from = job.offsets[l], to = job.offsets[l + 1];
        bool fine = from >= 0 && from <= to && to <= starts->numel();
        for (int64_t r = from, last = 0; fine && r < to; last = job.stops[r++])
          fine = last <= job.starts[r] && job.starts[r] < job.stops[r] && job.stops[r] <= job.keys;
        if (!fine) good = false;
      }
    });
    TORCH_CHECK(good, "block_attention: a list of keys is not ascending, disjoint and within the ", job.keys, " keys");
  }

  // All units of one batch entry and head of k and v, the last rows first: those see the most keys where order is causal,
  // and the shortest are left for the end. `lanes`: how many rows side by side.
  void units(int64_t b, int64_t kv, std::vector<Unit>& to) const {
    const int64_t group = job.heads / job.kv_heads;
    const int64_t shared = std::min<int64_t>(std::gcd(group, job.heads / list_heads), 8);
    for (int64_t h = 0; h < group; h += shared) {
      const int64_t heads = std::min(shared, group - h), head = kv * group + h;
      const int64_t most = std::max<int64_t>(16, 128 / heads / 16 * 16);
      for (int64_t g = groups - 1; g >= 0; --g) {
        const int64_t end = std::min(job.queries, (g + 1) * rows), parts = (end - g * rows + most - 1) / most;
        const int64_t list = ((list_batch == 1 ? 0 : b) * list_heads + head * list_heads / job.heads) * groups + g;
        for (int64_t p = parts - 1; p >= 0; --p) {
          const int64_t row = g * rows + p * most;
          to.push_back({b, head, heads, row, std::min(most, end - row), list});
        }
      }
    }
  }
  std::vector<Unit> units() const {
    std::vector<Unit> all;
    for (int64_t b = 0; b < job.batch; ++b)
      for (int64_t kv = 0; kv < job.kv_heads; ++kv) units(b, kv, all);
    return all;
  }
};

}  // namespace
}  // namespace maskwright::attention

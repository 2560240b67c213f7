// The operators of the library. Their schemas are declared in Python.
#include <torch/library.h>

#include "call.h"
#include "gradients.h"

namespace maskwright::attention {
namespace {

// Units of few rows, cut into parts by keys where there would be fewer than some sixteen of them. How they are cut depends
// on the lists alone: the result is the same for any number of threads.
void few_rows(const Call& call, const std::vector<Unit>& units) {
  const int64_t n = static_cast<int64_t>(units.size());
  if (n >= 64) return share_out(n, [&](int64_t k) { call.set.direct(call.dtype, call.job, {units[k], 0, call.job.keys, nullptr}); });
  std::vector<int64_t> keys(n), first(n + 1);
  int64_t total = 0;
  for (int64_t k = 0; k < n; ++k) total += keys[k] = call.set.count(call.dtype, call.job, units[k]);
  const int64_t most = std::max<int64_t>(256, total / 16 + 1);
  std::vector<Part> parts;
  int64_t sums = 0;
  for (int64_t k = 0; k < n; ++k) {
    first[k] = static_cast<int64_t>(parts.size());
    const int64_t count = std::max<int64_t>(1, (keys[k] + most - 1) / most);
    for (int64_t p = 0; p < count; ++p) parts.push_back({units[k], keys[k] * p / count, keys[k] * (p + 1) / count, nullptr});
    if (count > 1) sums += count * units[k].heads * units[k].rows * (call.job.width + 2);
  }
  first[n] = static_cast<int64_t>(parts.size());
  const at::Tensor held = at::empty({sums}, at::TensorOptions().dtype(call.kind));
  char* to = static_cast<char*>(held.mutable_data_ptr());
  for (int64_t k = 0; k < n; ++k)
    for (int64_t p = first[k]; first[k + 1] - first[k] > 1 && p < first[k + 1]; ++p) {
      parts[p].sums = to;
      to += units[k].heads * units[k].rows * (call.job.width + 2) * held.element_size();
    }
  share_out(first[n], [&](int64_t p) { call.set.direct(call.dtype, call.job, parts[p]); });
  for (int64_t k = 0; k < n; ++k)
    if (first[k + 1] - first[k] > 1) call.set.merge(call.dtype, call.job, parts.data() + first[k], first[k + 1] - first[k]);
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& bounds,
                                           const Maybe& offsets, const Maybe& starts, const Maybe& stops,
                                           at::IntArrayRef shape, int64_t rows, const Maybe& positions, const Maybe& bias,
                                           double scale, c10::string_view impl) {
  Call call(q, k, v, bounds, offsets, starts, stops, shape, rows, positions, bias, scale, impl);
  Job& job = call.job;
  at::Tensor out = like(q), lse = at::empty({job.batch, job.heads, job.queries}, q.options().dtype(call.kind));
  job.out = written(out), job.lse = lse.mutable_data_ptr();
  const std::vector<Unit> units = call.units();
  int64_t most = 0;
  for (const Unit& unit : units) most = std::max(most, unit.heads * unit.rows);
  if (most <= MOST_DIRECT) {
    few_rows(call, units);
  } else {
    job.brgemm = brgemm_of(impl, call.dtype, job.width);
    share_out(
        units.size(), [&](int64_t u) { call.set.forward(call.dtype, job, units[u]); },
        [&] {
          if (job.brgemm == torch_brgemm) at::native::cpublas::brgemm_release();
        });
  }
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskwright, CPU, m) {
  m.impl("block_attention", &forward);
  m.impl("block_attention_backward", &backward);
}

}  // namespace maskwright::attention

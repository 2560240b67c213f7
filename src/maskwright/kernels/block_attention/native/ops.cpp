// The operators: checks, units of work, threads, and the choice of instruction set. Their schemas are declared in Python.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

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

// Units of one batch entry and head of k and v, in a row: what they add to dk, dv and the bias's gradient is theirs alone.
struct Chunk {
  std::vector<Unit> units;
  int64_t batch, kv, start, stop;
  at::Tensor sums, dbias;
};

std::vector<Chunk> chunks_of(const Call& call) {
  const Job& job = call.job;
  // Up to eight threads the split depends on the shape alone, and so do the bits of the result.
  const int64_t pairs = std::max<int64_t>(1, job.batch * job.kv_heads), threads = at::get_num_threads();
  const int64_t wanted = pairs >= 8 && threads <= 8 ? 1 : (std::max<int64_t>(16, threads > 8 ? 2 * threads : 0) + pairs - 1) / pairs;
  std::vector<Chunk> out;
  for (int64_t b = 0; b < job.batch; ++b)
    for (int64_t kv = 0; kv < job.kv_heads; ++kv) {
      std::vector<Unit> all;
      call.units(b, kv, all);
      std::vector<int64_t> cost(all.size());
      at::parallel_for(0, static_cast<int64_t>(all.size()), 64, [&](int64_t from, int64_t to) {
        for (int64_t u = from; u < to; ++u)
          cost[u] = call.set.count(call.dtype, job, all[u]) * all[u].heads * all[u].rows + 1;
      });
      int64_t total = 0, seen = 0, made = 0;
      for (const int64_t c : cost) total += c;
      for (size_t u = 0; u < all.size(); ++u) {
        if (made == 0 || seen * wanted >= total * made) out.push_back({{}, b, kv, job.keys, 0, {}, {}}), ++made;
        Chunk& chunk = out.back();
        chunk.units.push_back(all[u]);
        call.set.reach(call.dtype, job, all[u], chunk.start, chunk.stop);
        seen += cost[u];
      }
    }
  for (Chunk& chunk : out) chunk.start = std::min(chunk.start, chunk.stop);
  return out;
}

// dk and dv from the chunks' sums, in the order of the chunks.
void collect(const Call& call, const std::vector<Chunk>& chunks, at::Tensor& dk, at::Tensor& dv) {
  const Job& job = call.job;
  const int64_t pairs = job.batch * job.kv_heads;
  std::vector<std::vector<const Chunk*>> of(pairs);
  for (const Chunk& chunk : chunks) of[chunk.batch * job.kv_heads + chunk.kv].push_back(&chunk);
  const auto sum = [&](auto kept, auto stored) {
    using A = decltype(kept);
    using T = decltype(stored);
    at::parallel_for(0, pairs * job.keys, std::max<int64_t>(1, 32768 / job.width), [&](int64_t from, int64_t to) {
      std::vector<A> row(job.width);
      for (int64_t at = from; at < to; ++at) {
        const int64_t b = at / job.keys / job.kv_heads, h = at / job.keys % job.kv_heads, key = at % job.keys;
        for (int which = 0; which < 2; ++which) {
          std::fill(row.begin(), row.end(), A{0});
          for (const Chunk* chunk : of[at / job.keys]) {
            if (key < chunk->start || key >= chunk->stop) continue;
            const A* in = chunk->sums.template const_data_ptr<A>() + which * chunk->sums.stride(0) + (key - chunk->start) * chunk->sums.stride(1);
            for (int64_t d = 0; d < job.width; ++d) row[d] += in[d];
          }
          const at::Tensor& t = which ? dv : dk;
          T* out = t.mutable_data_ptr<T>() + b * t.stride(0) + h * t.stride(1) + key * t.stride(2);
          for (int64_t d = 0; d < job.width; ++d) out[d] = static_cast<T>(row[d]);
        }
      }
    });
  };
  if (call.dtype == Dtype::f64) sum(double{}, double{});
  else if (call.dtype == Dtype::f32) sum(float{}, float{});
  else sum(float{}, at::BFloat16{});
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out_, const Maybe& grad_lse, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& out_, const at::Tensor& lse_, const Maybe& bounds, const Maybe& offsets, const Maybe& starts,
    const Maybe& stops, at::IntArrayRef shape, int64_t rows, const Maybe& positions, const Maybe& bias, double scale,
    bool bias_grad, c10::string_view impl) {
  Call call(q, k, v, bounds, offsets, starts, stops, shape, rows, positions, bias, scale, impl);
  Job& job = call.job;
  TORCH_CHECK(grad_out_.sizes() == q.sizes() && out_.sizes() == q.sizes() && grad_out_.scalar_type() == q.scalar_type() &&
                  out_.scalar_type() == q.scalar_type(),
              "block_attention: gradient of ", grad_out_.sizes(), " for q ", q.sizes());
  const at::IntArrayRef per_row = q.sizes().slice(0, 3);
  TORCH_CHECK(lse_.sizes() == per_row && (!grad_lse || grad_lse->sizes() == per_row), "block_attention: lse of ", lse_.sizes());
  const at::Tensor grad_out = with_rows(grad_out_), out = with_rows(out_), lse = lse_.to(call.kind).contiguous();
  const at::Tensor grad_of_lse = grad_lse ? grad_lse->to(call.kind).contiguous() : at::Tensor();
  job.lse = const_cast<void*>(lse.const_data_ptr());
  at::Tensor dq = like(q), dk = like(k), dv = like(v), dbias = at::empty({0}, q.options().dtype(call.kind));
  std::vector<Chunk> chunks = chunks_of(call);

  // Rows of the bias of their own: written in place, those that share a row of it one after another. One row for all
  // queries: a sum per chunk, added up at the end.
  const bool by_row = bias_grad && bias->size(2) == job.queries && job.queries > 1;
  if (bias_grad) dbias = at::zeros(bias->sizes(), dbias.options());
  const bool serial_batch = by_row && bias->size(0) == 1, serial_head = by_row && bias->size(1) == 1;
  const auto phase_of = [&](const Chunk& chunk) {
    return (serial_batch ? chunk.batch : 0) * job.kv_heads + (serial_head ? chunk.kv : 0);
  };
  // One chunk a head: its sums are made where they belong, if they are kept in the same type.
  const int64_t padded = (job.width + PAD - 1) / PAD * PAD;
  const bool in_place = static_cast<int64_t>(chunks.size()) == job.batch * job.kv_heads && padded == job.width &&
                        call.kind == q.scalar_type();
  Gradient all{};
  all.grad_out = view_of(grad_out), all.out = view_of(out), all.dq = written(dq);
  all.grad_lse = grad_lse ? grad_of_lse.const_data_ptr() : nullptr;
  const int64_t group = job.heads / job.kv_heads;
  const auto run = [&](Chunk& chunk) {
    Gradient g = all;
    at::Tensor to_k, to_v;
    if (in_place) {
      to_k = dk.select(0, chunk.batch).select(0, chunk.kv), to_v = dv.select(0, chunk.batch).select(0, chunk.kv);
      to_k.zero_(), to_v.zero_();
    } else {
      chunk.sums = at::zeros({2, chunk.stop - chunk.start, padded}, dbias.options());
      to_k = chunk.sums[0], to_v = chunk.sums[1], g.start = chunk.start;
    }
    g.dk = to_k.mutable_data_ptr(), g.dv = to_v.mutable_data_ptr(), g.dk_row = to_k.stride(0), g.dv_row = to_v.stride(0);
    if (bias_grad) {
      if (!by_row) chunk.dbias = at::zeros({bias->size(1) == 1 ? 1 : group, bias->size(3)}, dbias.options());
      const at::Tensor& to = by_row ? dbias : chunk.dbias;
      const auto step = [&](int64_t d) { return to.size(d) == 1 ? 0 : to.stride(d); };
      g.dbias = to.mutable_data_ptr();
      if (by_row) {
        g.dbias_batch = step(0), g.dbias_head = step(1), g.dbias_row = step(2), g.dbias_key = step(3);
      } else {
        g.dbias_head = step(0), g.dbias_key = step(1);
        g.dbias = static_cast<char*>(g.dbias) - chunk.kv * group * g.dbias_head * to.element_size();
      }
    }
    for (const Unit& unit : chunk.units) call.set.backward(call.dtype, job, unit, g);
  };
  std::vector<std::vector<Chunk*>> phases(job.batch * job.kv_heads);
  for (Chunk& chunk : chunks) phases[phase_of(chunk)].push_back(&chunk);
  for (auto& phase : phases) share_out(phase.size(), [&](int64_t c) { run(*phase[c]); });

  if (bias_grad && !by_row)
    for (const Chunk& chunk : chunks) {
      at::Tensor to = dbias.select(0, bias->size(0) == 1 ? 0 : chunk.batch).select(1, 0);
      to.narrow(0, bias->size(1) == 1 ? 0 : chunk.kv * group, chunk.dbias.size(0)).add_(chunk.dbias);
    }
  if (!in_place) collect(call, chunks, dk, dv);
  return {dq, dk, dv, bias_grad ? dbias.to(bias->scalar_type()) : dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskwright, CPU, m) {
  m.impl("block_attention", &forward);
  m.impl("block_attention_backward", &backward);
}

}  // namespace maskwright::attention

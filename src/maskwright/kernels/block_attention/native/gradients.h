// The backward operator: chunks of units that add to sums of their own, and what is made of the sums.
#pragma once
#include "call.h"

namespace maskwright::attention {
namespace {

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
}  // namespace maskwright::attention

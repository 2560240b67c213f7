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

// dk and dv of one batch entry and head of k and v from the sums of its chunks, in their order.
void collect(const Call& call, const std::vector<const Chunk*>& chunks, at::Tensor dk, at::Tensor dv) {
  const int64_t width = call.job.width, size = dk.element_size();
  at::parallel_for(0, call.job.keys, std::max<int64_t>(1, 65536 / width), [&](int64_t from, int64_t to) {
    std::vector<const void*> rows;
    for (int64_t key = from; key < to; ++key)
      for (const int64_t which : {0, 1}) {
        rows.clear();
        for (const Chunk* chunk : chunks) {
          if (key < chunk->start || key >= chunk->stop) continue;
          const int64_t at = which * chunk->sums.stride(0) + (key - chunk->start) * chunk->sums.stride(1);
          rows.push_back(static_cast<const char*>(chunk->sums.const_data_ptr()) + at * chunk->sums.element_size());
        }
        const at::Tensor& out = which ? dv : dk;
        char* row = static_cast<char*>(out.mutable_data_ptr()) + key * out.stride(0) * size;
        call.set.collect(call.dtype, rows.data(), static_cast<int64_t>(rows.size()), width, row);
      }
  });
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
  const bool single = static_cast<int64_t>(chunks.size()) == job.batch * job.kv_heads;
  const bool in_place = single && padded == job.width && call.kind == q.scalar_type();
  Gradient all{};
  all.grad_out = view_of(grad_out), all.out = view_of(out), all.dq = written(dq);
  all.grad_lse = grad_lse ? grad_of_lse.const_data_ptr() : nullptr;
  const int64_t group = job.heads / job.kv_heads;
  const auto run = [&](Chunk& chunk) {
    Gradient g = all;
    const at::Tensor own_k = dk.select(0, chunk.batch).select(0, chunk.kv), own_v = dv.select(0, chunk.batch).select(0, chunk.kv);
    at::Tensor to_k, to_v;
    if (in_place) {
      to_k = own_k, to_v = own_v;
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
    if (single && !in_place) {  // at once: the memory of the sums, still in the cache, serves the next chunk
      collect(call, {&chunk}, own_k, own_v);
      chunk.sums = at::Tensor();
    }
  };
  std::vector<std::vector<Chunk*>> phases(job.batch * job.kv_heads);
  for (Chunk& chunk : chunks) phases[phase_of(chunk)].push_back(&chunk);
  for (auto& phase : phases) share_out(phase.size(), [&](int64_t c) { run(*phase[c]); });

  if (bias_grad && !by_row)
    for (const Chunk& chunk : chunks) {
      at::Tensor to = dbias.select(0, bias->size(0) == 1 ? 0 : chunk.batch).select(1, 0);
      to.narrow(0, bias->size(1) == 1 ? 0 : chunk.kv * group, chunk.dbias.size(0)).add_(chunk.dbias);
    }
  if (!single) {
    std::vector<std::vector<const Chunk*>> of(job.batch * job.kv_heads);
    for (const Chunk& chunk : chunks) of[chunk.batch * job.kv_heads + chunk.kv].push_back(&chunk);
    for (int64_t b = 0; b < job.batch; ++b)
      for (int64_t h = 0; h < job.kv_heads; ++h)
        collect(call, of[b * job.kv_heads + h], dk.select(0, b).select(0, h), dv.select(0, b).select(0, h));
  }
  return {dq, dk, dv, bias_grad ? dbias.to(bias->scalar_type()) : dbias};
}

}  // namespace
}  // namespace maskwright::attention

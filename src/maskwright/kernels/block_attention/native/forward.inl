// Panels of two registers of query rows against tiles of keys, with a running softmax.
namespace maskwright::attention {
namespace {

template <class I>
constexpr int64_t PANEL = 2 * I::lanes;

// Hull of a panel's real rows. With positions the hull holds positions, and lists are not cut by it.
template <class A>
inline Hull hull_of(const Job& job, const Rows<A>& rows, int64_t first, int64_t last) {
  const int64_t all = job.positions ? std::numeric_limits<int32_t>::max() : job.keys;
  return rows.hull(first, std::min(last, rows.count), all);
}

template <class A>
inline Hull keys_of(const Job& job, const Rows<A>& rows) {
  if (!job.positions) return rows.hull(0, rows.count, job.keys);
  Hull out;
  out.add(0, job.keys);
  return out;
}

// Rows of the unit's query (or of another tensor of its shape) as float, transposed into panels (width, PANEL), times `by`.
template <class I, class S, class A>
inline void pack_panels(const Job& job, const View& from, const Unit& unit, const Rows<A>& rows, A by, A* to, Scratch& memory) {
  constexpr int64_t P = PANEL<I>;
  const int64_t width = job.width;
  A* copy = std::is_same_v<S, A> ? nullptr : memory.take<A>(8 * width);
  A factor[8];
  std::fill(factor, factor + 8, by);
  for (int64_t lane = 0; lane < rows.padded; lane += 8) {
    const A* in[8];
    A* panel = to + lane / P * P * width + lane % P;
    for (int k = 0; k < 8; ++k) {
      const int64_t at = std::min(lane + k, rows.padded - 1);
      const S* row = row_of<S>(from, unit.batch, rows.head(unit, at), rows.row(unit, at));
      if constexpr (std::is_same_v<S, A>) in[k] = row;
      else widen_row(row, width, copy + k * width), in[k] = copy + k * width;
    }
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      A* out[8];
      for (int k = 0; k < 8; ++k) out[k] = panel + (d + k) * P;
      transpose(in, d, factor, out, 0);
    }
    for (; d < width; ++d)
      for (int k = 0; k < 8; ++k) panel[d * P + k] = in[k][d] * by;
  }
}

// Sums (width, PANEL) a panel, each row times its own factor, back into rows of the dtype of q.
template <class I, class S, class A>
inline void unpack_panels(const Job& job, const View& to, const Unit& unit, const Rows<A>& rows, const A* from, const A* by,
                          Scratch& memory) {
  constexpr int64_t P = PANEL<I>;
  const int64_t width = job.width;
  A* copy = memory.take<A>(8 * width);
  A* out[8];
  for (int k = 0; k < 8; ++k) out[k] = copy + k * width;
  for (int64_t lane = 0; lane < rows.count; lane += 8) {
    const A* panel = from + lane / P * P * width + lane % P;
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      const A* in[8];
      for (int k = 0; k < 8; ++k) in[k] = panel + (d + k) * P;
      transpose(in, 0, by + lane, out, d);
    }
    for (; d < width; ++d)
      for (int k = 0; k < 8; ++k) out[k][d] = panel[d * P + k] * by[lane + k];
    for (int64_t k = 0; k < std::min<int64_t>(8, rows.count - lane); ++k) {
      auto* row = row_of<S>(to, unit.batch, rows.head(unit, lane + k), rows.row(unit, lane + k));
      narrow_row(out[k], width, const_cast<S*>(row));
    }
  }
}

// A bias in the scale of base 2: -infinity stays, other numbers do not become it.
template <class A>
inline A in_base_2(A v) {
  if (v == -std::numeric_limits<A>::infinity()) return v;
  return std::max<A>(v * static_cast<A>(LOG2E), static_cast<A>(-3e38));
}

// Scores (keys, V registers) of one panel, first row `lane`: the bias added, and what the bounds forbid at -infinity.
template <class I, int V, class S, class A>
inline void restrict_scores(const Job& job, const Rows<A>& rows, int64_t lane, const Tile<S, A>& tile, int64_t first,
                            int64_t last, A* s, int64_t lds) {
  constexpr int64_t W = I::lanes;
  if (rows.bias) {
    const A* const* bias = rows.bias + lane;
    bool same = true;
    for (int64_t k = 1; k < V * W; ++k) same &= bias[k] == bias[0];
    for (int64_t j = first; j < last; ++j) {
      const int64_t at = tile.index[j] * job.bias_key;
      A* to = s + (j - first) * lds;
      if (same) {
        const auto add = I::all(in_base_2(bias[0][at]));
        each<V>([&](auto v) { I::store(to + v * W, I::add(I::load(to + v * W), add)); });
      } else {
        for (int64_t k = 0; k < V * W; ++k) to[k] += in_base_2(bias[k][at]);
      }
    }
  }
  const auto [low, high] = std::minmax_element(tile.place + first, tile.place + last);
  if (rows.open(lane, lane + V * W, *low, *high)) return;
  each<V>([&](auto v) {
    const int64_t at = lane + v * W;
    const auto start = I::load(rows.start + at), stop = I::load(rows.stop + at);
    const auto start2 = I::load(rows.start2 + at), stop2 = I::load(rows.stop2 + at);
    for (int64_t j = first; j < last; ++j) {
      A* to = s + (j - first) * lds + v * W;
      I::store(to, I::only(I::load(to), I::all(tile.place[j]), start, stop, start2, stop2));
    }
  });
}

// One step of the running softmax: scores become weights; sums so far shrink where a row's greatest logit grew.
template <class I, int V, class A>
inline void soften(A* s, int64_t n, int64_t lds, A* greatest, A* total, A* sums, int64_t width) {
  constexpr int64_t W = I::lanes;
  typename I::F top[V], old[V], sum[V];
  each<V>([&](auto v) { top[v] = old[v] = I::load(greatest + v * W); });
  for (int64_t j = 0; j < n; ++j) each<V>([&](auto v) { top[v] = I::max(top[v], I::load(s + j * lds + v * W)); });
  bool grew = false;
  each<V>([&](auto v) {
    sum[v] = I::load(total + v * W);
    grew |= I::any_above(top[v], old[v]);
  });
  if (grew) {
    typename I::F less[V];
    each<V>([&](auto v) {
      less[v] = I::exp2(I::sub(old[v], top[v]));
      sum[v] = I::mul(sum[v], less[v]);
      I::store(greatest + v * W, top[v]);
    });
    for (int64_t d = 0; d < width; ++d)
      each<V>([&](auto v) {
        A* to = sums + d * PANEL<I> + v * W;
        I::store(to, I::mul(I::load(to), less[v]));
      });
  }
  for (int64_t j = 0; j < n; ++j)
    each<V>([&](auto v) {
      const auto p = I::exp2(I::sub(I::load(s + j * lds + v * W), top[v]));
      sum[v] = I::add(sum[v], p);
      I::store(s + j * lds + v * W, p);
    });
  each<V>([&](auto v) { I::store(total + v * W, sum[v]); });
}

// What remains of a row at the end: 1 / sum, and log-sum-exp in natural logarithms.
template <class A>
inline A finish_row(A total, A greatest, A& lse) {
  if (total == 0) return lse = -std::numeric_limits<A>::infinity(), A{0};
  lse = static_cast<A>(static_cast<double>(greatest) * LN2 + std::log(static_cast<double>(total)));
  return 1 / total;
}

template <class I, class S>
void forward(const Job& job, const Unit& unit) {
  using A = typename I::A;
  constexpr int64_t P = PANEL<I>;
  Scratch& memory = scratch();
  const int64_t width = job.width;
  const Rows<A> rows(job, unit, I::lanes, memory);
  const int64_t panels = (rows.padded + P - 1) / P, lanes = panels * P;
  A* q = memory.take<A>(lanes * width);
  A* sums = memory.take<A>(lanes * width);
  A* greatest = memory.take<A>(lanes);
  A* total = memory.take<A>(lanes);
  A* s = memory.take<A>(TILE * P);
  Hull* hulls = memory.take<Hull>(panels);
  pack_panels<I, S>(job, job.q, unit, rows, static_cast<A>(job.scale * LOG2E), q, memory);
  std::fill(sums, sums + lanes * width, A{0});
  std::fill(greatest, greatest + lanes, std::numeric_limits<A>::lowest());
  std::fill(total, total + lanes, A{0});
  for (int64_t p = 0; p < panels; ++p) hulls[p] = hull_of(job, rows, p * P, (p + 1) * P);

  Runs runs(job, unit.list, keys_of(job, rows));
  Tile<S, A> tile(job, memory);
  while (tile.next(job, unit, runs))
    for (int64_t p = 0; p < panels; ++p) {
      int64_t first, last;
      tile.cut(job, hulls[p], first, last);
      if (first == last) continue;
      const auto run = [&](auto v) {
        constexpr int V = v;
        by_rows<I, V>(tile.k + first, last - first, q + p * P * width, P, width, s, P);
        restrict_scores<I, V>(job, rows, p * P, tile, first, last, s, P);
        soften<I, V>(s, last - first, P, greatest + p * P, total + p * P, sums + p * P * width, width);
        by_columns<I, V>(tile.v + first, width, s, P, last - first, sums + p * P * width, P);
      };
      if (p * P + I::lanes < rows.padded) run(std::integral_constant<int, 2>{});
      else run(std::integral_constant<int, 1>{});
    }

  A* lse = static_cast<A*>(job.lse);
  for (int64_t k = 0; k < rows.count; ++k) {
    A* to = lse + (unit.batch * job.heads + rows.head(unit, k)) * job.queries + rows.row(unit, k);
    total[k] = finish_row(total[k], greatest[k], *to);
  }
  unpack_panels<I, S>(job, job.out, unit, rows, sums, total, memory);
}

}  // namespace
}  // namespace maskwright::attention

// Gradients, the weights recomputed from the stored log-sum-exp.
namespace maskwright::attention {
namespace {

// Rows of the unit of a tensor in strips of PANEL columns, (strips, lanes, PANEL), times `by`, zeros where the tensor ends.
template <class I, class S, class A>
inline void pack_strips(const Job& job, const View& from, const Unit& unit, const Rows<A>& rows, int64_t lanes, A by, A* to) {
  constexpr int64_t P = PANEL<I>;
  for (int64_t at = 0; at < rows.padded; ++at) {
    const S* row = row_of<S>(from, unit.batch, rows.head(unit, at), rows.row(unit, at));
    for (int64_t d = 0; d < job.width; d += P) {
      A* strip = to + (d / P * lanes + at) * P;
      const int64_t n = std::min(P, job.width - d);
      for (int64_t c = 0; c < n; ++c) strip[c] = widened(row[d + c]) * by;
      std::fill(strip + n, strip + P, A{0});
    }
  }
}

template <class I, class A>
inline A lane_sum(const A* from, int64_t n) {
  auto sum = I::zero();
  int64_t k = 0;
  for (; k + I::lanes <= n; k += I::lanes) sum = I::add(sum, I::load(from + k));
  A out = I::total(sum);
  for (; k < n; ++k) out += from[k];
  return out;
}

// The gradient of the bias, from that of the logits, (keys, lds).
template <class I, class S, class A>
inline void add_bias_gradient(const Gradient& g, const Unit& unit, const Rows<A>& rows, const Tile<S, A>& tile, const A* ds,
                              int64_t lds) {
  for (int64_t h = 0; h < unit.heads; ++h) {
    A* to = static_cast<A*>(g.dbias) + unit.batch * g.dbias_batch + (unit.head + h) * g.dbias_head + unit.row * g.dbias_row;
    const A* from = ds + h * unit.rows;
    if (g.dbias_row == 0) {
      for (int64_t j = 0; j < tile.count; ++j) to[tile.index[j] * g.dbias_key] += lane_sum<I>(from + j * lds, unit.rows);
    } else {
      for (int64_t r = 0; r < unit.rows; ++r)
        for (int64_t j = 0; j < tile.count; ++j) to[r * g.dbias_row + tile.index[j] * g.dbias_key] += from[j * lds + r];
    }
  }
}

template <class I, class S>
void backward(const Job& job, const Unit& unit, const Gradient& g) {
  using A = typename I::A;
  constexpr int64_t P = PANEL<I>;
  Scratch& memory = scratch();
  const int64_t width = job.width, padded = (width + PAD - 1) / PAD * PAD, strips = (width + P - 1) / P;
  const Rows<A> rows(job, unit, I::lanes, memory);
  const int64_t panels = (rows.padded + P - 1) / P, lanes = panels * P;
  const int64_t lds = lanes + P;  // an odd number of panels apart: rows of a power of two share few places of the cache
  A *q = memory.take<A>(lanes * width), *grad = memory.take<A>(lanes * width), *dq = memory.take<A>(lanes * width);
  A *q_rows = memory.take<A>(strips * lanes * P), *grad_rows = memory.take<A>(strips * lanes * P);
  A *p = memory.take<A>(TILE * lds), *ds = memory.take<A>(TILE * lds);
  A *lse = memory.take<A>(lanes), *delta = memory.take<A>(lanes), *scale = memory.take<A>(lanes);
  Hull* hulls = memory.take<Hull>(panels);
  int64_t *first = memory.take<int64_t>(panels), *last = memory.take<int64_t>(panels);
  pack_panels<I, S>(job, job.q, unit, rows, static_cast<A>(job.scale * LOG2E), q, memory);
  pack_panels<I, S>(job, g.grad_out, unit, rows, A{1}, grad, memory);
  pack_strips<I, S>(job, job.q, unit, rows, lanes, static_cast<A>(job.scale), q_rows);
  pack_strips<I, S>(job, g.grad_out, unit, rows, lanes, A{1}, grad_rows);
  std::fill(dq, dq + lanes * width, A{0});
  std::fill(scale, scale + lanes, static_cast<A>(job.scale));
  A* product = memory.take<A>(width);
  for (int64_t k = 0; k < rows.padded; ++k) {
    const int64_t at = (unit.batch * job.heads + rows.head(unit, k)) * job.queries + rows.row(unit, k);
    const A given = static_cast<const A*>(job.lse)[at];
    // Rows without keys, and those that only pad: weights of 0.
    const bool none = k >= rows.count || given == -std::numeric_limits<A>::infinity();
    lse[k] = none ? std::numeric_limits<A>::max() : given * static_cast<A>(LOG2E);
    const S* a = row_of<S>(g.grad_out, unit.batch, rows.head(unit, k), rows.row(unit, k));
    const S* b = row_of<S>(g.out, unit.batch, rows.head(unit, k), rows.row(unit, k));
    for (int64_t d = 0; d < width; ++d) product[d] = widened(a[d]) * widened(b[d]);
    delta[k] = lane_sum<I>(product, width) - (g.grad_lse ? static_cast<const A*>(g.grad_lse)[at] : A{0});
  }
  for (int64_t k = 0; k < panels; ++k) hulls[k] = hull_of(job, rows, k * P, (k + 1) * P);

  Runs runs(job, unit.list, keys_of(job, rows));
  Tile<S, A> tile(job, memory);
  while (tile.next(job, unit, runs)) {
    for (int64_t k = 0; k < panels; ++k) {
      tile.cut(job, hulls[k], first[k], last[k]);
      const int64_t from = first[k], n = last[k] - from;
      const auto run = [&](auto v) {
        constexpr int V = v;
        for (int64_t j = 0; j < tile.count; ++j)
          if (j < from || j >= from + n) {
            std::fill_n(p + j * lds + k * P, V * I::lanes, A{0});
            std::fill_n(ds + j * lds + k * P, V * I::lanes, A{0});
          }
        if (n == 0) return;
        A *here = p + from * lds + k * P, *there = ds + from * lds + k * P;
        by_rows<I, V>(tile.k + from, n, q + k * P * width, P, width, here, lds);
        restrict_scores<I, V>(job, rows, k * P, tile, from, from + n, here, lds);
        by_rows<I, V>(tile.v + from, n, grad + k * P * width, P, width, there, lds);
        typename I::F sum[V], shift[V];
        each<V>([&](auto at) {
          sum[at] = I::load(lse + k * P + at * I::lanes);
          shift[at] = I::load(delta + k * P + at * I::lanes);
        });
        for (int64_t j = 0; j < n; ++j)
          each<V>([&](auto at) {
            A *to = here + j * lds + at * I::lanes, *too = there + j * lds + at * I::lanes;
            const auto weight = I::exp2(I::sub(I::load(to), sum[at]));
            I::store(to, weight);
            I::store(too, I::mul(weight, I::sub(I::load(too), shift[at])));
          });
        by_columns<I, V>(tile.k + from, width, there, lds, n, dq + k * P * width, P);
      };
      if (k * P + I::lanes < rows.padded) run(std::integral_constant<int, 2>{});
      else run(std::integral_constant<int, 1>{});
    }
    if (g.dbias) add_bias_gradient<I>(g, unit, rows, tile, ds, lds);
    A *dk[TILE], *dv[TILE];
    for (int64_t j = 0; j < tile.count; ++j) {
      dk[j] = static_cast<A*>(g.dk) + (tile.index[j] - g.start) * g.dk_row;
      dv[j] = static_cast<A*>(g.dv) + (tile.index[j] - g.start) * g.dv_row;
    }
    for (int64_t d = 0; d < width; d += P)
      in_tiles<I>(tile.count, [&](int64_t j, auto r) {
        constexpr int R = r;
        int64_t a = panels, b = 0;  // the panels whose rows may allow one of these keys
        for (int64_t k = 0; k < panels; ++k)
          if (first[k] < j + R && last[k] > j) a = std::min(a, k), b = k + 1;
        if (a >= b) return;
        const int64_t from = a * P, n = std::min(b * P, rows.padded) - from, strip = (d / P * lanes + from) * P;
        const auto run = [&](auto v) {
          sums_tile<I, R, v>(p + j * lds + from, lds, grad_rows + strip, P, n, dv + j, d);
          sums_tile<I, R, v>(ds + j * lds + from, lds, q_rows + strip, P, n, dk + j, d);
        };
        if (d + P <= padded) run(std::integral_constant<int, 2>{});
        else run(std::integral_constant<int, 1>{});
      });
  }
  unpack_panels<I, S>(job, g.dq, unit, rows, dq, scale, memory);
}

// A row of dk or dv from the sums of some chunks, in their order.
template <class I, class S>
void collect(const void* const* sums, int64_t count, int64_t width, void* to) {
  using A = typename I::A;
  A row[1024];
  std::fill(row, row + width, A{0});
  for (int64_t c = 0; c < count; ++c)
    for (int64_t d = 0; d < width; ++d) row[d] += static_cast<const A*>(sums[c])[d];
  narrow_row(row, width, static_cast<S*>(to));
}

}  // namespace
}  // namespace maskwright::attention

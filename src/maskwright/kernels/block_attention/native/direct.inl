// Few query rows against many keys: keys and values are read once, as they lie, every row of the unit at each of them.
namespace maskwright::attention {
namespace {

constexpr int64_t STEP = 128;  // keys whose scores are kept

// Asks for a row before it is needed: short runs of keys lie where the chip's own prefetcher does not look.
template <class S>
inline void ask(const S* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(row + d, 0, 2);
}

// s[l][j] = q[l] k[j], four keys at a time; s is written up to the next multiple of four. `then` (or null): the n rows
// that are read next.
template <class I, class S, int L, class A>
__attribute__((noinline)) void dots(const S* const* k, const S* const* then, int64_t n, const A* q, int64_t width, A* s) {
  for (int64_t j = 0; j < n; j += 4) {
    const S* p[4];
    for (int r = 0; r < 4; ++r) p[r] = k[std::min(j + r, n - 1)];
    for (int r = 0; then && r < 4; ++r) ask(then[std::min(j + r, n - 1)], width);
    typename I::F sum[4][L];
    each<4>([&](auto r) { each<L>([&](auto l) { sum[r][l] = I::zero(); }); });
    int64_t d = 0;
    for (; d + I::lanes <= width; d += I::lanes) {
      typename I::F in[L];
      each<L>([&](auto l) { in[l] = I::load(q + l * width + d); });
      each<4>([&](auto r) {
        const auto w = I::load(p[r] + d);
        each<L>([&](auto l) { sum[r][l] = I::fma(w, in[l], sum[r][l]); });
      });
    }
    each<L>([&](auto l) { I::totals(sum[0][l], sum[1][l], sum[2][l], sum[3][l], s + l * STEP + j); });
    for (; d < width; ++d)
      for (int l = 0; l < L; ++l)
        for (int r = 0; r < 4; ++r) s[l * STEP + j + r] += widened(p[r][d]) * q[l * width + d];
  }
}

// sums[l][at ...] += weights[l][j] v[j][at ...], C registers wide. `then`: `more` rows that are read next.
template <class I, class S, int L, int C, class A>
__attribute__((noinline)) void weigh_part(const S* const* v, const S* const* then, int64_t more, int64_t n, const A* weights,
                                          int64_t at, int64_t width, A* sums) {
  typename I::F sum[L][C];
  each<L>([&](auto l) { each<C>([&](auto c) { sum[l][c] = I::load(sums + l * width + at + c * I::lanes); }); });
  for (int64_t j = 0; j < n; ++j) {
    const S* p = v[j] + at;
    if (at == 0 && j < more) ask(then[j], width);
    typename I::F w[L];
    each<L>([&](auto l) { w[l] = I::all(weights[l * STEP + j]); });
    each<C>([&](auto c) {
      const auto in = I::load(p + c * I::lanes);
      each<L>([&](auto l) { sum[l][c] = I::fma(w[l], in, sum[l][c]); });
    });
  }
  each<L>([&](auto l) { each<C>([&](auto c) { I::store(sums + l * width + at + c * I::lanes, sum[l][c]); }); });
}

template <class I, class S, int L, class A>
inline void weigh(const S* const* v, const S* const* then, int64_t more, int64_t n, const A* weights, int64_t width, A* sums) {
  constexpr int64_t W = I::lanes;
  int64_t d = 0;
  if constexpr (L == 1)
    for (; d + 8 * W <= width; d += 8 * W) weigh_part<I, S, L, 8>(v, then, more, n, weights, d, width, sums);
  for (; d + 4 * W <= width; d += 4 * W) weigh_part<I, S, L, 4>(v, then, more, n, weights, d, width, sums);
  for (; d + W <= width; d += W) weigh_part<I, S, L, 1>(v, then, more, n, weights, d, width, sums);
  for (; d < width; ++d)
    for (int l = 0; l < L; ++l)
      for (int64_t j = 0; j < n; ++j) sums[l * width + d] += weights[l * STEP + j] * widened(v[j][d]);
}

// Scores of one row: bias, bounds, running softmax. What lies past n in the last register counts as forbidden.
template <class I, class A>
inline void soften_row(const Job& job, const Rows<A>& rows, int64_t l, const int32_t* index, const int32_t* place, int64_t n,
                       bool open, A* s, A& greatest, A& total, A* sums) {
  constexpr int64_t W = I::lanes;
  if (rows.bias)
    for (int64_t j = 0; j < n; ++j) s[j] += in_base_2(rows.bias[l][index[j] * job.bias_key]);
  const int64_t padded = (n + W - 1) / W * W;
  std::fill(s + n, s + padded, -std::numeric_limits<A>::infinity());
  auto top = I::all(greatest);
  const auto start = I::all(rows.start[l]), stop = I::all(rows.stop[l]), start2 = I::all(rows.start2[l]), stop2 = I::all(rows.stop2[l]);
  for (int64_t j = 0; j < padded; j += W) {
    auto v = I::load(s + j);
    if (!open) I::store(s + j, v = I::only(v, I::load(place + j), start, stop, start2, stop2));
    top = I::max(top, v);
  }
  alignas(64) A lane[W];
  I::store(lane, top);
  const A best = *std::max_element(lane, lane + W);
  if (best > greatest) {
    I::store(lane, I::exp2(I::all(greatest - best)));
    total *= lane[0];
    for (int64_t d = 0; d < job.width; ++d) sums[d] *= lane[0];
    greatest = best;
  }
  const auto shift = I::all(greatest);
  auto sum = I::zero();
  for (int64_t j = 0; j < padded; j += W) {
    const auto p = I::exp2(I::sub(I::load(s + j), shift));
    sum = I::add(sum, p);
    I::store(s + j, p);
  }
  total += I::total(sum);
}

// The sums of some parts of one unit, brought to one maximum, into its output rows.
template <class I, class S>
void merge(const Job& job, const Part* parts, int64_t count) {
  using A = typename I::A;
  const Unit& unit = parts[0].unit;
  const int64_t width = job.width, step = width + 2;
  alignas(64) A row[1024];
  for (int64_t l = 0; l < unit.heads * unit.rows; ++l) {
    const int64_t h = unit.head + l / unit.rows, r = unit.row + l % unit.rows;
    A best = std::numeric_limits<A>::lowest(), total = 0;
    for (int64_t k = 0; k < count; ++k) best = std::max(best, (static_cast<const A*>(parts[k].sums) + l * step)[width + 1]);
    std::fill(row, row + width, A{0});
    for (int64_t k = 0; k < count; ++k) {
      const A* sums = static_cast<const A*>(parts[k].sums) + l * step;
      if (sums[width] == 0) continue;
      const A by = std::exp2(sums[width + 1] - best);
      total += sums[width] * by;
      for (int64_t d = 0; d < width; ++d) row[d] += sums[d] * by;
    }
    const A by = finish_row(total, best, static_cast<A*>(job.lse)[(unit.batch * job.heads + h) * job.queries + r]);
    for (int64_t d = 0; d < width; ++d) row[d] *= by;
    narrow_row(row, width, const_cast<S*>(row_of<S>(job.out, unit.batch, h, r)));
  }
}

template <class I, class S>
void direct(const Job& job, const Part& part) {
  using A = typename I::A;
  Scratch& memory = scratch();
  const Unit& unit = part.unit;
  const int64_t width = job.width, step = width + 2;
  const Rows<A> rows(job, unit, 1, memory);
  A* q = memory.take<A>(rows.count * width);
  A* s = memory.take<A>(rows.count * STEP);
  A* sums = memory.take<A>(rows.count * width);
  A *greatest = memory.take<A>(rows.count), *total = memory.take<A>(rows.count);
  int32_t *index = memory.take<int32_t>(STEP), *ahead = memory.take<int32_t>(STEP), *place = memory.take<int32_t>(STEP);
  const S **k = memory.take<const S*>(STEP), **v = memory.take<const S*>(STEP), **then = memory.take<const S*>(STEP);
  for (int64_t l = 0; l < rows.count; ++l) {
    const S* from = row_of<S>(job.q, unit.batch, rows.head(unit, l), rows.row(unit, l));
    for (int64_t d = 0; d < width; ++d) q[l * width + d] = widened(from[d]) * static_cast<A>(job.scale * LOG2E);
  }
  std::fill(sums, sums + rows.count * width, A{0});
  std::fill(greatest, greatest + rows.count, std::numeric_limits<A>::lowest());
  std::fill(total, total + rows.count, A{0});

  const int64_t head = unit.head * job.kv_heads / job.heads;
  const S* k0 = row_of<S>(job.k, unit.batch, head, 0);
  const S* v0 = row_of<S>(job.v, unit.batch, head, 0);
  Runs runs(job, unit.list, keys_of(job, rows));
  runs.skip(part.first);
  int64_t left = part.last - part.first, more;
  for (int64_t n = runs.fill(index, std::min(STEP, left)); n > 0; n = more, std::swap(index, ahead)) {
    left -= n;
    more = runs.fill(ahead, std::min(STEP, left));
    for (int64_t j = 0; j < more; ++j) then[j] = k0 + ahead[j] * job.k.row;
    for (int64_t j = 0; j < n; ++j) {
      k[j] = k0 + index[j] * job.k.row, v[j] = v0 + index[j] * job.v.row;
      place[j] = job.positions ? job.positions[index[j]] : index[j];
    }
    const auto [low, high] = std::minmax_element(place, place + n);
    for (int64_t l = 0; l < rows.count;) {
      const auto some = [&](auto count) {
        constexpr int L = count;
        dots<I, S, L>(k, l == 0 ? v : nullptr, n, q + l * width, width, s + l * STEP);
        for (int64_t r = l; r < l + L; ++r)
          soften_row<I>(job, rows, r, index, place, n, rows.open(r, r + 1, *low, *high), s + r * STEP, greatest[r], total[r],
                        sums + r * width);
        weigh<I, S, L>(v, then, l == 0 ? more : 0, n, s + l * STEP, width, sums + l * width);
        l += L;
      };
      const int64_t rest = rows.count - l;
      if (rest == 3 || rest > 4) some(std::integral_constant<int, 3>{});
      else if (rest > 1) some(std::integral_constant<int, 2>{});
      else some(std::integral_constant<int, 1>{});
    }
  }
  Part told = part;
  A* to = static_cast<A*>(part.sums ? part.sums : (told.sums = memory.take<A>(rows.count * step)));
  for (int64_t l = 0; l < rows.count; ++l) {
    std::memcpy(to + l * step, sums + l * width, width * sizeof(A));
    to[l * step + width] = total[l], to[l * step + width + 1] = greatest[l];
  }
  if (!part.sums) merge<I, S>(job, &told, 1);
}

}  // namespace
}  // namespace maskwright::attention

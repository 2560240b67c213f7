// The keys of a unit, a tile at a time, and its query rows in lanes.
namespace maskwright::attention {
namespace {

constexpr int64_t TILE = 64;  // keys at a time: with a panel of rows their scores and both operands stay in the first cache

// Where keys may be allowed: one or two intervals.
struct Hull {
  int64_t start[2] = {0, 0}, stop[2] = {0, 0};
  int parts = 0;

  void add(int64_t a, int64_t b) {  // ascending order of calls
    if (a >= b) return;
    if (parts == 1 && a <= stop[0] && b >= start[0]) {
      start[0] = std::min(start[0], a), stop[0] = std::max(stop[0], b);
    } else {
      start[parts] = a, stop[parts++] = b;
    }
    if (parts == 2 && start[1] < start[0]) std::swap(start[0], start[1]), std::swap(stop[0], stop[1]);
  }
  bool meets(int64_t a, int64_t b) const {  // [a, b)
    return (parts > 0 && a < stop[0] && b > start[0]) || (parts > 1 && a < stop[1] && b > start[1]);
  }
};

// The runs of a list cut to a hull, in ascending order.
class Runs {
  const int32_t *starts, *stops;
  int64_t run, runs;
  int32_t whole[2];
  Hull hull;
  int part = 0;
  int64_t at = 0, end = 0;

  bool next() {
    for (;;) {
      if (run >= runs || hull.parts == 0) return false;
      if (part == hull.parts || stops[run] <= hull.start[part]) {
        ++run, part = 0;
        continue;
      }
      if (starts[run] >= hull.stop[hull.parts - 1]) return run = runs, false;
      at = std::max<int64_t>(starts[run], hull.start[part]), end = std::min<int64_t>(stops[run], hull.stop[part]);
      ++part;
      if (at < end) return true;
    }
  }

 public:
  Runs(const Job& job, int64_t list, const Hull& within) : hull(within) {
    if (job.offsets) {
      starts = job.starts + job.offsets[list], stops = job.stops + job.offsets[list];
      runs = job.offsets[list + 1] - job.offsets[list];
    } else {
      whole[0] = 0, whole[1] = static_cast<int32_t>(job.keys);
      starts = whole, stops = whole + 1, runs = 1;
    }
    run = hull.parts ? std::upper_bound(stops, stops + runs, static_cast<int32_t>(hull.start[0])) - stops : runs;
  }
  Runs(const Runs&) = delete;

  int64_t count() {
    int64_t n = 0;
    while (next()) n += end - at;
    return n;
  }
  void reach(int64_t& first, int64_t& last) {
    while (next()) first = std::min(first, at), last = std::max(last, end);
  }
  void skip(int64_t n) {
    while (n > 0 && (at < end || next())) {
      const int64_t step = std::min(n, end - at);
      at += step, n -= step;
    }
  }
  int64_t fill(int32_t* index, int64_t most) {  // how many keys were found
    int64_t n = 0;
    while (n < most && (at < end || next()))
      for (; at < end && n < most; ++at) index[n++] = static_cast<int32_t>(at);
    return n;
  }
};

// Query rows side by side, head after head; padded to whole registers by repeating the last.
template <class A>
struct Rows {
  int64_t count, padded;
  int32_t *start, *stop, *start2, *stop2;
  const A** bias;

  Rows(const Job& job, const Unit& unit, int64_t to, Scratch& memory)
      : count(unit.heads * unit.rows), padded((count + to - 1) / to * to) {
    for (int32_t** part : {&start, &stop, &start2, &stop2}) *part = memory.take<int32_t>(padded);
    bias = job.bias ? memory.take<const A*>(padded) : nullptr;
    for (int64_t k = 0; k < padded; ++k) {
      const int64_t h = head(unit, k), r = row(unit, k);
      if (job.bounds) {
        const int32_t* b = job.bounds + unit.batch * job.bounds_batch + h * job.bounds_head + r * 4;
        start[k] = b[0], stop[k] = b[1], start2[k] = b[2], stop2[k] = b[3];
      } else {
        start[k] = std::numeric_limits<int32_t>::min(), stop[k] = std::numeric_limits<int32_t>::max();
        start2[k] = stop2[k] = 0;
      }
      if (bias) bias[k] = static_cast<const A*>(job.bias) + unit.batch * job.bias_batch + h * job.bias_head + r * job.bias_row;
    }
  }
  int64_t head(const Unit& unit, int64_t k) const { return unit.head + std::min(k, count - 1) / unit.rows; }
  int64_t row(const Unit& unit, int64_t k) const { return unit.row + std::min(k, count - 1) % unit.rows; }

  Hull hull(int64_t first, int64_t last, int64_t keys) const {
    int64_t a = keys, b = 0, a2 = keys, b2 = 0;
    for (int64_t k = first; k < last; ++k) {
      if (start[k] < stop[k]) a = std::min<int64_t>(a, start[k]), b = std::max<int64_t>(b, stop[k]);
      if (start2[k] < stop2[k]) a2 = std::min<int64_t>(a2, start2[k]), b2 = std::max<int64_t>(b2, stop2[k]);
    }
    Hull out;
    out.add(std::max<int64_t>(a, 0), std::min(b, keys));
    out.add(std::max<int64_t>(a2, 0), std::min(b2, keys));
    return out;
  }
  // Every row of first .. last - 1 allows every position from `low` to `high`.
  bool open(int64_t first, int64_t last, int32_t low, int32_t high) const {
    bool one = true, two = true;
    for (int64_t k = first; k < last; ++k)
      one &= start[k] <= low && high < stop[k], two &= start2[k] <= low && high < stop2[k];
    return one || two;
  }
};

// Some keys of a unit: their indices, positions and rows.
template <class S, class A>
struct Tile {
  int64_t count = 0;
  int32_t index[TILE], place[TILE + 16];
  const A *k[TILE], *v[TILE];
  A *k_copy = nullptr, *v_copy = nullptr;
  int32_t low, high;

  Tile(const Job& job, Scratch& memory) {
    if constexpr (!std::is_same_v<S, A>)
      k_copy = memory.take<A>(TILE * job.width), v_copy = memory.take<A>(TILE * job.width);
  }
  bool next(const Job& job, const Unit& unit, Runs& runs) {
    count = runs.fill(index, TILE);
    const int64_t head = unit.head * job.kv_heads / job.heads;
    const S* k0 = row_of<S>(job.k, unit.batch, head, 0);
    const S* v0 = row_of<S>(job.v, unit.batch, head, 0);
    for (int64_t j = 0; j < count; ++j) {
      place[j] = job.positions ? job.positions[index[j]] : index[j];
      if constexpr (std::is_same_v<S, A>) {
        k[j] = k0 + index[j] * job.k.row, v[j] = v0 + index[j] * job.v.row;
      } else {
        k[j] = k_copy + j * job.width, v[j] = v_copy + j * job.width;
        widen_row(k0 + index[j] * job.k.row, job.width, k_copy + j * job.width);
        widen_row(v0 + index[j] * job.v.row, job.width, v_copy + j * job.width);
      }
    }
    if (count) low = *std::min_element(place, place + count), high = *std::max_element(place, place + count);
    return count > 0;
  }
  // The keys first .. last - 1 of the tile that rows with this hull may allow.
  void cut(const Job& job, const Hull& hull, int64_t& first, int64_t& last) const {
    first = 0, last = count;
    if (!hull.meets(low, int64_t{high} + 1)) last = 0;
    if (job.positions || last == 0) return;
    while (first < last && place[first] < hull.start[0]) ++first;
    while (first < last && place[last - 1] >= hull.stop[hull.parts - 1]) --last;
    if (first < last && !hull.meets(place[first], int64_t{place[last - 1]} + 1)) last = first;
  }
};

}  // namespace
}  // namespace maskwright::attention

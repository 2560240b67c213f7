// Bfloat16 on chips with matrix tiles: both products by torch's brgemm, scores (rows, keys) in between.
namespace maskwright::attention {
namespace {

constexpr int64_t WIDE_TILE = 256;  // keys at a time

// Eight by eight 32-bit numbers transposed: from[k * lda ...] to to[j * ldb + k].
inline void transpose_bits(const uint32_t* const* from, int64_t at, uint32_t* to, int64_t ldb) {
  __m256 r[8], s[8];
  each<8>([&](auto k) { r[k] = _mm256_loadu_ps(reinterpret_cast<const float*>(from[k] + at)); });
  each<4>([&](auto k) {
    s[2 * k] = _mm256_unpacklo_ps(r[2 * k], r[2 * k + 1]);
    s[2 * k + 1] = _mm256_unpackhi_ps(r[2 * k], r[2 * k + 1]);
  });
  each<2>([&](auto h) {
    each<2>([&](auto k) {
      r[4 * h + 2 * k] = _mm256_shuffle_ps(s[4 * h + k], s[4 * h + k + 2], 0x44);
      r[4 * h + 2 * k + 1] = _mm256_shuffle_ps(s[4 * h + k], s[4 * h + k + 2], 0xEE);
    });
  });
  each<4>([&](auto k) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to + k * ldb), _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(to + (k + 4) * ldb), _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
  });
}

// Keys as the right side of a product, (width / 2, padded, 2): pairs of a row stay together, so 32-bit numbers move.
inline void pack_keys(const bf16* const* k, int64_t n, int64_t padded, int64_t width, uint16_t* to) {
  alignas(64) static const uint32_t nothing[512] = {};
  for (int64_t j = 0; j < padded; j += 8) {
    const uint32_t* from[8];
    for (int64_t r = 0; r < 8; ++r) from[r] = j + r < n ? reinterpret_cast<const uint32_t*>(k[j + r]) : nothing;
    for (int64_t d = 0; d < width / 2; d += 8) transpose_bits(from, d, reinterpret_cast<uint32_t*>(to) + d * padded + j, padded);
  }
}

// Values as the right side of a product, (padded / 2, width, 2): two rows interleaved.
inline void pack_values(const bf16* const* v, int64_t n, int64_t padded, int64_t width, uint16_t* to) {
  alignas(64) static const bf16 nothing[1024] = {};
  for (int64_t j = 0; j < padded; j += 2) {
    const bf16 *a = j < n ? v[j] : nothing, *b = j + 1 < n ? v[j + 1] : nothing;
    uint16_t* row = to + j * width;
    for (int64_t d = 0; d < width; d += 16) {
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + d));
      const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + d));
      const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * d), _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * d + 16), _mm256_permute2x128_si256(low, high, 0x31));
    }
  }
}

// Widths that are multiples of 16.
template <class I>
void forward_brgemm(const Job& job, const Unit& unit) {
  Scratch& memory = scratch();
  const int64_t width = job.width, head = unit.head * job.kv_heads / job.heads;
  const Rows<float> rows(job, unit, 1, memory);
  bf16* q = memory.take<bf16>(rows.count * width);
  float *s = memory.take<float>(rows.count * WIDE_TILE), *sums = memory.take<float>(rows.count * width);
  bf16* weights = memory.take<bf16>(rows.count * WIDE_TILE);
  uint16_t *keys = memory.take<uint16_t>(WIDE_TILE * width), *values = memory.take<uint16_t>(WIDE_TILE * width);
  float *greatest = memory.take<float>(rows.count), *total = memory.take<float>(rows.count);
  int32_t *index = memory.take<int32_t>(WIDE_TILE), *place = memory.take<int32_t>(WIDE_TILE);
  const bf16 **k = memory.take<const bf16*>(WIDE_TILE), **v = memory.take<const bf16*>(WIDE_TILE);
  for (int64_t l = 0; l < rows.count; ++l)
    std::memcpy(q + l * width, row_of<bf16>(job.q, unit.batch, rows.head(unit, l), rows.row(unit, l)), width * sizeof(bf16));
  std::fill(sums, sums + rows.count * width, 0.0f);
  std::fill(greatest, greatest + rows.count, std::numeric_limits<float>::lowest());
  std::fill(total, total + rows.count, 0.0f);

  const bf16* k0 = row_of<bf16>(job.k, unit.batch, head, 0);
  const bf16* v0 = row_of<bf16>(job.v, unit.batch, head, 0);
  const auto by = I::all(static_cast<float>(job.scale * LOG2E));
  Runs runs(job, unit.list, keys_of(job, rows));
  while (const int64_t n = runs.fill(index, WIDE_TILE)) {
    const int64_t padded = (n + 31) / 32 * 32;
    for (int64_t j = 0; j < n; ++j) {
      k[j] = k0 + index[j] * job.k.row, v[j] = v0 + index[j] * job.v.row;
      place[j] = job.positions ? job.positions[index[j]] : index[j];
    }
    const auto [low, high] = std::minmax_element(place, place + n);
    pack_keys(k, n, padded, width, keys);
    pack_values(v, n, padded, width, values);
    job.brgemm(rows.count, padded, width, width, padded, WIDE_TILE, false, &q->bits, keys, s);
    for (int64_t l = 0; l < rows.count; ++l) {
      float* row = s + l * WIDE_TILE;
      for (int64_t j = 0; j < padded; j += I::lanes) I::store(row + j, I::mul(I::load(row + j), by));
      soften_row<I>(job, rows, l, index, place, n, rows.open(l, l + 1, *low, *high), row, greatest[l], total[l], sums + l * width);
      std::fill(row + n, row + padded, 0.0f);
      narrow_row(row, padded, weights + l * WIDE_TILE);
    }
    job.brgemm(rows.count, width, padded, WIDE_TILE, width, width, true, &weights->bits, values, sums);
  }
  for (int64_t l = 0; l < rows.count; ++l) {
    const int64_t h = rows.head(unit, l), r = rows.row(unit, l);
    const float rest = finish_row(total[l], greatest[l], static_cast<float*>(job.lse)[(unit.batch * job.heads + h) * job.queries + r]);
    for (int64_t d = 0; d < width; ++d) sums[l * width + d] *= rest;
    narrow_row(sums + l * width, width, const_cast<bf16*>(row_of<bf16>(job.out, unit.batch, h, r)));
  }
}

}  // namespace
}  // namespace maskwright::attention

// The passes, over blocks that stay in the first cache. Plain loops: the compiler makes vectors of them, with the flags of
// the file that includes this one. Products and sums are rounded one by one (no contraction), so all sets give equal bits.
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "merge.h"

namespace maskwright::merging {
namespace {

constexpr int BLOCK = 1024;

void load(Piece piece, int64_t at, int count, float* __restrict out) {
  if (piece.dtype == Dtype::f32) {
    std::memcpy(out, static_cast<const float*>(piece.data) + at, count * sizeof(float));
  } else if (piece.dtype == Dtype::bf16) {
    const uint16_t* __restrict in = static_cast<const uint16_t*>(piece.data) + at;
    for (int i = 0; i < count; ++i) out[i] = std::bit_cast<float>(static_cast<uint32_t>(in[i]) << 16);
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(piece.data) + at;
    int i = 0;
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    for (; i < count; ++i) out[i] = _cvtsh_ss(in[i]);
  }
}

// Rounds to nearest even; gives how many results are not finite.
int64_t store(float* __restrict values, int count, Dtype dtype, void* to, int64_t at) {
  int32_t refused = 0;
  if (dtype == Dtype::f32) {
    for (int i = 0; i < count; ++i) refused += (std::bit_cast<int32_t>(values[i]) & EXPONENT) == EXPONENT;
    std::memcpy(static_cast<float*>(to) + at, values, count * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    uint16_t* __restrict out = static_cast<uint16_t*>(to) + at;
    for (int i = 0; i < count; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(values[i]);
      const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1);
      refused += ((bits & EXPONENT) == EXPONENT) | ((rounded & EXPONENT) == EXPONENT);
      out[i] = static_cast<uint16_t>(rounded >> 16);
    }
  } else {
    uint16_t* out = static_cast<uint16_t*>(to) + at;
    int i = 0;
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < count; ++i) out[i] = _cvtss_sh(values[i], _MM_FROUND_TO_NEAREST_INT);
    for (i = 0; i < count; ++i) refused += (out[i] & 0x7C00) == 0x7C00;
  }
  return refused;
}

void difference(const float* __restrict base, Piece tuned, int64_t at, int count, float* __restrict out) {
  load(tuned, at, count, out);
  for (int i = 0; i < count; ++i) out[i] -= base[i];
}

void magnitudes(Piece base, Piece tuned, int64_t at, int count, int32_t* __restrict out) {
  float mine[BLOCK], other[BLOCK];
  load(base, at, count, mine);
  difference(mine, tuned, at, count, other);
  for (int i = 0; i < count; ++i) out[i] = std::bit_cast<int32_t>(other[i]) & ABS;
}

void histogram(Piece base, Piece tuned, int64_t n, int64_t* bins) {
  int32_t bits[BLOCK];
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK, n - at));
    magnitudes(base, tuned, at, count, bits);
    for (int i = 0; i < count; ++i) ++bins[bits[i] >> LOW];
  }
}

// Which of eight entries lie in a window, one bit each: few do, and bits are quicker to walk than entries.
uint32_t inside(const int32_t* bits, __m256i below, __m256i end) {
  const __m256i size = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits));
  const __m256i in = _mm256_and_si256(_mm256_cmpgt_epi32(size, below), _mm256_cmpgt_epi32(end, size));
  return _mm256_movemask_ps(_mm256_castsi256_ps(in));
}

void within(Piece base, Piece tuned, int64_t n, Window* windows, int64_t number) {
  int32_t bits[BLOCK];
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK, n - at));
    magnitudes(base, tuned, at, count, bits);
    std::fill(bits + count, bits + BLOCK, -1);
    for (Window* w = windows; w < windows + number; ++w) {
      const int32_t first = w->first << LOW, end = (w->first + w->wide) << LOW;
      int32_t above = 0;
      for (int i = 0; i < BLOCK; ++i) above += bits[i] >= end;
      w->above += above;
      if (w->wide == 0) continue;
      const __m256i low = _mm256_set1_epi32(first - 1), high = _mm256_set1_epi32(end);
      for (int i = 0; i < count; i += 16)
        for (uint32_t hits = inside(bits + i, low, high) | inside(bits + i + 8, low, high) << 8; hits; hits &= hits - 1)
          ++w->counts[bits[i + std::countr_zero(hits)] - first];
    }
  }
}

void equal(Piece base, Piece tuned, int64_t n, const int64_t* levels, int64_t number, int64_t* counts) {
  int32_t bits[BLOCK];
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK, n - at));
    magnitudes(base, tuned, at, count, bits);
    for (int64_t k = 0; k < number; ++k) {
      const int32_t level = static_cast<int32_t>(levels[k]);
      int32_t found = 0;
      for (int i = 0; i < count; ++i) found += bits[i] == level;
      counts[k] += found;
    }
  }
}

uint64_t word(uint64_t from) {
  from = (from ^ from >> 30) * 0xBF58476D1CE4E5B9;
  from = (from ^ from >> 27) * 0x94D049BB133111EB;
  return from ^ from >> 31;
}

// SplitMix64 as updates/noise.py has it: entry e is the low or high half of word e / 2.
void by_chance(const Keep& keep, int64_t at, int count, float* __restrict values) {
  const uint64_t first = keep.place + at, start = keep.start + (first / 2 + 1) * keep.increment;
  uint64_t words[BLOCK / 2 + 1];
  const int number = static_cast<int>((first + count + 1) / 2 - first / 2);
  for (int k = 0; k < number; ++k) words[k] = word(start + k * keep.increment);
  uint32_t halves[BLOCK + 2];
  std::memcpy(halves, words, number * sizeof(uint64_t));  // the low half first
  const uint32_t* from = halves + (first & 1);
  const uint32_t bound = static_cast<uint32_t>(keep.bound);
  for (int i = 0; i < count; ++i)
    values[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(values[i]) & -static_cast<uint32_t>(from[i] < bound));
}

// The level that a plain comparison with needs, for a block in which all or none of the tied entries still count as above;
// `ties` falls by those of the block. false where they part inside the block.
bool level(const float* values, int count, int32_t bits, int64_t& ties, int32_t& above) {
  above = bits;
  if (ties == 0) return true;
  int32_t equal = 0;
  for (int i = 0; i < count; ++i) equal += (std::bit_cast<int32_t>(values[i]) & ABS) == bits;
  if (equal > ties) return false;
  ties -= equal;
  above = bits - 1;
  return true;
}

void by_size(Keep& keep, int count, float* __restrict values) {
  int32_t above, beyond;
  const bool plain = level(values, count, keep.above, keep.above_ties, above) &
                     level(values, count, keep.beyond, keep.beyond_ties, beyond);
  if (plain) {
    for (int i = 0; i < count; ++i) {
      const int32_t bits = std::bit_cast<int32_t>(values[i]), size = bits & ABS;
      values[i] = std::bit_cast<float>(bits & -static_cast<int32_t>((size > above) & (size <= beyond)));
    }
    return;
  }
  // `level` has counted a whole block where its side did not part: that side is plain and its `above` tells so.
  for (int i = 0; i < count; ++i) {
    const int32_t size = std::bit_cast<int32_t>(values[i]) & ABS;
    bool stays = size > above, dropped = size > beyond;
    if (!stays && above == keep.above && size == above && keep.above_ties > 0) stays = true, --keep.above_ties;
    if (!dropped && beyond == keep.beyond && size == beyond && keep.beyond_ties > 0) dropped = true, --keep.beyond_ties;
    if (!stays || dropped) values[i] = 0.0f;
  }
}

void sparse(Keep& keep, int64_t at, int count, float* __restrict values) {
  if (keep.above >= 0 || keep.beyond < ABS) by_size(keep, count, values);
  if (keep.bound >= 0) by_chance(keep, at, count, values);
  if (keep.mask != nullptr)
    for (int i = 0; i < count; ++i) values[i] = keep.mask[at + i] ? values[i] : 0.0f;
}

void summed(const float* parts, int64_t models, Rule rule, int count, float* __restrict out) {
  std::memcpy(out, parts, count * sizeof(float));
  for (int64_t m = 1; m < models; ++m) {
    const float* __restrict part = parts + m * BLOCK;
    for (int i = 0; i < count; ++i) out[i] += part[i];
  }
  if (rule.mean)
    for (int i = 0; i < count; ++i) out[i] /= rule.divisor;
}

void elected(const float* parts, const Model* models, int64_t number, Rule rule, int count, float* __restrict out) {
  float sign[BLOCK], divisor[BLOCK];
  std::memcpy(sign, parts, count * sizeof(float));
  for (int64_t m = 1; m < number; ++m) {
    const float* __restrict part = parts + m * BLOCK;
    for (int i = 0; i < count; ++i) sign[i] += part[i];
  }
  for (int i = 0; i < count; ++i) {
    sign[i] = sign[i] > 0 ? 1.0f : sign[i] < 0 ? -1.0f : rule.leaning;
    out[i] = 0.0f, divisor[i] = 0.0f;
  }
  for (int64_t m = 0; m < number; ++m) {
    const float* __restrict part = parts + m * BLOCK;
    const float weight = models[m].weight;
    for (int i = 0; i < count; ++i) {
      const float agreeing = part[i] * sign[i];
      out[i] += agreeing > 0 ? agreeing : 0.0f;
      divisor[i] += agreeing > 0 ? weight : 0.0f;
    }
  }
  for (int i = 0; i < count; ++i) out[i] *= sign[i];
  // Where nothing agrees the sum is 0, and 0 over anything above 0 stays 0.
  if (rule.mean)
    for (int i = 0; i < count; ++i) out[i] /= divisor[i] > 1e-30f ? divisor[i] : 1e-30f;
}

void times(float* __restrict values, int count, float by) {
  if (by != 1.0f)
    for (int i = 0; i < count; ++i) values[i] *= by;
}

Refused combine(Piece base, Model* models, int64_t number, Rule rule, int64_t n, Dtype dtype, void* to) {
  std::vector<float> parts(number * BLOCK);
  float mine[BLOCK], out[BLOCK];
  Refused refused{0, 0};
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK, n - at));
    load(base, at, count, mine);
    for (int64_t m = 0; m < number; ++m) {
      float* part = parts.data() + m * BLOCK;
      difference(mine, models[m].tuned, at, count, part);
      int32_t odd = 0;
      for (int i = 0; i < count; ++i) odd += (std::bit_cast<int32_t>(part[i]) & EXPONENT) == EXPONENT;
      refused.differences += odd;
      sparse(models[m].keep, at, count, part);
      times(part, count, models[m].factor);
      times(part, count, models[m].weight);
    }
    if (rule.elect) elected(parts.data(), models, number, rule, count, out);
    else summed(parts.data(), number, rule, count, out);
    times(out, count, rule.scale);
    for (int i = 0; i < count; ++i) out[i] += mine[i];
    refused.results += store(out, count, dtype, to, at);
  }
  for (int64_t m = 0; m < number; ++m) {
    models[m].keep.place += n;
    if (models[m].keep.mask != nullptr) models[m].keep.mask += n;
  }
  return refused;
}

}  // namespace
}  // namespace maskwright::merging

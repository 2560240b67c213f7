// The pass, over blocks that stay in the first cache. Plain loops: the compiler makes vectors of them, with the flags of the
// file that includes this one. Products and sums are rounded one by one (no contraction), so all sets give equal bits.
#include <algorithm>
#include <bit>
#include <cstring>

#include "noise.h"

namespace maskwright::noise {
namespace {

constexpr int BLOCK = 1024;

// Whole numbers throughout: the share of the tail is 31 bits, and never 0.
void halves(Stream stream, int64_t at, uint32_t* __restrict out) {
  const uint64_t entry = stream.place + static_cast<uint64_t>(at), first = stream.start + (entry / 2 + 1) * stream.increment;
  alignas(64) uint64_t words[BLOCK / 2 + 8];
  for (int i = 0; i < BLOCK / 2 + 8; ++i) {
    uint64_t word = first + static_cast<uint64_t>(i) * stream.increment;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9;
    word = (word ^ word >> 27) * 0x94D049BB133111EB;
    words[i] = word ^ word >> 31;
  }
  std::memcpy(out, reinterpret_cast<const char*>(words) + 4 * (entry & 1), BLOCK * sizeof(uint32_t));
}

void normals(Stream stream, int64_t at, const Chord* table, float* __restrict out) {
  alignas(64) uint32_t drawn[BLOCK];
  alignas(64) float share[BLOCK];
  alignas(64) int32_t segment[BLOCK];
  alignas(64) uint64_t chord[BLOCK];
  halves(stream, at, drawn);
  for (int i = 0; i < BLOCK; ++i) {
    share[i] = static_cast<float>(static_cast<int32_t>((drawn[i] & 0x7FFFFFFF) | 1));
    segment[i] = std::bit_cast<int32_t>(share[i]) >> (23 - FINE);
  }
  // One load of eight bytes an entry: quicker here than the gathers of most CPUs.
  for (int i = 0; i < BLOCK; ++i) std::memcpy(&chord[i], &table[segment[i]], sizeof(uint64_t));
  for (int i = 0; i < BLOCK; ++i) {
    const float base = std::bit_cast<float>(static_cast<uint32_t>(chord[i]));
    const float slope = std::bit_cast<float>(static_cast<uint32_t>(chord[i] >> 32));
    const float rise = slope * share[i];
    const float below = base + rise;
    out[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(below) ^ (drawn[i] & 0x80000000));
  }
}

void unpacked(const uint8_t* __restrict bits, int count, int32_t* __restrict keep) {
  for (int byte = 0; byte < (count + 7) / 8; ++byte)
    for (int i = 0; i < 8; ++i) keep[8 * byte + i] = bits[byte] >> i & 1;
}

void move(float* row, int64_t n, Stream stream, const Chord* table, const uint8_t* bits, const float* scales, int64_t number,
          float decay) {
  alignas(64) float z[BLOCK];
  alignas(64) int32_t keep[BLOCK];
  for (int64_t at = 0; at < n; at += BLOCK) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK, n - at));
    float* __restrict w = row + at;
    normals(stream, at, table, z);
    if (bits != nullptr) unpacked(bits + at / 8, count, keep);
    for (int64_t k = 0; k < number; ++k) {
      const float scale = scales[k];
      const bool decays = decay != 0 && k == number - 1;
      if (bits == nullptr && !decays) {
        for (int i = 0; i < count; ++i) w[i] = w[i] + scale * z[i];
      } else if (bits == nullptr) {
        for (int i = 0; i < count; ++i) w[i] = w[i] + (scale * z[i] + decay * w[i]);
      } else if (!decays) {
        for (int i = 0; i < count; ++i) {
          const float moved = w[i] + scale * z[i];
          w[i] = keep[i] ? moved : w[i];
        }
      } else {
        for (int i = 0; i < count; ++i) {
          const float moved = w[i] + (scale * z[i] + decay * w[i]);
          w[i] = keep[i] ? moved : w[i];
        }
      }
    }
  }
}

}  // namespace
}  // namespace maskwright::noise

// What a pass of noise works on, and the table of it that each instruction set fills.
#pragma once
#include <cstdint>

namespace maskwright::noise {

// SplitMix64's stream, and the first entry (half word) that is asked for.
struct Stream {
  uint64_t start, increment, place;
};

struct Chord {
  float base, slope;
};

constexpr int FINE = 8;                                   // leading bits of a mantissa that name a segment
constexpr int64_t SEGMENTS = (127 + 31) * (1 << FINE) + 1;  // by the leading bits of the share, 1 to 2^31, as float32

struct Passes {
  const char* name;
  // Entries 0..n of `row`, in place. `bits`: entry i in bit i % 8 of byte i / 8; null: all.
  void (*move)(float* row, int64_t n, Stream stream, const Chord* table, const uint8_t* bits, const float* scales,
               int64_t number, float decay);
};

const Passes& avx2();
const Passes& avx512();

}  // namespace maskwright::noise

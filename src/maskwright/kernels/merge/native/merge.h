// What the passes of a merge work on, and the table of them that each instruction set fills.
#pragma once
#include <cstdint>

namespace maskwright::merging {

enum class Dtype { f32, bf16, f16 };

struct Piece {
  const void* data;
  Dtype dtype;
};

// Which differences of one model stay, as `Keep` in reference.py says.
struct Keep {
  int32_t above, beyond;            // bits of magnitudes: kept above the one, dropped above the other
  int64_t above_ties, beyond_ties;  // so many entries that equal them count as above
  uint64_t start, increment, place;
  int64_t bound;     // of 2^32; -1: chance has no part
  const bool* mask;  // null: all
};

struct Model {
  Piece tuned;
  Keep keep;
  float factor, weight;
};

struct Rule {
  bool elect, mean;
  float divisor, leaning, scale;
};

struct Refused {
  int64_t differences, results;  // entries that are not finite
};

struct Window {
  int32_t first, wide;
  int64_t* counts;
  int64_t above;
};

struct Passes {
  const char* name;
  // The first three add to the counts they are given. What chooses (`Keep`) is left as the next entries need it.
  void (*histogram)(Piece base, Piece tuned, int64_t n, int64_t* bins);
  // A window is `wide` bins from `first`: counts its entries' values, 2^LOW a bin, and in above those of the bins beyond.
  void (*within)(Piece base, Piece tuned, int64_t n, Window* windows, int64_t number);
  void (*equal)(Piece base, Piece tuned, int64_t n, const int64_t* levels, int64_t number, int64_t* counts);
  Refused (*combine)(Piece base, Model* models, int64_t count, Rule rule, int64_t n, Dtype dtype, void* out);
};

constexpr int LOW = 15;  // bits below a bin
constexpr int32_t ABS = 0x7FFFFFFF, EXPONENT = 0x7F800000;

const Passes& avx2();
const Passes& avx512();

}  // namespace maskwright::merging

// What one call asks of an instruction set: some rows of y = x W^T, from packed or dense weights.
#pragma once
#include <cstdint>

namespace maskwright {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
enum class Dtype { f32, bf16, f16, i8 };

constexpr int MOST = 16;  // rows of x a call takes at most: one AVX-512 register of float32
constexpr int64_t PAD = 64;  // columns x is padded to a multiple of, so that no kernel has a tail

// All x and y are float32. `values` may end anywhere: kernels copy rows that lie too near its end.
struct Job {
  const void* values;
  const uint8_t* bitmask;        // (rows, ceil(cols / 8)), little-endian bits
  const int64_t* row_offsets;    // (rows,), first value of each row
  const uint8_t* offsets;        // indexed: (groups, 8), column = base + offset
  const int32_t* bases;          // indexed: (groups,)
  const int64_t* row_groups;     // indexed: (rows + 1,)
  const float* scale;            // (rows,) or null
  int64_t rows, cols, kept;
  int64_t step;                  // kept in every byte of the bitmask, or 0 where it varies
  const float* x;                // (batch, x_stride), zeros past cols; transposed (cols, lanes) for `lanes`
  const uint16_t* x_bf16;        // the same in bfloat16, where x was given so and the kernel asks for it
  int64_t batch, x_stride;
  float* y;                      // (batch, rows)
};

struct Kernels {
  const char* name;
  int lanes;       // float32 in a register
  bool dot_bf16;   // products of bfloat16 pairs in one instruction
  void (*bitmask)(Dtype, const Job&, int64_t first, int64_t last);
  void (*indexed)(Dtype, const Job&, int64_t first, int64_t last);        // batch 1
  void (*indexed_lanes)(Dtype, const Job&, int64_t first, int64_t last);  // batch 2 and more, x transposed
  void (*dense)(Dtype, const Job&, int64_t first, int64_t last);          // values (rows, cols)
  // Rows first..last of the dense weight into `out`, (last - first, cols).
  void (*expand)(Dtype, const Job&, int64_t first, int64_t last, float* out);
  void (*expand_indexed)(Dtype, const Job&, int64_t first, int64_t last, float* out);
};

const Kernels& avx2();
const Kernels& avx512();
const Kernels& avx512_bf16();  // the same with `dot_bf16`

}  // namespace maskwright

// What one call asks of an instruction set: attention over the keys each row group lists, forward and backward.
#pragma once
#include <cstdint>

namespace maskwright::attention {

struct bf16 { uint16_t bits; };
enum class Dtype { f32, bf16, f64 };

// (batch, heads, rows, width) with the last dimension contiguous; steps in elements, 0 where a dimension is broadcast.
struct View { const void* data; int64_t batch, head, row; };

template <class T>
static inline const T* row_of(const View& v, int64_t b, int64_t h, int64_t r) {
  return static_cast<const T*>(v.data) + b * v.batch + h * v.head + r * v.row;
}

// bfloat16 rows by pairs, C (+)= A B: A (m, k) row-major, B (k / 2, n, 2), C float32. The signature of torch's brgemm.
using Brgemm = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const uint16_t* a,
                        const uint16_t* b, float* c);

struct Job {
  View q, k, v;
  int64_t batch, heads, kv_heads, queries, keys, width;
  const int32_t* bounds;  // (queries, 2, 2) a batch and head, or null: every key is allowed
  int64_t bounds_batch, bounds_head;
  const int64_t* offsets;  // of the lists, or null: one run of all keys
  const int32_t *starts, *stops;
  const int32_t* positions;  // (keys,) or null: a key's position is its index
  const void* bias;          // in the type sums are kept in, or null
  int64_t bias_batch, bias_head, bias_row, bias_key;
  double scale;
  View out;   // written, the dtype of q
  void* lse;  // (batch, heads, queries), in the type sums are kept in
  Brgemm brgemm;  // forward in bfloat16, widths that are multiples of 16; or null
};

// Rows row .. row + rows - 1 of heads head .. head + heads - 1, which share one list of keys and one head of k and v.
struct Unit { int64_t batch, head, heads, row, rows, list; };

// Part of a unit of few rows: the keys of rank first .. last - 1 in its list. Sums for `merge`, a row of them per query row:
// width + 2 numbers (the weighted values, the sum of weights, the greatest logit times log2(e)).
struct Part { Unit unit; int64_t first, last; void* sums; };

struct Gradient {
  View grad_out, out;    // the dtype of q
  const void* grad_lse;  // (batch, heads, queries) or null
  View dq;               // written
  void *dk, *dv;         // sums of the keys `start` and on of one head of k and v, zero at first
  int64_t dk_row, dv_row, start;
  void* dbias;           // sums in the shape of the bias, or null
  int64_t dbias_batch, dbias_head, dbias_row, dbias_key;
};

struct Kernels {
  const char* name;
  int lanes;
  void (*forward)(Dtype, const Job&, const Unit&);
  int64_t (*count)(Dtype, const Job&, const Unit&);  // keys of the unit: those of its list its rows' bounds may allow
  void (*direct)(Dtype, const Job&, const Part&);    // at most MOST_DIRECT rows in the unit
  void (*merge)(Dtype, const Job&, const Part*, int64_t parts);
  void (*reach)(Dtype, const Job&, const Unit&, int64_t& start, int64_t& stop);  // widened to the keys of the unit
  void (*backward)(Dtype, const Job&, const Unit&, const Gradient&);
  void (*collect)(Dtype, const void* const* sums, int64_t count, int64_t width, void* to);  // a row, in the dtype of q
};

constexpr int64_t MOST_DIRECT = 8;
constexpr int64_t PAD = 16;  // rows of dk and dv can be written up to a multiple of this

const Kernels& avx2();
const Kernels& avx512();

}  // namespace maskwright::attention

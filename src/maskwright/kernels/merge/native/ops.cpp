// The operators of the library. Their schemas are declared in Python.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include <unistd.h>

#include "merge.h"

namespace maskwright::merging {
namespace {

constexpr int64_t SPAN = 1 << 15;  // entries worked on at a time: of four models and the result they stay in the second cache

const Passes& chosen(c10::string_view name) {
  const bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  const bool wide = two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide && (name.empty() || name == "avx512")) return avx512();
  TORCH_CHECK(two && (name.empty() || name == "avx2"), "merge: no instruction set ", name, " here");
  return avx2();
}

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK(false, "merge: pieces are float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

// A piece that lies in memory, or in a file: then it is read span by span, into memory for all of it or for one span.
struct Source {
  char* memory;
  Dtype dtype;
  int64_t size;
  int file;
  int64_t at;
  bool all;

  Source(const at::Tensor& x, int64_t n, const int64_t* where) : dtype(dtype_of(x)), size(x.element_size()) {
    file = static_cast<int>(where[0]), at = where[1], all = x.numel() >= n;
    TORCH_CHECK(x.dim() == 1 && x.is_contiguous() && (all || (file >= 0 && x.numel() >= SPAN)),
                "merge: a piece is flat, and as long as the others, got ", x.sizes(), " for ", n);
    memory = static_cast<char*>(file < 0 ? const_cast<void*>(x.const_data_ptr()) : x.mutable_data_ptr());
  }

  Piece span(int64_t start, int64_t count) const {
    char* to = memory + (file < 0 || all ? start * size : 0);
    if (file >= 0) read(to, count * size, at + start * size);
    return {to, dtype};
  }

  void read(char* to, int64_t left, int64_t from) const {
    while (left > 0) {
      const ssize_t got = ::pread(file, to, left, from);
      if (got < 0 && errno == EINTR) continue;
      TORCH_CHECK(got > 0, "merge: a file ended while it was read");
      to += got, from += got, left -= got;
    }
  }
};

// Where a result goes: memory for all of it, or a file, written span by span from memory for one.
struct Target {
  char* memory;
  int64_t size;
  int file;
  int64_t at;

  Target(const at::Tensor& x, int64_t n, const int64_t* where) : size(x.element_size()) {
    file = static_cast<int>(where[0]), at = where[1];
    TORCH_CHECK(x.dim() == 1 && x.is_contiguous() && x.numel() >= (file < 0 ? n : std::min(n, SPAN)),
                "merge: no room for the result, ", x.sizes(), " for ", n);
    memory = static_cast<char*>(x.mutable_data_ptr());
  }

  char* span(int64_t start) const { return memory + (file < 0 ? start * size : 0); }

  void written(int64_t start, int64_t count) const {
    const char* from = memory;
    for (int64_t left = file < 0 ? 0 : count * size, to = at + start * size; left > 0;) {
      const ssize_t put = ::pwrite(file, from, left, to);
      if (put < 0 && errno == EINTR) continue;
      TORCH_CHECK(put > 0, "merge: a file could not be written: ", std::strerror(errno));
      from += put, to += put, left -= put;
    }
  }
};

template <class Work>
void spans(int64_t n, Work&& work) {
  for (int64_t start = 0; start < n; start += SPAN) work(start, std::min(SPAN, n - start));
}

int64_t* counted(at::Tensor& counts, int64_t size) {
  TORCH_CHECK(counts.scalar_type() == at::kLong && counts.numel() == size && counts.is_contiguous(), "merge: needs ", size,
              " int64 counts");
  return counts.mutable_data_ptr<int64_t>();
}

// `files`: (file, byte) of each piece, file -1 for memory.
void histogram(at::Tensor& counts, const at::Tensor& base, const at::Tensor& tuned, at::IntArrayRef files, int64_t n,
               c10::string_view impl) {
  TORCH_CHECK(files.size() == 4, "merge: two pieces have two places");
  const Passes& set = chosen(impl);
  int64_t* to = counted(counts, 1 << (31 - LOW));
  const Source mine(base, n, files.data()), theirs(tuned, n, files.data() + 2);
  spans(n, [&](int64_t start, int64_t count) { set.histogram(mine.span(start, count), theirs.span(start, count), count, to); });
}

std::vector<int64_t> within(at::Tensor& counts, const at::Tensor& base, const at::Tensor& tuned, at::IntArrayRef files,
                            int64_t n, at::IntArrayRef first, at::IntArrayRef wide, c10::string_view impl) {
  const int64_t number = static_cast<int64_t>(first.size());
  TORCH_CHECK(files.size() == 4 && wide.size() == first.size(), "merge: every window has a begin and a width");
  int64_t room = 0;
  for (int64_t k = 0; k < number; ++k) {
    TORCH_CHECK(first[k] >= 0 && wide[k] >= 0 && first[k] + wide[k] < 1 << (31 - LOW), "merge: a window lies beyond the bins");
    room += wide[k] << LOW;
  }
  int64_t* to = counted(counts, room);
  std::vector<Window> windows;
  for (int64_t k = 0; k < number; to += wide[k] << LOW, ++k)
    windows.push_back({static_cast<int32_t>(first[k]), static_cast<int32_t>(wide[k]), to, 0});
  const Passes& set = chosen(impl);
  const Source mine(base, n, files.data()), theirs(tuned, n, files.data() + 2);
  spans(n, [&](int64_t start, int64_t count) {
    set.within(mine.span(start, count), theirs.span(start, count), count, windows.data(), number);
  });
  std::vector<int64_t> above;
  for (const Window& window : windows) above.push_back(window.above);
  return above;
}

std::vector<int64_t> equal(const at::Tensor& base, const at::Tensor& tuned, at::IntArrayRef files, int64_t n,
                           at::IntArrayRef levels, c10::string_view impl) {
  TORCH_CHECK(files.size() == 4, "merge: two pieces have two places");
  std::vector<int64_t> counts(levels.size(), 0);
  const Passes& set = chosen(impl);
  const Source mine(base, n, files.data()), theirs(tuned, n, files.data() + 2);
  spans(n, [&](int64_t start, int64_t count) {
    set.equal(mine.span(start, count), theirs.span(start, count), count, levels.data(), static_cast<int64_t>(levels.size()),
              counts.data());
  });
  return counts;
}

// `files` begins with the result's place. `keeps` has 8 numbers a model, in the order of `Keep`.
std::vector<int64_t> combine(at::Tensor& out, const at::Tensor& base, at::TensorList tuned, at::IntArrayRef files, int64_t n,
                             at::IntArrayRef keeps, const c10::List<std::optional<at::Tensor>>& masks,
                             at::ArrayRef<double> factors, at::ArrayRef<double> weights, bool elect, double divisor,
                             double leaning, double scale, c10::string_view impl) {
  const int64_t number = static_cast<int64_t>(tuned.size());
  TORCH_CHECK(number > 0 && static_cast<int64_t>(keeps.size()) == 8 * number && static_cast<int64_t>(masks.size()) == number &&
                  static_cast<int64_t>(factors.size()) == number && static_cast<int64_t>(weights.size()) == number &&
                  static_cast<int64_t>(files.size()) == 2 * number + 4,
              "merge: every model needs its choice, factor, weight and place");
  std::vector<Model> models(number);
  std::vector<at::Tensor> held(number);
  std::vector<Source> sources;
  for (int64_t m = 0; m < number; ++m) {
    const int64_t* k = keeps.data() + 8 * m;
    Keep keep{static_cast<int32_t>(k[0]), static_cast<int32_t>(k[2]), k[1], k[3],
              static_cast<uint64_t>(k[4]), static_cast<uint64_t>(k[5]), static_cast<uint64_t>(k[6]), k[7], nullptr};
    const std::optional<at::Tensor> mask = masks.get(m);
    if (mask) {
      held[m] = *mask;
      TORCH_CHECK(mask->scalar_type() == at::kBool && mask->dim() == 1 && mask->numel() == n && mask->is_contiguous(),
                  "merge: a mask is flat, bool and as long as its piece");
      keep.mask = held[m].const_data_ptr<bool>();
    }
    sources.emplace_back(tuned[m], n, files.data() + 2 * m + 4);
    models[m] = {{}, keep, static_cast<float>(factors[m]), static_cast<float>(weights[m])};
  }
  const Passes& set = chosen(impl);
  const Source mine(base, n, files.data() + 2);
  const Target target(out, n, files.data());
  const Rule rule{elect, divisor != 0, static_cast<float>(divisor), static_cast<float>(leaning), static_cast<float>(scale)};
  const Dtype dtype = dtype_of(out);
  Refused refused{0, 0};
  spans(n, [&](int64_t start, int64_t count) {
    for (int64_t m = 0; m < number; ++m) models[m].tuned = sources[m].span(start, count);
    const Refused told =
        set.combine(mine.span(start, count), models.data(), number, rule, count, dtype, target.span(start));
    target.written(start, count);
    refused.differences += told.differences, refused.results += told.results;
  });
  return {refused.differences, refused.results};
}

}  // namespace

TORCH_LIBRARY_IMPL(maskwright, CPU, m) {
  m.impl("merge_histogram", &histogram);
  m.impl("merge_within", &within);
  m.impl("merge_equal", &equal);
  m.impl("merge_combine", &combine);
}

}  // namespace maskwright::merging

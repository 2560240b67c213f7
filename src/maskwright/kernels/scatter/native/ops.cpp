// The operators of the library. Their schemas are declared in Python.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <vector>

#include "scatter.h"

namespace maskwright::scattering {

int64_t Target::below(int64_t index) const { return std::lower_bound(indices, indices + count, index) - indices; }

int64_t Target::first(uintptr_t address) const {
  const int64_t bytes = static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(data));
  return bytes <= 0 ? 0 : std::min((bytes + size - 1) / size, length);
}

namespace {

constexpr int64_t BLOCK = 1 << 16;

Dtype dtype_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK(false, "scatter: tensors are float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

template <class Work>
void with(Dtype dtype, Work&& work) {
  switch (dtype) {
    case Dtype::f32: return work(float{});
    case Dtype::bf16: return work(c10::BFloat16{});
    case Dtype::f16: return work(c10::Half{});
  }
}

template <class Held, class Added>
bool run(const Piece& piece, int64_t shift) {
  const Target& target = *piece.target;
  // A large page made anew was copied from the tensor, and is in the cache.
  Held* entries = reinterpret_cast<Held*>(target.data + shift);
  const Added* values = reinterpret_cast<const Added*>(target.values);
  Held* before = reinterpret_cast<Held*>(target.before);
  int64_t last = std::max(piece.low, piece.begin ? target.indices[piece.begin - 1] + 1 : 0) - 1;
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    const int64_t at = target.indices[i];
    if (at <= last || at >= piece.high) return false;
    last = at;
    before[i] = entries[at];
    entries[at] = static_cast<Held>(static_cast<float>(before[i]) + static_cast<float>(values[i]));
  }
  return true;
}

template <class Work>
void side_by_side(int64_t number, Work&& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), number), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < number;) work(i);
  });
}

// before[i] = targets[i][indices[i]]; targets[i][indices[i]] += values[i]. False, and nothing done: targets overlap.
bool add(at::TensorList targets, at::TensorList indices, at::TensorList values, at::TensorList before) {
  const size_t number = targets.size();
  TORCH_CHECK(indices.size() == number && values.size() == number && before.size() == number,
              "scatter: every tensor needs indices, values and room for its old entries");
  std::vector<Target> all;
  for (size_t i = 0; i < number; ++i) {
    const int64_t count = indices[i].numel();
    TORCH_CHECK(targets[i].is_contiguous() && indices[i].is_contiguous() && values[i].is_contiguous() &&
                    before[i].is_contiguous() && indices[i].scalar_type() == at::kLong && values[i].numel() == count &&
                    before[i].numel() == count && before[i].scalar_type() == targets[i].scalar_type(),
                "scatter: as many int64 indices as values and old entries, all contiguous");
    if (count == 0) continue;
    Target target{static_cast<char*>(targets[i].mutable_data_ptr()), targets[i].numel(),
                  targets[i].element_size(), indices[i].const_data_ptr<int64_t>(),
                  static_cast<const char*>(values[i].const_data_ptr()), static_cast<char*>(before[i].mutable_data_ptr()), count,
                  nullptr};
    if (reinterpret_cast<uintptr_t>(target.data) % target.size) return false;
    with(dtype_of(targets[i]), [&](auto held) {
      with(dtype_of(values[i]), [&](auto added) { target.run = &run<decltype(held), decltype(added)>; });
    });
    all.push_back(target);
  }
  std::sort(all.begin(), all.end(), [](const Target& a, const Target& b) { return a.data < b.data; });
  for (size_t i = 1; i < all.size(); ++i)
    if (all[i - 1].data + all[i - 1].length * all[i - 1].size > all[i].data) return false;
  const std::vector<Unit> units = planned(all);
  std::atomic<bool> fine{true};
  side_by_side(static_cast<int64_t>(units.size()), [&](int64_t i) {
    if (!done(units[i])) fine = false;
  });
  TORCH_CHECK(fine, "scatter: indices must ascend and lie in their tensor");
  return true;
}

template <class T>
bool finite(const char* values, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  const Bits exponent = sizeof(T) == 4 ? 0x7F800000 : std::is_same_v<T, c10::Half> ? 0x7C00 : 0x7F80;
  const Bits* bits = reinterpret_cast<const Bits*>(values);
  Bits odd = 0;
  for (int64_t i = 0; i < count; ++i) odd |= (bits[i] & exponent) == exponent;
  return !odd;
}

// Block counts and offsets of one tensor -> ascending indices. False: they do not make any.
bool expanded(const int32_t* counts, int64_t blocks, const uint16_t* offsets, int64_t number, int64_t* out) {
  int64_t at = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    if (counts[block] < 0 || counts[block] > number - at) return false;
    const int64_t end = at + counts[block], start = block * BLOCK;
    uint16_t falls = 0;
    for (int64_t i = at + 1; i < end; ++i) falls |= offsets[i] <= offsets[i - 1];
    if (falls) return false;
    for (; at < end; ++at) out[at] = start + offsets[at];
  }
  return at == number;
}

// A bit for every entry, entry i in bit i % 8 of its byte -> ascending indices. False: not as many are set.
bool set_bits(const uint8_t* bits, int64_t bytes, int64_t number, int64_t* out) {
  int64_t at = 0;
  for (int64_t byte = 0; byte < bytes; byte += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bits + byte, std::min<int64_t>(8, bytes - byte));
    if (std::popcount(word) > number - at) return false;
    for (; word; word &= word - 1) out[at++] = byte * 8 + std::countr_zero(word);
  }
  return at == number;
}

// A file's bytes, and six numbers a tensor: where its counts begin, of how many blocks, where its offsets begin, how many,
// where its values begin, their dtype (0 float32, 1 bfloat16, 2 float16). Offsets at -1: the first two are bits and bytes of
// them. Fills `out` with all indices, one tensor after the other, and gives the last index of each, -1 for none, -2 where
// counts, offsets, bits or values are not what they have to be.
std::vector<int64_t> places(at::Tensor& out, const at::Tensor& file, at::IntArrayRef table) {
  TORCH_CHECK(file.scalar_type() == at::kByte && file.is_contiguous() && out.scalar_type() == at::kLong && out.is_contiguous() &&
                  table.size() % 6 == 0,
              "scatter: needs bytes, and six numbers a tensor");
  const int64_t number = static_cast<int64_t>(table.size() / 6), bytes = file.numel();
  const char* data = reinterpret_cast<const char*>(file.const_data_ptr<uint8_t>());
  std::vector<int64_t> starts(number + 1, 0), last(number, -2);
  const auto inside = [&](int64_t at, int64_t count, int64_t size) {
    return at >= 0 && count >= 0 && count <= bytes / size && at <= bytes - count * size;
  };
  for (int64_t i = 0; i < number; ++i) {
    const int64_t* t = table.data() + 6 * i;
    const bool packed = t[2] == -1;
    TORCH_CHECK(t[5] >= 0 && t[5] <= 2 && inside(t[0], t[1], packed ? 1 : 4) && (packed || inside(t[2], t[3], 2)) &&
                    inside(t[4], t[3], t[5] ? 2 : 4),
                "scatter: a tensor lies outside the file");
    starts[i + 1] = starts[i] + t[3];
  }
  TORCH_CHECK(out.numel() == starts[number], "scatter: needs room for ", starts[number], " indices");
  int64_t* to = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < number; ++i) {
    const int64_t* t = table.data() + 6 * i;
    const char *first = data + t[0], *values = data + t[4];
    if (t[4] % (t[5] ? 2 : 4) || (t[2] != -1 && (t[0] % 4 || t[2] % 2))) continue;  // no file of ours
    if (!(t[5] == 0 ? finite<float>(values, t[3]) : t[5] == 1 ? finite<c10::BFloat16>(values, t[3]) : finite<c10::Half>(values, t[3])))
      continue;
    if (t[2] == -1 ? !set_bits(reinterpret_cast<const uint8_t*>(first), t[1], t[3], to + starts[i])
                   : !expanded(reinterpret_cast<const int32_t*>(first), t[1], reinterpret_cast<const uint16_t*>(data + t[2]), t[3],
                               to + starts[i]))
      continue;
    last[i] = t[3] ? to[starts[i + 1] - 1] : -1;
  }
  return last;
}

// out: (number, spots * run) float32: runs of each tensor's entries, spread over it; of a small one all, the rest untouched.
void sample(at::Tensor& out, at::TensorList tensors, int64_t spots, int64_t length) {
  TORCH_CHECK(spots > 1 && length > 0 && out.scalar_type() == at::kFloat && out.is_contiguous() &&
                  out.numel() == static_cast<int64_t>(tensors.size()) * spots * length,
              "scatter: at least two runs of one entry, and room for them");
  for (size_t k = 0; k < tensors.size(); ++k) {
    TORCH_CHECK(tensors[k].is_contiguous(), "scatter: a sampled tensor is contiguous");
    const int64_t number = tensors[k].numel();
    float* to = out.mutable_data_ptr<float>() + static_cast<int64_t>(k) * spots * length;
    with(dtype_of(tensors[k]), [&](auto kind) {
      const auto* from = static_cast<const decltype(kind)*>(tensors[k].const_data_ptr());
      if (number <= spots * length) {
        for (int64_t i = 0; i < number; ++i) to[i] = static_cast<float>(from[i]);
        return;
      }
      for (int64_t spot = 0; spot < spots; ++spot)
        for (int64_t i = 0, at = spot * (number - length) / (spots - 1); i < length; ++i)
          *to++ = static_cast<float>(from[at + i]);
    });
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(maskwright, CPU, m) {
  m.impl("scatter_add", &add);
  m.impl("scatter_places", &places);
  m.impl("scatter_sample", &sample);
}

}  // namespace maskwright::scattering

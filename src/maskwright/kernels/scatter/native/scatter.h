// What sparse additions work on.
#pragma once
#include <cstdint>
#include <vector>

namespace maskwright::scattering {

enum class Dtype { f32, bf16, f16 };

struct Piece;

struct Target {
  char* data;
  int64_t length, size;  // entries, bytes of one
  const int64_t* indices;
  const char* values;
  char* before;
  int64_t count;
  bool (*run)(const Piece& piece, int64_t shift);

  int64_t below(int64_t index) const;  // how many entries of the list
  int64_t first(uintptr_t address) const;  // the tensor's first entry from there on
};

// Entries `begin` to `end` of a target's list; they lie in low .. high of the tensor.
struct Piece {
  const Target* target;
  int64_t begin, end, low, high;

  // Writes `shift` bytes from where the tensor is. False: an index lies elsewhere, and nothing was written there.
  bool run(int64_t shift) const { return target->run(*this, shift); }
};

// What one thread does at a time. Where there are pages they are made anew, from `at` on, each with its pieces added.
struct Unit {
  uintptr_t at = 0;
  std::vector<std::vector<Piece>> pages;
  std::vector<Piece> loose;
};

constexpr int64_t PAGE = 1 << 21;

// Cuts the additions into units. Targets must not overlap.
std::vector<Unit> planned(const std::vector<Target>& targets);

// False: an index lies outside its tensor.
bool done(const Unit& unit);

}  // namespace maskwright::scattering

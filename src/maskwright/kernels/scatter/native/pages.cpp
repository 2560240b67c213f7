// Weights that are mapped from a file. The first write to such a page makes the kernel copy it, 4 KiB and some 3 us at a time,
// and a sparse delta writes to nearly every page. Here 2 MiB are copied at once, with the delta added on the way, into memory
// that is then moved to where the mapping was: the same private copy at the same addresses, in a fifth of the time.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <sys/mman.h>

#include "scatter.h"

namespace maskwright::scattering {
namespace {

constexpr int64_t ENOUGH = 256;   // entries in 2 MiB from which half of its small pages would be copied anyway
constexpr size_t TOGETHER = 16;  // large pages a unit: memory held twice, should the mapping have been written to before
constexpr int64_t LOOSE = 1 << 18;  // entries a unit elsewhere
constexpr int64_t PART = 1 << 17;   // bytes, a quarter of a second cache

struct Range {
  uintptr_t begin, end;
};

std::string text(const char* path) {
  std::string out;
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path, "re"), [](FILE* f) { return f ? std::fclose(f) : 0; });
  char some[1 << 16];
  for (size_t got; file && (got = std::fread(some, 1, sizeof some, file.get())) > 0;) out.append(some, got);
  return out;
}

bool large_pages() {
  static const bool given = [] {
    const std::string told = text("/sys/kernel/mm/transparent_hugepage/enabled");
    return !told.empty() && told.find("[never]") == std::string::npos;
  }();
  return given;
}

// Mappings that are private, writable and of a file; what was written to them is in no file and in no other process.
std::vector<Range> private_files() {
  std::vector<Range> out;
  const std::string told = text("/proc/self/maps");
  for (const char* line = told.c_str(); *line;) {
    const char* next = std::strchr(line, '\n');
    if (next == nullptr) break;
    char* after = nullptr;
    const uintptr_t begin = std::strtoull(line, &after, 16), end = std::strtoull(after + 1, &after, 16);
    // "begin-end rw-p offset device inode   /path"
    if (std::strncmp(after, " rw-p ", 6) == 0 && static_cast<int64_t>(end - begin) >= PAGE) {
      const std::string_view rest(after, next - after);
      const size_t path = rest.find('/');
      if (path != rest.npos && rest.substr(path, 5) != "/dev/") out.push_back({begin, end});
    }
    line = next + 1;
  }
  return out;
}

uintptr_t up(uintptr_t at) { return (at + PAGE - 1) & ~static_cast<uintptr_t>(PAGE - 1); }
uintptr_t down(uintptr_t at) { return at & ~static_cast<uintptr_t>(PAGE - 1); }

char* fresh(int64_t bytes) {
  void* at = ::mmap(nullptr, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  const uintptr_t all = reinterpret_cast<uintptr_t>(at), mine = up(all);
  if (mine > all) ::munmap(at, mine - all);
  ::munmap(reinterpret_cast<void*>(mine + bytes), all + PAGE - mine);
  ::madvise(reinterpret_cast<void*>(mine), bytes, MADV_HUGEPAGE);
  return reinterpret_cast<char*>(mine);
}

bool added(const std::vector<Piece>& pieces, int64_t shift) {
  bool fine = true;
  for (const Piece& piece : pieces) fine &= piece.run(shift);
  return fine;
}

// Moves the new memory over the old. False: the old is still there.
bool moved(char* from, uintptr_t at, int64_t bytes) {
  void* to = reinterpret_cast<void*>(at);
  if (::mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to) return true;
  std::vector<unsigned char> there(bytes >> 12);
  if (::mincore(to, bytes, there.data()) == 0) return false;
  // The kernel took the old away and then lacked memory for its own lists: give the place its contents all the same.
  if (::mmap(to, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != to) std::abort();
  std::memcpy(to, from, bytes);
  ::munmap(from, bytes);
  return true;
}

}  // namespace

std::vector<Unit> planned(const std::vector<Target>& targets) {
  std::vector<Range> files;
  int64_t bytes = 0;
  for (const Target& target : targets) bytes += target.length * target.size;
  if (bytes >= PAGE && large_pages()) files = private_files();
  std::map<uintptr_t, std::vector<Piece>> pages;
  std::vector<Piece> loose;
  for (const Target& target : targets) {
    const uintptr_t data = reinterpret_cast<uintptr_t>(target.data), stop = data + target.length * target.size;
    int64_t at = 0;
    const auto until = [&](int64_t end) {  // what lies in no large page
      for (; at < end; at = std::min(at + LOOSE, end)) loose.push_back({&target, at, std::min(at + LOOSE, end), 0, target.length});
    };
    for (const Range& file : files) {
      // A large page may hold the end of one tensor and the beginning of the next: all of it is copied.
      const uintptr_t end = std::min(up(stop), down(file.end));
      for (uintptr_t page = std::max(down(data), up(file.begin)); page < end; page += PAGE) {
        const int64_t low = target.first(page), high = target.first(page + PAGE);
        const int64_t first = std::max(at, target.below(low)), last = target.below(high);
        until(first);
        if (last > first) pages[page].push_back({&target, first, last, low, high});
        at = std::max(at, last);
      }
    }
    until(target.count);
  }
  std::vector<Unit> units;
  for (auto& [page, pieces] : pages) {
    int64_t count = 0;
    for (const Piece& piece : pieces) count += piece.end - piece.begin;
    if (count < ENOUGH) {
      loose.insert(loose.end(), pieces.begin(), pieces.end());
      continue;
    }
    const auto follows = [&](const Unit& unit) { return unit.at + unit.pages.size() * PAGE == page && unit.pages.size() < TOGETHER; };
    if (units.empty() || !follows(units.back())) units.push_back({page, {}, {}});
    units.back().pages.push_back(std::move(pieces));
  }
  for (const Piece& piece : loose) units.push_back({0, {}, {piece}});
  return units;
}

bool done(const Unit& unit) {
  bool fine = added(unit.loose, 0);
  const int64_t bytes = static_cast<int64_t>(unit.pages.size()) * PAGE;
  char* memory = bytes ? fresh(bytes) : nullptr;
  if (memory) {
    const char* old = reinterpret_cast<const char*>(unit.at);
    const int64_t shift = reinterpret_cast<intptr_t>(memory) - static_cast<intptr_t>(unit.at);
    for (int64_t page = 0; page * PAGE < bytes; ++page) {
      for (int64_t at = page * PAGE; at < (page + 1) * PAGE; at += PART) {
        // Memory likes many reads and then many writes better than one after the other.
        for (int64_t line = at; line < at + PART; line += 64) __builtin_prefetch(old + line);
        std::memcpy(memory + at, old + at, PART);
      }
      fine &= added(unit.pages[page], shift);  // while the page is in the cache
    }
    if (fine && moved(memory, unit.at, bytes)) return true;
    ::munmap(memory, bytes);
  }
  for (const std::vector<Piece>& pieces : unit.pages) fine = fine && added(pieces, 0);
  return fine;
}

}  // namespace maskwright::scattering

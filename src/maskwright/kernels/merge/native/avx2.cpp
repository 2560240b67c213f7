// AVX2, F16C: eight float32 a register.
#include "passes.inl"

namespace maskwright::merging {

const Passes& avx2() {
  static const Passes table{"avx2", &histogram, &within, &equal, &combine};
  return table;
}

}  // namespace maskwright::merging

// AVX-512 F, BW, VL, DQ: sixteen float32 a register.
#include "passes.inl"

namespace maskwright::merging {

const Passes& avx512() {
  static const Passes table{"avx512", &histogram, &within, &equal, &combine};
  return table;
}

}  // namespace maskwright::merging

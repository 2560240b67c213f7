// AVX-512 F, BW, VL, DQ: sixteen float32 a register.
#include "pass.inl"

namespace maskwright::noise {

const Passes& avx512() {
  static const Passes table{"avx512", &move};
  return table;
}

}  // namespace maskwright::noise

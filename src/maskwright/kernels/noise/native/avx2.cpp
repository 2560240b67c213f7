// AVX2: eight float32 a register.
#include "pass.inl"

namespace maskwright::noise {

const Passes& avx2() {
  static const Passes table{"avx2", &move};
  return table;
}

}  // namespace maskwright::noise

// x86-64 flags: -mavx2 -mfma -mf16c
#define MPQ_SIMD "cpu/simd/avx2.h"
#include "cpu/int8/kernels.inl"
#include "cpu/kernels.h"

namespace mpq::cpu {

LinearInt8 int8_avx2() { return linear_int8_tokens<NoTiles>; }

}  // namespace mpq::cpu

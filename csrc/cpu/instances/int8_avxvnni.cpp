// x86-64 flags: -mavx2 -mfma -mf16c -mavxvnni
#define MPQ_SIMD "cpu/simd/avx2.h"
#include "cpu/int8/kernels.inl"
#include "cpu/kernels.h"

namespace mpq::cpu {

LinearInt8 int8_avxvnni() { return linear_int8_tokens<NoTiles>; }

}  // namespace mpq::cpu

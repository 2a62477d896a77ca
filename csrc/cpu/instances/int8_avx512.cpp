// x86-64 flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c
#define MPQ_SIMD "cpu/simd/avx512.h"
#include "cpu/int8/kernels.inl"
#include "cpu/kernels.h"

namespace mpq::cpu {

LinearInt8 int8_avx512() { return linear_int8_tokens<NoTiles>; }

}  // namespace mpq::cpu

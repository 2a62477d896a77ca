// x86-64 flags: -mavx2 -mfma -mf16c
#define MPQ_SIMD "cpu/simd/avx2.h"
#include "cpu/exact/kernels.inl"
#include "cpu/kernels.h"

namespace mpq::cpu {

Kernels exact_avx2() { return {linear_tokens, dequantize_weight}; }

}  // namespace mpq::cpu

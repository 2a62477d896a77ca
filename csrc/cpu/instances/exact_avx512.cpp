// x86-64 flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c
#define MPQ_SIMD "cpu/simd/avx512.h"
#include "cpu/exact/kernels.inl"
#include "cpu/kernels.h"

namespace mpq::cpu {

Kernels exact_avx512() { return {linear_tokens, dequantize_weight}; }

}  // namespace mpq::cpu

// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c.
#if defined(__x86_64__)
#include "cpu/kernels.h"
#include "cpu/simd_avx512.h"
// The kernels are written against the names that the header above defines.
#include "cpu/kernels.inl"

namespace mpq::cpu {

Kernels avx512_kernels() { return {linear_tokens, dequantize_weight}; }

}  // namespace mpq::cpu
#endif

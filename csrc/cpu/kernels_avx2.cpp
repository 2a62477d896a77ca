// Compiled with -mavx2 -mfma -mf16c.
#if defined(__x86_64__)
#include "cpu/kernels.h"
#include "cpu/simd_avx2.h"
// The kernels are written against the names that the header above defines.
#include "cpu/kernels.inl"

namespace mpq::cpu {

Kernels avx2_kernels() { return {linear_tokens, dequantize_weight}; }

}  // namespace mpq::cpu
#endif

// Any machine: 4 lanes, GCC/Clang vector extensions, the compiler's default flags.
#include "cpu/kernels.h"
#include "cpu/simd_portable.h"
// The kernels are written against the names that the header above defines.
#include "cpu/kernels.inl"

namespace mpq::cpu {

Kernels portable_kernels() { return {linear_tokens, dequantize_weight}; }

}  // namespace mpq::cpu

// Compiled with -mavx2 -mfma -mf16c -mavxvnni.
#if defined(__x86_64__)
#include "cpu/kernels.h"
#include "cpu/simd_avx2.h"
// The kernels are written against the names that the header above defines.
#include "cpu/int8.inl"

namespace mpq::cpu {

LinearInt8 avxvnni_int8() { return linear_int8_tokens<NoTiles>; }

}  // namespace mpq::cpu
#endif

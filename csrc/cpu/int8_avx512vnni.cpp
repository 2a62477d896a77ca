// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mfma -mf16c.
#if defined(__x86_64__)
#include "cpu/kernels.h"
#include "cpu/simd_avx512.h"
// The kernels are written against the names that the header above defines.
#include "cpu/int8.inl"

namespace mpq::cpu {

LinearInt8 avx512vnni_int8() { return linear_int8_tokens<NoTiles>; }

}  // namespace mpq::cpu
#endif

// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mamx-tile -mamx-int8 -mfma -mf16c.
#if defined(__x86_64__)
#include "cpu/kernels.h"
#include "cpu/simd_avx512.h"
#include "cpu/tiles_amx.h"
// The kernels are written against the names that the headers above define.
#include "cpu/int8.inl"

namespace mpq::cpu {

LinearInt8 amx_int8() { return linear_int8_tokens<AmxTiles>; }

bool amx_multiplies() { return tiles_multiply<AmxTiles>(); }

}  // namespace mpq::cpu
#endif

// x86-64 flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mavx512vnni -mamx-tile -mamx-int8
#define MPQ_SIMD "cpu/simd/avx512.h"
#include "cpu/int8/kernels.inl"
#include "cpu/kernels.h"
#include "cpu/tiles/amx.h"
#include "cpu/tiles/amx_tiles.h"

namespace mpq::cpu {

LinearInt8 int8_amx() { return linear_int8_tokens<AmxTiles>; }

bool amx_multiplies_bytes() { return tiles_multiply_bytes<AmxTiles>(); }

}  // namespace mpq::cpu

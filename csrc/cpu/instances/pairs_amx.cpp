// x86-64 flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mavx512bf16 -mamx-tile -mamx-bf16
#define MPQ_SIMD "cpu/simd/avx512.h"
#include "cpu/exact/tile_pairs.inl"
#include "cpu/kernels.h"
#include "cpu/tiles/amx.h"
#include "cpu/tiles/amx_tiles.h"

namespace mpq::cpu {

const Products* pairs_amx() { return &kPairProducts<AmxTiles>; }

bool amx_multiplies_pairs() { return tiles_multiply_pairs<AmxTiles>(); }

}  // namespace mpq::cpu

// x86-64 flags: -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c -mavx512bf16
#define MPQ_SIMD "cpu/simd/avx512.h"
#include "cpu/exact/tile_pairs.inl"
#include "cpu/kernels.h"

namespace mpq::cpu {

const Products* pairs_avx512bf16() { return &kPairProducts<NoTiles>; }

}  // namespace mpq::cpu

// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c.
#if defined(__x86_64__)
#include "cpu/kernels.h"
#include "cpu/simd_avx512.h"
#include "generated/layout.h"

// clang-format off: each file uses the names of those before it.
#include "cpu/codes.inl"
#include "cpu/convert.inl"
#include "cpu/blocks.inl"
#include "cpu/prefetch.inl"
#include "cpu/decode.inl"
#include "cpu/decode_pairs.inl"
#include "cpu/pair_tile.inl"
// clang-format on

namespace mpq::cpu {

const Products& avx512bf16_products() { return kPairProducts; }

}  // namespace mpq::cpu
#endif

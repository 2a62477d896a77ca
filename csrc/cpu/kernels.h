// What one instruction set provides to dispatch.cpp. The same sources (exact/kernels.inl, int8/kernels.inl) are
// compiled once for each set, by the files of cpu/instances with that set's compiler flags, and everything in unnamed
// namespaces: an inline function shared between those translation units could otherwise be linked with AVX-512 code
// into the portable path.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/isa.h"

namespace mpq::cpu {

constexpr int64_t kTokenChunk = 192;  // tokens whose x is held in the workspace at a time
constexpr int64_t kDecodeTokens = 4;  // up to here codes are multiplied directly
// The same for pairs of bf16. With 4 tokens the tile is as fast at 1 to 4 bits and faster above: 500 and 380 us at 8
// bits, 4096 x 4096 in the third-level cache, two threads of an AMD EPYC (Zen 5).
constexpr int64_t kPairedDecodeTokens = 3;
constexpr int64_t kTileTokens = 16;  // of a product on tile registers
constexpr int64_t kAlignment = 64;   // bytes; the workspace is aligned up to it
// Bits of 2^-100 as fp32: sums of smaller x times codes could come near the subnormal numbers, which some instructions
// take for 0.
constexpr uint32_t kSmallestPaired = 27u << 23;

// Token m's x, fp32: chunks[m * stride + 16 * chunk + 4 * j + q], zero beyond the true columns.
// pairs: the same as bf16 in the order of columns, two in a word, [m * stride / 2 + column / 2]; null without.
// sums: of the 16 columns of each chunk, [chunk * kTokenChunk + m]; only beside pairs, and beyond kPairedDecodeTokens.
struct Tokens {
  const float* chunks;
  const uint32_t* pairs;
  const float* sums;
  int64_t stride;
};

// sums[m * 64 + position] += W[row tile of this segment] @ x, for M tokens: decode[bits][M].
using DecodeSegment = void (*)(const Segment& segment, DType scale_dtype, int64_t row_tile, const Tokens& x,
                               float* sums);
// The same for any number of tokens.
using TileSegment = void (*)(const Segment& segment, DType scale_dtype, int64_t row_tile, const Tokens& x,
                             int64_t tokens, float* sums);
// How segments whose groups are whole chunks are multiplied: decode[bits][M] up to decode_tokens, else tile.
struct Products {
  int64_t decode_tokens;
  int64_t pass_tokens;  // that the tile takes at a time
  DecodeSegment decode[9][5];
  TileSegment tile;
};

struct Kernels {
  // pairs: products of bf16 x that no value of is smaller than kSmallestPaired, or null.
  void (*linear)(const LinearArgs& args, const Parallel& parallel, const Products* pairs);
  void (*dequantize)(const Weight& weight, void* out, DType out_dtype, const Parallel& parallel);
};

// fp32 values of one token of x in the workspace: an odd number of 64, so that the same columns of many tokens fall
// into all sets of a cache. Static: an inline function would be shared between the translation units.
static constexpr int64_t padded_k(int64_t K) { return ((K + 63) / 64 | 1) * 64; }

using LinearInt8 = void (*)(const LinearArgs& args, const Parallel& parallel);

// embedding.cpp; arguments have been checked.
void embedding_rows(const Weight& weight, const int64_t* ids, int64_t count, void* out, DType out_dtype,
                    const Parallel& parallel);

// exact_avx2(), int8_avx2() and so on: what the files of cpu/instances define, each the function of its name.
#define MPQ_DECLARE(name, exact, pairs, int8, ...) \
  Kernels exact_##exact();                         \
  const Products* pairs_##pairs();                 \
  LinearInt8 int8_##int8();
MPQ_CPU_ISAS(MPQ_DECLARE, MPQ_DECLARE)
#undef MPQ_DECLARE

}  // namespace mpq::cpu

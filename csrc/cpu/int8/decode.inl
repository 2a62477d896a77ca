// Decode with int8 x, M = 1..4 tokens: the codes of a row, four in a lane, times four x in one instruction.
//
//   y[n] = sum over blocks of  (scale of w * scale of x) * (sum code * x  -  zero * sum x)       kind min: see add_dots
//
// Both sums are exact integers; they are added up over the columns of a block before anything is rounded.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/inline.h"
#include "cpu/int8/blocks.h"
#include "cpu/int8/round_x.inl"
#include "cpu/shared/codes.inl"
#include "cpu/shared/convert.inl"
#include "cpu/shared/frame.inl"
#include "cpu/shared/prefetch.inl"
#include "cpu/simd/simd.h"

namespace mpq::cpu {
namespace {

// Powers of two that bring the sums of a row half back when its codes were multiplied where they lay in the byte.
template <int Bits>
struct HalfScales {
  alignas(64) float values[16];
};

template <int Bits>
constexpr HalfScales<Bits> half_scales() {
  HalfScales<Bits> out{};
  for (int i = 0; i < 16; ++i) {
    const int shift = kDotTakesBytes && (i & 4) ? natural_start<Bits, 1>() : 0;
    out.values[i] = 1.0f / static_cast<float>(1 << shift);
  }
  return out;
}

template <int Bits>
constexpr HalfScales<Bits> kHalfScales = half_scales<Bits>();

// A block as decode sees it: `x` is at the block's first chunk.
struct DecodeBlock {
  Block columns;
  const uint32_t* x;
  int64_t x_stride;  // words from token to token
};

// acc[g - g0][h][m] += codes * x of one chunk, the C-th of its supertile.
template <int Bits, int C, int M, int G>
MPQ_INLINE void dot_chunk(const Stripe& stripe, int64_t chunk, const uint32_t* x, int64_t x_stride, int g0,
                          I (&acc)[M][G][2]) {
#pragma GCC unroll 1
  for (int part = 0; part < 16 / kLanes; ++part) {
    I xs[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) xs[m] = load_i(x + m * x_stride + kLanes * part);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      I codes[2];
      load_clean_codes<Bits, C, kDotTakesBytes>(stripe, chunk, g0 + g, part, codes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        acc[m][g][0] = dot<Bits == 8>(acc[m][g][0], codes[0], xs[m]);
        acc[m][g][1] = dot<Bits == 8>(acc[m][g][1], codes[1], xs[m]);
      }
    }
  }
}

// acc += codes * x over all chunks of a block.
template <int Bits, int M, int G>
MPQ_INLINE void dot_block(const Stripe& stripe, const DecodeBlock& block, int g0, I (&acc)[M][G][2]) {
  const int64_t begin = block.columns.chunk;
  const int64_t end = begin + block.columns.chunks;
  const uint32_t* x = block.x - kSpreadWords * begin;
  if constexpr (chunks_have_words<Bits>()) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      dot_chunk<Bits, 0>(stripe, chunk, x + kSpreadWords * chunk, block.x_stride, g0, acc);
    }
    return;
  }
  for (int64_t tile = begin / 4; 4 * tile < end; ++tile) {
    for_each_of_4([&](auto c) __attribute__((always_inline)) {
      const int64_t chunk = 4 * tile + c.value;
      if (chunk < begin || chunk >= end) return;
      dot_chunk<Bits, c.value>(stripe, chunk, x + kSpreadWords * chunk, block.x_stride, g0, acc);
    });
  }
}

// totals[m][position] += the block. scales[m], sums[m]: of the block's x.
template <int Bits, int M>
__attribute__((noinline)) void add_block(const Stripe& stripe, const DecodeBlock& block, const GroupParams& params,
                                         const float (&scales)[M], const float (&sums)[M], float (&totals)[M][64]) {
  constexpr int G = kInt8RowGroups[M];
  for (int g0 = 0; g0 < 8; g0 += G) {
    I acc[M][G][2];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) acc[m][g][0] = acc[m][g][1] = zeros_i();
    }
    dot_block<Bits>(stripe, block, g0, acc);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const F x_scale = set1(scales[m]);
      const F x_sum = set1(sums[m]);
#pragma GCC unroll 16
      for (int i = 0; i < 2 * G; i += kSet) {
        const int row = 8 * g0 + 4 * i;
        F dots = to_f(sum_q(&acc[m][0][0] + i));
        if constexpr (kDotTakesBytes && natural_start<Bits, 1>() > 0) {
          dots = mul(dots, load(kHalfScales<Bits>.values + (row & 15)));
        }
        add_dots(params, row, dots, x_scale, x_sum, totals[m]);
      }
    }
  }
}

// sums[m * 64 + position] += W[row tile of this segment] @ x, for M tokens whose words are spread.
template <int Bits, int M>
void decode_int8(const TileSource& source, const Int8Tokens& x, float* sums) {
  const Segment& segment = source.segment;
  const Stripe stripe = stripe_of(segment, source.row_tile);
  const Blocks blocks = blocks_of(segment);
  const int64_t groups = blocks.count / blocks.per_group;
  float (&totals)[M][64] = *reinterpret_cast<float (*)[M][64]>(sums);
  GroupParams params;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const DecodeBlock block{block_at(blocks, b), x.words + b * blocks.slots * kSpreadWords, x.words_stride};
    if (b % blocks.per_group == 0) {
      load_group(segment, source.scale_dtype, source.row_tile, block.columns.group, params);
      const int64_t later = block.columns.group + kPrefetchGroups;
      if (later < groups) prefetch_group(segment, source.scale_dtype, source.row_tile, later);
    }
    prefetch_words<Bits>(stripe, block.columns.chunk, block.columns.chunks);
    float scales[M], x_sums[M];
    for (int m = 0; m < M; ++m) {
      scales[m] = x.scales[m * x.blocks_stride + b];
      x_sums[m] = x.sums[m * x.blocks_stride + b];
    }
    add_block<Bits, M>(stripe, block, params, scales, x_sums, totals);
  }
}

using DecodeInt8 = void (*)(const TileSource&, const Int8Tokens&, float*);

constexpr DecodeInt8 kDecodeInt8[9][5] = {
    {},
    {nullptr, decode_int8<1, 1>, decode_int8<1, 2>, decode_int8<1, 3>, decode_int8<1, 4>},
    {nullptr, decode_int8<2, 1>, decode_int8<2, 2>, decode_int8<2, 3>, decode_int8<2, 4>},
    {nullptr, decode_int8<3, 1>, decode_int8<3, 2>, decode_int8<3, 3>, decode_int8<3, 4>},
    {nullptr, decode_int8<4, 1>, decode_int8<4, 2>, decode_int8<4, 3>, decode_int8<4, 4>},
    {nullptr, decode_int8<5, 1>, decode_int8<5, 2>, decode_int8<5, 3>, decode_int8<5, 4>},
    {nullptr, decode_int8<6, 1>, decode_int8<6, 2>, decode_int8<6, 3>, decode_int8<6, 4>},
    {nullptr, decode_int8<7, 1>, decode_int8<7, 2>, decode_int8<7, 3>, decode_int8<7, 4>},
    {nullptr, decode_int8<8, 1>, decode_int8<8, 2>, decode_int8<8, 3>, decode_int8<8, 4>},
};

}  // namespace
}  // namespace mpq::cpu

// Many tokens with int8 x: the codes of a block as bytes, rows side by side, so that no sum crosses lanes.
//
//   tile[4 * chunk + q][64] words of four codes, rows in position order      x: words[4 * chunk + q], as store_chunk
#pragma once

#include <cstdint>

#include "cpu/inline.h"
#include "cpu/int8/blocks.h"
#include "cpu/int8/round_x.inl"
#include "cpu/shared/codes.inl"
#include "cpu/shared/convert.inl"
#include "cpu/shared/frame.inl"
#include "cpu/simd/simd.h"

namespace mpq::cpu {
namespace {

constexpr int64_t kMostChunks = kBlockColumns / 16 + 1;

// tile[4][64] of one chunk, the C-th of its supertile.
template <int Bits, int C>
void unpack_chunk(const Stripe& stripe, int64_t chunk, uint32_t* tile) {
#pragma GCC unroll 1
  for (int part = 0; part < 16 / kLanes; ++part) {
    for (int g = 0; g < 8; g += kPairs) {
      I words[2 * kPairs];
#pragma GCC unroll 2
      for (int i = 0; i < kPairs; ++i) {
        I codes[2];
        load_clean_codes<Bits, C, false>(stripe, chunk, g + i, part, codes);
        words[2 * i] = codes[0];
        words[2 * i + 1] = codes[1];
      }
#pragma GCC unroll 2
      for (int set = 0; set < 2 * kPairs; set += kSet) {
        gather_rows(words + set);
#pragma GCC unroll 4
        for (int i = 0; i < kSet; ++i) store_i(tile + 64 * (kSet * part + i) + 8 * g + 4 * set, words[set + i]);
      }
    }
  }
}

// tile[4 * chunks][64] of a block.
template <int Bits>
void unpack_block(const Stripe& stripe, const Block& block, uint32_t* tile) {
  constexpr void (*kChunks[4])(const Stripe&, int64_t, uint32_t*) = {unpack_chunk<Bits, 0>, unpack_chunk<Bits, 1>,
                                                                     unpack_chunk<Bits, 2>, unpack_chunk<Bits, 3>};
  for (int64_t i = 0; i < block.chunks; ++i) {
    kChunks[(block.chunk + i) % 4](stripe, block.chunk + i, tile + 256 * i);
  }
}

using UnpackBlock = void (*)(const Stripe&, const Block&, uint32_t*);

constexpr UnpackBlock kUnpackBlock[9] = {
    nullptr,         unpack_block<1>, unpack_block<2>, unpack_block<3>, unpack_block<4>,
    unpack_block<5>, unpack_block<6>, unpack_block<7>, unpack_block<8>,
};

// A block of codes and what its x is multiplied with.
struct Int8Tile {
  const uint32_t* tile;  // [places][64]
  int64_t places;
  const GroupParams* params;
  Int8Tokens x;  // at the block and the first token
};

// sums[T][64] += x[T] @ the block.
template <bool Wide, int T>
void multiply_int8(const Int8Tile& block, float* sums) {
  for (int row = 0; row < 64; row += kTileVectors * kLanes) {
    I acc[T][kTileVectors];
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) acc[m][v] = zeros_i();
    }
    add_places(acc, block.tile + row, block.x.words, block.x.words_stride, block.places,
               [](I sum, I w, I x) __attribute__((always_inline)) { return dot<Wide>(sum, w, x); });
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m) {
      const F x_sum = set1(block.x.sums[m * block.x.blocks_stride]);
      const F x_scale = set1(block.x.scales[m * block.x.blocks_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        add_dots(*block.params, row + kLanes * v, to_f(acc[m][v]), x_scale, x_sum, sums + 64 * m);
      }
    }
  }
}

using MultiplyInt8 = void (*)(const Int8Tile&, float*);

constexpr MultiplyInt8 kMultiplyInt8[2][kTokenBlock + 1] = {
    {nullptr, multiply_int8<false, 1>, multiply_int8<false, 2>, multiply_int8<false, 3>, multiply_int8<false, 4>,
     multiply_int8<false, 5>, multiply_int8<false, 6>},
    {nullptr, multiply_int8<true, 1>, multiply_int8<true, 2>, multiply_int8<true, 3>, multiply_int8<true, 4>,
     multiply_int8<true, 5>, multiply_int8<true, 6>},
};

// sums[tokens][64] += x[tokens] @ the block, without tile registers.
inline void multiply_rounds(const Int8Tile& block, bool wide, int64_t tokens, float* sums) {
  const int64_t rounds = ceil_div(tokens, kTokenBlock);  // of equal size, as nearly as can be
  for (int64_t r = 0; r < rounds; ++r) {
    const int64_t first = tokens * r / rounds;
    const int64_t count = tokens * (r + 1) / rounds - first;
    const Int8Tokens here{block.x.words + first * block.x.words_stride, block.x.scales + first * block.x.blocks_stride,
                          block.x.sums + first * block.x.blocks_stride, block.x.words_stride, block.x.blocks_stride};
    kMultiplyInt8[wide][count]({block.tile, block.places, block.params, here}, sums + 64 * first);
  }
}

}  // namespace
}  // namespace mpq::cpu

// Sums of a block of int8 x on tile registers, see cpu/tiles/registers.inl.
#pragma once

#include <cstdint>

#include "cpu/inline.h"
#include "cpu/int8/round_x.inl"
#include "cpu/int8/tile.inl"
#include "cpu/simd/simd.h"
#include "cpu/tiles/registers.inl"

namespace mpq::cpu {
namespace {

// Signed bytes of x times unsigned codes.
struct ByteDot {
  template <int Sums, int X, int Codes, typename Tiles>
  static MPQ_INLINE void add(Tiles& tiles) {
    tiles.template dot_bytes<Sums, X, Codes>();
  }
};

// sums[tokens][64] += x[tokens] @ the block, for 16 tokens or more. The last 16 may begin among those already done,
// which are not added again.
template <typename Tiles>
void multiply_tiles(ItemTiles<Tiles>& item, const Int8Tile& block, int64_t tokens, float* sums) {
  item.shape(block.places % kStepWords);
  for (int64_t done = 0; done < tokens; done += Tiles::kTokens) {
    const int64_t first = done + Tiles::kTokens <= tokens ? done : tokens - Tiles::kTokens;
    alignas(64) uint32_t dots[Tiles::kTokens * 64];
    tile_dots<ByteDot>(item.tiles, block.tile, block.places, block.x.words + first * block.x.words_stride,
                       block.x.words_stride, dots);
    for (int64_t m = done; m < first + Tiles::kTokens; ++m) {
      const F x_scale = set1(block.x.scales[m * block.x.blocks_stride]);
      const F x_sum = set1(block.x.sums[m * block.x.blocks_stride]);
      for (int row = 0; row < 64; row += kLanes) {
        const F exact = to_f(load_i(dots + 64 * (m - first) + row));
        add_dots(*block.params, row, exact, x_scale, x_sum, sums + 64 * m);
      }
    }
  }
}

// A product at the ends of both ranges and between, with a tail of every size, compared with plain C++.
template <typename Tiles>
bool tiles_multiply_bytes() {
  alignas(64) uint32_t dots[16 * 64];
  uint8_t codes[4 * kStepWords * 2][64];
  alignas(64) uint8_t tile[kStepWords * 2][64][4];
  alignas(64) int8_t x[16][4 * kStepWords * 2];
  for (int k = 0; k < 8 * kStepWords; ++k) {
    for (int n = 0; n < 64; ++n) {
      codes[k][n] = static_cast<uint8_t>(n == 0 ? 255 : 7 * k + 13 * n);
      tile[k / 4][n][k % 4] = codes[k][n];
    }
    for (int m = 0; m < 16; ++m)
      x[m][k] = static_cast<int8_t>(m == 0 ? 127 : m == 1 ? -127 : (5 * k + 29 * m) % 255 - 127);
  }
  for (int64_t places = kStepWords; places <= 2 * kStepWords; places += 4) {
    ItemTiles<Tiles> item;
    item.shape(places % kStepWords);
    tile_dots<ByteDot>(item.tiles, reinterpret_cast<const uint32_t*>(tile), places,
                       reinterpret_cast<const uint32_t*>(x), 2 * kStepWords, dots);
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 64; ++n) {
        int32_t sum = 0;
        for (int64_t k = 0; k < 4 * places; ++k) sum += x[m][k] * codes[k][n];
        if (static_cast<int32_t>(dots[64 * m + n]) != sum) return false;
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace mpq::cpu

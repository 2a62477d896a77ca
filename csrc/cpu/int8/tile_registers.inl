// Sums of a block on tile registers: 16 tokens x 64 rows of W at a time. `Tiles` are those of AMX (amx_tiles.h), or
// what tests/cpp/simulated_tiles.h has in their place, or NoTiles.
//
//   sums[16 tokens][16 rows of W]  +=  x[16 tokens][64 columns]  *  codes[64 columns][16 rows of W]
//
// Both factors already lie as the instruction wants them, four columns in a word:
//
//   x      words[m * words_stride + k]    a row of the register for each token m, k = 0..15
//   codes  tile[k][64]                    a row of the register for each k, 16 of the 64 rows of W
//
// A block is as many full steps of 64 columns as fit, and a tail of 1 to 3 chunks in registers of fewer columns.
#pragma once

#include <cstdint>

#include "cpu/inline.h"
#include "cpu/int8/amx.h"
#include "cpu/int8/round_x.inl"
#include "cpu/int8/tile.inl"
#include "cpu/shared/codes.inl"
#include "cpu/simd/simd.h"

namespace mpq::cpu {
namespace {

struct NoTiles {
  static constexpr int64_t kTokens = 0;
};

// Tile registers 0..3 hold the sums of 16 rows of W each.
constexpr int kTileX = 4, kTileCodes = 5, kTailX = 6, kTailCodes = 7;
constexpr int64_t kStepWords = 16;  // of a token, and rows of codes

inline TileConfig tile_shapes(int64_t tail_words) {
  TileConfig config{};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.bytes[t] = 64;
    config.rows[t] = 16;
  }
  if (tail_words) {
    config.bytes[kTailX] = static_cast<uint16_t>(4 * tail_words);
    config.rows[kTailCodes] = static_cast<uint8_t>(tail_words);
  }
  return config;
}

// The tile registers during one work item: configured when a block first needs them, released at its end.
template <typename Tiles>
struct ItemTiles {
  Tiles tiles;
  int64_t tail_words = -1;

  void shape(int64_t wanted) {
    if (wanted == tail_words || (wanted == 0 && tail_words > 0)) return;
    tiles.configure(tile_shapes(wanted));
    tail_words = wanted;
  }

  ~ItemTiles() {
    if constexpr (Tiles::kTokens > 0) {
      if (tail_words >= 0) tiles.release();
    }
  }
};

template <int X, int Codes, typename Tiles>
MPQ_INLINE void multiply_step(Tiles& tiles, const uint32_t* x, int64_t words_stride, const uint32_t* codes) {
  tiles.template load<X>(x, 4 * words_stride);
  for_each_of_4([&](auto i) __attribute__((always_inline)) {
    tiles.template load<Codes>(codes + 16 * i.value, 256);
    tiles.template dot<i.value, X, Codes>();
  });
}

// dots[16][64] = x of 16 tokens @ tile[places][64], for registers that have the block's shape.
template <typename Tiles>
void tile_dots(Tiles& tiles, const uint32_t* tile, int64_t places, const uint32_t* x, int64_t words_stride,
               uint32_t* dots) {
  for_each_of_4([&](auto i) __attribute__((always_inline)) { tiles.template zero<i.value>(); });
  const int64_t tail = places / kStepWords * kStepWords;
  for (int64_t k = 0; k < tail; k += kStepWords) {
    multiply_step<kTileX, kTileCodes>(tiles, x + k, words_stride, tile + 64 * k);
  }
  if (tail < places) multiply_step<kTailX, kTailCodes>(tiles, x + tail, words_stride, tile + 64 * tail);
  for_each_of_4([&](auto i)
                    __attribute__((always_inline)) { tiles.template store<i.value>(dots + 16 * i.value, 256); });
}

// sums[tokens][64] += x[tokens] @ the block, for 16 tokens or more. The last 16 may begin among those already done,
// which are not added again.
template <typename Tiles>
void multiply_tiles(ItemTiles<Tiles>& item, const Int8Tile& block, int64_t tokens, float* sums) {
  item.shape(block.places % kStepWords);
  for (int64_t done = 0; done < tokens; done += Tiles::kTokens) {
    const int64_t first = done + Tiles::kTokens <= tokens ? done : tokens - Tiles::kTokens;
    alignas(64) uint32_t dots[Tiles::kTokens * 64];
    tile_dots(item.tiles, block.tile, block.places, block.x.words + first * block.x.words_stride, block.x.words_stride,
              dots);
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
bool tiles_multiply() {
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
    tile_dots(item.tiles, reinterpret_cast<const uint32_t*>(tile), places, reinterpret_cast<const uint32_t*>(x),
              2 * kStepWords, dots);
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

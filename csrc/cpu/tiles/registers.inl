// Sums of a block on tile registers: 16 tokens x 64 rows of W at a time. `Tiles` are those of AMX (amx_tiles.h), or
// what tests/cpp/simulated_tiles.h has in their place, or NoTiles.
//
//   sums[16 tokens][16 rows of W]  +=  x[16 tokens][16 words]  *  codes[16 words][16 rows of W]
//
// Both factors already lie as the instruction wants them, in words of four columns (bytes) or two (bf16):
//
//   x      words[m * words_stride + k]    a row of the register for each token m, k = 0..15
//   codes  tile[k][64]                    a row of the register for each k, 16 of the 64 rows of W
//
// A block is as many full steps of 16 words as fit, and a tail in registers of fewer columns. `Dot` has the product:
// Dot::add<Sums, X, Codes>(tiles), of register numbers.
#pragma once

#include <cstdint>

#include "cpu/inline.h"
#include "cpu/shared/codes.inl"
#include "cpu/tiles/amx.h"

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

template <typename Dot, int X, int Codes, typename Tiles>
MPQ_INLINE void multiply_step(Tiles& tiles, const uint32_t* x, int64_t words_stride, const uint32_t* codes) {
  tiles.template load<X>(x, 4 * words_stride);
  for_each_of_4([&](auto i) __attribute__((always_inline)) {
    tiles.template load<Codes>(codes + 16 * i.value, 256);
    Dot::template add<i.value, X, Codes>(tiles);
  });
}

// dots[16][64] = x of 16 tokens @ tile[places][64], for registers that have the block's shape.
template <typename Dot, typename Tiles>
void tile_dots(Tiles& tiles, const uint32_t* tile, int64_t places, const uint32_t* x, int64_t words_stride,
               uint32_t* dots) {
  for_each_of_4([&](auto i) __attribute__((always_inline)) { tiles.template zero<i.value>(); });
  const int64_t tail = places / kStepWords * kStepWords;
  for (int64_t k = 0; k < tail; k += kStepWords) {
    multiply_step<Dot, kTileX, kTileCodes>(tiles, x + k, words_stride, tile + 64 * k);
  }
  if (tail < places) multiply_step<Dot, kTailX, kTailCodes>(tiles, x + tail, words_stride, tile + 64 * tail);
  for_each_of_4([&](auto i)
                    __attribute__((always_inline)) { tiles.template store<i.value>(dots + 16 * i.value, 256); });
}

}  // namespace
}  // namespace mpq::cpu

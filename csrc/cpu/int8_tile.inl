// Many tokens with int8 x: the codes of a block as bytes, rows side by side, so that no sum crosses lanes.
//
//   tile[4 * chunk + q][64] words of four codes, rows in position order      x: words[4 * chunk + q], as store_chunk

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
        gather_rows_i(words + set);
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
    for (int64_t k = 0; k < block.places; ++k) {
      I w[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) w[v] = load_i(block.tile + 64 * k + row + kLanes * v);
#pragma GCC unroll 8
      for (int m = 0; m < T; ++m) {
        const I x = set1_i(block.x.words[m * block.x.words_stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) acc[m][v] = dot<Wide>(acc[m][v], w[v], x);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m) {
      const F x_sum = set1(block.x.sums[m * block.x.blocks_stride]);
      const F x_scale = set1(block.x.scales[m * block.x.blocks_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int at = row + kLanes * v;
        const F dots = fnma(load(block.params->zeros + at), x_sum, to_f(acc[m][v]));
        const F scale = mul(load(block.params->scales + at), x_scale);
        store(sums + 64 * m + at, fma(scale, dots, load(sums + 64 * m + at)));
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

// sums[tokens][64] += W[row tile of this segment] @ x, for words that are not spread.
inline void tile_int8(const TileSource& source, const Int8Tokens& x, int64_t tokens, float* sums) {
  alignas(64) uint32_t tile[kMostChunks * 256];
  const Segment& segment = source.segment;
  const Stripe stripe = stripe_of(segment, source.row_tile);
  const Blocks blocks = blocks_of(segment);
  const int64_t rounds = ceil_div(tokens, kTokenBlock);  // of equal size, as nearly as can be
  GroupParams params;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const Block columns = block_at(blocks, b);
    if (b % blocks.per_group == 0) load_group(segment, source.scale_dtype, source.row_tile, columns.group, params);
    kUnpackBlock[segment.bits](stripe, columns, tile);
    for (int64_t r = 0; r < rounds; ++r) {
      const int64_t first = tokens * r / rounds;
      const int64_t count = tokens * (r + 1) / rounds - first;
      const Int8Tokens here{x.words + first * x.words_stride + b * blocks.slots * kTokenWords,
                            x.scales + first * x.blocks_stride + b, x.sums + first * x.blocks_stride + b,
                            x.words_stride, x.blocks_stride};
      kMultiplyInt8[segment.bits == 8][count]({tile, 4 * columns.chunks, &params, here}, sums + 64 * first);
    }
  }
}

}  // namespace
}  // namespace mpq::cpu

// The dequantized fp32 tile: any group size, any number of tokens.
//
//   tile[k'][64]: columns in the order of x chunks (16 * chunk + 4 * j + q), rows of the supertile in position order
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/kernels.h"
#include "cpu/shared/codes.inl"
#include "cpu/shared/convert.inl"
#include "cpu/shared/frame.inl"
#include "cpu/simd/simd.h"

namespace mpq::cpu {
namespace {

constexpr int64_t kTileChunks = 8;  // 128 columns x 64 rows of fp32 = 32 KB: fits the first-level cache

// Scales and zeros that the 16 columns of a chunk use: entry[place] of params.
struct ChunkParams {
  GroupParams params[16];
  int entry[16];
  int64_t group = -1;  // the one group in params[0] that all columns use, or -1
};

// Columns beyond the segment are padding and take the last group: x is zero there.
inline void load_chunk_params(const Segment& s, DType scale_dtype, int64_t row_tile, int64_t chunk, ChunkParams& out) {
  const int64_t last_column = s.k1 - s.k0 - 1;
  const int64_t end = 16 * chunk + 15 < last_column ? 16 * chunk + 15 : last_column;
  const int64_t first = 16 * chunk / s.group_size;
  const int64_t last = end / s.group_size;
  if (first == last && first == out.group) return;
  for (int64_t group = first; group <= last; ++group)
    load_group(s, scale_dtype, row_tile, group, out.params[group - first]);
  for (int place = 0; place < 16; ++place) {
    const int64_t column = 16 * chunk + column_of(place);
    out.entry[place] = static_cast<int>((column < end ? column : end) / s.group_size - first);
  }
  out.group = first == last ? first : -1;
}

// A weight, two roundings.
template <bool Min>
MPQ_INLINE F weight_of(F code, F scale, F zero) {
  if constexpr (Min) return add(mul(code, scale), zero);
  return mul(sub(code, zero), scale);
}

// tile[16][64] = the weights of one chunk, the C-th of its supertile.
template <int Bits, int C, bool Min>
void dequantize_chunk(const Stripe& stripe, int64_t chunk, const ChunkParams& params, float* tile) {
#pragma GCC unroll 1
  for (int part = 0; part < 16 / kLanes; ++part) {
    for (int g = 0; g < 8; g += kPairs) {
      I codes[kPairs][2];
#pragma GCC unroll 2
      for (int i = 0; i < kPairs; ++i) load_codes<Bits, C>(stripe, chunk, g + i, part, codes[i]);
      for_each_of_4([&](auto j) __attribute__((always_inline)) {
        F v[2 * kPairs];
#pragma GCC unroll 2
        for (int i = 0; i < kPairs; ++i) {
          v[2 * i] = code_floats<Bits, 0, j.value>(codes[i][0]);
          v[2 * i + 1] = code_floats<Bits, 1, j.value>(codes[i][1]);
        }
#pragma GCC unroll 2
        for (int set = 0; set < 2 * kPairs; set += kSet) {
          gather_rows(v + set);
#pragma GCC unroll 4
          for (int i = 0; i < kSet; ++i) {
            const int place = 4 * j.value + kSet * part + i;
            const int row = 8 * g + 4 * set;
            const GroupParams& group = params.params[params.entry[place]];
            const F scale = load(group.scales + row), zero = load(group.zeros + row);
            store(tile + 64 * place + row, weight_of<Min>(v[set + i], scale, zero));
          }
        }
      });
    }
  }
}

// tile[16 * (end - begin)][64] of the chunks [begin, end) of a segment.
template <int Bits>
void dequantize_tile(const TileSource& source, int64_t begin, int64_t end, float* tile) {
  constexpr void (*kChunks[2][4])(const Stripe&, int64_t, const ChunkParams&, float*) = {
      {dequantize_chunk<Bits, 0, false>, dequantize_chunk<Bits, 1, false>, dequantize_chunk<Bits, 2, false>,
       dequantize_chunk<Bits, 3, false>},
      {dequantize_chunk<Bits, 0, true>, dequantize_chunk<Bits, 1, true>, dequantize_chunk<Bits, 2, true>,
       dequantize_chunk<Bits, 3, true>}};
  const auto& chunks = kChunks[source.segment.zero_kind == kZeroMin];
  const Stripe stripe = stripe_of(source.segment, source.row_tile);
  ChunkParams params;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    load_chunk_params(source.segment, source.scale_dtype, source.row_tile, chunk, params);
    chunks[chunk % 4](stripe, chunk, params, tile + 1024 * (chunk - begin));
  }
}

using DequantizeTile = void (*)(const TileSource&, int64_t, int64_t, float*);

constexpr DequantizeTile kDequantizeTile[9] = {
    nullptr,
    dequantize_tile<1>,
    dequantize_tile<2>,
    dequantize_tile<3>,
    dequantize_tile<4>,
    dequantize_tile<5>,
    dequantize_tile<6>,
    dequantize_tile<7>,
    dequantize_tile<8>,
};

// sums[T][64] += x[T][columns] @ tile[columns][64], one fused or plain multiply-add after the other along the columns.
template <int T>
void multiply_tile(const float* tile, int64_t columns, const float* x, int64_t stride, float* sums) {
  for (int row = 0; row < 64; row += kTileVectors * kLanes) {
    F acc[T][kTileVectors];
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) acc[m][v] = load(sums + 64 * m + row + kLanes * v);
    }
    add_places(acc, tile + row, x, stride, columns,
               [](F sum, F w, F value) __attribute__((always_inline)) { return fma(value, w, sum); });
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) store(sums + 64 * m + row + kLanes * v, acc[m][v]);
    }
  }
}

using MultiplyTile = void (*)(const float*, int64_t, const float*, int64_t, float*);

constexpr MultiplyTile kMultiplyTile[kTokenBlock + 1] = {
    nullptr, multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>, multiply_tile<5>, multiply_tile<6>,
};

// sums[tokens][64] += W[row tile of this segment] @ x.
inline void tile_segment(const Segment& segment, DType scale_dtype, int64_t row_tile, const Tokens& x, int64_t tokens,
                         float* sums) {
  alignas(64) float tile[kTileChunks * 1024];
  const int64_t chunks = ceil_div(segment.k1 - segment.k0, 16);
  for (int64_t begin = 0; begin < chunks; begin += kTileChunks) {
    const int64_t end = begin + kTileChunks < chunks ? begin + kTileChunks : chunks;
    kDequantizeTile[segment.bits]({segment, scale_dtype, row_tile}, begin, end, tile);
    for (int64_t m = 0; m < tokens; m += kTokenBlock) {
      const int64_t block = tokens - m < kTokenBlock ? tokens - m : kTokenBlock;
      const float* first = x.chunks + m * x.stride + segment.k0 + 16 * begin;
      kMultiplyTile[block](tile, 16 * (end - begin), first, x.stride, sums + 64 * m);
    }
  }
}

}  // namespace
}  // namespace mpq::cpu

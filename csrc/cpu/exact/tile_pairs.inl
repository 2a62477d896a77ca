// Many tokens by dot products of pairs of bf16: the codes of a span as bf16, two columns in a word, rows side by side.
//
//   tile[8 * chunk + i][64] words: columns 2 i and 2 i + 1 of a chunk, rows in position order      x: Tokens::pairs
//
// `Tiles`: of 16 tokens or more, on tile registers (cpu/tiles/registers.inl), else NoTiles.
//
// A span lies inside one group, so scale and zero are taken to the sum of the codes, as in decode: a one-hot x gives
// the very bits of dequantize().
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/exact/decode.inl"
#include "cpu/exact/decode_pairs.inl"
#include "cpu/inline.h"
#include "cpu/kernels.h"
#include "cpu/shared/codes.inl"
#include "cpu/shared/convert.inl"
#include "cpu/shared/frame.inl"
#include "cpu/simd/simd.h"
#include "cpu/tiles/registers.inl"

namespace mpq::cpu {
namespace {

static_assert(kTileVectors * kLanes == 64 && kSet == 4 && kPairs == 2);

// The codes of bytes J and J + 2, as bf16.
template <int Bits, int H, int J>
MPQ_INLINE I code_pairs(I merged) {
  if constexpr (Bits <= 5) {
    return to_pairs<Bits, 8 * J + field_start<Bits, H>(), 1>(merged);
  } else {
    // fp32 of a code has nothing in its lower half.
    const I low = _mm512_castps_si512(code_floats<Bits, H, J>(merged));
    const I high = _mm512_castps_si512(code_floats<Bits, H, J + 2>(merged));
    return _mm512_or_si512(shift<-16>(low), high);
  }
}

// tile[8][64] of one chunk, the C-th of its supertile.
template <int Bits, int C>
void unpack_pairs(const Stripe& stripe, int64_t chunk, uint32_t* tile) {
  for (int g = 0; g < 8; g += 2) {
    I codes[2][2];
    load_codes<Bits, C>(stripe, chunk, g, 0, codes[0]);
    load_codes<Bits, C>(stripe, chunk, g + 1, 0, codes[1]);
    const auto store_columns = [&](auto j) __attribute__((always_inline)) {
      I words[4] = {code_pairs<Bits, 0, j.value>(codes[0][0]), code_pairs<Bits, 1, j.value>(codes[0][1]),
                    code_pairs<Bits, 0, j.value>(codes[1][0]), code_pairs<Bits, 1, j.value>(codes[1][1])};
      gather_rows(words);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) store_i(tile + 64 * (4 * j.value + q) + 8 * g, words[q]);
    };
    store_columns(Index<0>{});
    store_columns(Index<1>{});
  }
}

// tile[8 * (end - begin)][64] of the chunks [begin, end) of a segment.
template <int Bits>
void unpack_span(const Stripe& stripe, int64_t begin, int64_t end, uint32_t* tile) {
  constexpr void (*kChunks[4])(const Stripe&, int64_t, uint32_t*) = {unpack_pairs<Bits, 0>, unpack_pairs<Bits, 1>,
                                                                     unpack_pairs<Bits, 2>, unpack_pairs<Bits, 3>};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    kChunks[chunk % 4](stripe, chunk, tile + 512 * (chunk - begin));
  }
}

using UnpackSpan = void (*)(const Stripe&, int64_t, int64_t, uint32_t*);

constexpr UnpackSpan kUnpackSpan[9] = {
    nullptr,        unpack_span<1>, unpack_span<2>, unpack_span<3>, unpack_span<4>,
    unpack_span<5>, unpack_span<6>, unpack_span<7>, unpack_span<8>,
};

// A span of codes and the x that it is multiplied with, from the first token on.
struct PairTile {
  const uint32_t* tile;  // [words][64]
  int64_t words;         // of one token: 8 for each chunk
  const GroupParams& params;
  const uint32_t* x;
  int64_t stride;
  const float* x_sums;  // of each token
};

// sums[T][64] += x[T] @ the span.
template <int T>
void multiply_span(const PairTile& span, float* sums) {
  F acc[T][kTileVectors];
#pragma GCC unroll 8
  for (int m = 0; m < T; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) acc[m][v] = zeros_f();
  }
  add_places(acc, span.tile, span.x, span.stride, span.words,
             [](F sum, I w, I x) __attribute__((always_inline)) { return dot_pairs(sum, w, x); });
  const float* x_sums = span.x_sums;
  const auto add_sums = [&](auto min) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const F zeros = load(span.params.zeros + kLanes * v), scales = load(span.params.scales + kLanes * v);
#pragma GCC unroll 8
      for (int m = 0; m < T; ++m) {
        float* out = sums + 64 * m + kLanes * v;
        store(out, add_group<min.value>(load(out), acc[m][v], set1(x_sums[m]), scales, zeros));
      }
    }
  };
  span.params.min ? add_sums(Index<1>{}) : add_sums(Index<0>{});
}

using MultiplySpan = void (*)(const PairTile&, float*);

constexpr MultiplySpan kMultiplySpan[kTokenBlock + 1] = {
    nullptr, multiply_span<1>, multiply_span<2>, multiply_span<3>, multiply_span<4>, multiply_span<5>, multiply_span<6>,
};

// Products of bf16 on tile registers.
struct PairDot {
  template <int Sums, int X, int Codes, typename Tiles>
  static MPQ_INLINE void add(Tiles& tiles) {
    tiles.template dot_pairs<Sums, X, Codes>();
  }
};

// sums[tokens][64] += x[tokens] @ the span, for 16 tokens or more. The last 16 may begin among those already done,
// which are not added again.
template <typename Tiles>
void multiply_span_tiles(ItemTiles<Tiles>& item, const PairTile& span, int64_t tokens, float* sums) {
  item.shape(span.words % kStepWords);
  for (int64_t done = 0; done < tokens; done += Tiles::kTokens) {
    const int64_t first = done + Tiles::kTokens <= tokens ? done : tokens - Tiles::kTokens;
    alignas(64) uint32_t dots[Tiles::kTokens * 64];
    tile_dots<PairDot>(item.tiles, span.tile, span.words, span.x + first * span.stride, span.stride, dots);
    const auto add_sums = [&](auto min) __attribute__((always_inline)) {
      for (int v = 0; v < kTileVectors; ++v) {
        const F zeros = load(span.params.zeros + kLanes * v), scales = load(span.params.scales + kLanes * v);
        for (int64_t m = done; m < first + Tiles::kTokens; ++m) {
          float* out = sums + 64 * m + kLanes * v;
          const F dot = (F)load_i(dots + 64 * (m - first) + kLanes * v);
          store(out, add_group<min.value>(load(out), dot, set1(span.x_sums[m]), scales, zeros));
        }
      }
    };
    span.params.min ? add_sums(Index<1>{}) : add_sums(Index<0>{});
  }
}

// Products at the ends of both ranges, with and without a tail, compared with plain C++: whole numbers, so that fp32
// has no choice.
template <typename Tiles>
bool tiles_multiply_pairs() {
  constexpr int kWords = 2 * kStepWords;
  alignas(64) uint16_t tile[kWords][64][2];
  alignas(64) uint16_t x[16][2 * kWords];
  alignas(64) float dots[16 * 64];
  int codes[2 * kWords][64], values[16][2 * kWords];
  const auto to_bf16 = [](int value) {
    return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, static_cast<float>(value)) >> 16);
  };
  for (int k = 0; k < 2 * kWords; ++k) {
    for (int n = 0; n < 64; ++n) {
      codes[k][n] = n == 0 ? 255 : (7 * k + 13 * n) % 256;
      tile[k / 2][n][k % 2] = to_bf16(codes[k][n]);
    }
    for (int m = 0; m < 16; ++m) {
      values[m][k] = m == 0 ? 127 : m == 1 ? -127 : (5 * k + 29 * m) % 255 - 127;
      x[m][k] = to_bf16(values[m][k]);
    }
  }
  for (int64_t words = kStepWords; words <= kWords; words += kStepWords / 2) {
    ItemTiles<Tiles> item;
    item.shape(words % kStepWords);
    tile_dots<PairDot>(item.tiles, reinterpret_cast<const uint32_t*>(tile), words, reinterpret_cast<const uint32_t*>(x),
                       kWords, reinterpret_cast<uint32_t*>(dots));
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 64; ++n) {
        int sum = 0;
        for (int64_t k = 0; k < 2 * words; ++k) sum += values[m][k] * codes[k][n];
        if (dots[64 * m + n] != static_cast<float>(sum)) return false;
      }
    }
  }
  return true;
}

// out[m] = the sum of x over the chunks [begin, end), for each token.
inline void sum_span(const float* sums, int64_t begin, int64_t end, int64_t tokens, float* out) {
  for (int64_t m = 0; m < tokens; m += kLanes) {
    F sum = load(sums + begin * kTokenChunk + m);
    for (int64_t chunk = begin + 1; chunk < end; ++chunk) sum = add(sum, load(sums + chunk * kTokenChunk + m));
    store(out + m, sum);
  }
}

// Asks for the x of the next span, for which the hardware does not look: 48 tokens 92 and 80 us each, 192 tokens 79 and
// 77 us, without and with, one thread of an AMD EPYC (Zen 5), 4096 x 4096, 4 bits, groups of 64.
MPQ_INLINE void prefetch_next_span(const uint32_t* x, int64_t words, int64_t tokens, int64_t stride) {
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t w = words; w < 2 * words; w += 16) __builtin_prefetch(x + m * stride + w, 0, 2);
  }
}

// sums[tokens][64] += W[row tile of this segment] @ x.
template <typename Tiles>
void tile_pairs(const Segment& segment, DType scale_dtype, int64_t row_tile, const Tokens& x, int64_t tokens,
                float* sums) {
  alignas(64) uint32_t tile[kSpanChunks * 512];
  const Stripe stripe = stripe_of(segment, row_tile);
  alignas(64) float x_sums[kTokenChunk];
  const Tokens columns = at_column(x, segment.k0);
  ItemTiles<Tiles> item;
  const int64_t rounds = ceil_div(tokens, kTokenBlock);  // of equal size, as nearly as can be
  for_each_span(segment, scale_dtype, row_tile, [&](int64_t begin, int64_t end, const GroupParams& params) {
    kUnpackSpan[segment.bits](stripe, begin, end, tile);
    sum_span(columns.sums, begin, end, tokens, x_sums);
    if constexpr (Tiles::kTokens > 0) {
      if (tokens >= Tiles::kTokens) {
        const PairTile span{tile, 8 * (end - begin), params, columns.pairs + 8 * begin, x.stride / 2, x_sums};
        return multiply_span_tiles(item, span, tokens, sums);
      }
    }
    for (int64_t r = 0; r < rounds; ++r) {
      const int64_t first = tokens * r / rounds;
      const int64_t count = tokens * (r + 1) / rounds - first;
      const uint32_t* words = columns.pairs + first * (x.stride / 2) + 8 * begin;
      prefetch_next_span(words, 8 * (end - begin), count, x.stride / 2);
      kMultiplySpan[count]({tile, 8 * (end - begin), params, words, x.stride / 2, x_sums + first}, sums + 64 * first);
    }
  });
}

template <typename Tiles>
constexpr Products kPairProducts =
    products_of<PairMath>(Tiles::kTokens > 0 ? Tiles::kTokens : kTokenBlock, tile_pairs<Tiles>);

}  // namespace
}  // namespace mpq::cpu

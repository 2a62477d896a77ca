// Decode, M = 1..4 tokens: codes are multiplied as they come out of the words, without a dequantized copy.
//
//   y[n] = sum over groups of scale * (sum code * x  -  zero * sum x)
//          kind min:          scale * sum code * x  +  zero * sum x
//
// All sums are kept per lane until the end, the sum of x included: for a one-hot x the one lane that is not zero then
// computes fl(fl(code - zero) * scale), the very bits that dequantize() returns. Scale and zero come last, to a sum of
// codes that is exact there, whatever the number of pieces that a Math takes codes in.
//
// A Math has the products: Math::accumulate<Bits, M>(stripe, x, begin, end, g0, acc[G][2][M]) adds codes * x over the
// chunks [begin, end) to the lanes (q, t), Math::kPrefetch<Bits> tells whether words are asked for ahead, and
// Math::kDecode up to how many tokens it is worth it.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/inline.h"
#include "cpu/kernels.h"
#include "cpu/shared/codes.inl"
#include "cpu/shared/convert.inl"
#include "cpu/shared/prefetch.inl"
#include "cpu/simd/simd.h"

namespace mpq::cpu {
namespace {

constexpr int64_t kSpanChunks = 8;  // long groups are cut so that the words of a span stay in the first-level cache

// Sum of a token's x over chunks, in the lanes where accumulate() puts the products.
MPQ_INLINE F sum_x(const float* chunks, int64_t begin, int64_t end) {
  F sum = zeros_f();
  for (int64_t i = 16 * begin; i < 16 * end; i += kLanes) sum = add(sum, load(chunks + i));
  float by_q[4];
  fold(sum, by_q);
  return lane_sums(by_q);
}

// totals[m][2 g + h] += the weights times x over a span of chunks inside one group.
//
// Not inlined: GCC would hoist the loads of scales and zeros out of the loop over spans and spill all of them.
template <class Math, int Bits, int M>
__attribute__((noinline)) void add_span(const Stripe& stripe, const Tokens& x, int64_t begin, int64_t end,
                                        const GroupParams& params, F (&totals)[M][16]) {
  constexpr int G = kRowGroups[M];
  F xsum[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) xsum[m] = sum_x(x.chunks + m * x.stride, begin, end);
  for (int g0 = 0; g0 < 8; g0 += G) {
    F acc[G][2][M];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * G; ++i) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[i >> 1][i & 1][m] = zeros_f();
    }
    Math::template accumulate<Bits, M>(stripe, x, begin, end, g0, acc);
    const auto add_sums = [&](auto min) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int i = 0; i < 2 * G; ++i) {
        const F zero = spread_t(params.zeros + 8 * g0 + 4 * i);
        const F scale = spread_t(params.scales + 8 * g0 + 4 * i);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          F& total = totals[m][2 * g0 + i];
          total = add_group<min.value>(total, acc[i >> 1][i & 1][m], xsum[m], scale, zero);
        }
      }
    };
    params.min ? add_sums(Index<1>{}) : add_sums(Index<0>{});
  }
}

// Every group starts on a chunk of 16 columns and ends on one, or at the end of the segment.
MPQ_INLINE bool groups_are_chunks(const Segment& segment) {
  return segment.group_size % 16 == 0 || segment.group_size == segment.k1 - segment.k0;
}

// body(begin, end, params) for the spans of chunks of a segment, each inside one group.
template <typename Body>
MPQ_INLINE void for_each_span(const Segment& segment, DType scale_dtype, int64_t row_tile, Body body) {
  const int64_t group_chunks = ceil_div(segment.group_size, 16);
  const int64_t groups = (segment.k1 - segment.k0) / segment.group_size;
  GroupParams params;
  for (int64_t group = 0; group < groups; ++group) {
    load_group(segment, scale_dtype, row_tile, group, params);
    const int64_t last = (group + 1) * group_chunks;
    for (int64_t begin = group * group_chunks; begin < last; begin += kSpanChunks) {
      body(begin, begin + kSpanChunks < last ? begin + kSpanChunks : last, params);
    }
  }
}

MPQ_INLINE Tokens at_column(const Tokens& x, int64_t column) {
  return {x.chunks + column, x.pairs ? x.pairs + column / 2 : nullptr,
          x.sums ? x.sums + column / 16 * kTokenChunk : nullptr, x.stride};
}

// sums[m * 64 + position] += W[row tile of this segment] @ x, for M tokens.
template <class Math, int Bits, int M>
void decode_segment(const Segment& segment, DType scale_dtype, int64_t row_tile, const Tokens& x, float* sums) {
  const Stripe stripe = stripe_of(segment, row_tile);
  const Tokens columns = at_column(x, segment.k0);
  F totals[M][16];
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 16; ++i) totals[m][i] = zeros_f();
  }
  for_each_span(segment, scale_dtype, row_tile, [&](int64_t begin, int64_t end, const GroupParams& params) {
    if constexpr (Math::template kPrefetch<Bits>) prefetch_words<Bits>(stripe, begin, end - begin);
    add_span<Math, Bits, M>(stripe, columns, begin, end, params, totals);
  });
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 16; ++i) {
      float rows[4];
      fold(totals[m][i], rows);
      for (int t = 0; t < 4; ++t) sums[m * 64 + 4 * i + t] += rows[t];
    }
  }
}

template <class Math, int Bits, int M>
constexpr DecodeSegment decode_or_none() {
  if constexpr (M <= Math::kDecode) return decode_segment<Math, Bits, M>;
  return nullptr;
}

template <class Math, int Bits>
constexpr void set_decode(Products& out) {
  out.decode[Bits][1] = decode_or_none<Math, Bits, 1>();
  out.decode[Bits][2] = decode_or_none<Math, Bits, 2>();
  out.decode[Bits][3] = decode_or_none<Math, Bits, 3>();
  out.decode[Bits][4] = decode_or_none<Math, Bits, 4>();
}

template <class Math>
constexpr Products products_of(int64_t pass_tokens, TileSegment tile) {
  static_assert(Math::kDecode <= kDecodeTokens && kDecodeTokens == 4);
  Products out{Math::kDecode, pass_tokens, {}, tile};
  set_decode<Math, 1>(out);
  set_decode<Math, 2>(out);
  set_decode<Math, 3>(out);
  set_decode<Math, 4>(out);
  set_decode<Math, 5>(out);
  set_decode<Math, 6>(out);
  set_decode<Math, 7>(out);
  set_decode<Math, 8>(out);
  return out;
}

// body(chunk, Index<C>) for the chunks [begin, end), C = chunk % 4 where
// chunks share their words.
template <int Bits, typename Body>
MPQ_INLINE void for_each_chunk(int64_t begin, int64_t end, Body body) {
  if constexpr (chunks_have_words<Bits>()) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk, Index<0>{});
    return;
  }
  for (int64_t tile = begin / 4; 4 * tile < end; ++tile) {
    for_each_of_4([&](auto c) __attribute__((always_inline)) {
      const int64_t chunk = 4 * tile + c.value;
      if (chunk >= begin && chunk < end) body(chunk, c);
    });
  }
}

}  // namespace
}  // namespace mpq::cpu

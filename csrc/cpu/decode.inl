// Decode, M = 1..4 tokens: codes are multiplied as they come out of the words, without a dequantized copy.
//
//   y[n] = sum over groups of scale * (sum code * x  -  zero * sum x)
//
// All sums are kept per lane until the end, the sum of x included: for a one-hot x the one lane that is not zero then
// computes fl(fl(code - zero) * scale), the very bits that dequantize() returns.

namespace mpq::cpu {
namespace {

// Where the words are in planes of which one has 4 bits. Best times of one thread, 1024 x 4096 from memory, AMD EPYC,
// without and with: 5 bits 162 and 172 us, 6 bits 166 and 169, 7 bits 361 and 230; medians 394 and 196, 406 and 265,
// 522 and 296. The other widths lost as much as they won.
template <int Bits>
constexpr bool kPrefetch = Bits > 4 && kPlaneCount[Bits] > 1;

constexpr int64_t kSpanChunks = 8;  // long groups are cut so that the words of a span stay in the first-level cache

// Token m's x: chunks[m * stride + 16 * chunk + 4 * j + q], fp32, zero beyond the true columns.
struct Tokens {
  const float* chunks;
  int64_t stride;
};

// acc[g - g0][h][m] += codes * x of one chunk, the C-th of its supertile.
template <int Bits, int C, int M, int G>
MPQ_INLINE void accumulate_chunk(const Stripe& stripe, int64_t chunk, const Tokens& x, int g0, F (&acc)[G][2][M]) {
#pragma GCC unroll 1
  for (int part = 0; part < 16 / kLanes; ++part) {
    F xs[4][M];
    for_each_of_4([&](auto j) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) xs[j.value][m] = spread_x<j.value>(x.chunks + 16 * chunk + m * x.stride, part);
    });
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      I codes[2];
      load_codes<Bits, C>(stripe, chunk, g0 + g, part, codes);
      for_each_of_4([&](auto j) __attribute__((always_inline)) {
        const F top = code_floats<Bits, 0, j.value>(codes[0]);
        const F bottom = code_floats<Bits, 1, j.value>(codes[1]);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          acc[g][0][m] = fma(top, xs[j.value][m], acc[g][0][m]);
          acc[g][1][m] = fma(bottom, xs[j.value][m], acc[g][1][m]);
        }
      });
    }
  }
}

// acc += codes * x over the chunks [begin, end).
template <int Bits, int M, int G>
MPQ_INLINE void accumulate(const Stripe& stripe, const Tokens& x, int64_t begin, int64_t end, int g0,
                           F (&acc)[G][2][M]) {
  if constexpr (chunks_have_words<Bits>()) {
    for (int64_t chunk = begin; chunk < end; ++chunk) accumulate_chunk<Bits, 0>(stripe, chunk, x, g0, acc);
    return;
  }
  for (int64_t tile = begin / 4; 4 * tile < end; ++tile) {
    for_each_of_4([&](auto c) __attribute__((always_inline)) {
      const int64_t chunk = 4 * tile + c.value;
      if (chunk < begin || chunk >= end) return;
      accumulate_chunk<Bits, c.value>(stripe, chunk, x, g0, acc);
    });
  }
}

// Sum of a token's x over chunks, in the lanes where accumulate() puts the products.
MPQ_INLINE F sum_x(const float* chunks, int64_t begin, int64_t end) {
  F sum = zeros_f();
  for (int64_t i = 16 * begin; i < 16 * end; i += kLanes) sum = add(sum, load(chunks + i));
  float by_q[4];
  fold(sum, by_q);
  return lane_sums(by_q);
}

// totals[m][2 g + h] += scale * (codes * x - zero * sum x) over a span of chunks inside one group.
//
// Not inlined: GCC would hoist the loads of scales and zeros out of the loop over spans and spill all of them.
template <int Bits, int M>
__attribute__((noinline)) void add_span(const Stripe& stripe, const Tokens& x, int64_t begin, int64_t end,
                                        const GroupParams& params, F (&totals)[M][16]) {
  constexpr int G = kRowGroups[M];
  F xsum[M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) xsum[m] = sub(zeros_f(), sum_x(x.chunks + m * x.stride, begin, end));
  for (int g0 = 0; g0 < 8; g0 += G) {
    F acc[G][2][M];
#pragma GCC unroll 16
    for (int i = 0; i < 2 * G; ++i) {
      const F zero = spread_t(params.zeros + 8 * g0 + 4 * i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[i >> 1][i & 1][m] = mul(zero, xsum[m]);
    }
    accumulate<Bits, M, G>(stripe, x, begin, end, g0, acc);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * G; ++i) {
      const F scale = spread_t(params.scales + 8 * g0 + 4 * i);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) totals[m][2 * g0 + i] = fma(scale, acc[i >> 1][i & 1][m], totals[m][2 * g0 + i]);
    }
  }
}

// Every group starts on a chunk of 16 columns and ends on one, or at the end of the segment.
MPQ_INLINE bool groups_are_chunks(const Segment& segment) {
  return segment.group_size % 16 == 0 || segment.group_size == segment.k1 - segment.k0;
}

// sums[m * 64 + position] += W[row tile of this segment] @ x, for M tokens.
template <int Bits, int M>
void decode_segment(const Segment& segment, DType scale_dtype, int64_t row_tile, const Tokens& x, float* sums) {
  const Stripe stripe = stripe_of(segment, row_tile);
  const Tokens columns{x.chunks + segment.k0, x.stride};
  const int64_t group_chunks = ceil_div(segment.group_size, 16);
  const int64_t groups = (segment.k1 - segment.k0) / segment.group_size;
  F totals[M][16];
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 16; ++i) totals[m][i] = zeros_f();
  }
  GroupParams params;
  for (int64_t group = 0; group < groups; ++group) {
    load_group(segment, scale_dtype, row_tile, group, params);
    const int64_t last = (group + 1) * group_chunks;
    for (int64_t begin = group * group_chunks; begin < last; begin += kSpanChunks) {
      const int64_t end = begin + kSpanChunks < last ? begin + kSpanChunks : last;
      if constexpr (kPrefetch<Bits>) prefetch_words<Bits>(stripe, begin, end - begin);
      add_span<Bits, M>(stripe, columns, begin, end, params, totals);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int i = 0; i < 16; ++i) {
      float rows[4];
      fold(totals[m][i], rows);
      for (int t = 0; t < 4; ++t) sums[m * 64 + 4 * i + t] += rows[t];
    }
  }
}

using DecodeSegment = void (*)(const Segment&, DType, int64_t, const Tokens&, float*);

constexpr DecodeSegment kDecodeSegment[9][5] = {
    {},
    {nullptr, decode_segment<1, 1>, decode_segment<1, 2>, decode_segment<1, 3>, decode_segment<1, 4>},
    {nullptr, decode_segment<2, 1>, decode_segment<2, 2>, decode_segment<2, 3>, decode_segment<2, 4>},
    {nullptr, decode_segment<3, 1>, decode_segment<3, 2>, decode_segment<3, 3>, decode_segment<3, 4>},
    {nullptr, decode_segment<4, 1>, decode_segment<4, 2>, decode_segment<4, 3>, decode_segment<4, 4>},
    {nullptr, decode_segment<5, 1>, decode_segment<5, 2>, decode_segment<5, 3>, decode_segment<5, 4>},
    {nullptr, decode_segment<6, 1>, decode_segment<6, 2>, decode_segment<6, 3>, decode_segment<6, 4>},
    {nullptr, decode_segment<7, 1>, decode_segment<7, 2>, decode_segment<7, 3>, decode_segment<7, 4>},
    {nullptr, decode_segment<8, 1>, decode_segment<8, 2>, decode_segment<8, 3>, decode_segment<8, 4>},
};

}  // namespace
}  // namespace mpq::cpu

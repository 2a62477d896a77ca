// Decode by fused multiply-adds of codes as fp32.
#pragma once

#include <cstdint>

#include "cpu/exact/decode.inl"
#include "cpu/inline.h"
#include "cpu/kernels.h"
#include "cpu/shared/codes.inl"
#include "cpu/simd/simd.h"
#include "generated/layout.h"

namespace mpq::cpu {
namespace {

// acc[g - g0][h][m] += codes * x of one chunk, the C-th of its supertile.
template <int Bits, int C, int M, int G>
MPQ_INLINE void multiply_chunk(const Stripe& stripe, int64_t chunk, const Tokens& x, int g0, F (&acc)[G][2][M]) {
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

struct FloatMath {
  static constexpr int64_t kDecode = kDecodeTokens;

  // Where the words are in planes of which one has 4 bits. Best times of one thread, 1024 x 4096 from memory, AMD EPYC,
  // without and with: 5 bits 162 and 172 us, 6 bits 166 and 169, 7 bits 361 and 230; medians 394 and 196, 406 and 265,
  // 522 and 296. The other widths lost as much as they won.
  template <int Bits>
  static constexpr bool kPrefetch = Bits > 4 && kPlaneCount[Bits] > 1;

  template <int Bits, int M, int G>
  static MPQ_INLINE void accumulate(const Stripe& stripe, const Tokens& x, int64_t begin, int64_t end, int g0,
                                    F (&acc)[G][2][M]) {
    for_each_chunk<Bits>(begin, end, [&](int64_t chunk, auto c) __attribute__((always_inline)) {
      multiply_chunk<Bits, c.value>(stripe, chunk, x, g0, acc);
    });
  }
};

}  // namespace
}  // namespace mpq::cpu

// Decode by dot products of pairs of bf16 (AVX512_BF16), for x in bf16: two products in one lane, and 32 codes a
// lookup.
//
// A code is a whole number of at most 8 bits, so it is exact in bf16, and so is every product in fp32: each addition is
// rounded as in any other fp32 sum. A lookup has 5 bits for its index; wider codes are added up from two pieces, which
// lie in planes of their own: 2^(Bits - 4) * (plane of 4 bits) + (a code of Bits - 4 bits). The instruction takes
// subnormal x for 0 and flushes subnormal sums: a caller brings no x that is smaller than kSmallestPaired. The vectors
// are those of AVX-512.
#pragma once

#include <cstdint>

#include "cpu/exact/decode.inl"
#include "cpu/inline.h"
#include "cpu/kernels.h"
#include "cpu/shared/codes.inl"
#include "cpu/simd/simd.h"

namespace mpq::cpu {
namespace {

// bf16 of Scale * (the Bits bits of i from bit Shift on), for every index i of 5 bits.
template <int Bits, int Shift, int Scale>
struct PairTable {
  alignas(64) uint16_t values[32];
  constexpr PairTable() : values{} {
    for (int i = 0; i < 32; ++i) {
      const float value = static_cast<float>(Scale * (i >> Shift & ((1 << Bits) - 1)));
      values[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16);
    }
  }
};

template <int Bits, int Shift, int Scale>
constexpr PairTable<Bits, Shift, Scale> kPairTable;

// The fields of Bits bits at bit Shift of both halves of every lane, times Scale, as bf16. Where both row halves fit
// into 5 bits, their tables differ and they share one shift.
template <int Bits, int Shift, int Scale>
MPQ_INLINE I to_pairs(I v) {
  constexpr int r = Shift % 8 + Bits <= 5 ? Shift % 8 : 0;
  const I table = _mm512_load_si512(kPairTable<Bits, r, Scale>.values);
  return _mm512_permutexvar_epi16(shift<r - Shift>(v), table);
}

// acc + a * b of both halves of every lane.
MPQ_INLINE F dot_pairs(F acc, I a, I b) {
  // In assembly, because GCC 12 copies the accumulator of the intrinsic before and after.
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

// x of columns 8 J + 2 q, 8 J + 2 q + 1 of a chunk in every lane (q, t).
template <int J>
MPQ_INLINE I spread_pairs(const uint32_t* chunk) {
  const I index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(chunk + 4 * J));
  return _mm512_permutexvar_epi32(index, _mm512_castsi128_si512(words));
}

// acc[g - g0][h][m] += Scale * codes * x of one chunk, the C-th of its supertile. Byte j of a merged word is at column
// 8 (j & 1) + 2 q + (j >> 1): bytes 0 and 2 make one pair, 1 and 3 the other.
template <int Bits, int C, int Scale, int M, int G>
MPQ_INLINE void multiply_pairs(const Stripe& stripe, int64_t chunk, const Tokens& x, int g0, F (&acc)[G][2][M]) {
  I xs[2][M];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const uint32_t* pairs = x.pairs + m * (x.stride / 2) + 8 * chunk;
    xs[0][m] = spread_pairs<0>(pairs);
    xs[1][m] = spread_pairs<1>(pairs);
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    I codes[2];
    load_codes<Bits, C>(stripe, chunk, g0 + g, 0, codes);
    const I top[2] = {to_pairs<Bits, field_start<Bits, 0>(), Scale>(codes[0]),
                      to_pairs<Bits, 8 + field_start<Bits, 0>(), Scale>(codes[0])};
    const I bottom[2] = {to_pairs<Bits, field_start<Bits, 1>(), Scale>(codes[1]),
                         to_pairs<Bits, 8 + field_start<Bits, 1>(), Scale>(codes[1])};
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        acc[g][0][m] = dot_pairs(acc[g][0][m], top[j], xs[j][m]);
        acc[g][1][m] = dot_pairs(acc[g][1][m], bottom[j], xs[j][m]);
      }
    }
  }
}

struct PairMath {
  static constexpr int64_t kDecode = kPairedDecodeTokens;

  // Best times of two threads, 4096 x 4096 from memory, AMD EPYC, without and with: 1 bit 114 and 104 us, 5 bits 350
  // and 330, 7 bits 359 and 479; of one thread: 1 bit 214 and 185, 2 bits 241 and 211, 5 bits 592 and 366, 7 bits 482
  // and 633. The other widths lost as much as they won.
  template <int Bits>
  static constexpr bool kPrefetch = Bits <= 2 || Bits == 5;

  template <int Bits, int M, int G>
  static MPQ_INLINE void accumulate(const Stripe& stripe, const Tokens& x, int64_t begin, int64_t end, int g0,
                                    F (&acc)[G][2][M]) {
    if constexpr (Bits > 5) {
      const Stripe low{{stripe.planes[1], stripe.planes[2], nullptr}};
      add_piece<4, 1 << (Bits - 4)>(stripe, x, begin, end, g0, acc);
      add_piece<Bits - 4, 1>(low, x, begin, end, g0, acc);
    } else {
      add_piece<Bits, 1>(stripe, x, begin, end, g0, acc);
    }
  }

  template <int Bits, int Scale, int M, int G>
  static MPQ_INLINE void add_piece(const Stripe& stripe, const Tokens& x, int64_t begin, int64_t end, int g0,
                                   F (&acc)[G][2][M]) {
    for_each_chunk<Bits>(begin, end, [&](int64_t chunk, auto c) __attribute__((always_inline)) {
      multiply_pairs<Bits, c.value, Scale>(stripe, chunk, x, g0, acc);
    });
  }
};

}  // namespace
}  // namespace mpq::cpu

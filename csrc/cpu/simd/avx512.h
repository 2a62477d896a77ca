// The vector vocabulary of the kernels for AVX-512: 16 lanes, lane = 4 q + t.
#pragma once

#if !defined(__clang__)
// GCC before 13 takes the deliberately undefined operands in its own AVX-512 header for uninitialized variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "cpu/inline.h"

namespace mpq::cpu {
namespace {

using F = __m512;
using I = __m512i;
constexpr int kLanes = 16;
constexpr int kRowGroups[5] = {0, 8, 4, 2, 1};  // g values whose accumulators fit in registers, for M = 1..4
constexpr int kTileVectors = 4;                 // vectors of a row of the fp32 tile that one pass multiplies

// Widths whose codes become floats by a table lookup that ignores the bits above the field; the others need clean
// bytes.
constexpr bool decodes_dirty(int bits) { return bits <= 5; }

MPQ_INLINE F zeros_f() { return _mm512_setzero_ps(); }
MPQ_INLINE F set1(float v) { return _mm512_set1_ps(v); }
MPQ_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
MPQ_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
MPQ_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
MPQ_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
MPQ_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
MPQ_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
MPQ_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b

// p[t] in every lane (q, t).
MPQ_INLINE F spread_t(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

// p[q] in every lane (q, t).
MPQ_INLINE F spread_q(const float* p) {
  const I index = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

// x of byte J for the lanes of a part: chunk is x[16] in the order [J][q].
template <int J>
MPQ_INLINE F spread_x(const float* chunk, int /*part*/) {
  return spread_q(chunk + 4 * J);
}

// Sum of the lanes of equal position inside 4: out[i] = v[i] + v[4 + i] + v[8 + i] + v[12 + i].
MPQ_INLINE void fold(F v, float* out) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// xsum[q] for the lanes of an accumulator.
MPQ_INLINE F lane_sums(const float* xsum) { return spread_q(xsum); }

// The 4-lane blocks of 4 vectors: v[i], block q, comes to v[q], block i.
MPQ_INLINE void transpose4(F* v) {
  const F a = _mm512_shuffle_f32x4(v[0], v[1], 0x44);
  const F b = _mm512_shuffle_f32x4(v[2], v[3], 0x44);
  const F c = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
  const F d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  v[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
  v[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  v[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

template <int Left>
MPQ_INLINE I shift(I v) {
  if constexpr (Left > 0) return _mm512_slli_epi32(v, Left);
  if constexpr (Left < 0) return _mm512_srli_epi32(v, -Left);
  return v;
}

MPQ_INLINE I keep(I v, uint32_t mask) { return _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(mask))); }

// field where mask is set, low elsewhere.
MPQ_INLINE I select(I low, I field, uint32_t mask) {
  return _mm512_ternarylogic_epi32(field, low, _mm512_set1_epi32(static_cast<int>(mask)), 0xe4);
}

// low | (field & mask)
MPQ_INLINE I insert(I low, I field, uint32_t mask) {
  return _mm512_ternarylogic_epi32(low, field, _mm512_set1_epi32(static_cast<int>(mask)), 0xf8);
}

// The words of lanes (q, t) of chunk C of a supertile; words points at the 16 words of row group g.
MPQ_INLINE I load_plane4(const uint32_t* words, int /*part*/) { return _mm512_loadu_si512(words); }

template <int C>
MPQ_INLINE I load_plane2(const uint32_t* words, int /*part*/) {
  const I lanes = _mm512_shuffle_epi32(_mm512_loadu_si512(words), static_cast<_MM_PERM_ENUM>(C & 1 ? 0xfa : 0x50));
  return _mm512_srlv_epi32(lanes, _mm512_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4));
}

template <int C>
MPQ_INLINE I load_plane1(const uint32_t* words, int /*part*/) {
  const I lanes = _mm512_shuffle_epi32(_mm512_loadu_si512(words), static_cast<_MM_PERM_ENUM>(C * 0x55));
  return _mm512_srlv_epi32(lanes, _mm512_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6, 0, 4, 2, 6, 0, 4, 2, 6));
}

// The field of Bits bits at bit Shift of every lane, as float. The lookup reads 4 bits: where both row halves fit into
// them, their tables differ and they share one shift.
template <int Bits, int Shift>
MPQ_INLINE F to_float(I v) {
  if constexpr (Bits <= 4) {
    constexpr int m = (1 << Bits) - 1;
    constexpr int r = Shift % 8 + Bits <= 4 ? Shift % 8 : 0;
    const F table = _mm512_setr_ps(0, 1 >> r & m, 2 >> r & m, 3 >> r & m, 4 >> r & m, 5 >> r & m, 6 >> r & m,
                                   7 >> r & m, 8 >> r & m, 9 >> r & m, 10 >> r & m, 11 >> r & m, 12 >> r & m,
                                   13 >> r & m, 14 >> r & m, 15 >> r & m);
    return _mm512_permutexvar_ps(shift<r - Shift>(v), table);
  } else if constexpr (Bits == 5) {
    const F low = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const F high = _mm512_setr_ps(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
    return _mm512_permutex2var_ps(low, shift<-Shift>(v), high);
  } else {
    constexpr int j = Shift / 8;
    const __m128i bytes = _mm_setr_epi8(j, -1, -1, -1, 4 + j, -1, -1, -1, 8 + j, -1, -1, -1, 12 + j, -1, -1, -1);
    return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(bytes)));
  }
}

// kLanes values of another dtype, unaligned.
MPQ_INLINE F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
MPQ_INLINE F load_bf16(const void* p) {
  const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
MPQ_INLINE F load_u8(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}

MPQ_INLINE void store_f16(void* p, F v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

MPQ_INLINE void store_bf16(void* p, F v) {
  const I bits = _mm512_castps_si512(v);
  const I top = _mm512_srli_epi32(bits, 16);
  const I odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const I even = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const I rounded = _mm512_mask_or_epi32(even, nan, top, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

// Integers, for int8 products.

#if defined(__AVX512VNNI__)
constexpr bool kDotTakesBytes = true;  // dot() is exact for any bytes; else for codes of 7 bits, and wide ones apart
#else
constexpr bool kDotTakesBytes = false;
#endif
constexpr int kInt8RowGroups[5] = {0, 8, 4, 2, 2};  // as kRowGroups; whole vectors of row positions

MPQ_INLINE I zeros_i() { return _mm512_setzero_si512(); }
MPQ_INLINE I set1_i(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
MPQ_INLINE I load_i(const uint32_t* p) { return _mm512_loadu_si512(p); }
MPQ_INLINE void store_i(uint32_t* p, I v) { _mm512_storeu_si512(p, v); }
MPQ_INLINE F to_f(I v) { return _mm512_cvtepi32_ps(v); }

// acc + the products of four unsigned codes and four signed x in every lane. Wide: codes of 8 bits.
template <bool Wide>
MPQ_INLINE I dot(I acc, I codes, I x) {
#if defined(__AVX512VNNI__)
  // In assembly, because GCC 12 copies the accumulator of the intrinsic before and after.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "vm"(x));
  return acc;
#else
  if constexpr (Wide) {
    const I even = _mm512_madd_epi16(_mm512_and_si512(codes, _mm512_set1_epi16(0xff)),
                                     _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    const I odd = _mm512_madd_epi16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
  }
  return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
#endif
}

// In: acc[i] = (rows 4 i + t, columns q). Out: 16 consecutive row positions, all columns.
MPQ_INLINE I sum_q(const I* acc) {
  const I a = _mm512_add_epi32(_mm512_shuffle_i32x4(acc[0], acc[1], 0x44), _mm512_shuffle_i32x4(acc[0], acc[1], 0xee));
  const I b = _mm512_add_epi32(_mm512_shuffle_i32x4(acc[2], acc[3], 0x44), _mm512_shuffle_i32x4(acc[2], acc[3], 0xee));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

}  // namespace
}  // namespace mpq::cpu

// The vector vocabulary of the kernels for AVX2: 8 lanes, lane = 4 (q & 1) + t; part = q >> 1.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/inline.h"

namespace mpq::cpu {
namespace {

using F = __m256;
using I = __m256i;
constexpr int kLanes = 8;
constexpr int kRowGroups[5] = {0, 4, 2, 1, 1};  // g values whose accumulators fit in registers, for M = 1..4
constexpr int kTileVectors = 2;                 // vectors of a row of the fp32 tile that one pass multiplies

// Widths whose codes become floats by a table lookup that ignores the bits above the field; the others need clean
// bytes.
constexpr bool decodes_dirty(int bits) { return bits <= 3; }

MPQ_INLINE F zeros_f() { return _mm256_setzero_ps(); }
MPQ_INLINE F set1(float v) { return _mm256_set1_ps(v); }
MPQ_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
MPQ_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
MPQ_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
MPQ_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
MPQ_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
MPQ_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }    // a * b + c
MPQ_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b

MPQ_INLINE F join(float low, float high) { return _mm256_blend_ps(_mm256_set1_ps(low), _mm256_set1_ps(high), 0xf0); }

// p[t] in every lane (q, t).
MPQ_INLINE F spread_t(const float* p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)); }

// x of byte J for the lanes of a part: chunk is x[16] in the order [J][q].
template <int J>
MPQ_INLINE F spread_x(const float* chunk, int part) {
  return join(chunk[4 * J + 2 * part], chunk[4 * J + 2 * part + 1]);
}

// Sum of the lanes of equal position inside 4: out[i] = v[i] + v[4 + i].
MPQ_INLINE void fold(F v, float* out) {
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}

// xsum[q] for the lanes of an accumulator, which adds up both parts.
MPQ_INLINE F lane_sums(const float* xsum) { return join(xsum[0] + xsum[2], xsum[1] + xsum[3]); }

// The 4-lane blocks of 2 vectors: v[i], block q, comes to v[q], block i.
MPQ_INLINE void transpose4(F* v) {
  const F even = _mm256_permute2f128_ps(v[0], v[1], 0x20);
  v[1] = _mm256_permute2f128_ps(v[0], v[1], 0x31);
  v[0] = even;
}

template <int Left>
MPQ_INLINE I shift(I v) {
  if constexpr (Left > 0) return _mm256_slli_epi32(v, Left);
  if constexpr (Left < 0) return _mm256_srli_epi32(v, -Left);
  return v;
}

MPQ_INLINE I keep(I v, uint32_t mask) { return _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(mask))); }

// field where mask is set, low elsewhere.
MPQ_INLINE I select(I low, I field, uint32_t mask) {
  const I m = _mm256_set1_epi32(static_cast<int>(mask));
  return _mm256_or_si256(_mm256_and_si256(field, m), _mm256_andnot_si256(m, low));
}

// low | (field & mask)
MPQ_INLINE I insert(I low, I field, uint32_t mask) { return _mm256_or_si256(low, keep(field, mask)); }

MPQ_INLINE I load_words(const uint32_t* words, int part) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8 * part));
}

// The words of lanes (q, t) of chunk C of a supertile; words points at the 16 words of row group g.
MPQ_INLINE I load_plane4(const uint32_t* words, int part) { return load_words(words, part); }

template <int C>
MPQ_INLINE I load_plane2(const uint32_t* words, int part) {
  const I lanes = _mm256_shuffle_epi32(load_words(words, part), C & 1 ? 0xfa : 0x50);
  return _mm256_srlv_epi32(lanes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
}

template <int C>
MPQ_INLINE I load_plane1(const uint32_t* words, int part) {
  const I lanes = _mm256_shuffle_epi32(load_words(words, part), C * 0x55);
  return _mm256_srlv_epi32(lanes, _mm256_setr_epi32(0, 4, 2, 6, 0, 4, 2, 6));
}

// The field of Bits bits at bit Shift of every lane, as float. The lookup reads 3 bits: where both row halves fit into
// them, their tables differ and they share one shift.
template <int Bits, int Shift>
MPQ_INLINE F to_float(I v) {
  if constexpr (Bits <= 3) {
    constexpr int m = (1 << Bits) - 1;
    constexpr int r = Shift % 8 + Bits <= 3 ? Shift % 8 : 0;
    const F table =
        _mm256_setr_ps(0, 1 >> r & m, 2 >> r & m, 3 >> r & m, 4 >> r & m, 5 >> r & m, 6 >> r & m, 7 >> r & m);
    return _mm256_permutevar8x32_ps(table, shift<r - Shift>(v));
  } else {
    constexpr int j = Shift / 8;
    const __m128i bytes = _mm_setr_epi8(j, -1, -1, -1, 4 + j, -1, -1, -1, 8 + j, -1, -1, -1, 12 + j, -1, -1, -1);
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(bytes)));
  }
}

// kLanes values of another dtype, unaligned.
MPQ_INLINE F load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
MPQ_INLINE F load_bf16(const void* p) {
  const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
MPQ_INLINE F load_u8(const void* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}

MPQ_INLINE void store_f16(void* p, F v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

MPQ_INLINE void store_bf16(void* p, F v) {
  const I bits = _mm256_castps_si256(v);
  const I top = _mm256_srli_epi32(bits, 16);
  const I odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const I even = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const I rounded = _mm256_blendv_epi8(even, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
  const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// Integers, for int8 products.

#if defined(__AVXVNNI__)
constexpr bool kDotTakesBytes = true;  // dot() is exact for any bytes; else for codes of 7 bits, and wide ones apart
#else
constexpr bool kDotTakesBytes = false;
#endif
constexpr int kInt8RowGroups[5] = {0, 4, 2, 1, 1};  // as kRowGroups; whole vectors of row positions

MPQ_INLINE I zeros_i() { return _mm256_setzero_si256(); }
MPQ_INLINE I set1_i(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
MPQ_INLINE I load_i(const uint32_t* p) { return load_words(p, 0); }
MPQ_INLINE void store_i(uint32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
MPQ_INLINE F to_f(I v) { return _mm256_cvtepi32_ps(v); }

// acc + the products of four unsigned codes and four signed x in every lane. Wide: codes of 8 bits, of which a sum of
// two products would not fit into 16 bits.
template <bool Wide>
MPQ_INLINE I dot(I acc, I codes, I x) {
#if defined(__AVXVNNI__)
  // In assembly, because GCC 12 copies the accumulator of the intrinsic before and after.
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(codes), "xm"(x));
  return acc;
#else
  if constexpr (Wide) {
    const I even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(0xff)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const I odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
  }
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
#endif
}

// In: acc[i] = (rows 4 i + t, columns q & 1, of both parts). Out: 8 consecutive row positions, all columns.
MPQ_INLINE I sum_q(const I* acc) {
  return _mm256_add_epi32(_mm256_permute2x128_si256(acc[0], acc[1], 0x20),
                          _mm256_permute2x128_si256(acc[0], acc[1], 0x31));
}

}  // namespace
}  // namespace mpq::cpu

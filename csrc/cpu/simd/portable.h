// The vector vocabulary of the kernels for any machine: 4 lanes, lane = t; part = q. Vector extensions of GCC and Clang
// become SSE2 or NEON; nothing here needs more.
#pragma once

#include <cstdint>

#include "cpu/inline.h"

namespace mpq::cpu {
namespace {

using F = float __attribute__((vector_size(16)));
using I = uint32_t __attribute__((vector_size(16)));
using Signed = int32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kRowGroups[5] = {0, 4, 2, 1, 1};  // g values whose accumulators fit in registers, for M = 1..4
constexpr int kTileVectors = 2;                 // vectors of a row of the fp32 tile that one pass multiplies

// Every conversion masks the field, so bits around it do not matter.
constexpr bool decodes_dirty(int /*bits*/) { return true; }

MPQ_INLINE F set1(float v) { return F{v, v, v, v}; }
MPQ_INLINE F zeros_f() { return set1(0.0f); }
MPQ_INLINE F load(const float* p) {
  F v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
MPQ_INLINE void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
MPQ_INLINE F add(F a, F b) { return a + b; }
MPQ_INLINE F sub(F a, F b) { return a - b; }
MPQ_INLINE F mul(F a, F b) { return a * b; }
MPQ_INLINE F fma(F a, F b, F c) { return a * b + c; }  // one or two roundings: both are exact for a one-hot x
MPQ_INLINE F fnma(F a, F b, F c) { return c - a * b; }

// p[t] in every lane.
MPQ_INLINE F spread_t(const float* p) { return load(p); }

// x of byte J for the lanes of a part: chunk is x[16] in the order [J][q].
template <int J>
MPQ_INLINE F spread_x(const float* chunk, int part) {
  return set1(chunk[4 * J + part]);
}

MPQ_INLINE void fold(F v, float* out) { store(out, v); }

// xsum[q] for the lanes of an accumulator, which adds up all q.
MPQ_INLINE F lane_sums(const float* xsum) { return set1((xsum[0] + xsum[1]) + (xsum[2] + xsum[3])); }

MPQ_INLINE void transpose4(F* /*v*/) {}  // one vector, and one block in it

template <int Left>
MPQ_INLINE I shift(I v) {
  if constexpr (Left > 0) return v << Left;
  if constexpr (Left < 0) return v >> -Left;
  return v;
}

MPQ_INLINE I keep(I v, uint32_t mask) { return v & mask; }
MPQ_INLINE I select(I low, I field, uint32_t mask) { return (field & mask) | (low & ~mask); }
MPQ_INLINE I insert(I low, I field, uint32_t mask) { return low | (field & mask); }

MPQ_INLINE uint32_t load_word(const uint32_t* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The words of lanes t of chunk C of a supertile; words points at the 16 words of row group g.
MPQ_INLINE I load_plane4(const uint32_t* words, int part) {
  I v;
  __builtin_memcpy(&v, words + 4 * part, sizeof v);
  return v;
}

template <int C>
MPQ_INLINE I load_plane2(const uint32_t* words, int part) {
  const uint32_t low = load_word(words + 4 * part + 2 * (C & 1));
  const uint32_t high = load_word(words + 4 * part + 2 * (C & 1) + 1);
  return I{low, low >> 4, high, high >> 4};
}

template <int C>
MPQ_INLINE I load_plane1(const uint32_t* words, int part) {
  const uint32_t w = load_word(words + 4 * part + C);
  return I{w, w >> 4, w >> 2, w >> 6};
}

// The field of Bits bits at bit Shift of every lane, as float.
template <int Bits, int Shift>
MPQ_INLINE F to_float(I v) {
  return __builtin_convertvector((Signed)(shift<-Shift>(v) & ((1u << Bits) - 1)), F);
}

MPQ_INLINE float float_of(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

MPQ_INLINE uint32_t bits_of(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return bits;
}

MPQ_INLINE float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  if (rest < 0x400) return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + (112u << 23)));
}

// Round to nearest even, as the two hardware paths do.
MPQ_INLINE uint16_t to_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (rest >> 13 & 0x1ff));
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  if (rest < 0x38800000) {                                              // subnormal: 0.5 has the same unit, 2**-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

MPQ_INLINE uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// kLanes values of another dtype, unaligned.
MPQ_INLINE F load_f16(const void* p) {
  uint16_t v[4];
  __builtin_memcpy(v, p, sizeof v);
  return F{from_f16(v[0]), from_f16(v[1]), from_f16(v[2]), from_f16(v[3])};
}
MPQ_INLINE F load_bf16(const void* p) {
  uint16_t v[4];
  __builtin_memcpy(v, p, sizeof v);
  const I wide{v[0], v[1], v[2], v[3]};
  return (F)(wide << 16);
}
MPQ_INLINE F load_u8(const void* p) {
  const uint8_t* v = static_cast<const uint8_t*>(p);
  return F{float(v[0]), float(v[1]), float(v[2]), float(v[3])};
}

MPQ_INLINE void store_f16(void* p, F v) {
  const uint16_t out[4] = {to_f16(v[0]), to_f16(v[1]), to_f16(v[2]), to_f16(v[3])};
  __builtin_memcpy(p, out, sizeof out);
}
MPQ_INLINE void store_bf16(void* p, F v) {
  const uint16_t out[4] = {to_bf16(v[0]), to_bf16(v[1]), to_bf16(v[2]), to_bf16(v[3])};
  __builtin_memcpy(p, out, sizeof out);
}

// Integers, for int8 products.

constexpr bool kDotTakesBytes = true;
constexpr int kInt8RowGroups[5] = {0, 4, 2, 1, 1};  // as kRowGroups

MPQ_INLINE I zeros_i() { return I{0, 0, 0, 0}; }
MPQ_INLINE I set1_i(uint32_t v) { return I{v, v, v, v}; }
MPQ_INLINE I load_i(const uint32_t* p) { return load_plane4(p, 0); }
MPQ_INLINE void store_i(uint32_t* p, I v) { __builtin_memcpy(p, &v, sizeof v); }
MPQ_INLINE F to_f(I v) { return __builtin_convertvector((Signed)v, F); }

// acc + the products of four unsigned codes and four signed x in every lane. A product fits into 16 bits, a sum of two
// does not.
template <bool Wide>
MPQ_INLINE I dot(I acc, I codes, I x) {
  using Halves = int16_t __attribute__((vector_size(16)));
  const I even = (I)((Halves)(codes & 0x00ff00ffu) * ((Halves)(x << 8) >> 8));
  const I odd = (I)((Halves)(codes >> 8 & 0x00ff00ffu) * ((Halves)x >> 8));
  const Signed low = ((Signed)(even << 16) >> 16) + ((Signed)(odd << 16) >> 16);
  const Signed high = ((Signed)even >> 16) + ((Signed)odd >> 16);
  return acc + (I)(low + high);
}

// An accumulator already holds 4 consecutive row positions of all columns.
MPQ_INLINE I sum_q(const I* acc) { return acc[0]; }

}  // namespace
}  // namespace mpq::cpu

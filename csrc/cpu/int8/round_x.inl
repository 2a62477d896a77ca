// Rounding x to int8, block by block: x is about codes * scale, scale = amax / 127, codes -127..127, ties to even.
//
// Only additions and multiplications of fp32 and integers, each rounded on its own: the same codes on every machine.
// mpq_kernels/format/reference_int8.py states the same in torch.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/inline.h"
#include "cpu/int8/blocks.h"
#include "cpu/shared/convert.inl"
#include "cpu/shared/frame.inl"
#include "cpu/simd/simd.h"

namespace mpq::cpu {
namespace {

using Bytes16 = int8_t __attribute__((vector_size(16)));

constexpr float kLeastAmax = 0x1p-100f;  // a block below it counts as zero: 127 / amax would leave fp32
constexpr float kRound = 12582912.0f;    // 1.5 * 2**23: adding it leaves the nearest integer in the low bits
constexpr uint32_t kRoundBits = 0x4b400000;
constexpr uint32_t kInfinityBits = 0x7f800000;

// The rounded x of some tokens, as prepare_int8 leaves it.
struct Int8Tokens {
  const uint32_t* words;  // [tokens, words_stride]: chunks of a block, kTokenWords or kSpreadWords each
  const float* scales;    // [tokens, blocks_stride]
  const float* sums;      // [tokens, blocks_stride]: of the codes of a block
  int64_t words_stride, blocks_stride;
};

// sums[row..] += the weights of a block times x, for one token and the rows of one vector: with W = (code - zero) *
// scale, that is scale of w * scale of x * (dots - zero * sum of x). One rounding of `sums` in either kind.
MPQ_INLINE void add_dots(const GroupParams& params, int row, F dots, F x_scale, F x_sum, float* sums) {
  const F scale = mul(load(params.scales + row), x_scale), zero = load(params.zeros + row), before = load(sums + row);
  store(sums + row, params.min ? add(before, fma(scale, dots, mul(zero, mul(x_scale, x_sum))))
                               : fma(scale, fnma(zero, x_sum, dots), before));
}

// Largest |value|, as its bits: those of Inf and NaN are the largest of all.
inline uint32_t largest_bits(const float* values, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, values + i, sizeof bits);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Codes of one chunk in the order of the weight's bytes: word q, byte j is column column_of(4 * j + q).
MPQ_INLINE void store_chunk(const int32_t* codes, bool spread, uint32_t* out) {
  int8_t narrow[16];
  for (int i = 0; i < 16; ++i) narrow[i] = static_cast<int8_t>(codes[i]);
  Bytes16 bytes;
  __builtin_memcpy(&bytes, narrow, 16);
  bytes = __builtin_shufflevector(bytes, bytes, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  uint32_t words[4];
  __builtin_memcpy(words, &bytes, 16);
  if (!spread) {
    __builtin_memcpy(out, words, 16);
    return;
  }
  for (int q = 0; q < 4; ++q) {
    const uint32_t four[4] = {words[q], words[q], words[q], words[q]};
    __builtin_memcpy(out + 4 * q, four, 16);
  }
}

// Rounds `chunks` chunks of values, of which those outside the block are zero. A block with NaN or Inf gets the scale
// NaN, which makes all of y's row NaN.
inline void round_block(const float* values, int64_t chunks, bool spread, uint32_t* out, float* scale, float* sum) {
  alignas(64) int32_t codes[kBlockColumns + 16];
  const uint32_t bits = largest_bits(values, 16 * chunks);
  float amax;
  __builtin_memcpy(&amax, &bits, sizeof amax);
  const bool finite = bits < kInfinityBits;
  const float inverse = finite && amax >= kLeastAmax ? 127.0f / amax : 0.0f;
  *scale = finite ? (amax >= kLeastAmax ? amax / 127.0f : 0.0f) : __builtin_nanf("");
  int32_t total = 0;
  for (int64_t i = 0; i < 16 * chunks; ++i) {
    const float shifted = (finite ? values[i] * inverse : 0.0f) + kRound;
    uint32_t raw;
    __builtin_memcpy(&raw, &shifted, sizeof raw);
    codes[i] = static_cast<int32_t>(raw - kRoundBits);
    total += codes[i];
  }
  *sum = static_cast<float>(total);
  const int64_t words = spread ? kSpreadWords : kTokenWords;
  for (int64_t c = 0; c < chunks; ++c) store_chunk(codes + 16 * c, spread, out + words * c);
}

// All blocks of one segment of one token.
inline void round_segment(const LinearArgs& args, const Segment& segment, const char* row, bool spread, uint32_t* out,
                          float* scales, float* sums) {
  const Blocks blocks = blocks_of(segment);
  const int64_t stride = blocks.slots * (spread ? kSpreadWords : kTokenWords);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const Block block = block_at(blocks, b);
    alignas(64) float values[kBlockColumns + 64];
    const int64_t before = block.begin % 16;
    const int64_t width = block.end - block.begin;
    if (before) {
      for (float& value : values) value = 0.0f;
    }
    for (int64_t i = 0; i < width; i += 64) {
      alignas(64) float part[64];
      load_columns(args, row, segment.k0 + block.begin + i, width - i < 64 ? width - i : 64, part);
      __builtin_memcpy(values + before + i, part, sizeof part);
    }
    round_block(values, block.chunks, spread, out + b * stride, scales + b, sums + b);
  }
}

}  // namespace
}  // namespace mpq::cpu

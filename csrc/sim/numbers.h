// Bit patterns of 16-bit floats, exactly as the device converts them: subnormals kept, rounding to nearest, ties to
// even, every NaN written as 0x7fff.
#pragma once

#include <bit>
#include <cstdint>

namespace mpq::sim {

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  // The exponent of fp32 is biased by 112 more; the multiplication is exact and normalises subnormals.
  uint32_t v = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  if ((bits & 0x7c00) == 0x7c00) v = magnitude | 0x7f800000;
  return std::bit_cast<float>(v | sign);
}

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_f16(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v), x = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (x > 0x7f800000) return 0x7fff;
  if (x >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (x < 0x38800000) {
    // Below 2^-14: the unit in the last place of 0.5f is the subnormal step 2^-24, so that the addition rounds.
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(x) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((x + 0xfff + ((x >> 13) & 1) - 0x38000000) >> 13));
}

inline uint16_t float_to_bf16(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace mpq::sim

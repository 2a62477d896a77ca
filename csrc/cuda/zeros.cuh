// Storage kinds (mpq_kernels/format/kinds.py) on devices: which kinds store zeros, and what a weight is.
//
//     kZeroMin      code * scale + zero
//     all others    (code - zero) * scale
#pragma once

#include "device.cuh"
#include "generated/layout.h"

namespace mpq::cuda {

// Zeros of the dtype of the scales; the only other ones that are stored are the bytes of kZeroInt.
MPQ_DEVICE bool zeros_like_scales(int kind) { return kind == kZeroFloat || kind == kZeroMin; }

// The zero point of a kind that stores none.
template <int kBits>
MPQ_DEVICE float fixed_zero(int kind) {
  constexpr float kMiddle = kFixedZero[kZeroNone][kBits];  // constants: devices have no table
  constexpr float kHalf = kFixedZero[kZeroHalf][kBits];
  return kind == kZeroHalf ? kHalf : kMiddle;
}

// Two roundings, and +0 in place of -0.
MPQ_DEVICE float weight_of(float code, float scale, float zero, int kind) {
  if (kind == kZeroMin) return dev::add(dev::fma(code, scale, 0.0f), zero);
  return dev::fma(dev::add(code, -zero), scale, 0.0f);
}

}  // namespace mpq::cuda

// 64 values at a time between fp32 and the dtypes of activations, scales and zeros; any alignment.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/inline.h"
#include "cpu/shared/codes.inl"
#include "cpu/simd/simd.h"
#include "generated/layout.h"

namespace mpq::cpu {
namespace {

MPQ_INLINE int64_t dtype_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

MPQ_INLINE const char* bytes_at(const void* p, int64_t offset) { return static_cast<const char*>(p) + offset; }

inline void to_f32_64(const void* src, DType dtype, float* dst) {
  for (int i = 0; i < 64; i += kLanes) {
    if (dtype == DType::kF32) {
      store(dst + i, load(static_cast<const float*>(src) + i));
    } else if (dtype == DType::kF16) {
      store(dst + i, load_f16(bytes_at(src, 2 * i)));
    } else {
      store(dst + i, load_bf16(bytes_at(src, 2 * i)));
    }
  }
}

// The first `count` of 64 values; the others become 0.
inline void to_f32_partial(const void* src, DType dtype, int64_t count, float* dst) {
  if (count >= 64) return to_f32_64(src, dtype, dst);
  alignas(64) char raw[256] = {};
  __builtin_memcpy(raw, src, static_cast<size_t>(count * dtype_bytes(dtype)));
  to_f32_64(raw, dtype, dst);
}

inline void from_f32_64(const float* src, DType dtype, void* dst) {
  char* out = static_cast<char*>(dst);
  for (int i = 0; i < 64; i += kLanes) {
    if (dtype == DType::kF32) {
      store(static_cast<float*>(dst) + i, load(src + i));
    } else if (dtype == DType::kF16) {
      store_f16(out + 2 * i, load(src + i));
    } else {
      store_bf16(out + 2 * i, load(src + i));
    }
  }
}

// Writes only the first `count` of 64 values.
inline void from_f32_partial(const float* src, DType dtype, int64_t count, void* dst) {
  if (count >= 64) return from_f32_64(src, dtype, dst);
  alignas(64) char raw[256];
  from_f32_64(src, dtype, raw);
  __builtin_memcpy(dst, raw, static_cast<size_t>(count * dtype_bytes(dtype)));
}

// Columns [k, k + count) of a row of K values: `values` are 64 fp32 in packed order, of which `perm` may be a
// permutation.
inline void write_columns(const int32_t* perm, int64_t k, int64_t count, const float* values, DType dtype, char* row) {
  const int64_t width = dtype_bytes(dtype);
  if (!perm) return from_f32_partial(values, dtype, count, row + k * width);
  alignas(64) char raw[256];
  from_f32_64(values, dtype, raw);
  for (int64_t i = 0; i < count; ++i) {
    int32_t column;
    __builtin_memcpy(&column, perm + k + i, sizeof column);
    __builtin_memcpy(row + column * width, raw + i * width, static_cast<size_t>(width));
  }
}

// fp32 scales and zeros of one group, 64 rows of a tile in position order. min: a weight is code * scale + zero, else
// (code - zero) * scale.
struct GroupParams {
  alignas(64) float scales[64];
  alignas(64) float zeros[64];
  bool min;
};

// total + the weights of a group times x, from the sum of codes times x and that of x. For a one-hot x and a total of 0
// these are the two roundings of a weight.
template <bool Min>
MPQ_INLINE F add_group(F total, F dots, F x_sum, F scale, F zero) {
  if constexpr (Min) return fma(zero, x_sum, fma(scale, dots, total));
  return fma(scale, fnma(zero, x_sum, dots), total);
}

// The first block of 64 scales or zeros of a row tile; those of its groups follow each other.
MPQ_INLINE int64_t first_scale(const Segment& segment, int64_t row_tile) {
  return row_tile * ((segment.k1 - segment.k0) / segment.group_size) * 64;
}

inline void load_group(const Segment& segment, DType scale_dtype, int64_t row_tile, int64_t group, GroupParams& out) {
  const int64_t first = first_scale(segment, row_tile) + group * 64;
  const int64_t width = dtype_bytes(scale_dtype);
  to_f32_64(bytes_at(segment.scales, first * width), scale_dtype, out.scales);
  out.min = segment.zero_kind == kZeroMin;
  if (!stores_zeros(segment.zero_kind)) {
    const F fixed = set1(kFixedZero[segment.zero_kind][segment.bits]);
    for (int i = 0; i < 64; i += kLanes) store(out.zeros + i, fixed);
  } else if (segment.zero_kind == kZeroInt) {
    for (int i = 0; i < 64; i += kLanes) store(out.zeros + i, load_u8(bytes_at(segment.zeros, first + i)));
  } else {
    to_f32_64(bytes_at(segment.zeros, first * width), scale_dtype, out.zeros);
  }
}

}  // namespace
}  // namespace mpq::cpu

// What follows from one segment alone, on the host: how its tiles are copied together, what they cost.
#pragma once

#include <cstdint>

#include "generated/layout.h"
#include "include/mpq.h"

namespace mpq::cuda {

constexpr int kScaleBytes[3] = {4, 2, 2};  // by mpq_dtype
constexpr uint32_t kUnitCodeBytes = 4096;  // a unit's codes: two 4-bit tiles, one 8-bit tile

inline int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

inline bool same_band(const mpq_weight& w, int a, int b) {
  return b < w.num_segments && w.segments[a].n0 == w.segments[b].n0;
}

inline bool single_group(const mpq_segment& s) { return s.group_size == s.k1 - s.k0; }

inline bool sub_tile(const mpq_segment& s) { return !single_group(s) && s.group_size % kTileK != 0; }

// Groups that tensor cores take: 16, 32 or a multiple of 64 columns, or the whole segment. Beyond 2^31 tiles times
// tiles of a group (params.h, group_factor) is more than any weight has.
inline bool tensor_core_group(const mpq_segment& s) {
  if (single_group(s) || s.group_size == 16 || s.group_size == 32) return true;
  return s.group_size % kTileK == 0 && (s.k1 - s.k0) / kTileK * (s.group_size / kTileK) < int64_t{1} << 31;
}

// decode.cuh: units of two tiles, where no group of scales ends between them.
inline bool pairs(const mpq_segment& s) { return s.bits <= 4 && (single_group(s) || s.group_size % (2 * kTileK) == 0); }

inline uint32_t group_factor(const mpq_segment& s) {
  if (single_group(s) || s.group_size % kTileK) return 0;
  return uint32_t(ceil_div(int64_t{1} << 31, s.group_size / kTileK));
}

// Tiles of a unit, as a power of two: no more than the codes' bytes allow, and in step with the groups of scales.
inline int log2_unit(const mpq_segment& s, int max_unit) {
  int log2 = 0;
  for (int unit = 2; unit <= max_unit; unit *= 2) {
    const int64_t columns = int64_t{unit} * kTileK;
    const bool fits = uint32_t(unit) * 512 * s.bits <= kUnitCodeBytes;
    const bool whole = s.group_size % kTileK == 0 && (s.group_size % columns == 0 || columns % s.group_size == 0);
    if (!fits || !(whole || single_group(s))) break;
    ++log2;
  }
  return log2;
}

// Tiles, or chunks of a tile, that share scales inside a unit, as a power of two.
inline int log2_flush(const mpq_segment& s, int log2_unit) {
  if (single_group(s)) return log2_unit;
  if (s.group_size % kTileK) return s.group_size / 32;  // 16 -> 0, 32 -> 1
  int log2 = 0;
  while (log2 < log2_unit && s.group_size % (int64_t{kTileK} << (log2 + 1)) == 0) ++log2;
  return log2;
}

// Bytes read for one tile: what the work is balanced by.
inline int64_t tile_cost(const mpq_segment& s, int scale_dtype) {
  const int scale = kScaleBytes[scale_dtype];
  return 512 * s.bits + kTileN * kTileK * (scale + zero_bytes(s.zero, scale)) / s.group_size;
}

}  // namespace mpq::cuda

// Which row groups a block works on, and which tiles of them. Items are numbered in the order in which a block takes
// them; their row groups never decrease.
#pragma once

#include <cstring>

#include "device.cuh"
#include "params.h"

namespace mpq::cuda {

// A structure of 32-bit words from a table in global memory.
template <class T>
MPQ_DEVICE T load_words(const T* from) {
  static_assert(sizeof(T) % 4 == 0);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
  uint32_t copy[sizeof(T) / 4];
  MPQ_UNROLL for (int i = 0; i < int(sizeof(T) / 4); ++i) copy[i] = dev::ld_constant(words + i);
  T to;
  memcpy(&to, copy, sizeof(T));
  return to;
}

MPQ_DEVICE Segment load_segment(const LinearParams& p, int i) {
  return p.segments ? load_words(p.segments + i) : p.inline_segments[i];
}
MPQ_DEVICE Band load_band(const LinearParams& p, int i) {
  return p.bands ? load_words(p.bands + i) : p.inline_bands[i];
}

constexpr uint32_t kNoItem = 0xffffffffu;

struct Extent {
  uint32_t group;
  int first_tile, end_tile;  // along K
};

// A share of the bytes of one weight (params.h): an item is a row group, the first and the last may be parts of one.
struct LinearWork {
  Cut begin, end;
  int k_tiles;

  MPQ_DEVICE uint32_t first() const { return begin.group; }
  MPQ_DEVICE uint32_t after(uint32_t item) const {
    return item + 1 < end.group || (item + 1 == end.group && end.tile > 0) ? item + 1 : kNoItem;
  }
  MPQ_DEVICE Extent extent(uint32_t item) const {
    return {item, item == begin.group ? int(begin.tile) : 0, item == end.group ? int(end.tile) : k_tiles};
  }
};

}  // namespace mpq::cuda

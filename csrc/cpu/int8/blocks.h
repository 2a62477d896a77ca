// Where the rounded x of an int8 product lies. Shared by the kernels and by the size of the workspace; everything in an
// unnamed namespace, see kernels.h.
//
// A *block* is what one scale of x covers: at most 128 consecutive columns of one group of the weight. Its x is stored
// in the chunks of 16 columns that the weight has there, zero outside the block, so that a group may begin and end
// anywhere. Segments with the same columns and groups share their blocks.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"

namespace mpq::cpu {
namespace {

constexpr int64_t kBlockColumns = 128;  // sums of a block stay below 2**23: 255 * 127 * 128, exact in fp32
constexpr int64_t kTokenWords = 4;      // 32-bit words of a chunk of x: word q holds the bytes j = 0..3
constexpr int64_t kSpreadWords = 16;    // the same for decode, every word four times: one for each lane (q, t)

struct Blocks {
  int64_t group_size;
  int64_t columns;    // of the segment
  int64_t per_group;  // blocks of a group
  int64_t count;      // blocks of the segment
  int64_t slots;      // chunks stored for each block: the most that one touches
};

// Columns [begin, end) of the segment; `chunks` of the weight from `chunk` on hold them.
struct Block {
  int64_t begin, end, group, chunk, chunks;
};

static inline Blocks blocks_of(const Segment& segment) {
  Blocks out{segment.group_size, segment.k1 - segment.k0, 0, 0, 0};
  out.per_group = (out.group_size + kBlockColumns - 1) / kBlockColumns;
  out.count = out.columns / out.group_size * out.per_group;
  const int64_t width = out.group_size < kBlockColumns ? out.group_size : kBlockColumns;
  const bool whole = out.group_size % 16 == 0 || out.group_size == out.columns;
  out.slots = whole ? (width + 15) / 16 : (width + 14) / 16 + 1;
  return out;
}

static inline Block block_at(const Blocks& blocks, int64_t index) {
  Block out{};
  out.group = index / blocks.per_group;
  out.begin = out.group * blocks.group_size + index % blocks.per_group * kBlockColumns;
  const int64_t group_end = (out.group + 1) * blocks.group_size;
  out.end = out.begin + kBlockColumns < group_end ? out.begin + kBlockColumns : group_end;
  out.chunk = out.begin / 16;
  out.chunks = (out.end - 1) / 16 + 1 - out.chunk;
  return out;
}

// The first segment whose blocks segment `index` uses: itself, or an earlier one.
static inline int blocks_owner(const Weight& weight, int index) {
  const Segment& s = weight.segments[index];
  for (int i = 0; i < index; ++i) {
    const Segment& other = weight.segments[i];
    if (other.k0 == s.k0 && other.k1 == s.k1 && other.group_size == s.group_size) return i;
  }
  return index;
}

// Where the blocks of a segment begin in what is stored for a token.
struct Place {
  int64_t chunk, block;
};

// Chunks and blocks stored for one token; fills places[num_segments] unless it is null. The chunks are an odd number of
// cache lines, so that the same columns of many tokens fall into all sets of a cache.
static inline Place place_blocks(const Weight& weight, Place* places) {
  Place end{0, 0};
  for (int i = 0; i < weight.num_segments; ++i) {
    const int owner = blocks_owner(weight, i);
    if (owner == i) {
      const Blocks blocks = blocks_of(weight.segments[i]);
      if (places) places[i] = end;
      end.chunk += blocks.count * blocks.slots;
      end.block += blocks.count;
    } else if (places) {
      places[i] = places[owner];
    }
  }
  end.chunk = ((end.chunk + 3) / 4 | 1) * 4;
  return end;
}

}  // namespace
}  // namespace mpq::cpu

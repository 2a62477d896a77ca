// What the host tells a kernel: plain structures, passed by value. Written by work_list.cpp, read by the kernels.
//
// A weight is cut into row bands (segments with equal n0 and n1), a band into row groups of `1 << log2_group_rows` row
// tiles, and the work is the list of all row groups, each of them `k_tiles` long:
//
//     group 0:  |-- segment 0 ----|-- segment 1 --|      cuts[i] = (group, k tile): where block i begins
//     group 1:  |-- segment 0 ----|-- segment 1 --|      and block i - 1 ends, so that all read
//     group 2:  |-- segment 2 --------------------|      the same number of bytes
#pragma once

#include <cstdint>

namespace mpq::cuda {

constexpr int kInlineBands = 12;
constexpr int kInlineSegments = 20;
constexpr int kMaxBlocks = 192;
constexpr int kStages = 3;  // of the ring of weights of each warp
constexpr int kMaxUnit = 4;
constexpr int kOnceBands = 4;  // decode.cuh
// decode.cuh: units that a warp has on their way, 4 to 8 KB of codes.
constexpr int slots_of(int bits, bool pairs) {
  return bits == 1 ? pairs ? 4 : 8 : bits <= 2 ? pairs ? 3 : 6 : bits <= 4 ? pairs ? 2 : 4 : 2;
}

// Tile: 64 x 64 weights. Unit: `1 << log2_unit` tiles along K, what a warp copies and multiplies at a time. A unit
// never straddles the border of a group of scales unless it holds whole groups.
struct Segment {
  uint32_t planes[3];          // first 16 bytes of each plane, in units of 16 bytes from qweight
  uint32_t scales, zeros;      // first scale and zero, in units of 64 elements
  int32_t tile0, tiles;        // along K
  int32_t groups, group_size;  // of scales; columns
  float groups_per_tile;       // 1 / (tiles in a group); 0 where there is one group
  uint32_t group_factor;       // group of tile t: t * group_factor >> 31; of groups of whole tiles
  uint32_t shape;
};

// Segment::shape, 4 bits each. A descriptor of a unit (ring.cuh) has the number of its tiles too.
namespace shape {
constexpr int kBits = 0, kZeroKind = 4, kSubTile = 8, kLog2Unit = 12, kCount = 16, kLog2Flush = 20;
constexpr int kPairs = 28, kLog2Parts = 29;  // 24 to 27: wide_steps.cuh
}  // namespace shape
// kLog2Flush: tiles that share scales, at most a unit; where kSubTile is 1: k16 chunks, 1 or 2.
// decode.cuh: 1 bit, units of two tiles; 2 bits, groups in a tile where they are narrower than that.

struct Band {
  int32_t n0, rows;
  int32_t row_tiles;
  int32_t first_group;  // number of its first row group; the next band's is the end
  int32_t first_segment;
};

struct Cut {
  uint32_t group, tile;
  uint16_t first, last;  // blocks that share `group`, where this cut is inside it
};

// The tokens that a block multiplies, and how they come to shared memory.
struct Input {
  const void* x;
  const void* gate;
  const int32_t* perm;
  int64_t row_stride;
  int32_t tokens, columns;  // M, K
  int32_t vector_loads;     // 1: every row begins at a multiple of 16 bytes, and there is no permutation
  int32_t chunk_sums;       // 1: some scales are shared by fewer than 64 columns
};

struct Output {
  void* y;
  const void* bias;
  int64_t row_stride;
  int32_t bias_dtype;
};

// Byte offsets from the beginning of dynamic shared memory, and sizes.
struct SharedMap {
  uint32_t panel, panel_stride;  // x: rows of tokens
  uint32_t tile_sums, chunk_sums;
  uint32_t flag;
  uint32_t descriptors, ring, stage_bytes;
  uint32_t zero_row, scale_bytes;  // decode.cuh: zeros as long as a row of two tiles; a warp's scales
  int32_t panel_tiles;             // tiles that units of one panel may begin in; kMaxUnit - 1 more are loaded
  uint32_t total;
};

struct LinearParams {
  Input in;
  Output out;
  const void* qweight;
  const void* scales;
  const void* zeros;
  const Band* bands;        // null: inline_bands
  const Segment* segments;  // null: inline_segments
  float* partials;
  uint32_t* counters;
  int32_t scale_dtype;
  int32_t k_tiles;
  int32_t num_bands, num_segments;
  int32_t log2_group_rows;
  SharedMap shared;
  Band inline_bands[kInlineBands];
  Segment inline_segments[kInlineSegments];
  Cut cuts[kMaxBlocks + 1];
};
static_assert(sizeof(LinearParams) <= 4096, "kernel parameters must fit into 4 KB");

// Experts: row groups of expert e are expert_groups[e] .. expert_groups[e + 1]; the rows of x that go through it are
// offsets[e] .. offsets[e + 1]. Work items are (expert, row group, block of tokens), in this order.
struct GroupedParams {
  LinearParams linear;
  const int32_t* offsets;        // [num_experts + 1]
  const int32_t* expert_groups;  // [num_experts + 1]
  int32_t num_experts, expert_rows;
  uint32_t items_before;  // shared memory: [num_experts + 1] words
};

// A part of a table on its way to the workspace.
struct TableChunk {
  static constexpr int kWords = 2048;
  uint32_t* to;
  uint32_t count;
  uint32_t words[kWords];
};

struct DequantizeParams {
  LinearParams linear;  // the weight alone
  void* out;
  int32_t out_dtype;
};

struct EmbeddingParams {
  LinearParams linear;  // the weight alone
  const int64_t* ids;
  void* out;
  int64_t rows;  // N
  int32_t out_dtype;
};

}  // namespace mpq::cuda

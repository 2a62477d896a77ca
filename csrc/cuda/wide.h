// What the kernels for 17 and more tokens (wide.cuh) are told besides LinearParams.
#pragma once

#include <cstdint>

#include "include/mpq.h"
#include "params.h"

namespace mpq::cuda {

constexpr int kMostNarrowTokens = 16;  // more are multiplied by wide.cuh
constexpr int kWideStages = 3;         // of copied weights and x
constexpr int kWideUnit = 2;           // tiles of a unit, at most
constexpr int kStepTiles = 8;          // tiles along K of a step, at most
constexpr int kWarpTokens = 32;        // that a warp multiplies
constexpr int kSumsStride = 68;        // floats from one token's 64 rows to the next: stores of a warp meet 32 banks

// A block has 2 warps for each of its row tiles. They share out the tokens (phases 1: 64 tokens a block), or, for up to
// 32 tokens, the tiles along K (phases 2). Byte offsets are from the beginning of dynamic shared memory.
struct WideMap {
  int32_t row_tiles;  // 1, 2 or 4
  int32_t phases;
  int32_t log2_units;  // units (params.h) that a warp multiplies in a step
  uint32_t stage_bytes;
  // A stage: | codes of each row tile | scales and zeros of each row tile and phase | x: [tile][token][64] | sums of x
  // |
  uint32_t codes_pitch, scales_pitch;
  uint32_t x, sums;
  uint32_t sums_pitch;  // of a tile: [token], then [chunk][token] where there are chunk sums
  uint32_t scratch;     // 8 tokens of each warp
  uint32_t flag, total;
};

// x as arrange.cu has it, in the workspace: for each block of tokens [tile][token][64] and [tile] sums.
struct WideParams {
  LinearParams linear;
  WideMap map;
  char* x;
  char* sums;
};
static_assert(sizeof(WideParams) <= 4096, "kernel parameters must fit into 4 KB");

struct ArrangeParams {
  Input in;
  char* x;
  char* sums;
  int32_t block_tokens;  // 32 or 64
  uint32_t sums_pitch;
};

inline uint32_t threads_of_block(const WideMap& map) { return uint32_t(64 * map.row_tiles); }
inline int tokens_of_block(const WideMap& map) { return kWarpTokens * (3 - map.phases); }

// Fills `map` for row groups of params.log2_group_rows, and `max_unit` with the tiles that units may have; false where
// it does not fit.
bool map_wide(const mpq_linear_args& args, const mpq_device& device, const LinearParams& params, WideMap& map,
              int& max_unit);

}  // namespace mpq::cuda

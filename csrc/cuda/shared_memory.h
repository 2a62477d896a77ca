// What lies where in the shared memory of a block.
#pragma once

#include <cstdint>

#include "include/mpq.h"
#include "params.h"

namespace mpq::cuda {

// Threads, and tokens of 8 for one block.
struct Shape {
  int token_tiles;  // 1, 2 or 4
  int log2_group_rows;
  uint32_t warps;
};

// Fills params.shared; false where it does not fit.
bool map_shared(const mpq_linear_args& args, const mpq_device& device, const Shape& shape, int max_unit,
                LinearParams& params);

// The same for decode_kernel, where a block has `tiles` tiles along K at the most and `side` groups side by side.
bool map_decode(const mpq_linear_args& args, const mpq_device& device, const Shape& shape, int tiles, int side,
                LinearParams& params);

}  // namespace mpq::cuda

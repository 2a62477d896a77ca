// Shares the bytes of a weight out among blocks: where each begins (params.h, Cut).
#pragma once

#include <cstdint>

#include "include/mpq.h"
#include "params.h"

namespace mpq::cuda {

// Row tiles of a row group, as a power of two from `least` to `most`: the smallest with which each block can have one
// part of one row group at little cost, else the largest with which it can have whole row groups, else `least`.
int log2_rows_for_one_part(const mpq_weight& weight, int least, int most, uint32_t blocks);

// Fills params.cuts for at most `blocks` blocks; returns how many have work, and whether any row group is shared. Each
// block has one part of one row group, or whole ones, where that costs little; else all have equal bytes, wherever row
// groups end: two parts of a row group take a block two loads of x and two additions of partial sums.
uint32_t cut_work(const mpq_weight& weight, int log2_group_rows, int max_unit, uint32_t blocks, LinearParams& params,
                  bool& split);

}  // namespace mpq::cuda

// Shares the bytes of a weight out among blocks: where each begins (params.h, Cut).
#pragma once

#include <cstdint>

#include "include/mpq.h"
#include "params.h"

namespace mpq::cuda {

// Fills params.cuts for at most `blocks` blocks of equal bytes, or of equal parts of K where all row groups cost the
// same; returns how many have work, and whether any row group is shared.
uint32_t cut_work(const mpq_weight& weight, int log2_group_rows, int max_unit, uint32_t blocks, LinearParams& params,
                  bool& split);

}  // namespace mpq::cuda

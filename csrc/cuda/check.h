// Whether arguments can be served. Pointers are compared with null and aligned, never read.
#pragma once

#include <cstdint>

#include "include/mpq.h"

namespace mpq::cuda {

// MPQ_OK or why these arguments are refused.
int check_weight(const mpq_weight& weight);
int check_linear(const mpq_linear_args& args, int64_t columns_of_y);
int check_device(const mpq_device& device);

}  // namespace mpq::cuda

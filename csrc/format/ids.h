// The numbers of dtypes and of kinds of zeros are those of mpq_kernels/format everywhere. The C interface and
// the CPU backend state them again, so that each can be read alone; here they are held equal.
#pragma once

#include "cpu/cpu.h"
#include "generated/layout.h"
#include "include/mpq.h"

namespace mpq {

static_assert(MPQ_F32 == kDtypeF32 && MPQ_F16 == kDtypeF16 && MPQ_BF16 == kDtypeBF16);
static_assert(static_cast<int>(cpu::DType::kF32) == kDtypeF32 && static_cast<int>(cpu::DType::kF16) == kDtypeF16 &&
              static_cast<int>(cpu::DType::kBF16) == kDtypeBF16);
static_assert(MPQ_ZERO_NONE == kZeroNone && MPQ_ZERO_HALF == kZeroHalf && MPQ_ZERO_INT == kZeroInt &&
              MPQ_ZERO_FLOAT == kZeroFloat && MPQ_ZERO_MIN == kZeroMin && kZeroKinds == 5);

}  // namespace mpq

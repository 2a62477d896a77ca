// More than 16 tokens: 32 for each block and two parts of each step, or 64.

#include "launch.h"
#include "wide.cuh"

namespace mpq::cuda {

int launch_wide(bool bf16, const dev::Launch& how, const WideParams& params) {
  if (params.map.phases == 2) return dev::launch(bf16 ? wide_kernel<true, 2> : wide_kernel<false, 2>, how, params);
  return dev::launch(bf16 ? wide_kernel<true, 1> : wide_kernel<false, 1>, how, params);
}

int warmup_wide() {
  if (int error = dev::load(wide_kernel<false, 1>)) return error;
  if (int error = dev::load(wide_kernel<false, 2>)) return error;
  if (int error = dev::load(wide_kernel<true, 1>)) return error;
  return dev::load(wide_kernel<true, 2>);
}

}  // namespace mpq::cuda

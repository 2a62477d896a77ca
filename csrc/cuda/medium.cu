// More than 16 tokens: 32 for each block, so that a decoded weight serves four products.

#include "launch.h"
#include "linear.cuh"

namespace mpq::cuda {

int launch_medium(bool bf16, const dev::Launch& how, const LinearParams& params) {
  return dev::launch(bf16 ? linear_kernel<true, 4> : linear_kernel<false, 4>, how, params);
}

int warmup_medium() {
  if (int error = dev::load(linear_kernel<false, 4>)) return error;
  if (int error = dev::load(linear_kernel<true, 4>)) return error;
  return 0;
}

}  // namespace mpq::cuda

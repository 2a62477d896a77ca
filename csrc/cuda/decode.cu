// Up to 16 tokens: bound by the bytes of the weights.

#include "launch.h"
#include "linear.cuh"

namespace mpq::cuda {

int launch_decode(bool bf16, int token_tiles, const dev::Launch& how, const LinearParams& params) {
  if (token_tiles == 1) return dev::launch(bf16 ? linear_kernel<true, 1> : linear_kernel<false, 1>, how, params);
  return dev::launch(bf16 ? linear_kernel<true, 2> : linear_kernel<false, 2>, how, params);
}

int warmup_decode() {
  if (int error = dev::load(linear_kernel<false, 1>)) return error;
  if (int error = dev::load(linear_kernel<false, 2>)) return error;
  if (int error = dev::load(linear_kernel<true, 1>)) return error;
  if (int error = dev::load(linear_kernel<true, 2>)) return error;
  return 0;
}

}  // namespace mpq::cuda

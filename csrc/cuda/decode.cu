// Up to 16 tokens: bound by the bytes of the weights.

#include "decode_kernels.cuh"
#include "launch.h"

namespace mpq::cuda {

const DecodeKernel* decode_kernels_fp16(int width) { return decode_kernels<false>(width); }

int launch_decode(bool bf16, int token_tiles, int side, int width, const dev::Launch& how, const LinearParams& params) {
  const DecodeKernel* kernels = bf16 ? decode_kernels_bf16(width) : decode_kernels_fp16(width);
  return dev::launch(kernels[side > 1 ? 0 : token_tiles], how, params);
}

int warmup_decode() {
  for (int width = -1; width <= 8; ++width) {
    for (int i = 0; i < 3; ++i) {
      if (int error = dev::load(decode_kernels_fp16(width)[i])) return error;
      if (int error = dev::load(decode_kernels_bf16(width)[i])) return error;
    }
  }
  return 0;
}

}  // namespace mpq::cuda

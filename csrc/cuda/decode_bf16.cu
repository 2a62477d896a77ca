// decode.cu for x in bf16.

#include "decode_kernels.cuh"

namespace mpq::cuda {

const DecodeKernel* decode_kernels_bf16(int width) { return decode_kernels<true>(width); }

}  // namespace mpq::cuda

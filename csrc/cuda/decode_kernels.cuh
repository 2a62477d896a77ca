// The kernels of decode.cuh for one dtype of x: each has a file of its own, so that they are compiled side by side.
#pragma once

#include "decode.cuh"

namespace mpq::cuda {

using DecodeKernel = void (*)(LinearParams);

// Kernels for up to 2, 8, 16 tokens; width: kWidth of decode_kernel.
const DecodeKernel* decode_kernels_fp16(int width);
const DecodeKernel* decode_kernels_bf16(int width);

template <bool kBf16, int kWidth>
constexpr DecodeKernel kOfWidth[3] = {decode_kernel<kBf16, 1, 4, kWidth>, decode_kernel<kBf16, 1, 1, kWidth>,
                                      decode_kernel<kBf16, 2, 1, kWidth>};

template <bool kBf16>
const DecodeKernel* decode_kernels(int width) {
  static constexpr const DecodeKernel* kOfDtype[10] = {
      kOfWidth<kBf16, -1>, kOfWidth<kBf16, 0>, kOfWidth<kBf16, 1>, kOfWidth<kBf16, 2>, kOfWidth<kBf16, 3>,
      kOfWidth<kBf16, 4>,  kOfWidth<kBf16, 5>, kOfWidth<kBf16, 6>, kOfWidth<kBf16, 7>, kOfWidth<kBf16, 8>};
  return kOfDtype[1 + width];
}

}  // namespace mpq::cuda

// Up to 16 tokens: bound by the bytes of the weights.

#include <initializer_list>

#include "decode.cuh"
#include "launch.h"

namespace mpq::cuda {

namespace {

using Kernel = void (*)(LinearParams);

// [up to 2, 8, 16 tokens]; a kernel for each width, and two for weights of several segments.
template <bool kBf16, int kWidth>
constexpr Kernel kOfWidth[3] = {decode_kernel<kBf16, 1, 4, kWidth>, decode_kernel<kBf16, 1, 1, kWidth>,
                                decode_kernel<kBf16, 2, 1, kWidth>};
template <bool kBf16>
constexpr const Kernel* kKernels[10] = {kOfWidth<kBf16, -1>, kOfWidth<kBf16, 0>, kOfWidth<kBf16, 1>, kOfWidth<kBf16, 2>,
                                        kOfWidth<kBf16, 3>,  kOfWidth<kBf16, 4>, kOfWidth<kBf16, 5>, kOfWidth<kBf16, 6>,
                                        kOfWidth<kBf16, 7>,  kOfWidth<kBf16, 8>};

}  // namespace

int launch_decode(bool bf16, int token_tiles, int side, int width, const dev::Launch& how, const LinearParams& params) {
  const Kernel* kernels = (bf16 ? kKernels<true> : kKernels<false>)[1 + width];
  return dev::launch(kernels[side > 1 ? 0 : token_tiles], how, params);
}

int warmup_decode() {
  for (const auto* of_dtype : {&kKernels<false>, &kKernels<true>}) {
    for (const Kernel* kernels : *of_dtype) {
      for (int i = 0; i < 3; ++i) {
        if (int error = dev::load(kernels[i])) return error;
      }
    }
  }
  return 0;
}

}  // namespace mpq::cuda

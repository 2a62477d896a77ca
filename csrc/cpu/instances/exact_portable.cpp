// Any machine: portable vectors, the compiler's default flags.
#include "cpu/exact/kernels.inl"
#include "cpu/kernels.h"

namespace mpq::cpu {

Kernels exact_portable() { return {linear_tokens, dequantize_weight}; }

}  // namespace mpq::cpu

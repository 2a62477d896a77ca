// Any machine: portable vectors, the compiler's default flags.
#include "cpu/int8/kernels.inl"
#include "cpu/kernels.h"

namespace mpq::cpu {

LinearInt8 int8_portable() { return linear_int8_tokens<NoTiles>; }

}  // namespace mpq::cpu

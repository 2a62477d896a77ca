// Any machine: 4 lanes, GCC/Clang vector extensions, the compiler's default flags.
#include "cpu/kernels.h"
#include "cpu/simd_portable.h"
// The kernels are written against the names that the header above defines.
#include "cpu/int8.inl"

namespace mpq::cpu {

LinearInt8 portable_int8() { return linear_int8_tokens<NoTiles>; }

}  // namespace mpq::cpu

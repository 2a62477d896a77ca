// Simulated tile registers beside the vectors of int8_amx.cpp: the bits of avx512vnni. Compiled with its flags, less
// those of AMX.
#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "cpu/simd_avx512.h"
//
#include "simulated_amx.inl"

namespace mpq::cpu {

LinearInt8 simulated_avx512() { return linear_int8_tokens<SimulatedTiles>; }

}  // namespace mpq::cpu
#endif

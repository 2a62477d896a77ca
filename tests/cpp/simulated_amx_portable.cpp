// Simulated tile registers beside portable vectors: the bits of the portable kernels.
#include "cpu/simd_portable.h"
//
#include "simulated_amx.inl"

namespace mpq::cpu {

LinearInt8 simulated_portable() { return linear_int8_tokens<SimulatedTiles>; }

bool simulated_multiplies() { return tiles_multiply<SimulatedTiles>(); }
bool signed_multiplies() { return tiles_multiply<SignedTiles>(); }

}  // namespace mpq::cpu

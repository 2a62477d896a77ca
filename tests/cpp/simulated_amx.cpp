// The kernels of int8_amx.cpp over simulated tile registers and portable vectors, for any machine.
#include "cpu/int8/kernels.inl"
#include "cpu/kernels.h"
#include "simulated_tiles.h"

namespace mpq::cpu {
namespace {

// Codes of 128 and more taken for negative ones, as by TDPBSSD.
struct SignedTiles : SimulatedTiles {
  template <int Sums, int X, int W>
  void dot_bytes() {
    dot_as<int8_t, int8_t>(Sums, X, W);
  }
};

}  // namespace

LinearInt8 simulated_int8() { return linear_int8_tokens<SimulatedTiles>; }

bool simulated_multiplies() { return tiles_multiply_bytes<SimulatedTiles>(); }
bool signed_multiplies() { return tiles_multiply_bytes<SignedTiles>(); }

}  // namespace mpq::cpu

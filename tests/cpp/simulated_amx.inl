// The kernels of int8_amx.cpp over simulated tile registers. Included after a simd header.
#include "cpu/kernels.h"
#include "simulated_tiles.h"
// The kernels are written against the names that the headers above define.
#include "cpu/int8.inl"

namespace mpq::cpu {
namespace {

// Codes of 128 and more taken for negative ones, as by TDPBSSD.
struct SignedTiles : SimulatedTiles {
  template <int Sums, int X, int W>
  void dot() {
    dot_as<Sums, X, W, int8_t, int8_t>();
  }
};

}  // namespace
}  // namespace mpq::cpu

// The tile registers of AMX, for tile_registers.inl. Register numbers are constants of the instructions.
//
// In assembly: the compiler does not know the registers, and its own macros (GCC 12) do not say that a tile load reads
// memory, so that stores before it may be moved behind it.
#pragma once

#include <cstdint>

#include "cpu/inline.h"
#include "cpu/int8/amx.h"

namespace mpq::cpu {
namespace {

struct AmxTiles {
  static constexpr int64_t kTokens = 16;

  // Every register becomes zero.
  MPQ_INLINE void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }

  MPQ_INLINE void release() { asm volatile("tilerelease" ::: "memory"); }

  template <int T>
  MPQ_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
  }

  // Rows of memory `stride` bytes apart.
  template <int T>
  MPQ_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }

  template <int T>
  MPQ_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }

  // Sums[m][n] += X[m][k] * W[k][n], int32, for signed bytes X and unsigned bytes W, four k in a word.
  template <int Sums, int X, int W>
  MPQ_INLINE void dot() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(X), "i"(W));
  }
};

}  // namespace
}  // namespace mpq::cpu

// The tile registers of AMX, for registers.inl. Register numbers are constants of the instructions.
//
// In assembly: the compiler does not know the registers, and its own macros (GCC 12) do not say that a tile load reads
// memory, so that stores before it may be moved behind it.
#pragma once

#include <cstdint>

#include "cpu/inline.h"
#include "cpu/kernels.h"
#include "cpu/tiles/amx.h"

namespace mpq::cpu {
namespace {

struct AmxTiles {
  static constexpr int64_t kTokens = kTileTokens;

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
  MPQ_INLINE void dot_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(X), "i"(W));
  }

  // The same in fp32 for bf16, two k in a word. Subnormal factors count as zero, and so do subnormal sums.
  template <int Sums, int X, int W>
  MPQ_INLINE void dot_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(X), "i"(W));
  }
};

}  // namespace
}  // namespace mpq::cpu

// The vectors that an instruction set's kernels are written in. A file of cpu/instances names its header before it
// includes anything:
//
//   #define MPQ_SIMD "cpu/simd/avx2.h"
//
// Portable vectors where none is named, whatever the compiler is told of the machine.
#pragma once

#if !defined(MPQ_SIMD)
#define MPQ_SIMD "cpu/simd/portable.h"
#endif
#include MPQ_SIMD

#include "cpu/inline.h"

namespace mpq::cpu {
namespace {

constexpr int kSet = kLanes / 4;  // (g, h) pairs that make a full vector of row positions

// In: v[i] = (rows 4 i + t, columns q) for i < kSet. Out: v[q] = kLanes consecutive row positions of column q.
MPQ_INLINE void gather_rows(F* v) { transpose4(v); }

MPQ_INLINE void gather_rows(I* v) {
  if constexpr (kSet > 1) {
    F floats[kSet];
    for (int i = 0; i < kSet; ++i) floats[i] = (F)v[i];
    transpose4(floats);
    for (int i = 0; i < kSet; ++i) v[i] = (I)floats[i];
  }
}

}  // namespace
}  // namespace mpq::cpu

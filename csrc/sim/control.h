// How tests steer the simulator, through ctypes or C++. A library of kernels for the simulator is built by
//
//   g++ -std=c++20 -O2 -ffp-contract=off -fPIC -shared -DMPQ_SIM -I csrc csrc/sim/*.cpp -x c++ csrc/cuda/NAME.cu -o
//   NAME.so
//
// and every launch in it runs on the CPU, to its end, with all checks. The first error is kept: later launches fail
// until mpq_sim_reset().
#pragma once

#include <stddef.h>
#include <stdint.h>

#define MPQ_SIM_API extern "C" __attribute__((visibility("default")))

enum MpqSimFlags : uint32_t {
  kMpqSimWritable = 1,
  kMpqSimUndefined = 2,  // bytes may be read only after a launch has written them
  kMpqSimInput = 4,      // written by an earlier kernel: no access before wait_for_earlier_kernels(), no ld_constant
  kMpqSimUntracked = 8,  // with kMpqSimWritable: stores are not remembered, so that any size costs nothing
};

// Forgets errors, ranges and settings.
MPQ_SIM_API void mpq_sim_reset(void);

// Global memory that kernels may use. Everything else is out of bounds.
MPQ_SIM_API void mpq_sim_allow(const void* address, size_t bytes, uint32_t flags, const char* name);

// Order of blocks, of warps and of lanes: 0 forward, 1 reverse, 2 random from the seed.
MPQ_SIM_API void mpq_sim_order(int kind, uint32_t seed);

// The next launch starts while the kernel ahead of it still runs: what that kernel writes, `bytes` from `from`, is at
// `to` once the first thread waits for it, and not before. Once.
MPQ_SIM_API void mpq_sim_arrives_late(void* to, const void* from, size_t bytes);

// 1: up to four blocks take turns at atomics, fences and block barriers. 0: one after the other.
MPQ_SIM_API void mpq_sim_interleave(int on);

// Text of the first error, "" if there was none.
MPQ_SIM_API const char* mpq_sim_error(void);

// Of the last launch. 0: blocks begun; 1: mma of a warp; 2: bytes of cp.async; 3: bytes of bulk copies; 4: copies that
// were still under way when their thread or block ended.
MPQ_SIM_API uint64_t mpq_sim_count(int which);

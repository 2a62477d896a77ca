// What the device functions of device.h ask of the simulator. Every function acts for the thread that runs now; one
// that finds an error does not return: the launch stops, and sim::run() returns kCheckFailed.
#pragma once

#include <cstdint>

#pragma GCC visibility push(hidden)  // several libraries of simulated kernels may share a process

namespace mpq::sim {

constexpr int kCheckFailed = 9001;  // no error code of CUDA
constexpr uint32_t kSharedBase = 1024;

// ---- launches (schedule.cpp) ----

struct Grid {
  uint32_t x, y, threads, shared_bytes;
  bool overlap;
};
// Runs `thread(call)` once for every thread of the grid. 0, or kCheckFailed; later launches fail too, until reset.
int run(const Grid& grid, void (*thread)(const void* call), const void* call);

struct Place {
  uint32_t thread, block_x, block_y;
};
Place place();
const Grid& grid();
[[noreturn]] void trap(const char* why);

// ---- threads (schedule.cpp) ----

void block_sync();
void wait_for_earlier_kernels();

// ---- operations of a whole warp (warp.cpp) ----

void mma(bool bf16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
void ldmatrix_x4(uint32_t* r, uint32_t address);
uint32_t shfl_xor(uint32_t v, int mask);
void warp_sync();

// ---- shared memory and cp.async (shared.cpp) ----

void load_shared(void* to, uint32_t address, uint32_t bytes);
void store_shared(uint32_t address, const void* from, uint32_t bytes);
void cp_async(uint32_t to, const void* from, uint32_t bytes);
void cp_async_commit();
void cp_async_wait(uint32_t pending);

// ---- barriers in shared memory and bulk copies (mbarrier.cpp) ----

void mbarrier_init(uint32_t bar, uint32_t arrivals);
void mbarrier_arrive(uint32_t bar, uint32_t expected_bytes);
void mbarrier_wait(uint32_t bar, uint32_t parity);
void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t bar);

// ---- global memory (global.cpp) ----

enum class Load { kGlobal, kConstant, kFromOthers, kCpAsync, kBulk };
// Checks; the caller then reads or writes the memory itself.
void check_load(Load kind, const void* address, uint32_t bytes, uint32_t alignment);
void check_store(void* address, uint32_t bytes, uint32_t alignment);
uint32_t atomic_add(uint32_t* address, uint32_t v);
uint32_t count_arrival(uint32_t* address, uint32_t most);
void thread_fence();

}  // namespace mpq::sim

#pragma GCC visibility pop

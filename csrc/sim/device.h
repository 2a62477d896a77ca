// The machine of csrc/cuda/ptx.cuh on the host: the same names, each checked by the simulator behind calls.h. Compiles
// kernel sources unchanged with g++ (see control.h for a command).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "sim/calls.h"
#include "sim/numbers.h"

#define MPQ_DEVICE inline
#define MPQ_KERNEL(max_threads) void
#define MPQ_KERNEL_BESIDE(max_threads, blocks) void
#define MPQ_GRID_CONSTANT
#define MPQ_UNROLL
#define MPQ_NO_UNROLL

#if !defined(__VECTOR_TYPES_H__)
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
#endif

namespace mpq::dev {

using Stream = void*;

// ---- places ----

MPQ_DEVICE uint32_t thread_index() { return sim::place().thread; }
MPQ_DEVICE uint32_t thread_count() { return sim::grid().threads; }
MPQ_DEVICE uint32_t block_x() { return sim::place().block_x; }
MPQ_DEVICE uint32_t block_x_again() { return block_x(); }
MPQ_DEVICE uint32_t block_y() { return sim::place().block_y; }
MPQ_DEVICE uint32_t grid_x() { return sim::grid().x; }
MPQ_DEVICE uint32_t grid_y() { return sim::grid().y; }

MPQ_DEVICE void trap(const char* why) { sim::trap(why); }

// ---- shared memory ----

MPQ_DEVICE uint32_t shared_base() { return sim::kSharedBase; }

template <class T>
MPQ_DEVICE T ld_shared(uint32_t address) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, float> || std::is_same_v<T, float2> ||
                    std::is_same_v<T, uint2> || std::is_same_v<T, uint4> || std::is_same_v<T, float4>,
                "ptx.cuh has no load of this type");
  T v;
  sim::load_shared(&v, address, sizeof v);
  return v;
}
MPQ_DEVICE void st_shared(uint32_t address, uint16_t v) { sim::store_shared(address, &v, sizeof v); }
MPQ_DEVICE void st_shared(uint32_t address, uint32_t v) { sim::store_shared(address, &v, sizeof v); }
MPQ_DEVICE void st_shared(uint32_t address, float v) { sim::store_shared(address, &v, sizeof v); }
MPQ_DEVICE void st_shared(uint32_t address, uint4 v) { sim::store_shared(address, &v, sizeof v); }
MPQ_DEVICE void st_shared(uint32_t address, float4 v) { sim::store_shared(address, &v, sizeof v); }
MPQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { sim::ldmatrix_x4(r, address); }

// ---- asynchronous copies ----

MPQ_DEVICE void cp_async16(uint32_t to, const void* from) { sim::cp_async(to, from, 16); }
MPQ_DEVICE void cp_async16_if(bool copies, uint32_t to, const void* from) {
  if (copies) sim::cp_async(to, from, 16);
}
MPQ_DEVICE void cp_async8(uint32_t to, const void* from) { sim::cp_async(to, from, 8); }
MPQ_DEVICE void cp_async_commit() { sim::cp_async_commit(); }
template <int kPending>
MPQ_DEVICE void cp_async_wait() {
  static_assert(kPending >= 0);
  sim::cp_async_wait(kPending);
}

MPQ_DEVICE void mbarrier_init(uint32_t bar, uint32_t arrivals) { sim::mbarrier_init(bar, arrivals); }
MPQ_DEVICE void mbarrier_expect(uint32_t bar, uint32_t bytes) { sim::mbarrier_arrive(bar, bytes); }
MPQ_DEVICE void mbarrier_arrive(uint32_t bar) { sim::mbarrier_arrive(bar, 0); }
MPQ_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) { sim::mbarrier_wait(bar, parity); }
MPQ_DEVICE void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  sim::bulk_copy(to, from, bytes, bar);
}
MPQ_DEVICE void fence_barrier_init() {}

// ---- global memory ----

template <class T>
MPQ_DEVICE T load_checked(sim::Load kind, const T* address) {
  sim::check_load(kind, address, sizeof(T), alignof(T));
  return *address;
}
template <class T>
MPQ_DEVICE T ld_global(const T* address) {
  return load_checked(sim::Load::kGlobal, address);
}
template <class T>
MPQ_DEVICE T ld_constant(const T* address) {
  return load_checked(sim::Load::kConstant, address);
}
template <class T>
MPQ_DEVICE T ld_from_others(const T* address) {
  return load_checked(sim::Load::kFromOthers, address);
}
template <class T>
MPQ_DEVICE void st_global(T* address, T v) {
  sim::check_store(address, sizeof(T), alignof(T));
  *address = v;
}
MPQ_DEVICE uint32_t atomic_add(uint32_t* address, uint32_t v) { return sim::atomic_add(address, v); }
MPQ_DEVICE uint32_t count_arrival(uint32_t* address, uint32_t most) {
  sim::thread_fence();
  return sim::count_arrival(address, most);
}
MPQ_DEVICE void thread_fence() { sim::thread_fence(); }

// ---- threads ----

MPQ_DEVICE void block_sync() { sim::block_sync(); }
MPQ_DEVICE void warp_sync() { sim::warp_sync(); }
MPQ_DEVICE uint32_t shfl_xor(uint32_t v, int mask) { return sim::shfl_xor(v, mask); }
MPQ_DEVICE float shfl_xor(float v, int mask) {
  return std::bit_cast<float>(sim::shfl_xor(std::bit_cast<uint32_t>(v), mask));
}
MPQ_DEVICE void wait_for_earlier_kernels() { sim::wait_for_earlier_kernels(); }
MPQ_DEVICE void launch_dependents() {}

// ---- numbers ----

// The empty statement hides where v came from, so that no compiler fuses it with what follows.
MPQ_DEVICE float opaque(float v) {
  asm volatile("" : "+m"(v));
  return v;
}
MPQ_DEVICE float f16_to_float(uint16_t bits) { return sim::f16_to_float(bits); }
MPQ_DEVICE float bf16_to_float(uint16_t bits) { return sim::bf16_to_float(bits); }
MPQ_DEVICE uint16_t float_to_f16(float v) { return sim::float_to_f16(v); }
MPQ_DEVICE uint16_t float_to_bf16(float v) { return sim::float_to_bf16(v); }
MPQ_DEVICE float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
MPQ_DEVICE uint32_t float_to_bits(float v) { return std::bit_cast<uint32_t>(v); }
MPQ_DEVICE uint32_t bit_select(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }
MPQ_DEVICE const char* held(const char* address) { return address; }
MPQ_DEVICE int held(int v) { return v; }
MPQ_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t v = 0;
  for (int i = 0; i < 4; ++i) v |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return v;
}
MPQ_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return uint32_t(uint64_t{a} * b >> 32); }
MPQ_DEVICE float fma(float a, float b, float c) { return std::fmaf(a, b, c); }
MPQ_DEVICE float mul(float a, float b) { return opaque(a * b); }
MPQ_DEVICE float add(float a, float b) { return opaque(a + b); }
MPQ_DEVICE float exp(float v) { return std::exp(v); }

// ---- tensor cores ----

MPQ_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  sim::mma(false, d, a, b0, b1);
}
MPQ_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  sim::mma(true, d, a, b0, b1);
}
MPQ_DEVICE void mma_f16_first(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  d[0] = d[1] = d[2] = d[3] = 0.0f;
  sim::mma(false, d, a, b0, b1);
}
MPQ_DEVICE void mma_bf16_first(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  d[0] = d[1] = d[2] = d[3] = 0.0f;
  sim::mma(true, d, a, b0, b1);
}

// ---- host side ----

struct Launch {
  uint32_t grid_x = 1, grid_y = 1, threads = 1, shared_bytes = 0;
  Stream stream = nullptr;
  bool overlap = false;
};

template <class Params>
inline int load(void (*)(Params)) {
  return 0;
}

template <class Params>
inline int launch(void (*kernel)(Params), const Launch& how, const Params& params) {
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  };
  const Call call{kernel, &params};
  const auto thread = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    c.kernel(*c.params);
  };
  return sim::run({how.grid_x, how.grid_y, how.threads, how.shared_bytes, how.overlap}, thread, &call);
}

}  // namespace mpq::dev

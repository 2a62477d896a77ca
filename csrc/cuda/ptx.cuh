// The machine as PTX. Shared memory is addressed by 32-bit offsets, as the instructions take them, so that the host
// implementation can check every access. Instructions: PTX ISA 8.x,
// https://docs.nvidia.com/cuda/parallel-thread-execution
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

#define MPQ_DEVICE __device__ __forceinline__
#define MPQ_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads, 1)
// `blocks` on a multiprocessor, as far as registers go.
#define MPQ_KERNEL_BESIDE(max_threads, blocks) __global__ void __launch_bounds__(max_threads, blocks)
#define MPQ_GRID_CONSTANT __grid_constant__
#define MPQ_UNROLL _Pragma("unroll")
#define MPQ_NO_UNROLL _Pragma("unroll 1")

namespace mpq::dev {

using Stream = cudaStream_t;

// ---- places ----

MPQ_DEVICE uint32_t thread_index() { return threadIdx.x; }
MPQ_DEVICE uint32_t thread_count() { return blockDim.x; }
MPQ_DEVICE uint32_t block_x() { return blockIdx.x; }
// The same number, read again: no register has held it since the kernel began.
MPQ_DEVICE uint32_t block_x_again() {
  uint32_t v;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(v));
  return v;
}
MPQ_DEVICE uint32_t block_y() { return blockIdx.y; }
MPQ_DEVICE uint32_t grid_x() { return gridDim.x; }
MPQ_DEVICE uint32_t grid_y() { return gridDim.y; }

// Ends the kernel: whoever waits for the stream gets an error. The text is for readers and for the simulator.
MPQ_DEVICE void trap(const char*) { __trap(); }

// ---- shared memory: byte addresses that begin at shared_base() ----

MPQ_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

template <class T>
MPQ_DEVICE T ld_shared(uint32_t address);
template <>
MPQ_DEVICE uint32_t ld_shared<uint32_t>(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
template <>
MPQ_DEVICE float ld_shared<float>(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
template <>
MPQ_DEVICE float2 ld_shared<float2>(uint32_t address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
  return v;
}
template <>
MPQ_DEVICE uint2 ld_shared<uint2>(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
template <>
MPQ_DEVICE uint4 ld_shared<uint4>(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

template <>
MPQ_DEVICE float4 ld_shared<float4>(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

MPQ_DEVICE void st_shared(uint32_t address, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}
MPQ_DEVICE void st_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
MPQ_DEVICE void st_shared(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
MPQ_DEVICE void st_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
MPQ_DEVICE void st_shared(uint32_t address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

// Four 8x8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned);
// r[i] of lane l holds columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i.
MPQ_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// ---- asynchronous copies from global to shared memory; a thread waits for its own, in groups ----

MPQ_DEVICE void cp_async16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
// Nothing where `copies` is false: one predicate, no branch.
MPQ_DEVICE void cp_async16_if(bool copies, uint32_t to, const void* from) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(uint32_t(copies))
               : "memory");
}
MPQ_DEVICE void cp_async8(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(__cvta_generic_to_global(from)) : "memory");
}
MPQ_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's most recent groups have not landed.
template <int kPending>
MPQ_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- barriers in shared memory and bulk copies that report to them: sm_90 and later, elsewhere they trap ----
//
// A barrier is 8 aligned bytes. Its phases end when `arrivals` threads have arrived and all bytes that they announced
// have been copied; phase i has parity i & 1.

// By one thread, then fence_barrier_init() by the same thread, then block_sync() by all.
MPQ_DEVICE void mbarrier_init(uint32_t bar, uint32_t arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
#else
  __trap();
#endif
}
// Makes mbarrier_init known to the copy engine.
MPQ_DEVICE void fence_barrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  __trap();
#endif
}
// Arrives, and announces bytes of bulk copies of this phase.
MPQ_DEVICE void mbarrier_expect(uint32_t bar, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
#else
  __trap();
#endif
}
MPQ_DEVICE void mbarrier_arrive(uint32_t bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
#else
  __trap();
#endif
}
// Waits for the end of the phase of this parity, which is the current one or the one before.
MPQ_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(bar), "r"(parity)
                 : "memory");
  } while (!done);
#else
  __trap();
#endif
}
// Addresses and bytes are multiples of 16.
MPQ_DEVICE void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(bar)
               : "memory");
#else
  __trap();
#endif
}

// ---- global memory ----

template <class T>
MPQ_DEVICE T ld_global(const T* address) {
  return *address;
}
// For data that no kernel writes which may run beside this one. Not for what an earlier kernel of the stream wrote,
// where launches may overlap: this path may hold bytes from before that kernel.
template <class T>
MPQ_DEVICE T ld_constant(const T* address) {
  return __ldg(address);
}
// Past the first-level cache: for data that other blocks of this launch wrote.
template <class T>
MPQ_DEVICE T ld_from_others(const T* address) {
  return __ldcg(address);
}
template <class T>
MPQ_DEVICE void st_global(T* address, T v) {
  *address = v;
}
MPQ_DEVICE uint32_t atomic_add(uint32_t* address, uint32_t v) { return atomicAdd(address, v); }
// Counts up to `most` and then back to 0; returns what was there. What this thread stored, or knows of through a
// block_sync, is there for whoever counts later, and what was there for earlier ones is there for this thread, and
// behind a block_sync for its block.
MPQ_DEVICE uint32_t count_arrival(uint32_t* address, uint32_t most) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(address)), "r"(most)
               : "memory");
  return before;
}
MPQ_DEVICE void thread_fence() { __threadfence(); }

// ---- threads ----

MPQ_DEVICE void block_sync() { __syncthreads(); }
MPQ_DEVICE void warp_sync() { __syncwarp(); }
// All 32 lanes take part.
MPQ_DEVICE float shfl_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
MPQ_DEVICE uint32_t shfl_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }

// Nothing that an earlier kernel of the stream wrote may be read before this; later kernels may start after
// launch_dependents(). Both do nothing unless the launch asked for overlap.
MPQ_DEVICE void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
MPQ_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- numbers: bit patterns of 16-bit floats in and out ----

MPQ_DEVICE float f16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
MPQ_DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
// To nearest, ties to even.
MPQ_DEVICE uint16_t float_to_f16(float v) { return __half_as_ushort(__float2half_rn(v)); }
MPQ_DEVICE uint16_t float_to_bf16(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
MPQ_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
MPQ_DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }
// Bits of `a` where the mask is set, of `b` elsewhere. In assembly, because a compiler that sees the operations spreads
// later masks over them and needs two instructions.
MPQ_DEVICE uint32_t bit_select(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xe2;" : "=r"(v) : "r"(a), "r"(mask), "r"(b));
  return v;
}
// The same value, which from here on the compiler keeps in registers and does not work out again each time.
MPQ_DEVICE const char* held(const char* address) {
  asm("" : "+l"(address));
  return address;
}
MPQ_DEVICE int held(int v) {
  asm("" : "+r"(v));
  return v;
}
// Four of the bytes of b : a, chosen by the nibbles of `selector`, lowest first; 0 is the lowest byte of a.
MPQ_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// The upper word of the product.
MPQ_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
// One rounding.
MPQ_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// A product or a sum that the compiler does not fuse with its neighbours.
MPQ_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
MPQ_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
MPQ_DEVICE float exp(float v) { return __expf(v); }

// ---- tensor cores ----
//
// d[16][8] += a[16][16] * b[16][8], lane l = 4 g + q:
//   a[0], a[1]  rows g, g + 8, columns 2q and 2q + 1         a[2], a[3]  the same rows, columns 2q + 8 and 2q + 9
//   b[0], b[1]  rows 2q and 2q + 1, rows 2q + 8 and 2q + 9, of column g
//   d[0], d[1]  row g, columns 2q and 2q + 1                 d[2], d[3]  row g + 8, the same columns

MPQ_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MPQ_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d = a * b
MPQ_DEVICE void mma_f16_first(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
MPQ_DEVICE void mma_bf16_first(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// ---- host side: launches and errors (0 is success) ----

struct Launch {
  uint32_t grid_x = 1, grid_y = 1, threads = 1, shared_bytes = 0;
  Stream stream = nullptr;
  bool overlap = false;  // may start before the kernel that is ahead of it in the stream has finished
};

// Lets the blocks of a kernel have as much dynamic shared memory as the current device gives to one: once for each
// kernel and device, because a launch of 4 us has no time for it.
inline cudaError_t allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static auto* const allowed = new std::set<std::pair<const void*, int>>;
  int device = 0, most = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed->count({kernel, device})) return cudaSuccess;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  most -= static_cast<int>(attributes.sharedSizeBytes);
  if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (!error) allowed->insert({kernel, device});
  return error;
}

// Onto the current device, where that would otherwise happen at the first launch.
template <class Params>
inline int load(void (*kernel)(Params)) {
  return static_cast<int>(allow_shared_memory(reinterpret_cast<const void*>(kernel)));
}

template <class Params>
inline int launch(void (*kernel)(Params), const Launch& how, const Params& params) {
  if (how.shared_bytes > 48 * 1024) {
    if (cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel))) return static_cast<int>(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.grid_x, how.grid_y, 1);
  config.blockDim = dim3(how.threads, 1, 1);
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = how.overlap ? 1 : 0;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace mpq::dev

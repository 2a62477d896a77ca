// The numbers that the machine model and the kernels' design rest on, from a device: what a node of a graph costs,
// latencies, rates of pipes, tensor cores on normal and subnormal operands, copies into shared memory. Prints one JSON
// object on a line for each part, as it comes, so that a part that fails loses nothing else. first_contact.py runs it
// and reads the lines.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a first_contact.cu -o first_contact && ./first_contact

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "check.cuh"

constexpr int kLoop = 256;  // turns of loops that are timed by the clock

struct Device {
  int index = 0, multiprocessors = 0, capability = 0, l2_bytes = 0, shared_bytes = 0;
};

template <class T>
T* allocate(size_t count) {
  T* memory = nullptr;
  CHECK(cudaMalloc(&memory, count * sizeof(T)));
  CHECK(cudaMemset(memory, 0, count * sizeof(T)));
  return memory;
}

// Median of the milliseconds of `work`, by events.
template <class Work>
double median_ms(int times, cudaStream_t stream, const Work& work) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> found;
  for (int i = 0; i < times + 2; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    work();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) found.push_back(ms);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  std::sort(found.begin(), found.end());
  return found[found.size() / 2];
}

// Numbers without a pattern: memory and tensor cores may be faster on zeros.
__global__ void fill(uint32_t* out, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u;
    out[i] = (h ^ h >> 15) * 2246822519u;
  }
}

__device__ uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// ---- clock: cycles of the multiprocessor in a known time

__global__ void clock_rate(long long cycles, uint64_t* out) {
  const long long begin = clock64();
  const uint64_t first = nanoseconds();
  while (clock64() - begin < cycles) {
  }
  out[0] = clock64() - begin;
  out[1] = nanoseconds() - first;
}

void measure_clock() {
  uint64_t* out = allocate<uint64_t>(2);
  uint64_t host[2] = {};
  for (int i = 0; i < 3; ++i) clock_rate<<<1, 1>>>(50'000'000, out);
  CHECK(cudaGetLastError());
  CHECK(cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost));
  std::printf("{\"clock_hz\": %.0f}\n", 1e9 * host[0] / host[1]);
  CHECK(cudaFree(out));
}

// ---- a chain of kernels in a graph, each `spin` cycles long: what the step from one to the next costs

__global__ void __launch_bounds__(256, 1) node(uint32_t* counters, long long spin, bool overlap) {
  extern __shared__ uint32_t shared[];
#if __CUDA_ARCH__ >= 900
  if (overlap) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
#endif
  const long long begin = clock64();
  while (clock64() - begin < spin) {
  }
  if (threadIdx.x == 0) {
    shared[0] = counters[blockIdx.x];
    counters[blockIdx.x] = shared[0] + 1;
  }
}

double chain_us(const Device& device, int shared_bytes, bool overlap, long long spin) {
  constexpr int kNodes = 200;
  uint32_t* counters = allocate<uint32_t>(device.multiprocessors);
  CHECK(cudaFuncSetAttribute(node, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes));
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t made;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kNodes; ++i) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(device.multiprocessors);
    config.blockDim = dim3(256);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = overlap;
    CHECK(cudaLaunchKernelEx(&config, node, counters, spin, overlap));
  }
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&made, graph, 0));
  const double ms = median_ms(15, stream, [&] { CHECK(cudaGraphLaunch(made, stream)); });
  CHECK(cudaGraphExecDestroy(made));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
  CHECK(cudaFree(counters));
  return 1e3 * ms / kNodes;
}

void measure_chains(const Device& device) {
  const char* separator = "{\"chain\": [";
  for (int shared_bytes : {1024, 96 * 1024, 160 * 1024}) {
    for (int overlap = 0; overlap <= (device.capability >= 90); ++overlap) {
      for (long long spin : {0ll, 10'000ll}) {
        if (shared_bytes > device.shared_bytes) continue;
        std::printf("%s{\"shared_bytes\": %d, \"overlap\": %s, \"spin_cycles\": %lld, \"us\": %.3f}", separator,
                    shared_bytes, overlap ? "true" : "false", spin, chain_us(device, shared_bytes, overlap, spin));
        separator = ", ";
      }
    }
  }
  std::printf("]}\n");
}

// ---- latencies, each a chain in which every step waits for the one before it

__constant__ uint32_t constant_chain[64];

__global__ void latencies(uint32_t* chase, uint32_t steps, uint32_t* cells, long long* out) {
  __shared__ alignas(16) uint32_t shared[1024];
  for (int i = 0; i < 1024; ++i) shared[i] = (i + 32) % 1024;
  uint32_t j = 0;
  const auto timed = [&](int place, int turns, auto step) {
    const long long begin = clock64();
    for (int i = 0; i < turns; ++i) step(i);
    out[place] = (clock64() - begin) * 100 / turns;
  };
  timed(0, kLoop, [&](int) { j = shared[j]; });
  timed(1, kLoop, [&](int) { j = constant_chain[j]; });
  const uint32_t zeros = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  for (int i = 0; i < 1024; ++i) shared[i] = 0;
  timed(2, kLoop, [&](int) { asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+r"(j)); });
  j = 0;
  for (uint32_t i = 0; i < steps; ++i) j = __ldcg(chase + j);  // into L2
  timed(3, kLoop, [&](int) { j = __ldcg(chase + j); });
  j = 0;
  timed(4, 64, [&](int) { j = atomicAdd(cells + j, 0u); });
  timed(5, 64, [&](int i) {
    __stcg(cells + 64, i);
    __threadfence();
  });
  timed(6, 64, [&](int) { __threadfence(); });
  out[7] = j + zeros;
}

// Those that take a whole warp, or several.
__global__ void warp_latencies(long long* out) {
  __shared__ alignas(16) uint32_t shared[1024];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) shared[i] = 0;
  __syncthreads();
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + threadIdx.x % 32 * 16;
  uint32_t v = 0;
  long long begin = clock64();
  for (int i = 0; i < kLoop; ++i) v = __shfl_xor_sync(0xffffffff, v, 1);
  long long shuffle = clock64() - begin;
  begin = clock64();
  for (int i = 0; i < kLoop; ++i) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(v) : "r"(base + v) : "memory");
  }
  long long matrix = clock64() - begin;
  __syncthreads();
  begin = clock64();
  for (int i = 0; i < kLoop; ++i) __syncthreads();
  long long barrier = clock64() - begin;
  if (threadIdx.x == 0) {
    out[0] = shuffle * 100 / kLoop;
    out[1] = matrix * 100 / kLoop;
    out[2] = barrier * 100 / kLoop;
    out[3] = v;
  }
}

__global__ void link_chain(uint32_t* chase, uint32_t stride, uint32_t count) {
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) chase[i * stride] = (i + 1) % count * stride;
}

__global__ void memory_latency(const uint32_t* chase, int steps, long long* out) {
  uint32_t j = 0;
  const long long begin = clock64();
  for (int i = 0; i < steps; ++i) j = __ldcg(chase + j);
  out[0] = (clock64() - begin) * 100 / steps;
  out[1] = j;
}

// data: `words` words, rewritten here.
void measure_latencies(uint32_t* data, size_t words) {
  uint32_t* cells = allocate<uint32_t>(128);
  long long* out = allocate<long long>(8);
  long long host[8], whole[4], memory[2];
  uint32_t chain[64];
  for (int i = 0; i < 64; ++i) chain[i] = (i + 1) % 64;
  CHECK(cudaMemcpyToSymbol(constant_chain, chain, sizeof chain));
  constexpr uint32_t kSteps = 4096, kStride = 96;  // 1.5 MB, no two steps in one line
  for (int i = 0; i < 2; ++i) {                    // the first one loads the code
    link_chain<<<1, 256>>>(data, kStride, kSteps);
    latencies<<<1, 1>>>(data, kSteps, cells, out);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost));
    warp_latencies<<<1, 256>>>(out);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(whole, out, sizeof whole, cudaMemcpyDeviceToHost));
  }
  // 256 lines, a megabyte and a bit apart; then everything else passes through L2.
  constexpr uint32_t kFar = 262144 + 1056, kLines = 255;
  link_chain<<<1, 256>>>(data, kFar, kLines);
  const size_t rest = size_t{kFar} * (kLines + 1);
  fill<<<1024, 256>>>(data + rest, words - rest);
  memory_latency<<<1, 1>>>(data, kLines, out);
  CHECK(cudaGetLastError());
  CHECK(cudaMemcpy(memory, out, sizeof memory, cudaMemcpyDeviceToHost));
  std::printf(
      "{\"cycles\": {\"shared\": %.1f, \"constant\": %.1f, \"special\": %.1f, \"l2\": %.1f, \"atomic\": %.1f, "
      "\"store_and_fence\": %.1f, \"fence\": %.1f, \"shuffle\": %.1f, \"matrix\": %.1f, \"barrier_of_8_warps\": %.1f, "
      "\"dram\": %.1f}}\n",
      host[0] / 100., host[1] / 100., host[2] / 100., host[3] / 100., host[4] / 100., host[5] / 100., host[6] / 100.,
      whole[0] / 100., whole[1] / 100., whole[2] / 100., memory[0] / 100.);
  CHECK(cudaFree(cells));
  CHECK(cudaFree(out));
}

// ---- pipes: cycles of one scheduler for an instruction of a warp, eight chains in each of four warps

enum Pipe { kInt, kImad, kFma, kHalf, kSpecial, kPipes };
constexpr const char* kPipeNames[kPipes] = {"int", "imad", "fma", "half", "special"};

template <int kPipe>
__device__ void operate(uint32_t& v, uint32_t other) {
  if constexpr (kPipe == kInt) asm volatile("lop3.b32 %0, %0, %1, %1, 0x96;" : "+r"(v) : "r"(other));
  if constexpr (kPipe == kImad) asm volatile("mad.lo.u32 %0, %0, %1, %1;" : "+r"(v) : "r"(other));
  if constexpr (kPipe == kFma) asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+r"(v) : "r"(other));
  if constexpr (kPipe == kHalf) asm volatile("fma.rn.f16x2 %0, %0, %1, %1;" : "+r"(v) : "r"(other));
  if constexpr (kPipe == kSpecial) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+r"(v));
}

template <int kPipe>
__global__ void pipe(uint32_t seed, long long* out, uint32_t* sink) {
  uint32_t v[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = seed + i + threadIdx.x;
  __syncthreads();
  const long long begin = clock64();
  for (int i = 0; i < kLoop; ++i) {
#pragma unroll
    for (int k = 0; k < 32; ++k) operate<kPipe>(v[k % 8], seed);
  }
  __syncthreads();
  if (threadIdx.x == 0) out[0] = clock64() - begin;
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum ^= v[i];
  if (sum == 0xdeadbeef) *sink = sum;
}

template <int kPipe>
void measure_pipe(long long* out, uint32_t* sink) {
  constexpr int kWarps = 16;
  for (int i = 0; i < 2; ++i) pipe<kPipe><<<1, 32 * kWarps>>>(0x3c003c01u, out, sink);
  CHECK(cudaGetLastError());
  long long cycles = 0;
  CHECK(cudaMemcpy(&cycles, out, sizeof cycles, cudaMemcpyDeviceToHost));
  std::printf("%s\"%s\": %.3f", kPipe ? ", " : "{\"pipes\": {", kPipeNames[kPipe], cycles / (kLoop * 32. * kWarps / 4));
  if constexpr (kPipe + 1 < kPipes) measure_pipe<kPipe + 1>(out, sink);
}

void measure_pipes() {
  long long* out = allocate<long long>(1);
  uint32_t* sink = allocate<uint32_t>(1);
  measure_pipe<0>(out, sink);
  std::printf("}}\n");
  CHECK(cudaFree(out));
  CHECK(cudaFree(sink));
}

// Shared memory: bytes a cycle of 16-byte loads by every lane.
__global__ void shared_loads(long long* out, uint32_t* sink) {
  __shared__ uint4 data[1024];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) data[i] = make_uint4(i, i * 3, i * 5, i * 7);
  __syncthreads();
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(data + threadIdx.x % 512));
  uint32_t sum = 0;
  const long long begin = clock64();
  for (int i = 0; i < kLoop; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint4 v;
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(at + 2048 * k)
                   : "memory");
      sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) out[0] = clock64() - begin;
  if (sum == 0xdeadbeef) *sink = sum;
}

void measure_shared() {
  long long* out = allocate<long long>(1);
  uint32_t* sink = allocate<uint32_t>(1);
  for (int i = 0; i < 2; ++i) shared_loads<<<1, 512>>>(out, sink);
  CHECK(cudaGetLastError());
  long long cycles = 0;
  CHECK(cudaMemcpy(&cycles, out, sizeof cycles, cudaMemcpyDeviceToHost));
  std::printf("{\"shared_rate\": %.1f}\n", kLoop * 4. * 512 * 16 / cycles);
  CHECK(cudaFree(out));
  CHECK(cudaFree(sink));
}

// ---- m16n8k16 of fp16: cycles of a scheduler for each, and whether the sums are exact

__global__ void tensor(uint32_t a, uint32_t b, long long* out, float* sums) {
  float d[8][4] = {};
  __syncthreads();
  const long long begin = clock64();
  for (int i = 0; i < kLoop; ++i) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
          : "+f"(d[k][0]), "+f"(d[k][1]), "+f"(d[k][2]), "+f"(d[k][3])
          : "r"(a), "r"(b));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x == 0) out[0] = clock64() - begin;
  float least = d[0][0], most = d[0][0];
  for (auto& row : d) {
    for (float v : row) least = fminf(least, v), most = fmaxf(most, v);
  }
  sums[2 * (blockIdx.x * blockDim.x + threadIdx.x)] = least;
  sums[2 * (blockIdx.x * blockDim.x + threadIdx.x) + 1] = most;
}

void measure_tensor_cores(const Device& device) {
  long long* out = allocate<long long>(1);
  float* sums = allocate<float>(2 * 512 * device.multiprocessors);
  const char* separator = "{\"hmma\": [";
  for (int warps : {4, 8, 16}) {
    // 1, and the code 15 where its bits stand: 15 * 2^-24; times 2^-2 each, 16 columns, kLoop times.
    for (int subnormal = 0; subnormal < 2; ++subnormal) {
      const double wanted = (subnormal ? 15. / (1 << 24) : 1.) * 0.25 * 16 * kLoop;
      for (int i = 0; i < 2; ++i) {
        tensor<<<device.multiprocessors, 32 * warps>>>(subnormal ? 0x000f000fu : 0x3c003c00u, 0x34003400u, out, sums);
      }
      CHECK(cudaGetLastError());
      std::vector<float> host(2 * 32 * warps * device.multiprocessors);
      long long cycles = 0;
      CHECK(cudaMemcpy(host.data(), sums, host.size() * sizeof(float), cudaMemcpyDeviceToHost));
      CHECK(cudaMemcpy(&cycles, out, sizeof cycles, cudaMemcpyDeviceToHost));
      const bool exact = std::all_of(host.begin(), host.end(), [&](float v) { return v == wanted; });
      std::printf("%s{\"warps\": %d, \"subnormal\": %s, \"cycles\": %.3f, \"exact\": %s}", separator, warps,
                  subnormal ? "true" : "false", cycles / (kLoop * 8. * warps / 4), exact ? "true" : "false");
      separator = ", ";
    }
  }
  std::printf("]}\n");
  CHECK(cudaFree(out));
  CHECK(cudaFree(sums));
}

// ---- copies into shared memory: a ring for each warp, filled by its lanes (16 bytes each) or by bulk copies of lane 0

__device__ void wait_for_groups(int left) {  // the instruction takes no register
  if (left == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (left == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (left == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  if (left >= 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
}

constexpr int kBarrierBytes = 1024;
constexpr int kMostDepth = 4;

// Each warp reads `per_warp` bytes, `depth` pieces on their way at a time, of depth + 1 slots.
template <bool kBulk>
__global__ void __launch_bounds__(512, 1)
    copies(const char* from, uint64_t per_warp, uint32_t piece, int depth, uint32_t* sink) {
#if __CUDA_ARCH__ >= 900
  constexpr bool kCanBulk = true;
#else
  constexpr bool kCanBulk = false;
#endif
  extern __shared__ __align__(128) char memory[];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, slots = depth + 1;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(memory)),
                 barriers [[maybe_unused]] = base + warp * slots * 8,
                 ring = base + kBarrierBytes + warp * slots * piece;
  const char* mine = from + (uint64_t{blockIdx.x} * warps + warp) * per_warp;
  const uint32_t pieces = static_cast<uint32_t>(per_warp / piece);
  uint32_t sum = 0;
#if __CUDA_ARCH__ >= 900
  if constexpr (kBulk) {
    if (lane < slots) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * lane) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
  }
#endif
  const auto fetch = [&](uint32_t i) {
    const uint32_t to = ring + i % slots * piece;
    const char* source = mine + uint64_t{i} * piece;
    if constexpr (kBulk && kCanBulk) {
#if __CUDA_ARCH__ >= 900
      if (i < pieces && lane == 0) {
        const uint32_t barrier = barriers + 8 * (i % slots);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(piece) : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
            "l"(source), "r"(piece), "r"(barrier)
            : "memory");
      }
#endif
    } else {
      for (uint32_t at = 16 * lane; i < pieces && at < piece; at += 512) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(source + at) : "memory");
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
  };
  for (int i = 0; i < depth; ++i) fetch(i);
  for (uint32_t i = 0; i < pieces; ++i) {
    if constexpr (kBulk && kCanBulk) {
#if __CUDA_ARCH__ >= 900
      uint32_t done = 0;
      while (!done) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(barriers + 8 * (i % slots)), "r"(i / slots & 1)
                     : "memory");
      }
#endif
    } else {
      wait_for_groups(depth - 1);
      __syncwarp();
    }
    fetch(i + depth);  // into the slot that all lanes left before the last __syncwarp
    for (uint32_t at = 16 * lane; at < piece; at += 512) {
      uint4 v;
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(ring + i % slots * piece + at)
                   : "memory");
      sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    __syncwarp();
  }
  if (sum == 0xdeadbeef) *sink = sum;
}

struct Ring {
  int kilobytes;  // on their way in one multiprocessor
  int warps, piece, depth;
};
constexpr Ring kRings[] = {{4, 8, 512, 1},   {8, 8, 512, 2},   {16, 8, 1024, 2}, {24, 8, 1024, 3},  {32, 8, 2048, 2},
                           {48, 8, 2048, 3}, {64, 8, 2048, 4}, {96, 8, 4096, 3}, {128, 8, 4096, 4}, {144, 12, 4096, 3}};

template <bool kBulk>
void launch_copies(const Device& device, const Ring& r, const char* from, uint64_t bytes, uint32_t* sink,
                   cudaStream_t stream) {
  const uint64_t per_warp = bytes / (uint64_t(device.multiprocessors) * r.warps) / r.piece * r.piece;
  const uint32_t shared = kBarrierBytes + r.warps * (r.depth + 1) * r.piece;
  copies<kBulk><<<device.multiprocessors, 32 * r.warps, shared, stream>>>(from, per_warp, r.piece, r.depth, sink);
}

// GB/s of one kernel over all of `bytes`; 0 where the device cannot.
template <bool kBulk>
double copies_gbps(const Device& device, const Ring& r, const char* from, uint64_t bytes, uint32_t* sink) {
  if ((kBulk && device.capability < 90) || kBarrierBytes + r.warps * (r.depth + 1) * r.piece > device.shared_bytes) {
    return 0;
  }
  const uint64_t piece = uint64_t(device.multiprocessors) * r.warps * r.piece;
  const double ms = median_ms(5, nullptr, [&] { launch_copies<kBulk>(device, r, from, bytes, sink, nullptr); });
  return bytes / piece * piece / ms / 1e6;
}

// us of one kernel that only reads `bytes`, among as many in a graph as `all` bytes hold: what no product can beat.
double read_us(const Device& device, const char* from, uint64_t all, uint64_t bytes, uint32_t* sink) {
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t made;
  const int nodes = static_cast<int>(all / bytes);
  const Ring r = device.shared_bytes > 112 * 1024 ? Ring{64, 8, 2048, 4} : Ring{48, 8, 2048, 3};
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < nodes; ++i) {
    if (device.capability >= 90) {
      launch_copies<true>(device, r, from + i * bytes, bytes, sink, stream);
    } else {
      launch_copies<false>(device, r, from + i * bytes, bytes, sink, stream);
    }
    CHECK(cudaGetLastError());
  }
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&made, graph, 0));
  const double ms = median_ms(9, stream, [&] { CHECK(cudaGraphLaunch(made, stream)); });
  CHECK(cudaGraphExecDestroy(made));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
  return 1e3 * ms / nodes;
}

void measure_copies(const Device& device, const char* data, uint64_t bytes) {
  uint32_t* sink = allocate<uint32_t>(1);
  CHECK(cudaFuncSetAttribute(copies<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes));
  CHECK(cudaFuncSetAttribute(copies<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes));
  const char* separator = "{\"copies\": [";
  for (const Ring& r : kRings) {
    std::printf(
        "%s{\"kb\": %d, \"warps\": %d, \"piece\": %d, \"depth\": %d, \"lanes_gbps\": %.0f, \"bulk_gbps\": %.0f}",
        separator, r.kilobytes, r.warps, r.piece, r.depth, copies_gbps<false>(device, r, data, bytes, sink),
        copies_gbps<true>(device, r, data, bytes, sink));
    separator = ", ";
  }
  std::printf("]}\n");
  // A third of L2, read again and again.
  const uint64_t near = std::min<uint64_t>(device.l2_bytes / 3, 16 << 20);
  std::printf("{\"l2_gbps\": %.0f}\n", copies_gbps<false>(device, kRings[5], data, near, sink));
  separator = "{\"reads\": [";
  for (uint64_t mb : {8, 16, 32, 64}) {
    std::printf("%s{\"mb\": %d, \"us\": %.2f}", separator, static_cast<int>(mb),
                read_us(device, data, bytes, mb * 1'000'000, sink));
    separator = ", ";
  }
  std::printf("]}\n");
  CHECK(cudaFree(sink));
}

static_assert(kRings[6].depth <= kMostDepth, "wait_for_groups knows no deeper ring");

int main() {
  cudaDeviceProp properties{};
  CHECK(cudaGetDeviceProperties(&properties, 0));
  Device device;
  device.multiprocessors = properties.multiProcessorCount;
  device.capability = properties.major * 10 + properties.minor;
  device.l2_bytes = properties.l2CacheSize;
  device.shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
  std::printf(
      "{\"device\": \"%s\", \"capability\": %d, \"multiprocessors\": %d, \"l2_bytes\": %d, \"shared_bytes\": %d}\n",
      properties.name, device.capability, device.multiprocessors, device.l2_bytes, device.shared_bytes);
  const size_t words = size_t{1} << 28;  // 1 GiB
  uint32_t* data = nullptr;
  CHECK(cudaMalloc(&data, 4 * words));
  fill<<<2048, 256>>>(data, words);
  CHECK(cudaDeviceSynchronize());
  measure_clock();
  measure_chains(device);
  measure_copies(device, reinterpret_cast<const char*>(data), 4 * words);
  measure_pipes();
  measure_shared();
  measure_tensor_cores(device);
  measure_latencies(data, words);
  CHECK(cudaDeviceSynchronize());
  std::printf("{\"complete\": true}\n");
  return 0;
}

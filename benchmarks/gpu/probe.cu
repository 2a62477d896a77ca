// What the kernels' design assumes of a GPU, measured before anything relies on it. Prints one JSON object.
//
//   fp16_mma, bf16_mma, fp16_wgmma: are products of subnormal A operands exact? `mismatches` must be 0. A code that is
//     masked out of a packed word is such an operand (docs/format.md, "Why this layout"): bits v of a half mean
//     v * 2^-24 for every v < 2048, and bits v of a bf16 mean v * 2^-133 for every v < 256.
//   copy_gbps, read_gbps: bytes moved by a device copy (read + write) and bytes read by a kernel that only reads.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a probe.cu -o probe && ./probe

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.cuh"

// One m16n8k16 product: every A element is the 16-bit pattern `a`, B is x in row k = 0 and zero below, so that each
// accumulator is one product. out: [values of a][8 columns].
template <bool kBf16>
__global__ void mma_products(const uint16_t* a_bits, const uint16_t* x_bits, float* out) {
  const uint32_t a = a_bits[blockIdx.x] * 0x00010001u;
  const int lane = threadIdx.x;
  // B fragment: lane holds rows k = 2 (lane % 4) + {0, 1} of column lane / 4 in the first register.
  const uint32_t b0 = lane % 4 == 0 ? x_bits[lane / 4] : 0u, b1 = 0u;
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  if constexpr (kBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a), "r"(b0), "r"(b1));
  }
  // Row 0 of the result: lanes 0..3, columns 2 lane and 2 lane + 1.
  if (lane < 4) {
    out[blockIdx.x * 8 + 2 * lane] = d[0];
    out[blockIdx.x * 8 + 2 * lane + 1] = d[1];
  }
}

// The same through wgmma m64n8k16 with A in registers and B in shared memory: two core matrices of 8 columns x 8 k.
__global__ void wgmma_products(const uint16_t* a_bits, const uint16_t* x_bits, float* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __shared__ alignas(128) uint16_t b[2 * 64];
  if (threadIdx.x < 128) b[threadIdx.x] = threadIdx.x < 64 && threadIdx.x % 8 == 0 ? x_bits[threadIdx.x / 8] : 0;
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  const uint32_t a = a_bits[blockIdx.x] * 0x00010001u;
  const uint64_t address = static_cast<uint64_t>(__cvta_generic_to_shared(b));
  // No swizzle, K-major: start address, then the byte distance of core matrices along K and along N, all in 16 bytes.
  const uint64_t descriptor = (address & 0x3FFFF) >> 4 | (128ull >> 4) << 16 | (256ull >> 4) << 32;
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, {%4,%4,%4,%4}, %5, 1, 1, 1, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a), "l"(descriptor));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  if (threadIdx.x < 4) {
    out[blockIdx.x * 8 + 2 * threadIdx.x] = d[0];
    out[blockIdx.x * 8 + 2 * threadIdx.x + 1] = d[1];
  }
#endif
}

__global__ void read_only(const uint4* data, size_t count, uint32_t* sink) {
  uint32_t sum = 0;
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count; i += 4 * stride) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j * stride >= count) break;
      const uint4 v = __ldcs(data + i + j * stride);
      sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  if (sum == 0xdeadbeef) *sink = sum;  // never true for zeroed data, but the compiler cannot know
}

using Kernel = void (*)(const uint16_t*, const uint16_t*, float*);

// Products that are not the exact a * x. decode_a, decode_x turn patterns into numbers.
template <class DecodeA, class DecodeX>
int mismatches(Kernel kernel, int threads, int values, const std::vector<uint16_t>& xs, DecodeA decode_a,
               DecodeX decode_x) {
  std::vector<uint16_t> patterns(values);
  for (int v = 0; v < values; ++v) patterns[v] = static_cast<uint16_t>(v);
  uint16_t *a = nullptr, *x = nullptr;
  float* out = nullptr;
  CHECK(cudaMalloc(&a, values * sizeof(uint16_t)));
  CHECK(cudaMalloc(&x, 8 * sizeof(uint16_t)));
  CHECK(cudaMalloc(&out, values * 8 * sizeof(float)));
  CHECK(cudaMemcpy(a, patterns.data(), values * sizeof(uint16_t), cudaMemcpyHostToDevice));
  std::vector<float> host(values * 8);
  int wrong = 0;
  for (size_t first = 0; first + 8 <= xs.size(); first += 8) {
    CHECK(cudaMemset(out, 0xff, values * 8 * sizeof(float)));  // NaN: an output that nobody writes is a mismatch
    CHECK(cudaMemcpy(x, xs.data() + first, 8 * sizeof(uint16_t), cudaMemcpyHostToDevice));
    kernel<<<values, threads>>>(a, x, out);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(host.data(), out, host.size() * sizeof(float), cudaMemcpyDeviceToHost));
    for (int v = 0; v < values; ++v)
      for (int n = 0; n < 8; ++n)
        wrong += !(static_cast<double>(host[v * 8 + n]) == decode_a(v) * decode_x(xs[first + n]));
  }
  CHECK(cudaFree(a));
  CHECK(cudaFree(x));
  CHECK(cudaFree(out));
  return wrong;
}

double half_value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
double bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

template <class Work>
double best_seconds(const Work& work) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  double best = 1e30;
  for (int i = 0; i < 20; ++i) {
    CHECK(cudaEventRecord(begin));
    work();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    best = std::min(best, ms * 1e-3);
  }
  return best;
}

int main(int argc, char**) {
  const bool quick = argc > 1;  // any argument: few products and no bandwidth, for the sanitizers
  cudaDeviceProp device{};
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::vector<uint16_t> halves, bf16s;
  for (uint32_t bits = 0; bits < 0x7c00; bits += quick ? 1999 : 61)
    halves.push_back(static_cast<uint16_t>(bits | (bits % 2) << 15));
  // x * 2^100 with |x| in 2^-20 .. 2^20: the exact pre-scaling that bf16 activations would need.
  for (uint32_t exponent = 80; exponent < (quick ? 82 : 121); ++exponent)
    for (uint32_t mantissa = 0; mantissa < 128; mantissa += 9)
      bf16s.push_back(static_cast<uint16_t>((exponent + 127) << 7 | mantissa));
  const auto half_code = [](int v) { return std::ldexp(v, -24); };
  const auto bf16_code = [](int v) { return std::ldexp(v, -133); };
  const int fp16_mma = mismatches(mma_products<false>, 32, 2048, halves, half_code, half_value);
  const int bf16_mma = mismatches(mma_products<true>, 32, 256, bf16s, bf16_code, bf16_value);
  const bool hopper = device.major == 9;
  const int wgmma = hopper ? mismatches(wgmma_products, 128, 2048, halves, half_code, half_value) : -1;

  const size_t bytes = quick ? size_t{1} << 20 : size_t{1} << 30;
  char *from = nullptr, *to = nullptr;
  uint32_t* sink = nullptr;
  CHECK(cudaMalloc(&from, bytes));
  CHECK(cudaMalloc(&to, bytes));
  CHECK(cudaMalloc(&sink, sizeof(uint32_t)));
  CHECK(cudaMemset(from, 0, bytes));
  const double copy = best_seconds([&] { CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice)); });
  const double read = best_seconds([&] {
    read_only<<<device.multiProcessorCount * 8, 512>>>(reinterpret_cast<const uint4*>(from), bytes / 16, sink);
    CHECK(cudaGetLastError());
  });
  std::printf(
      "{\"device\": \"%s\", \"sm\": %d, \"fp16_mma_mismatches\": %d, \"bf16_mma_mismatches\": %d, "
      "\"fp16_wgmma_mismatches\": %s, \"products_checked\": %zu, \"copy_gbps\": %.0f, \"read_gbps\": %.0f}\n",
      device.name, device.major * 10 + device.minor, fp16_mma, bf16_mma,
      hopper ? std::to_string(wgmma).c_str() : "null", halves.size() / 8 * 8 * 2048, 2e-9 * bytes / copy,
      1e-9 * bytes / read);
  return 0;
}

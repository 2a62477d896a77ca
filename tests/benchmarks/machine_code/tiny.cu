// Small kernels for test_gpu_model.py: their machine code, tiny_sm90.sass beside this file, is emulated and timed
// there, with results and cycles by hand. Made by CUDA 13.0 with
//
//     nvcc -std=c++20 -O3 -arch=sm_90 -cubin -o tiny.cubin tiny.cu
//     nvdisasm -c -ndf -hex tiny.cubin | grep -v -E '^\s*$' > tiny_sm90.sass
#include <cstdint>

// out[warp] += (sum of i * i for i < n + warp) / divisor: a loop, and a division of integers by way of floats.
extern "C" __global__ void sums_kernel(uint32_t* out, uint32_t n, uint32_t divisor) {
  uint32_t warp = threadIdx.x / 32, sum = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < n + warp; ++i) sum += i * i;
  if (threadIdx.x % 32 == 0) atomicAdd(out + warp, sum / divisor);
}

// A chain of dependent products: latency alone.
extern "C" __global__ void chain_kernel(float* out, float a) {
  float x = a;
#pragma unroll
  for (int i = 0; i < 16; ++i) x = x * a + 1.0f;
  out[threadIdx.x] = x;
}

// Warp 0 leaves a number for the others behind a barrier; each loops as often as it says.
extern "C" __global__ void pass_kernel(uint32_t* out, uint32_t rounds) {
  __shared__ uint32_t shared[32];
  if (threadIdx.x == 0) shared[0] = rounds * 3;
  __syncthreads();
  uint32_t left = shared[0], x = 1;
#pragma unroll 1
  for (uint32_t i = 0; i < left; ++i) x = x * 3 + i;
  if (threadIdx.x % 32 == 0) atomicAdd(out + threadIdx.x / 32, x);
}

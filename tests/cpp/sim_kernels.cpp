// Kernels for tests/backends/cuda/test_simulator.py: one for each primitive of csrc/cuda/device.cuh that is right, and
// in sim_bugs.cpp one for each kind of bug. All take the same parameters; the table at the end names them.
#include "sim_kernels.h"

#include <cstring>

using namespace mpq::dev;

namespace {

MPQ_DEVICE uint32_t word(const uint16_t* low, const uint16_t* high) {
  return ld_constant(low) | static_cast<uint32_t>(ld_constant(high)) << 16;
}

// out[16][8] (fp32, in and out) += in0[16][16] * in1[16][8].
template <bool kBf16>
MPQ_KERNEL(32)
mma(const MPQ_GRID_CONSTANT Params p) {
  const auto* a16 = static_cast<const uint16_t*>(p.in0);
  const auto* b16 = static_cast<const uint16_t*>(p.in1);
  auto* out = static_cast<float*>(p.out);
  const uint32_t g = thread_index() / 4, q = thread_index() % 4;
  uint32_t a[4], b[2];
  float d[4];
  for (uint32_t i = 0; i < 4; ++i) {
    const uint16_t* at = a16 + (g + 8 * (i % 2)) * 16 + 2 * q + 8 * (i / 2);
    a[i] = word(at, at + 1);
    d[i] = ld_global(&out[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2]);
  }
  for (uint32_t i = 0; i < 2; ++i) b[i] = word(&b16[(2 * q + 8 * i) * 8 + g], &b16[(2 * q + 8 * i + 1) * 8 + g]);
  if (kBf16) {
    mma_bf16(d, a, b[0], b[1]);
  } else {
    mma_f16(d, a, b[0], b[1]);
  }
  for (uint32_t i = 0; i < 4; ++i) st_global(&out[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2], d[i]);
}

// in0: four 8x8 matrices of 16 bits, one after the other. out[32][4] words: the registers of each lane.
MPQ_KERNEL(32)
ldmatrix(const MPQ_GRID_CONSTANT Params p) {
  const uint32_t lane = thread_index(), at = shared_base() + 16 * lane;
  st_shared(at, ld_constant(static_cast<const uint4*>(p.in0) + lane));
  warp_sync();
  uint32_t r[4];
  ldmatrix_x4(r, at);
  st_global(static_cast<uint4*>(p.out) + lane, make_uint4(r[0], r[1], r[2], r[3]));
}

// out[t] = in0[t ^ 5] + the sum of the 32 values of t's warp.
MPQ_KERNEL(256)
shuffle(const MPQ_GRID_CONSTANT Params p) {
  const uint32_t t = thread_index();
  const float v = ld_constant(static_cast<const float*>(p.in0) + t);
  float sum = v;
  for (int mask = 16; mask; mask /= 2) sum = add(sum, shfl_xor(sum, mask));
  st_global(static_cast<float*>(p.out) + t, add(shfl_xor(v, 5), sum));
}

// out[block][256] = sum over 8 tiles of in0[8][256] read by another thread than the one that copied, through a ring of
// three stages. Tiles of 8-byte copies by the lower half of the block, of 16-byte copies by a quarter.
MPQ_KERNEL(256)
ring(const MPQ_GRID_CONSTANT Params p) {
  const auto* in = static_cast<const float*>(p.in0);
  const uint32_t t = thread_index();
  const auto fetch = [&](uint32_t tile) {
    const uint32_t to = shared_base() + tile % 3 * 1024;
    if (tile < 8 && tile % 2 && t < 128) cp_async8(to + 8 * t, in + 256 * tile + 2 * t);
    if (tile < 8 && tile % 2 == 0 && t < 64) cp_async16(to + 16 * t, in + 256 * tile + 4 * t);
    cp_async_commit();
  };
  fetch(0);
  fetch(1);
  float sum = 0;
  for (uint32_t tile = 0; tile < 8; ++tile) {
    cp_async_wait<1>();
    block_sync();
    fetch(tile + 2);
    sum = add(sum, ld_shared<float>(shared_base() + tile % 3 * 1024 + 4 * (255 - t)));
  }
  st_global(static_cast<float*>(p.out) + block_x() * 256 + t, sum);
}

// The same sum; the first thread of the last warp feeds two stages by bulk copies, the other seven warps use them.
MPQ_KERNEL(256)
bulk_ring(const MPQ_GRID_CONSTANT Params p) {
  const auto* in = static_cast<const float*>(p.in0);
  const uint32_t t = thread_index(), full = shared_base() + 2048, empty = full + 16;
  if (t == 0) {
    for (uint32_t i = 0; i < 2; ++i) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, 7);
    }
    fence_barrier_init();
  }
  block_sync();
  if (t == 224) {
    for (uint32_t tile = 0; tile < 8; ++tile) {
      const uint32_t stage = tile % 2, round = tile / 2;
      mbarrier_wait(empty + 8 * stage, (round & 1) ^ 1);
      mbarrier_expect(full + 8 * stage, 1024);
      bulk_copy(shared_base() + 1024 * stage, in + 256 * tile, 512, full + 8 * stage);
      bulk_copy(shared_base() + 1024 * stage + 512, in + 256 * tile + 128, 512, full + 8 * stage);
    }
  }
  if (t >= 224) return;
  float sum = 0;
  for (uint32_t tile = 0; tile < 8; ++tile) {
    const uint32_t stage = tile % 2;
    mbarrier_wait(full + 8 * stage, tile / 2 & 1);
    sum = add(sum, ld_shared<float>(shared_base() + 1024 * stage + 4 * (255 - t)));
    warp_sync();
    if (t % 32 == 0) mbarrier_arrive(empty + 8 * stage);
  }
  st_global(static_cast<float*>(p.out) + block_x() * 256 + t, sum);
}

// out[128] = sum over blocks of (block + 1) * in0[128], by the block that arrives last, which also clears the counter
// (the first word of the workspace; partial sums follow after 16 bytes).
MPQ_KERNEL(128)
last_arriver(const MPQ_GRID_CONSTANT Params p) {
  const uint32_t t = thread_index(), block = block_y() * grid_x() + block_x(), blocks = grid_x() * grid_y();
  auto* counter = static_cast<uint32_t*>(p.workspace);
  float* partial = static_cast<float*>(p.workspace) + 4;
  wait_for_earlier_kernels();
  const float v = ld_constant(static_cast<const float*>(p.in0) + t);
  st_global(partial + block * 128 + t, mul(v, static_cast<float>(block + 1)));
  thread_fence();
  block_sync();
  if (t == 0) st_shared(shared_base(), atomic_add(counter, 1));
  block_sync();
  if (ld_shared<uint32_t>(shared_base()) + 1 != blocks) return;
  float sum = 0;
  for (uint32_t b = 0; b < blocks; ++b) sum = add(sum, ld_from_others(partial + b * 128 + t));
  st_global(static_cast<float*>(p.out) + t, sum);
  if (t == 0) st_global(counter, 0u);
  launch_dependents();
}

// in0: 65536 floats. out: their fp16 and bf16 patterns, then the values of all 65536 patterns in fp16 and in bf16.
MPQ_KERNEL(256)
numbers(const MPQ_GRID_CONSTANT Params p) {
  auto* patterns = static_cast<uint16_t*>(p.out);
  auto* values = reinterpret_cast<float*>(patterns + 2 * 65536);
  const uint32_t i = block_x() * thread_count() + thread_index();
  const float v = ld_constant(static_cast<const float*>(p.in0) + i);
  st_global(patterns + i, float_to_f16(v));
  st_global(patterns + 65536 + i, float_to_bf16(v));
  st_global(values + i, f16_to_float(static_cast<uint16_t>(i)));
  st_global(values + 65536 + i, bf16_to_float(static_cast<uint16_t>(i)));
}

// in0 [1]: rounds. So many collectives that clocks restart; what was ordered before stays ordered.
MPQ_KERNEL(64)
long_run(const MPQ_GRID_CONSTANT Params p) {
  const uint32_t rounds = ld_constant(static_cast<const uint32_t*>(p.in0)), t = thread_index();
  st_shared(shared_base() + 4 * t, t);
  for (uint32_t i = 0; i < rounds; ++i) warp_sync();
  block_sync();
  st_global(static_cast<uint32_t*>(p.out) + t, ld_shared<uint32_t>(shared_base() + 4 * (63 - t)));
  block_sync();
  st_shared(shared_base() + 4 * t, t);
}

// in0 [1]: rounds. Many mma in each of the warps of one block.
MPQ_KERNEL(512)
mma_speed(const MPQ_GRID_CONSTANT Params p) {
  const uint32_t rounds = ld_constant(static_cast<const uint32_t*>(p.in0)), a[4] = {};
  float d[4] = {};
  for (uint32_t i = 0; i < rounds; ++i) mma_f16(d, a, i, i);
  st_global(static_cast<float*>(p.out) + thread_index(), d[0]);
}

const Entry kKernels[] = {{"mma_f16", &mma<false>}, {"mma_bf16", &mma<true>},  {"ldmatrix", &ldmatrix},
                          {"shuffle", &shuffle},    {"ring", &ring},           {"bulk_ring", &bulk_ring},
                          {"numbers", &numbers},    {"mma_speed", &mma_speed}, {"last_arriver", &last_arriver},
                          {"long_run", &long_run}};

}  // namespace

extern "C" __attribute__((visibility("default"))) int sim_launch(const char* name, uint32_t grid_x, uint32_t grid_y,
                                                                 uint32_t threads, uint32_t shared_bytes, int overlap,
                                                                 const Params* params) {
  const Launch how{grid_x, grid_y, threads, shared_bytes, nullptr, overlap != 0};
  for (const Entry& entry : kKernels) {
    if (!std::strcmp(entry.name, name)) return launch(entry.kernel, how, *params);
  }
  for (size_t i = 0; i < kBugCount; ++i) {
    if (!std::strcmp(kBugs[i].name, name)) return launch(kBugs[i].kernel, how, *params);
  }
  return -1;
}

// One kernel for each kind of bug that the simulator finds. tests/backends/cuda/test_simulator.py has the text that
// each must give.
#include "sim_kernels.h"

using namespace mpq::dev;

namespace {

// `BUG(name) { body }` is a kernel with its parameters p, its thread t and the start of shared memory at hand.
#define BUG(name)                                                                                           \
  MPQ_DEVICE void name##_body(const Params& p, uint32_t t, uint32_t base);                                  \
  MPQ_KERNEL(256) name(const MPQ_GRID_CONSTANT Params p) { name##_body(p, thread_index(), shared_base()); } \
  MPQ_DEVICE void name##_body([[maybe_unused]] const Params& p, [[maybe_unused]] uint32_t t,                \
                              [[maybe_unused]] uint32_t base)

MPQ_DEVICE const uint4* quads(const Params& p) { return static_cast<const uint4*>(p.in0); }
MPQ_DEVICE const float* floats(const Params& p) { return static_cast<const float*>(p.in0); }
MPQ_DEVICE float* out(const Params& p) { return static_cast<float*>(p.out); }

// ---- shared memory ----

BUG(shared_past_end) { st_shared(base + 1024 + 4 * t, 1.0f); }
BUG(shared_address_zero) { st_shared(4 * t, 1.0f); }
BUG(shared_misaligned) { st_shared(base + 16 * t + 4, make_uint4(0, 0, 0, 0)); }
BUG(shared_undefined) { st_global(out(p) + t, ld_shared<float>(base + 4 * t)); }

BUG(missing_block_sync) {
  st_shared(base + 4 * t, 1.0f);
  st_global(out(p) + t, ld_shared<float>(base + 4 * ((t + 32) % 64)));
}
BUG(missing_warp_sync) {
  st_shared(base + 4 * t, 1.0f);
  st_global(out(p) + t, ld_shared<float>(base + 4 * (t ^ 1)));
}
BUG(ldmatrix_without_sync) {
  st_shared(base + 16 * (t ^ 1), ld_constant(quads(p) + t));
  uint32_t r[4];
  ldmatrix_x4(r, base + 16 * t);
}
BUG(overwritten_while_read) {
  st_shared(base + 4 * t, 1.0f);
  block_sync();
  const float v = ld_shared<float>(base + 4 * ((t + 32) % 64));
  st_shared(base + 4 * t, v);
}
BUG(overwritten_in_warp) {
  st_shared(base + 4 * t, 1.0f);
  warp_sync();
  ld_shared<float>(base + 4 * (t ^ 1));
  if (t == 31) st_shared(base, 2.0f);
}
BUG(two_writers) { st_shared(base + t / 64 * 4, t); }

// ---- cp.async ----

BUG(missing_wait) {
  cp_async16(base + 16 * t, quads(p) + t);
  cp_async_commit();
  st_global(out(p) + t, ld_shared<float>(base + 16 * t));
}
BUG(missing_commit) {
  cp_async16(base + 16 * t, quads(p) + t);
  cp_async_wait<0>();
  st_global(out(p) + t, ld_shared<float>(base + 16 * t));
}
BUG(wait_for_too_few) {
  cp_async16(base + 16 * t, quads(p) + t);
  cp_async_commit();
  cp_async_wait<1>();
  st_global(out(p) + t, ld_shared<float>(base + 16 * t));
}
BUG(wait_without_block_sync) {
  cp_async16(base + 16 * t, quads(p) + t);
  cp_async_commit();
  cp_async_wait<0>();
  if (t >= 32) st_global(out(p) + t, ld_shared<float>(base + 16 * (t - 32)));
}
BUG(copy_over_readers) {
  st_shared(base + 4 * t, 1.0f);
  block_sync();
  st_global(out(p) + t, ld_shared<float>(base + 4 * ((t + 32) % 64)));
  if (t == 63) cp_async16(base + 128, quads(p) + t);
}
BUG(store_over_copy) {
  cp_async16(base + 16 * t, quads(p) + t);
  st_shared(base + 16 * t, 1.0f);
}
BUG(unwaited_copy) { cp_async16(base + 16 * t, quads(p) + t); }  // no error: counted

// ---- collectives and barriers ----

BUG(diverged) {
  if (t % 2) {
    warp_sync();
  } else {
    shfl_xor(t, 1);
  }
}
BUG(diverged_block_sync) {
  if (t % 2) {
    block_sync();
  } else {
    warp_sync();
  }
}
BUG(lane_exits) {
  if (t == 7) return;
  shfl_xor(t, 1);
}
BUG(half_a_warp) { warp_sync(); }
BUG(shuffle_masks) { shfl_xor(t, static_cast<int>(t % 2)); }
BUG(half_block_sync) {
  if (t < 32) block_sync();
}
BUG(barrier_never_ends) {
  if (t == 0) mbarrier_init(base, 2);
  block_sync();
  if (t == 0) mbarrier_arrive(base);
  mbarrier_wait(base, 0);
}
BUG(barrier_not_initialised) { mbarrier_wait(base, 0); }
BUG(barrier_without_sync) {
  if (t == 32) mbarrier_init(base, 1);
  if (t == 0) mbarrier_arrive(base);
}
BUG(barrier_too_many) {
  if (t == 0) mbarrier_init(base, 1);
  block_sync();
  mbarrier_expect(base, 16);
}

// ---- bulk copies ----

MPQ_DEVICE void start_bulk(const Params& p, uint32_t t, uint32_t base, uint32_t bytes) {
  if (t == 0) mbarrier_init(base + 1024, 1);
  block_sync();
  if (t != 0) return;
  mbarrier_expect(base + 1024, 512);
  bulk_copy(base, p.in0, bytes, base + 1024);
}
BUG(bulk_without_wait) {
  start_bulk(p, t, base, 512);
  block_sync();
  st_global(out(p) + t, ld_shared<float>(base + 4 * t));
}
BUG(bulk_waited_by_one) {
  start_bulk(p, t, base, 512);
  if (t == 0) mbarrier_wait(base + 1024, 0);
  if (t < 32) return;
  st_global(out(p) + t, ld_shared<float>(base + 4 * t));
}
BUG(bulk_bytes) {
  start_bulk(p, t, base, 528);
  mbarrier_wait(base + 1024, 0);
}
BUG(bulk_size) { start_bulk(p, t, base, 24); }
// The second copy does not wait until the readers of the first are done.
BUG(bulk_over_readers) {
  start_bulk(p, t, base, 512);
  mbarrier_wait(base + 1024, 0);
  st_global(out(p) + t, ld_shared<float>(base + 4 * t));
  if (t != 63) return;
  mbarrier_expect(base + 1024, 512);
  bulk_copy(base, p.in0, 512, base + 1024);
}

// ---- global memory ----

BUG(global_past_end) { ld_constant(floats(p) + 4096 + t); }
BUG(global_misaligned) { ld_constant(reinterpret_cast<const uint4*>(floats(p) + 1)); }
BUG(copy_past_end) { cp_async16(base + 16 * t, quads(p) + 1024 + t); }
BUG(store_to_input) { st_global(const_cast<float*>(floats(p)) + t, 0.0f); }
BUG(workspace_undefined) { ld_from_others(static_cast<const float*>(p.workspace) + 4 + t); }
BUG(input_too_early) { ld_constant(static_cast<const float*>(p.in1) + t); }
BUG(input_as_constant) {
  wait_for_earlier_kernels();
  ld_constant(static_cast<const float*>(p.in1) + t);
}
BUG(store_too_early) { st_global(out(p) + t, 0.0f); }
BUG(store_race) { st_global(out(p) + t, static_cast<float>(block_x())); }
BUG(store_race_in_block) { st_global(out(p) + t / 2, 0.0f); }
BUG(constant_written) {
  st_global(out(p) + t, 0.0f);
  ld_constant(out(p) + t);
}
BUG(stale_read) {
  st_global(out(p) + block_x() * 64 + t, 0.0f);
  if (block_x() == 1) ld_global(out(p) + t);
}

// The last block sums, with one step left out.
MPQ_DEVICE void arrive(const Params& p, uint32_t t, uint32_t base, bool fence, bool sync) {
  float* partial = static_cast<float*>(p.workspace) + 4;
  st_global(partial + block_x() * 64 + t, 1.0f);
  if (fence) thread_fence();
  if (sync) block_sync();
  if (t == 0) st_shared(base, atomic_add(static_cast<uint32_t*>(p.workspace), 1));
  block_sync();
  if (ld_shared<uint32_t>(base) + 1 != grid_x()) return;
  for (uint32_t b = 0; b < grid_x(); ++b) ld_from_others(partial + b * 64 + t);
}
BUG(arrive_without_fence) { arrive(p, t, base, false, true); }
BUG(arrive_without_sync) { arrive(p, t, base, true, false); }
BUG(read_without_arriving) {
  st_global(out(p) + block_x() * 64 + t, 1.0f);
  thread_fence();
  block_sync();
  if (block_x() == 1) ld_from_others(out(p) + t);
}

}  // namespace

#define ENTRY(name) {#name, &name}
const Entry kBugs[] = {
    ENTRY(shared_past_end),
    ENTRY(shared_address_zero),
    ENTRY(shared_misaligned),
    ENTRY(shared_undefined),
    ENTRY(missing_block_sync),
    ENTRY(missing_warp_sync),
    ENTRY(ldmatrix_without_sync),
    ENTRY(two_writers),
    ENTRY(overwritten_while_read),
    ENTRY(overwritten_in_warp),
    ENTRY(missing_wait),
    ENTRY(missing_commit),
    ENTRY(wait_for_too_few),
    ENTRY(copy_over_readers),
    ENTRY(wait_without_block_sync),
    ENTRY(store_over_copy),
    ENTRY(unwaited_copy),
    ENTRY(diverged),
    ENTRY(diverged_block_sync),
    ENTRY(lane_exits),
    ENTRY(half_a_warp),
    ENTRY(shuffle_masks),
    ENTRY(half_block_sync),
    ENTRY(barrier_never_ends),
    ENTRY(barrier_without_sync),
    ENTRY(barrier_too_many),
    ENTRY(barrier_not_initialised),
    ENTRY(bulk_without_wait),
    ENTRY(bulk_waited_by_one),
    ENTRY(bulk_bytes),
    ENTRY(bulk_size),
    ENTRY(bulk_over_readers),
    ENTRY(global_past_end),
    ENTRY(global_misaligned),
    ENTRY(copy_past_end),
    ENTRY(store_to_input),
    ENTRY(workspace_undefined),
    ENTRY(input_too_early),
    ENTRY(input_as_constant),
    ENTRY(store_too_early),
    ENTRY(store_race),
    ENTRY(store_race_in_block),
    ENTRY(constant_written),
    ENTRY(stale_read),
    ENTRY(arrive_without_fence),
    ENTRY(arrive_without_sync),
    ENTRY(read_without_arriving),
};
const size_t kBugCount = sizeof kBugs / sizeof kBugs[0];

// Launches: blocks begin, take turns and end on the host's own stack.
#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>

#include "state.h"

namespace mpq::sim {
namespace {

Block* slots[kMaxResident];  // allocated at the first use, kept

Block* allocate_block() {
  auto* block = new Block();
  block->stacks = allocate_stacks(kMaxThreads);
  if (block->stacks) return block;
  delete block;
  return nullptr;
}

void begin_thread(Block& block, uint32_t i) {
  Thread& t = block.thread[i];
  t.block = &block;
  t.warp = &block.warp[i / kLanes];
  t.index = i;
  t.lane = i % kLanes;
  t.bit = 1u << t.lane;
  t.waited_for_earlier = false;
  t.loads_from_others = 0;
  t.fence_event = 0;
  t.copies.clear();
  t.group = 0;
  // Tops of stacks at different distances from a page boundary: otherwise all lanes use the same few cache sets.
  const size_t colour = (i * 320u) % 4096;
  fiber_prepare(t.fiber, block.stacks + i * kStackBytes + kGuardBytes, kStackBytes - kGuardBytes - colour,
                thread_entry);
}

void begin_block(Block& block, uint32_t linear) {
  const Grid& grid = simulation.grid;
  block.x = linear % grid.x;
  block.y = linear / grid.x;
  block.linear = linear;
  block.threads = block.live = grid.threads;
  block.warps = (grid.threads + kLanes - 1) / kLanes;
  block.arrived = 0;
  block.sync_event = block.atomic_event = 0;
  block.barriers.clear();
  block.warp_knows.clear();
  SharedMemory& shared = block.shared;
  shared.bytes = grid.shared_bytes;
  std::memset(shared.data, 0xff, shared.bytes);
  std::memset(shared.written, 0, shared.bytes * 2);
  for (auto& read : shared.read) std::memset(read, 0, shared.bytes * 2);
  for (uint32_t w = 0; w < block.warps; ++w) {
    Warp& warp = block.warp[w];
    const uint32_t lanes = std::min(kLanes, grid.threads - w * kLanes);
    warp.index = w;
    warp.runnable = kAllLanes >> (kLanes - lanes);
    warp.exited = ~warp.runnable;
    warp.arrived = warp.at_block_sync = warp.acquired = 0;
    warp.time = warp.synced = warp.floor = 1;
  }
  for (uint32_t i = 0; i < grid.threads; ++i) begin_thread(block, i);
  ++simulation.counters[kBlocks];
}

// Runs the block until it ends, gives way or fails.
void resume(Block& block) {
  current = &choose(block);
  fiber_switch(simulation.host, current->fiber);
}

void run_blocks(const std::vector<uint32_t>& order) {
  const uint32_t resident = simulation.interleave ? kMaxResident : 1;
  uint32_t running = 0;  // one bit a slot
  size_t next = 0;
  uint32_t last = 0;
  while (!simulation.error[0]) {
    for (uint32_t s = 0; s < resident && next < order.size(); ++s) {
      if (running >> s & 1) continue;
      begin_block(*slots[s], order[next++]);
      running |= 1u << s;
    }
    if (!running) return;
    // In turn, or at random.
    const uint32_t later = running & ~((2u << last) - 1);
    last = simulation.order == Order::kRandom ? pick(running)
                                              : static_cast<uint32_t>(__builtin_ctz(later ? later : running));
    resume(*slots[last]);
    if (slots[last]->live == 0) running &= ~(1u << last);
  }
}

bool check_grid(const Grid& grid) {
  if (!grid.x || !grid.y || !grid.threads || grid.threads > kMaxThreads) {
    record_error("launch of %u x %u blocks of %u threads: at least 1 of each, at most %u threads", grid.x, grid.y,
                 grid.threads, kMaxThreads);
  } else if (static_cast<uint64_t>(grid.x) * grid.y >= 1u << 20) {
    record_error("launch of %u x %u blocks: the simulator takes fewer than 2^20", grid.x, grid.y);
  } else if (grid.shared_bytes > kMaxShared || grid.shared_bytes % 2) {
    record_error("launch with %u bytes of shared memory: an even number up to %u", grid.shared_bytes, kMaxShared);
  }
  return !simulation.error[0];
}

}  // namespace

int run(const Grid& grid, void (*thread)(const void*), const void* call) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (simulation.error[0] || !check_grid(grid)) return kCheckFailed;
  for (uint32_t s = 0; s < (simulation.interleave ? kMaxResident : 1); ++s) {
    if (!slots[s] && !(slots[s] = allocate_block())) {
      record_error("no memory for the stacks of a block");
      return kCheckFailed;
    }
  }
  simulation.grid = grid;
  simulation.call = thread;
  simulation.params = call;
  simulation.event = 0;
  std::fill(std::begin(simulation.counters), std::end(simulation.counters), 0);
  begin_global_checks();
  std::vector<uint32_t> order(grid.x * grid.y);
  std::iota(order.begin(), order.end(), 0u);
  if (simulation.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (simulation.order == Order::kRandom) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
  run_blocks(order);
  current = nullptr;
  return simulation.error[0] ? kCheckFailed : 0;
}

}  // namespace mpq::sim

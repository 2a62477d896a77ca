// Which accesses are ordered before which: see state.h.
#include "state.h"

namespace mpq::sim {
namespace {

// Restarts the clocks of a block whose earlier accesses are all ordered, so that stamps keep to their 22 bits.
void restart_clocks(Block& block) {
  SharedMemory& shared = block.shared;
  for (uint32_t g = 0; g < shared.bytes / 2; ++g) {
    const uint32_t stamp = shared.written[g];
    if (stamp && (stamp & kTimeMask) <= kMaxTime) shared.written[g] = (stamp & ~kTimeMask) | 1;
    shared.read[0][g] = shared.read[1][g] = 0;
  }
  for (Barrier& barrier : block.barriers) {
    barrier.init_stamp = (barrier.init_stamp & ~kTimeMask) | 1;
    barrier.released.assign(block.threads, 0);
  }
  block.warp_knows.assign(block.warp_knows.size(), 0);
  for (uint32_t w = 0; w < block.warps; ++w) block.warp[w].time = block.warp[w].synced = block.warp[w].floor = 2;
}

}  // namespace

void tick(Warp& warp, const Thread& thread) {
  if (++warp.time > kMaxTime) fail(thread, "more than %u collectives of a warp without a block_sync", kMaxTime / 2);
}

void advance(Block& block, Warp& warp) {
  tick(warp, block.thread[warp.index * kLanes]);
  warp.synced = warp.time;
  if (warp.acquired) share_knowledge(block, warp);
}

void order_block(Block& block) {
  bool late = false;
  for (uint32_t w = 0; w < block.warps; ++w) {
    Warp& warp = block.warp[w];
    tick(warp, block.thread[w * kLanes]);
    warp.floor = warp.synced = warp.time;
    warp.acquired = 0;
    late |= warp.time > kMaxTime / 2;
  }
  if (late) restart_clocks(block);
}

bool is_ordered(const Thread& t, uint32_t stamp) {
  const uint32_t other = stamp >> kTimeBits, time = stamp & kTimeMask;
  if (other == t.index) return true;
  const Warp& warp = t.block->warp[other / kLanes];
  if (time < warp.floor || (&warp == t.warp && time < warp.synced)) return true;
  return !t.block->barriers.empty() && time < known_time(t, other);
}

}  // namespace mpq::sim

// Who runs when. Fibers hand over to each other directly while their block runs; the host's own stack is returned to
// when a block ends, gives way to another block, or fails.
//
// Within a warp the next lane is the first, the last or a random runnable one; the warp is left when none of its lanes
// can run (and, in random order, now and then at a collective). Blocks follow the same order.
#include <bit>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace mpq::sim {

Simulation simulation;
Thread* current = nullptr;

uint32_t pick(uint32_t mask) {
  switch (simulation.order) {
    case Order::kForward:
      return static_cast<uint32_t>(__builtin_ctz(mask));
    case Order::kReverse:
      return 31 - static_cast<uint32_t>(__builtin_clz(mask));
    case Order::kRandom:
      break;
  }
  const uint32_t turn = next_random() % 32;
  return (static_cast<uint32_t>(__builtin_ctz(std::rotr(mask, static_cast<int>(turn)))) + turn) % 32;
}

namespace {

// What a thread that cannot run waits at; kNone if it has exited.
Op waits_at(const Thread& t) {
  const Warp& warp = *t.warp;
  if (warp.exited & t.bit) return Op::kNone;
  if (warp.arrived & t.bit) return warp.op;
  return warp.at_block_sync & t.bit ? Op::kBlockSync : Op::kMbarrierWait;
}

[[noreturn]] void fail_stuck(const Block& block) {
  const Thread* first = nullptr;
  const Thread* other = nullptr;
  for (uint32_t i = 0; i < block.threads; ++i) {
    const Thread& t = block.thread[i];
    if (waits_at(t) == Op::kNone) continue;
    if (!first) first = &t;
    if (waits_at(t) != waits_at(*first) && !other) other = &t;
  }
  char rest[120] = "";
  if (other) std::snprintf(rest, sizeof rest, ", %s at %s", describe(other->index), name_of(waits_at(*other)));
  fail(*first, "no thread can continue: %s waits at %s%s; %u of %u threads are at block_sync", describe(first->index),
       name_of(waits_at(*first)), rest, block.arrived, block.threads);
}

void switch_to(Thread& next) {
  Thread& me = *current;
  if (&next == &me) return;
  current = &next;
  fiber_switch(me.fiber, next.fiber);
}

void end_of_thread() {
  Thread& t = *current;
  Block& block = *t.block;
  Warp& warp = *t.warp;
  if (warp.arrived) {
    fail(t, "%s exits while lanes 0x%08x of its warp wait at %s", describe(t.index), warp.arrived, name_of(warp.op));
  }
  if (block.arrived) {
    fail(t, "%s exits while %u of %u threads wait at block_sync", describe(t.index), block.arrived, block.threads);
  }
  simulation.counters[kUnwaitedCopies] += t.copies.size();
  warp.exited |= t.bit;
  warp.runnable &= ~t.bit;
  if (--block.live == 0) {
    for (const Barrier& barrier : block.barriers) simulation.counters[kUnwaitedCopies] += barrier.copies.size();
    leave();
  }
  wait_for_turn();
}

}  // namespace

// A runnable thread of the block. There is one, or the block is stuck.
Thread& choose(Block& block) {
  uint32_t warps = 0;
  for (uint32_t w = 0; w < block.warps; ++w) warps |= static_cast<uint32_t>(block.warp[w].runnable != 0) << w;
  if (!warps) fail_stuck(block);
  const uint32_t w = pick(warps);
  return block.thread[w * kLanes + pick(block.warp[w].runnable)];
}

void thread_entry() {
  simulation.call(simulation.params);
  end_of_thread();
  __builtin_unreachable();
}

// Never 0.
uint32_t next_random() {
  uint32_t& v = simulation.random;
  v ^= v << 13;
  v ^= v >> 17;
  v ^= v << 5;
  return v;
}

Place place() { return {current->index, current->block->x, current->block->y}; }
const Grid& grid() { return simulation.grid; }

void wait_for_turn() {
  Thread& t = *current;
  const uint32_t runnable = t.warp->runnable;
  const bool leave_warp = simulation.order == Order::kRandom && next_random() % 32 == 0;
  switch_to(runnable && !leave_warp ? t.block->thread[t.warp->index * kLanes + pick(runnable)] : choose(*t.block));
}

void leave() {
  fiber_switch(current->fiber, simulation.host);
  __builtin_unreachable();
}

void maybe_switch_block() {
  if (!simulation.interleave || (simulation.order == Order::kRandom && next_random() % 2)) return;
  fiber_switch(current->fiber, simulation.host);
}

void wait_for_earlier_kernels() {
  current->waited_for_earlier = true;
  LateBytes& late = simulation.late;
  if (late.bytes) std::memcpy(late.to, late.from, late.bytes);
  late = {};
}

void block_sync() {
  Thread& t = *current;
  Block& block = *t.block;
  Warp& warp = *t.warp;
  if (warp.arrived) {
    fail(t, "lanes of a warp diverge: this one is at block_sync, lanes 0x%08x at %s", warp.arrived, name_of(warp.op));
  }
  if (block.live != block.threads) {
    fail(t, "block_sync after %u of %u threads have exited", block.threads - block.live, block.threads);
  }
  warp.at_block_sync |= t.bit;
  if (++block.arrived < block.threads) {
    warp.runnable &= ~t.bit;
    wait_for_turn();
    return;
  }
  block.arrived = 0;
  block.sync_event = ++simulation.event;
  for (uint32_t w = 0; w < block.warps; ++w) {
    block.warp[w].at_block_sync = 0;
    block.warp[w].runnable = ~block.warp[w].exited;
  }
  order_block(block);
  maybe_switch_block();
  switch_to(choose(block));
}

}  // namespace mpq::sim

// Barriers in shared memory and the bulk copies that report to them.
//
// A bulk copy lands as late as it may: when a thread waits for the phase that covers it. What a thread had done, or
// knew to be done, when it arrived is known to whoever waits for the phase: vectors of one time for each thread of the
// block, joined at arrivals and waits; the lanes of a warp share what they learnt at their next collective.

// The joins are to be vectorised whatever the flags of the build.
#pragma GCC optimize("O3")

#include <algorithm>

#include "state.h"

namespace mpq::sim {
namespace {

constexpr uint32_t kBarrierBytes = 8;

void join(uint32_t* into, const uint32_t* from, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) into[i] = std::max(into[i], from[i]);
}

uint32_t* warp_knows(Block& block, uint32_t warp) { return &block.warp_knows[warp * block.threads]; }
uint32_t* thread_knows(Block& block, uint32_t thread) {
  return &block.thread_knows[static_cast<size_t>(thread) * block.threads];
}

Barrier& find(const Thread& t, const char* what, uint32_t address) {
  for (Barrier& barrier : t.block->barriers) {
    if (barrier.address != address) continue;
    if (!is_ordered(t, barrier.init_stamp)) {
      fail(t, "%s at shared byte %u: initialised by %s without a barrier in between", what, address - kSharedBase,
           describe(barrier.init_stamp >> kTimeBits));
    }
    return barrier;
  }
  fail(t, "%s at shared byte %lld: no mbarrier was initialised there", what,
       static_cast<long long>(address) - kSharedBase);
}

bool has_waiters(const Barrier& barrier) {
  return std::any_of(barrier.waiters, barrier.waiters + kMaxWarps, [](uint32_t lanes) { return lanes != 0; });
}

// Ends the phase if all that it needs has arrived: copies land, waiters may run.
void settle(const Thread& t, Barrier& barrier) {
  if (barrier.pending) return;
  if (barrier.queued > barrier.expected) {
    fail(t, "mbarrier at shared byte %u: %lld bytes copied, %lld expected", barrier.address - kSharedBase,
         static_cast<long long>(barrier.queued), static_cast<long long>(barrier.expected));
  }
  if (barrier.queued < barrier.expected) return;
  for (const Copy& copy : barrier.copies) {
    Warp& warp = t.block->warp[copy.issuer / kLanes];
    land(t, copy, copy.issuer << kTimeBits | warp.time);
    barrier.released[copy.issuer] = warp.time + 1;
    tick(warp, t);  // what the issuer does from now on is not released
  }
  barrier.copies.clear();
  barrier.expected = barrier.queued = 0;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  for (uint32_t w = 0; w < t.block->warps; ++w) {
    t.block->warp[w].runnable |= barrier.waiters[w];
    barrier.waiters[w] = 0;
  }
}

// What the thread knows goes to the barrier.
void release(const Thread& t, Barrier& barrier) {
  Block& block = *t.block;
  join(barrier.released.data(), warp_knows(block, t.warp->index), block.threads);
  if (t.warp->acquired & t.bit) join(barrier.released.data(), thread_knows(block, t.index), block.threads);
  const uint32_t first = t.warp->index * kLanes, end = std::min(first + kLanes, block.threads);
  for (uint32_t i = first; i < end; ++i) barrier.released[i] = std::max(barrier.released[i], t.warp->synced);
  barrier.released[t.index] = t.warp->time + 1;
  tick(*t.warp, t);
}

// What the barrier knows goes to the thread.
void acquire(const Thread& t, const Barrier& barrier) {
  Block& block = *t.block;
  const size_t needed = static_cast<size_t>(block.threads) * block.threads;
  if (block.thread_knows.size() < needed) block.thread_knows.resize(needed);
  uint32_t* known = thread_knows(block, t.index);
  if (!(t.warp->acquired & t.bit)) std::fill_n(known, block.threads, 0);
  t.warp->acquired |= t.bit;
  join(known, barrier.released.data(), block.threads);
}

}  // namespace

void share_knowledge(Block& block, Warp& warp) {
  for (uint32_t lanes = warp.acquired; lanes; lanes &= lanes - 1) {
    const uint32_t thread = warp.index * kLanes + static_cast<uint32_t>(__builtin_ctz(lanes));
    join(warp_knows(block, warp.index), thread_knows(block, thread), block.threads);
  }
  warp.acquired = 0;
}

uint32_t known_time(const Thread& t, uint32_t other) {
  const uint32_t by_warp = warp_knows(*t.block, t.warp->index)[other];
  return t.warp->acquired & t.bit ? std::max(by_warp, thread_knows(*t.block, t.index)[other]) : by_warp;
}

void mbarrier_init(uint32_t bar, uint32_t arrivals) {
  const Thread& t = *current;
  Block& block = *t.block;
  if (!arrivals || arrivals >= 1u << 20) fail(t, "mbarrier_init for %u arrivals: 1 to 2^20 - 1", arrivals);
  write_shared(t, "mbarrier_init", bar, kBarrierBytes, t.index << kTimeBits | kBarrierWord);
  Barrier barrier{};
  barrier.address = bar;
  barrier.arrivals = barrier.pending = arrivals;
  barrier.init_stamp = stamp_of(t);
  barrier.released.resize(block.threads);
  block.barriers.push_back(barrier);
  block.warp_knows.resize(static_cast<size_t>(block.warps) * block.threads);
}

void mbarrier_arrive(uint32_t bar, uint32_t expected_bytes) {
  const Thread& t = *current;
  const char* what = expected_bytes ? "mbarrier_expect" : "mbarrier_arrive";
  Barrier& barrier = find(t, what, bar);
  settle(t, barrier);
  if (!barrier.pending) {
    fail(t, "%s at shared byte %u: more than the %u arrivals of a phase", what, bar - kSharedBase, barrier.arrivals);
  }
  barrier.expected += expected_bytes;
  --barrier.pending;
  release(t, barrier);
  if (barrier.copies.empty() || has_waiters(barrier)) settle(t, barrier);
}

void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  const Thread& t = *current;
  if (!bytes || bytes % 16) fail(t, "bulk_copy of %u bytes: not a positive multiple of 16", bytes);
  check_load(Load::kBulk, from, bytes, 16);
  Barrier& barrier = find(t, "bulk_copy", bar);
  settle(t, barrier);
  write_shared(t, "bulk_copy", to, bytes, t.index << kTimeBits | kInFlight);
  barrier.copies.push_back({to, bytes, from, 0, t.index});
  barrier.queued += bytes;
  simulation.counters[kBulkBytes] += bytes;
  if (has_waiters(barrier)) settle(t, barrier);
}

void mbarrier_wait(uint32_t bar, uint32_t parity) {
  Thread& t = *current;
  Barrier& barrier = find(t, "mbarrier_wait", bar);
  const auto under_way = [&] { return (barrier.phase & 1) == (parity & 1); };
  if (under_way()) settle(t, barrier);
  if (under_way()) {
    barrier.waiters[t.warp->index] |= t.bit;
    t.warp->runnable &= ~t.bit;
    wait_for_turn();
  }
  // Found again: an mbarrier_init of another thread may have moved it.
  acquire(t, find(t, "mbarrier_wait", bar));
}

}  // namespace mpq::sim

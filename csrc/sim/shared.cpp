// Shared memory: bounds, alignment, definedness and races, for each two bytes.
#include <cstring>

#include "state.h"

namespace mpq::sim {
namespace {

uint32_t offset_of(const Thread& t, const char* what, uint32_t address, uint32_t bytes) {
  const uint32_t offset = address - kSharedBase, size = t.block->shared.bytes;
  if (address < kSharedBase || offset > size || bytes > size - offset) {
    fail(t, "%s of %u bytes at shared byte %lld: outside the %u bytes of the launch", what, bytes,
         static_cast<long long>(address) - kSharedBase, size);
  }
  if (address % (bytes < 16 ? bytes : 16)) {
    fail(t, "%s of %u bytes at shared byte %u: not aligned to %u", what, bytes, offset, bytes < 16 ? bytes : 16);
  }
  return offset;
}

[[noreturn]] void fail_written(const Thread& t, const char* what, uint32_t offset, uint32_t stamp) {
  const char* writer = describe(stamp >> kTimeBits);
  const uint32_t time = stamp & kTimeMask;
  if (!stamp) fail(t, "%s at shared byte %u: undefined, nobody has written it", what, offset);
  if (time == kInFlight) {
    fail(t, "%s at shared byte %u: a copy by %s is under way, its wait is missing", what, offset, writer);
  }
  if (time == kBarrierWord) fail(t, "%s at shared byte %u: an mbarrier lives there", what, offset);
  const bool same_warp = (stamp >> kTimeBits) / kLanes == t.index / kLanes;
  fail(t, "%s at shared byte %u: written by %s without a %s in between", what, offset, writer,
       same_warp ? "warp_sync" : "block_sync");
}

[[noreturn]] void fail_read(const Thread& t, const char* what, uint32_t offset, uint32_t stamp) {
  const uint32_t reader = stamp >> kTimeBits;
  fail(t, "%s at shared byte %u: read by %s without a %s in between", what, offset, describe(reader),
       reader / kLanes == t.index / kLanes ? "warp_sync" : "block_sync");
}

bool is_plain(uint32_t stamp) { return (stamp & kTimeMask) <= kMaxTime; }

// Remembers a reader in one of two places: a later writer is then unordered with one of them if it is unordered with
// any, except among several readers of one warp of which only some are ordered.
void remember_reader(const Thread& t, SharedMemory& shared, uint32_t g, uint32_t mine) {
  uint32_t& first = shared.read[0][g];
  const uint32_t thread = first >> kTimeBits;
  if (!first || thread == t.index || (first & kTimeMask) < t.block->warp[thread / kLanes].floor) {
    first = mine;
    return;
  }
  uint32_t& second = shared.read[1][g];
  const uint32_t warp = thread / kLanes, second_warp = (second >> kTimeBits) / kLanes;
  if (!second || second_warp == warp || t.warp->index != warp) second = mine;
}

}  // namespace

unsigned char* read_shared(const Thread& t, const char* what, uint32_t address, uint32_t bytes) {
  const uint32_t offset = offset_of(t, what, address, bytes), mine = stamp_of(t);
  SharedMemory& shared = t.block->shared;
  uint32_t good = 0;  // the last stamp found to be in order
  for (uint32_t g = offset / 2; g < (offset + bytes) / 2; ++g) {
    const uint32_t written = shared.written[g];
    if (written != good || !written) {
      if (!written || !is_plain(written) || !is_ordered(t, written)) fail_written(t, what, 2 * g, written);
      good = written;
    }
    if (shared.read[0][g] != mine) remember_reader(t, shared, g, mine);
  }
  return shared.data + offset;
}

unsigned char* write_shared(const Thread& t, const char* what, uint32_t address, uint32_t bytes, uint32_t mark) {
  const uint32_t offset = offset_of(t, what, address, bytes);
  SharedMemory& shared = t.block->shared;
  uint32_t good[3] = {0, 0, 0};
  for (uint32_t g = offset / 2; g < (offset + bytes) / 2; ++g) {
    const uint32_t written = shared.written[g], first = shared.read[0][g], second = shared.read[1][g];
    if (written != good[0] && (!is_plain(written) || !is_ordered(t, written))) fail_written(t, what, 2 * g, written);
    if (first != good[1] && !is_ordered(t, first)) fail_read(t, what, 2 * g, first);
    if (second != good[2] && !is_ordered(t, second)) fail_read(t, what, 2 * g, second);
    good[0] = written;
    good[1] = first;
    good[2] = second;
    shared.written[g] = mark;
    shared.read[0][g] = shared.read[1][g] = 0;
  }
  return shared.data + offset;
}

void land(const Thread& t, const Copy& copy, uint32_t stamp) {
  SharedMemory& shared = t.block->shared;
  const uint32_t offset = copy.to - kSharedBase;
  std::memcpy(shared.data + offset, copy.from, copy.bytes);
  for (uint32_t g = offset / 2; g < (offset + copy.bytes) / 2; ++g) shared.written[g] = stamp;
}

void load_shared(void* to, uint32_t address, uint32_t bytes) {
  std::memcpy(to, read_shared(*current, "ld_shared", address, bytes), bytes);
}

void store_shared(uint32_t address, const void* from, uint32_t bytes) {
  std::memcpy(write_shared(*current, "st_shared", address, bytes, stamp_of(*current)), from, bytes);
}

// ---- cp.async: the bytes are under way from the copy to the wait that covers its group; the source is read then ----

void cp_async(uint32_t to, const void* from, uint32_t bytes) {
  Thread& t = *current;
  check_load(Load::kCpAsync, from, bytes, bytes);
  write_shared(t, "cp_async", to, bytes, t.index << kTimeBits | kInFlight);
  t.copies.push_back({to, bytes, from, t.group, t.index});
  simulation.counters[kCpAsyncBytes] += bytes;
}

void cp_async_commit() { ++current->group; }

void cp_async_wait(uint32_t pending) {
  Thread& t = *current;
  const uint32_t stamp = stamp_of(t);
  size_t landed = 0;
  while (landed < t.copies.size() && t.copies[landed].group + pending < t.group) land(t, t.copies[landed++], stamp);
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace mpq::sim

// Global memory: which bytes a kernel may touch, and who wrote them in this launch.
//
// Each byte of a writable range remembers (block, thread, event) of its last store. Another block's store is in order
// for a thread if it was published - the storing thread, or the thread of its block that went on after a block_sync,
// called thread_fence and then atomic_add - and if the reader's own block has added to an atomic since, in this thread
// or before its last block_sync.
#include <algorithm>
#include <cstring>
#include <string>

#include "control.h"
#include "state.h"

namespace mpq::sim {
namespace {

struct Range {
  uintptr_t begin, end;
  uint32_t flags;
  std::string name;
  std::vector<uint8_t> defined;   // [bytes] if kMpqSimUndefined
  std::vector<uint64_t> written;  // [bytes] if kMpqSimWritable
};

std::vector<Range> ranges;
size_t last_range = 0;
// [block][thread] stores before this event are published; empty for blocks that added to no atomic.
std::vector<std::vector<uint64_t>> published;

constexpr uint32_t kEventBits = 34, kThreadBits = 10, kMaxLoadsFromOthers = 1u << 24;

uint64_t store_stamp(const Thread& t) {
  return (uint64_t{t.block->linear} << kThreadBits | t.index) << kEventBits | (simulation.event + 1);
}
uint32_t block_of(uint64_t stamp) { return static_cast<uint32_t>(stamp >> (kEventBits + kThreadBits)); }
uint32_t thread_of(uint64_t stamp) { return stamp >> kEventBits & ((1u << kThreadBits) - 1); }
uint64_t event_of(uint64_t stamp) { return (stamp & ((uint64_t{1} << kEventBits) - 1)) - 1; }

[[noreturn]] void fail_outside(const Thread& t, const char* what, uintptr_t begin, uint32_t bytes) {
  const Range* nearest = nullptr;
  uintptr_t best = UINTPTR_MAX;
  for (const Range& r : ranges) {
    const uintptr_t distance = begin < r.begin ? r.begin - begin : begin >= r.end ? begin - r.end : 0;
    if (distance < best) {
      best = distance;
      nearest = &r;
    }
  }
  if (!nearest) fail(t, "%s of %u bytes at %p: no range is allowed", what, bytes, reinterpret_cast<void*>(begin));
  fail(t, "%s of %u bytes at byte %lld of '%s': outside its %zu bytes", what, bytes,
       static_cast<long long>(begin - nearest->begin), nearest->name.c_str(),
       static_cast<size_t>(nearest->end - nearest->begin));
}

Range& find(const Thread& t, const char* what, const void* address, uint32_t bytes, uint32_t alignment) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const auto holds = [&](const Range& r) { return begin >= r.begin && begin < r.end && bytes <= r.end - begin; };
  if (last_range >= ranges.size() || !holds(ranges[last_range])) {
    last_range = static_cast<size_t>(std::find_if(ranges.begin(), ranges.end(), holds) - ranges.begin());
    if (last_range == ranges.size()) fail_outside(t, what, begin, bytes);
  }
  Range& range = ranges[last_range];
  if (begin % alignment) {
    fail(t, "%s of %u bytes at byte %zu of '%s': the address is not a multiple of %u", what, bytes,
         static_cast<size_t>(begin - range.begin), range.name.c_str(), alignment);
  }
  return range;
}

// Whether a store of this launch comes before what the thread does now.
bool is_ordered(const Thread& t, uint64_t stamp) {
  const Block& mine = *t.block;
  const uint32_t thread = thread_of(stamp);
  const uint64_t event = event_of(stamp);
  if (block_of(stamp) == mine.linear) return thread == t.index || event < mine.sync_event;
  const std::vector<uint64_t>& of_block = published[block_of(stamp)];
  const bool seen = mine.atomic_event > event && (mine.atomic_thread == t.index || mine.sync_event > mine.atomic_event);
  return seen && !of_block.empty() && event < of_block[thread];
}

[[noreturn]] void fail_order(const Thread& t, const char* what, const Range& range, size_t byte, uint64_t stamp,
                             const char* why) {
  const uint32_t block = block_of(stamp);
  fail(t, "%s at byte %zu of '%s': written in this launch by block (%u, %u), %s, %s", what, byte, range.name.c_str(),
       block % simulation.grid.x, block / simulation.grid.x, describe(thread_of(stamp)), why);
}

void check_order(const Thread& t, Load kind, const char* what, const Range& range, size_t offset, uint32_t bytes) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    const uint64_t stamp = range.written[i];
    if (!stamp) continue;
    const bool other_block = block_of(stamp) != t.block->linear;
    if (kind != Load::kGlobal && kind != Load::kFromOthers) {
      fail_order(t, what, range, i, stamp, "which it is not meant for");
    }
    if (kind == Load::kGlobal && other_block) fail_order(t, what, range, i, stamp, "for which ld_from_others is meant");
    if (!is_ordered(t, stamp)) {
      fail_order(
          t, what, range, i, stamp,
          other_block ? "without a thread_fence and an atomic_add in between" : "without a block_sync in between");
    }
  }
}

void check_defined(const Thread& t, const char* what, const Range& range, size_t offset, uint32_t bytes) {
  if (range.defined.empty()) return;
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (!range.defined[i])
      fail(t, "%s at byte %zu of '%s': undefined, nobody has written it", what, i, range.name.c_str());
  }
}

// A store or an atomic.
size_t check_written(const Thread& t, const char* what, Range& range, const void* address) {
  const size_t offset = reinterpret_cast<uintptr_t>(address) - range.begin;
  if (!(range.flags & kMpqSimWritable)) fail(t, "%s at byte %zu of '%s': read-only", what, offset, range.name.c_str());
  if (simulation.grid.overlap && !t.waited_for_earlier) {
    fail(t, "%s at byte %zu of '%s' before wait_for_earlier_kernels: an earlier kernel may still use it", what, offset,
         range.name.c_str());
  }
  return offset;
}

// What the stores before the atomic of this thread are worth to other blocks.
void publish(const Thread& t) {
  Block& block = *t.block;
  std::vector<uint64_t>& mine = published[block.linear];
  mine.resize(block.threads);
  for (uint32_t i = 0; i < block.threads; ++i) {
    uint64_t event = std::min(block.sync_event, block.thread[i].fence_event);
    if (t.fence_event > block.sync_event) event = block.sync_event;
    if (i == t.index) event = t.fence_event;
    mine[i] = std::max(mine[i], event);
  }
}

}  // namespace

void add_range(const void* address, size_t bytes, uint32_t flags, const char* name) {
  Range range{};
  range.begin = reinterpret_cast<uintptr_t>(address);
  range.end = range.begin + bytes;
  range.flags = flags;
  range.name = name;
  if (flags & kMpqSimUndefined) range.defined.resize(bytes);
  if (flags & kMpqSimWritable && !(flags & kMpqSimUntracked)) range.written.resize(bytes);
  ranges.push_back(std::move(range));
}

void forget_ranges() { ranges.clear(); }

void begin_global_checks() {
  for (Range& range : ranges) std::fill(range.written.begin(), range.written.end(), 0);
  published.assign(static_cast<size_t>(simulation.grid.x) * simulation.grid.y, {});
}

void check_load(Load kind, const void* address, uint32_t bytes, uint32_t alignment) {
  constexpr const char* kNames[] = {"ld_global", "ld_constant", "ld_from_others", "cp_async", "bulk_copy"};
  const char* what = kNames[static_cast<int>(kind)];
  Thread& t = *current;
  const Range& range = find(t, what, address, bytes, alignment);
  const size_t offset = reinterpret_cast<uintptr_t>(address) - range.begin;
  if (range.flags & kMpqSimInput && !t.waited_for_earlier) {
    fail(t, "%s at byte %zu of '%s' before wait_for_earlier_kernels", what, offset, range.name.c_str());
  }
  if (range.flags & kMpqSimInput && kind == Load::kConstant) {
    fail(t, "%s at byte %zu of '%s': an earlier kernel may have written it while this one ran", what, offset,
         range.name.c_str());
  }
  if (!range.written.empty()) check_order(t, kind, what, range, offset, bytes);
  check_defined(t, what, range, offset, bytes);
  if (kind == Load::kFromOthers && ++t.loads_from_others > kMaxLoadsFromOthers) {
    fail(t, "%u loads from others: a thread that waits for other blocks never ends here", kMaxLoadsFromOthers);
  }
}

void check_store(void* address, uint32_t bytes, uint32_t alignment) {
  const Thread& t = *current;
  Range& range = find(t, "st_global", address, bytes, alignment);
  const size_t offset = check_written(t, "st_global", range, address);
  if (range.flags & kMpqSimUntracked) return;
  const uint64_t mine = store_stamp(t);
  for (size_t i = offset; i < offset + bytes; ++i) {
    const uint64_t stamp = range.written[i];
    if (stamp && stamp != mine && !is_ordered(t, stamp)) {
      fail_order(t, "st_global", range, i, stamp, "not ordered before this store");
    }
    range.written[i] = mine;
  }
  if (!range.defined.empty()) std::fill_n(range.defined.begin() + static_cast<std::ptrdiff_t>(offset), bytes, 1);
}

namespace {

// change(old) -> new
template <class Change>
uint32_t change_atomically(const char* what, uint32_t* address, const Change& change) {
  maybe_switch_block();
  Thread& t = *current;
  Range& range = find(t, what, address, 4, 4);
  const size_t offset = check_written(t, what, range, address);
  check_defined(t, what, range, offset, 4);
  publish(t);
  t.block->atomic_event = ++simulation.event;
  t.block->atomic_thread = t.index;
  const uint32_t before = *address;
  *address = change(before);
  return before;
}

}  // namespace

uint32_t atomic_add(uint32_t* address, uint32_t v) {
  return change_atomically("atomic_add", address, [&](uint32_t before) { return before + v; });
}
uint32_t count_arrival(uint32_t* address, uint32_t most) {
  return change_atomically("count_arrival", address, [&](uint32_t before) { return before >= most ? 0 : before + 1; });
}

void thread_fence() {
  current->fence_event = ++simulation.event;
  maybe_switch_block();
}

}  // namespace mpq::sim

// The state of a simulation: blocks of warps of threads, each thread a fiber. One launch at a time; nothing here is
// shared between threads of the host.
//
// Order of memory accesses. Each warp has a clock that goes on at every collective operation and every arrival at an
// mbarrier. An access is stamped (thread, clock). It is ordered before what thread t does now if
//   - t did it itself, or
//   - its clock is below Warp::floor of its warp: a block_sync came in between, or
//   - it is of t's warp and below Warp::synced: a collective of the warp came in between, or
//   - t knows of it through an mbarrier (mbarrier.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "calls.h"
#include "fiber.h"

#pragma GCC visibility push(hidden)

namespace mpq::sim {

constexpr uint32_t kLanes = 32, kAllLanes = 0xffffffff;
constexpr uint32_t kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes, kMaxShared = 227 * 1024;
constexpr uint32_t kMaxResident = 4;  // blocks that take turns when interleaving is on

enum class Op : uint8_t { kNone, kMmaF16, kMmaBf16, kLdmatrix, kShflXor, kWarpSync, kBlockSync, kMbarrierWait };
const char* name_of(Op op);

// A copy under way to shared memory.
struct Copy {
  uint32_t to, bytes;
  const void* from;
  uint32_t group;   // cp.async: the group of its thread
  uint32_t issuer;  // thread
};

struct Block;
struct Warp;

struct Thread {
  Fiber fiber;
  Block* block;
  Warp* warp;
  uint32_t index, lane, bit;  // in the block; in the warp; 1 << lane
  bool waited_for_earlier;
  uint32_t loads_from_others;
  uint64_t fence_event;  // the last thread_fence, 0 if none
  std::vector<Copy> copies;
  uint32_t group;  // cp.async groups committed so far
};

// What a lane brings to a collective operation. Pointers are to the stacks of lanes, which wait until it is done.
struct Operands {
  void* out;
  const uint32_t* in;
  uint32_t x, y;
};

struct Warp {
  uint32_t index;
  uint32_t runnable, exited, arrived, at_block_sync;  // one bit a lane
  Op op;                                              // what the lanes in `arrived` wait at
  uint32_t time, synced, floor;
  uint32_t acquired;  // lanes that learnt something from an mbarrier since the last collective
  Operands operands[kLanes];
};

// Stamps are thread << 22 | time; 0 means that the bytes are undefined. One for each two bytes, the smallest access.
constexpr uint32_t kTimeBits = 22, kTimeMask = (1u << kTimeBits) - 1;
constexpr uint32_t kInFlight = kTimeMask, kBarrierWord = kTimeMask - 1, kMaxTime = kTimeMask - 2;

struct SharedMemory {
  uint32_t bytes;
  alignas(128) unsigned char data[kMaxShared];
  uint32_t written[kMaxShared / 2];
  uint32_t read[2][kMaxShared / 2];  // of two readers since the last write; of two warps if two warps read
};

struct Barrier {
  uint32_t address, arrivals, pending, phase;
  int64_t expected;  // bytes that arrivals of this phase announced
  int64_t queued;    // bytes of `copies`
  uint32_t init_stamp;
  std::vector<Copy> copies;
  std::vector<uint32_t> released;  // [threads] accesses below this time are known to whoever waits
  uint32_t waiters[kMaxWarps];
};

struct Block {
  uint32_t x, y, linear;
  uint32_t threads, warps, live, arrived;
  uint64_t sync_event, atomic_event;
  uint32_t atomic_thread;
  std::vector<Barrier> barriers;
  std::vector<uint32_t> warp_knows;    // [warps][threads] times below which accesses are ordered
  std::vector<uint32_t> thread_knows;  // [threads][threads] the same for lanes in Warp::acquired
  unsigned char* stacks;
  Thread thread[kMaxThreads];
  Warp warp[kMaxWarps];
  SharedMemory shared;
};

enum class Order { kForward, kReverse, kRandom };
enum Counter { kBlocks, kMmas, kCpAsyncBytes, kBulkBytes, kUnwaitedCopies, kCounters };

// What an earlier kernel writes while this launch has already begun (control.h).
struct LateBytes {
  void* to = nullptr;
  const void* from = nullptr;
  size_t bytes = 0;
};

struct Simulation {
  LateBytes late;
  Order order = Order::kForward;
  bool interleave = false;
  uint32_t random = 1;
  uint64_t event = 0;  // counts fences, atomics and block_syncs of the launch
  uint64_t counters[kCounters] = {};
  char error[1024] = "";
  Grid grid{};
  void (*call)(const void*) = nullptr;
  const void* params = nullptr;
  Fiber host;
};

extern Simulation simulation;
extern Thread* current;

uint32_t next_random();

// ---- errors (errors.cpp) ----

// Records the text, with the place of the thread in front, unless an earlier error is recorded; stops the launch.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(const Thread& thread, const char* format, ...);
// "thread 37 (warp 1, lane 5)", in one of four buffers that take turns.
const char* describe(uint32_t thread);
void record_error(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- schedule.cpp ----

// The running thread stops here; returns once `runnable` of its warp has its bit again and its turn has come.
void wait_for_turn();
// One of the bits of a mask that is not 0, in the order set.
uint32_t pick(uint32_t mask);
// A thread of the block that can run. Fails if there is none.
Thread& choose(Block& block);
// What every fiber runs.
void thread_entry();
// A point where another block may run.
void maybe_switch_block();
// Leaves the launch for good (after an error, or the end of a block).
[[noreturn]] void leave();

// ---- clocks (clocks.cpp) ----

void advance(Block& block, Warp& warp);  // after a collective: orders the accesses of its lanes
void tick(Warp& warp, const Thread& thread);
void order_block(Block& block);  // after a block_sync
bool is_ordered(const Thread& thread, uint32_t stamp);
inline uint32_t stamp_of(const Thread& t) { return t.index << kTimeBits | t.warp->time; }

// ---- shared.cpp ----

unsigned char* read_shared(const Thread& thread, const char* what, uint32_t address, uint32_t bytes);
unsigned char* write_shared(const Thread& thread, const char* what, uint32_t address, uint32_t bytes, uint32_t mark);
void land(const Thread& thread, const Copy& copy, uint32_t stamp);

// ---- mbarrier.cpp, warp.cpp, global.cpp ----

void share_knowledge(Block& block, Warp& warp);
uint32_t known_time(const Thread& thread, uint32_t other);
void compute(Op op, Warp& warp, Block& block);
void begin_global_checks();
void add_range(const void* address, size_t bytes, uint32_t flags, const char* name);
void forget_ranges();

}  // namespace mpq::sim

#pragma GCC visibility pop

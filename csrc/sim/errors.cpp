// Error texts. The first one of a launch is kept; the launch ends there, and fibers are abandoned where they stand.
#include <cstdarg>
#include <cstdio>

#include "state.h"

namespace mpq::sim {

const char* name_of(Op op) {
  constexpr const char* kNames[] = {"nothing",  "mma_f16",   "mma_bf16",   "ldmatrix_x4",
                                    "shfl_xor", "warp_sync", "block_sync", "mbarrier_wait"};
  return kNames[static_cast<int>(op)];
}

const char* describe(uint32_t thread) {
  static char texts[4][64];
  static int turn = 0;
  char* text = texts[turn++ % 4];
  std::snprintf(text, sizeof texts[0], "thread %u (warp %u, lane %u)", thread, thread / kLanes, thread % kLanes);
  return text;
}

void record_error(const char* format, ...) {
  if (simulation.error[0]) return;
  va_list list;
  va_start(list, format);
  std::vsnprintf(simulation.error, sizeof simulation.error, format, list);
  va_end(list);
}

void fail(const Thread& thread, const char* format, ...) {
  char text[900];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  record_error("%s [block (%u, %u), %s]", text, thread.block->x, thread.block->y, describe(thread.index));
  leave();
}

void trap(const char* why) { fail(*current, "trap: %s", why); }

}  // namespace mpq::sim

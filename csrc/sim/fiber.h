// Fibers: threads of execution that switch by a function call. On x86-64 a switch saves the six registers that the
// calling convention asks for (about 5 ns); elsewhere, and with MPQ_SIM_UCONTEXT, it is swapcontext.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(MPQ_SIM_UCONTEXT)
#include <ucontext.h>
#define MPQ_SIM_PORTABLE_FIBERS 1
#endif

namespace mpq::sim {

struct Fiber {
#if defined(MPQ_SIM_PORTABLE_FIBERS)
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

// Prepares `fiber` to run entry() on the given stack at the first switch to it. entry() must never return.
void fiber_prepare(Fiber& fiber, void* stack, size_t bytes, void (*entry)());

// Continues `to`; returns when somebody switches back to `from`.
void fiber_switch(Fiber& from, Fiber& to);

// `count` stacks of kStackBytes each, one after the other, with an inaccessible page below each one; pages take memory
// once they are touched. nullptr when the system refuses.
constexpr size_t kStackBytes = 64 * 1024, kGuardBytes = 4096;
unsigned char* allocate_stacks(size_t count);

}  // namespace mpq::sim

#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>

namespace mpq::sim {

unsigned char* allocate_stacks(size_t count) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  auto* stacks = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < count; ++i) mprotect(stacks + i * kStackBytes, kGuardBytes, PROT_NONE);
  return stacks;
}

#if defined(MPQ_SIM_PORTABLE_FIBERS)

void fiber_prepare(Fiber& fiber, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
}

void fiber_switch(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#else

// rdi: where to store the stack pointer of this fiber; rsi: the stack pointer of the next one. The jump in place of a
// return spares the processor's return predictor, which would be wrong every time.
asm(R"(
.text
.p2align 4
.hidden mpq_sim_switch
.globl mpq_sim_switch
.type mpq_sim_switch,@function
mpq_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size mpq_sim_switch, .-mpq_sim_switch
)");
extern "C" void mpq_sim_switch(void** from, void* to);

void fiber_prepare(Fiber& fiber, void* stack, size_t bytes, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  // From the top: a return address that is never used, the entry, six registers. At the entry the stack pointer is
  // then 8 short of a multiple of 16, as after a call.
  auto* frame = reinterpret_cast<uintptr_t*>(top) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = 0;
  frame[6] = reinterpret_cast<uintptr_t>(entry);
  fiber.stack_pointer = frame;
}

void fiber_switch(Fiber& from, Fiber& to) { mpq_sim_switch(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace mpq::sim

// Whether the tile registers of AMX may be used: the processor, the system, and one product for proof.
#include "cpu/tiles/amx.h"

#include "cpu/cpu.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <initializer_list>

namespace mpq::cpu {
namespace {

constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr int kTileData = 18;               // component of the extended state, and its bit in XCR0; 17: configuration
constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25;  // CPUID leaf 7, EDX: bf16, tiles, int8
constexpr unsigned kXgetbv = 1u << 27;                       // CPUID leaf 1, ECX

bool processor_lists_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles;
}

bool system_saves_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXgetbv)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  constexpr unsigned kBoth = 3u << (kTileData - 1);
  return (a & kBoth) == kBoth;
}

// For all threads of the process, those that run already included, and for children; exec clears it. See
// https://docs.kernel.org/arch/x86/xstate.html.
bool request_permission() { return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0; }

bool multiplies() { return amx_multiplies_bytes() && amx_multiplies_pairs(); }

void leave_faulted(int) { _exit(static_cast<int>(Trial::kFaulted)); }

const char* refusal() {
  if (!processor_lists_amx()) return "the processor does not list AMX-TILE, AMX-INT8 and AMX-BF16";
  if (!supported(Isa::avx512bf16)) return "the processor has no AVX512_BF16, which these kernels use besides AMX";
  if (!system_saves_tiles()) return "the operating system does not save the tile registers (XCR0, bits 17 and 18)";
  if (!request_permission()) {
    if (errno == ENOSPC) return "an alternate signal stack of this process is too small for the tile registers";
    return "the operating system grants this process no tile registers (arch_prctl ARCH_REQ_XCOMP_PERM)";
  }
  switch (try_in_child(multiplies)) {
    case Trial::kRight:
      return nullptr;
    case Trial::kWrong:
      return "a product tried on the tile registers was wrong";
    case Trial::kFaulted:
      return "the processor lists AMX, but a product tried in a child process faulted";
    case Trial::kNoChild:
      break;
  }
  return "no child process could be made to try a product in";
}

}  // namespace

// A bare clone: no handlers of the host's libraries run, no SIGCHLD reaches the host, and a wait() of the host's for
// any of its children does not see this one. The child does only what is safe after a fork of a process with threads.
Trial try_in_child(bool (*right)()) {
  const long child = syscall(SYS_clone, 0ul, nullptr, nullptr, nullptr, 0ul);
  if (child < 0) return Trial::kNoChild;
  if (child == 0) {
    struct sigaction leave{};
    leave.sa_handler = leave_faulted;
    for (const int number : {SIGILL, SIGSEGV, SIGBUS, SIGFPE, SIGTRAP}) sigaction(number, &leave, nullptr);
    _exit(static_cast<int>(right() ? Trial::kRight : Trial::kWrong));
  }
  int status = 0;
  pid_t ended;
  do {
    ended = waitpid(static_cast<pid_t>(child), &status, __WALL);
  } while (ended < 0 && errno == EINTR);
  if (ended < 0) return Trial::kNoChild;
  return WIFEXITED(status) ? static_cast<Trial>(WEXITSTATUS(status)) : Trial::kFaulted;
}

}  // namespace mpq::cpu

#else

namespace mpq::cpu {
namespace {

const char* refusal() { return "AMX is used on x86-64 under Linux only"; }

}  // namespace

Trial try_in_child(bool (*)()) { return Trial::kNoChild; }

}  // namespace mpq::cpu
#endif

namespace mpq::cpu {

const char* amx_refusal() {
  static const char* const kept = refusal();
  return kept;
}

}  // namespace mpq::cpu

// Argument checks, instruction set selection and workspace size of the CPU backend.
#include "cpu/kernels.h"
#include "generated/layout.h"

namespace mpq::cpu {
namespace {

bool known(DType dtype) { return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16; }

int check_segment(const Segment& s) {
  if (s.n0 < 0 || s.n1 <= s.n0 || s.k0 < 0 || s.k1 <= s.k0 || s.k0 % kTileK) return kErrorSegment;
  if (s.bits < 1 || s.bits > 8 || s.group_size < 1 || (s.k1 - s.k0) % s.group_size) return kErrorSegment;
  if (s.zero_kind < kZeroNone || s.zero_kind > kZeroFloat) return kErrorSegment;
  for (int i = 0; i < kPlaneCount[s.bits]; ++i) {
    if (!s.planes[i]) return kErrorNull;
  }
  if (!s.scales || (s.zero_kind != kZeroNone && !s.zeros)) return kErrorNull;
  return kOk;
}

// Every element of [N, K] belongs to exactly one segment, in the documented order.
int check_weight(const Weight& w) {
  if (w.N < 1 || w.K < 1) return kErrorShape;
  if (!known(w.scale_dtype)) return kErrorDType;
  if (!w.segments || w.num_segments < 1) return kErrorNull;
  int64_t row = 0;
  int64_t col = 0;
  for (int i = 0; i < w.num_segments; ++i) {
    const Segment& s = w.segments[i];
    if (const int error = check_segment(s)) return error;
    if (s.n0 != row || s.k0 != col || s.k1 > w.K) return kErrorCover;
    if (col && s.n1 != w.segments[i - 1].n1) return kErrorCover;
    col = s.k1;
    if (col == w.K) {
      row = s.n1;
      col = 0;
    }
  }
  return row == w.N && col == 0 ? kOk : kErrorCover;
}

Kernels kernels_of(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512_kernels();
  if (isa == Isa::kAvx2) return avx2_kernels();
#endif
  (void)isa;
  return portable_kernels();
}

}  // namespace

size_t linear_workspace_bytes(const LinearArgs& args) {
  if (args.M < 1 || args.weight.K < 1) return 0;
  const int64_t tokens = args.M < kTokenChunk ? args.M : kTokenChunk;
  return static_cast<size_t>(tokens * padded_k(args.weight.K) * 4 + kAlignment);
}

int linear(const LinearArgs& args, Isa isa, const Parallel& parallel) {
  if (!supported(isa)) return kErrorIsa;
  if (const int error = check_weight(args.weight)) return error;
  if (args.M < 0) return kErrorShape;
  if (args.M == 0) return kOk;
  if (!known(args.x_dtype) || (args.bias && !known(args.bias_dtype))) return kErrorDType;
  if (!args.x || !args.y || !args.workspace) return kErrorNull;
  if (args.workspace_bytes < linear_workspace_bytes(args)) return kErrorWorkspace;
  kernels_of(isa).linear(args, parallel);
  return kOk;
}

int dequantize(const Weight& weight, void* out, DType out_dtype, Isa isa, const Parallel& parallel) {
  if (!supported(isa)) return kErrorIsa;
  if (const int error = check_weight(weight)) return error;
  if (!known(out_dtype)) return kErrorDType;
  if (!out) return kErrorNull;
  kernels_of(isa).dequantize(weight, out, out_dtype, parallel);
  return kOk;
}

const char* error_text(int code) {
  switch (code) {
    case kOk:
      return "ok";
    case kErrorIsa:
      return "this machine or this build cannot run the requested instruction set";
    case kErrorShape:
      return "M is negative, or N or K is not positive";
    case kErrorNull:
      return "a required pointer is null";
    case kErrorDType:
      return "unknown dtype";
    case kErrorSegment:
      return "a segment has a bad range, width, group_size or zero kind";
    case kErrorCover:
      return "the segments do not cover [N, K] exactly once in order of n0, then k0";
    case kErrorWorkspace:
      return "the workspace is smaller than linear_workspace_bytes";
    default:
      return "unknown error code";
  }
}

bool supported(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    default:
      return false;
  }
}

Isa best_isa() {
  if (supported(Isa::kAvx512)) return Isa::kAvx512;
  return supported(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

}  // namespace mpq::cpu

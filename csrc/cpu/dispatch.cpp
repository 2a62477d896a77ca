// Argument checks, instruction set selection and workspace size of the CPU backend.
#include "cpu/int8/blocks.h"
#include "cpu/kernels.h"
#include "cpu/tiles/amx.h"
#include "format/ids.h"
#include "generated/layout.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace mpq::cpu {

const Products* pairs_portable() { return nullptr; }  // portable C++ multiplies bf16 x like any other

namespace {

bool known(DType dtype) { return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16; }

int check_segment(const Segment& s) {
  if (s.n0 < 0 || s.n1 <= s.n0 || s.k0 < 0 || s.k1 <= s.k0 || s.k0 % kTileK) return kErrorSegment;
  if (s.bits < 1 || s.bits > 8 || s.group_size < 1 || (s.k1 - s.k0) % s.group_size) return kErrorSegment;
  if (!is_zero_kind(s.zero_kind)) return kErrorSegment;
  for (int i = 0; i < kPlaneCount[s.bits]; ++i) {
    if (!s.planes[i]) return kErrorNull;
  }
  if (!s.scales || (stores_zeros(s.zero_kind) && !s.zeros)) return kErrorNull;
  return kOk;
}

}  // namespace

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

namespace {

// A row of isa.h.
struct Row {
  const char* name;
  Kernels (*exact)();
  const Products* (*pairs)();
  Isa pairs_isa;  // which pairs() may run on
  LinearInt8 (*int8)();
  const char* (*refusal)();
};

#define MPQ_ROW(name, exact, pairs, int8, refusal) \
  {#name, exact_##exact, pairs_##pairs, Isa::pairs, int8_##int8, []() -> const char* { return refusal; }},

#if defined(__x86_64__)
#define MPQ_X86_ROW MPQ_ROW

const char* unless(bool has) {
  return has ? nullptr : "the processor does not have it, or the operating system does not use it";
}

// Not every compiler that is supported knows a name for it.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#else
#define MPQ_X86_ROW(name, ...)      \
  {#name,         nullptr, nullptr, \
   Isa::portable, nullptr, []() -> const char* { \
     return "it is an instruction set of x86-64"; }},
#endif

constexpr Row kRows[] = {MPQ_CPU_ISAS(MPQ_ROW, MPQ_X86_ROW)};

const Row& row_of(Isa isa) { return kRows[static_cast<int>(isa)]; }

bool known(Isa isa) { return static_cast<size_t>(isa) < sizeof kRows / sizeof *kRows; }

// What multiplies bf16 x in pairs, or null.
const Products* pairs_of(Isa isa, DType x_dtype) {
  const Row& row = row_of(isa);
  return x_dtype == DType::kBF16 && supported(row.pairs_isa) ? row.pairs() : nullptr;
}

// kOk where there is nothing wrong with a call, M = 0 included; `needed` bytes of workspace are asked for.
int check_linear(const LinearArgs& args, Isa isa, size_t needed) {
  if (!supported(isa)) return kErrorIsa;
  if (const int error = check_weight(args.weight)) return error;
  if (args.M < 0) return kErrorShape;
  if (args.M == 0) return kOk;
  if (!known(args.x_dtype) || (args.bias && !known(args.bias_dtype))) return kErrorDType;
  if (!args.x || !args.y || !args.workspace) return kErrorNull;
  return args.workspace_bytes < needed ? kErrorWorkspace : kOk;
}

}  // namespace

size_t linear_workspace_bytes(const LinearArgs& args) {
  if (args.M < 1 || args.weight.K < 1) return 0;
  const int64_t tokens = args.M < kTokenChunk ? args.M : kTokenChunk;
  const int64_t columns = padded_k(args.weight.K);
  const bool paired = args.x_dtype == DType::kBF16;  // then there are bf16 and, beyond decode, sums beside fp32
  const int64_t sums = paired && args.M > kPairedDecodeTokens ? columns / 16 * kTokenChunk * 4 : 0;
  return static_cast<size_t>(tokens * columns * (paired ? 6 : 4) + sums + 2 * kAlignment);  // whole vectors of sums
}

int linear(const LinearArgs& args, Isa isa, const Parallel& parallel) {
  const int error = check_linear(args, isa, linear_workspace_bytes(args));
  if (error == kOk && args.M) row_of(isa).exact().linear(args, parallel, pairs_of(isa, args.x_dtype));
  return error;
}

size_t linear_int8_workspace_bytes(const LinearArgs& args) {
  if (args.M < 1 || check_weight(args.weight)) return 0;
  const int64_t tokens = args.M < kTokenChunk ? args.M : kTokenChunk;
  const Place stored = place_blocks(args.weight, nullptr);
  const int64_t words = stored.chunk * (args.M <= kDecodeTokens ? kSpreadWords : kTokenWords);
  const int64_t places = args.weight.num_segments * static_cast<int64_t>(sizeof(Place)) + kAlignment;
  return static_cast<size_t>(places + tokens * 4 * (words + 2 * stored.block) + kAlignment);
}

int linear_int8(const LinearArgs& args, Isa isa, const Parallel& parallel) {
  const int error = check_linear(args, isa, linear_int8_workspace_bytes(args));
  if (error == kOk && args.M) row_of(isa).int8()(args, parallel);
  return error;
}

int dequantize(const Weight& weight, void* out, DType out_dtype, Isa isa, const Parallel& parallel) {
  if (!supported(isa)) return kErrorIsa;
  if (const int error = check_weight(weight)) return error;
  if (!known(out_dtype)) return kErrorDType;
  if (!out) return kErrorNull;
  row_of(isa).exact().dequantize(weight, out, out_dtype, parallel);
  return kOk;
}

int embedding(const Weight& weight, const int64_t* ids, int64_t count, void* out, DType out_dtype,
              const Parallel& parallel) {
  if (const int error = check_weight(weight)) return error;
  if (!known(out_dtype)) return kErrorDType;
  if (count < 0) return kErrorShape;
  if (count == 0) return kOk;
  if (!ids || !out) return kErrorNull;
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= weight.N) return kErrorId;
  }
  embedding_rows(weight, ids, count, out, out_dtype, parallel);
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
    case kErrorId:
      return "an id is outside of the rows of the weight";
    default:
      return "unknown error code";
  }
}

const char* isa_refusal(Isa isa) { return known(isa) ? row_of(isa).refusal() : "there is no such instruction set"; }

bool supported(Isa isa) { return isa_refusal(isa) == nullptr; }

Isa best_isa() {
  for (const Isa isa : kIsas) {
    if (supported(isa)) return isa;
  }
  return Isa::portable;
}

int paths(Isa isa, DType x_dtype, bool int8, Path (&out)[kMostPaths]) {
  if (!supported(isa)) return 0;
  const Products* pairs = int8 ? nullptr : pairs_of(isa, x_dtype);
  const int64_t decode = pairs ? pairs->decode_tokens : kDecodeTokens;
  const int64_t pass = int8 ? (isa == Isa::amx ? kTileTokens : 0) : (pairs ? pairs->pass_tokens : 0);
  out[0] = {1, "codes as they come out of the words"};
  out[1] = {decode + 1, "codes unpacked once for all tokens"};
  if (pass < kTileTokens) return 2;
  out[2] = {kTileTokens, "the same on tile registers"};
  return 3;
}

const char* isa_name(Isa isa) { return known(isa) ? row_of(isa).name : "unknown"; }

}  // namespace mpq::cpu

// CPU backend: y[M,N] = x[M,K] @ W[N,K].T + bias on packed weights of any mix of widths. No torch, no globals (but the
// answer whether AMX works), no allocation, no exceptions: raw pointers, a caller-owned workspace, integer error codes.
//
// Every pointer may be unaligned (weights are mapped files). Layout of planes, scales and zeros:
// mpq_kernels/format/codes.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace mpq::cpu {

enum class DType : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

// Instruction sets, named as in isa.h: Isa::avx2.
#define MPQ_ENUMERATOR(name, ...) name,
enum class Isa : int { MPQ_CPU_ISAS(MPQ_ENUMERATOR, MPQ_ENUMERATOR) };
#undef MPQ_ENUMERATOR

// All of them, best first.
#define MPQ_ENUMERATOR(name, ...) Isa::name,
constexpr Isa kIsas[] = {MPQ_CPU_ISAS(MPQ_ENUMERATOR, MPQ_ENUMERATOR)};
#undef MPQ_ENUMERATOR

enum Error : int {
  kOk = 0,
  kErrorIsa = 1,
  kErrorShape = 2,
  kErrorNull = 3,
  kErrorDType = 4,
  kErrorSegment = 5,
  kErrorCover = 6,
  kErrorWorkspace = 7,
  kErrorId = 8,
};

// Rows [n0, n1) x columns [k0, k1) of one width.
struct Segment {
  int64_t n0, n1, k0, k1;     // k0 is a multiple of 64
  int bits;                   // 1..8
  int64_t group_size;         // divides k1 - k0
  int zero_kind;              // of generated/layout.h
  const uint32_t* planes[3];  // each [row_tiles, col_tiles, 128 * width] words, most significant plane first
  const void* scales;         // [row_tiles, groups, 64] of Weight::scale_dtype, rows of a tile in position order
  const void* zeros;          // same shape: uint8 (int), scale_dtype (float, min), nullptr (none, half)
};

struct Weight {
  int64_t N, K;
  const Segment* segments;  // sorted by n0, then k0; those with the same n0, n1 (a row band) cover [0, K)
  int num_segments;
  DType scale_dtype;
  const int32_t* perm;  // [K], a permutation (not checked here), or nullptr: packed column j is column perm[j] of x
};

struct LinearArgs {
  const void* x;  // [M, K] of x_dtype
  DType x_dtype;
  int64_t M;
  int64_t x_row_stride;  // elements
  Weight weight;
  const void* bias;  // [N] of bias_dtype, or nullptr
  DType bias_dtype;
  void* y;          // [M, N] contiguous, of x_dtype
  void* workspace;  // linear_workspace_bytes(args) bytes
  size_t workspace_bytes;
};

// Runs task(ctx, begin, end) over disjoint ranges that cover [0, n), on any threads, and returns when all are done.
// A null `run` means: on the calling thread. Results do not depend on how the ranges are cut.
struct Parallel {
  void (*run)(void* pool, int64_t n, void (*task)(void* ctx, int64_t begin, int64_t end), void* ctx);
  void* pool;
};

// Below this many multiplications waking a second thread costs more than it saves. One against two threads, 4 bits, M =
// 1, 2-core AMD EPYC: 768 x 768 18.6 and 22.5 us, 1024 x 1024 27.6 and 18.1 us; this is between the two.
constexpr int64_t kSerialWork = 3 << 18;

// Bytes of workspace that linear() needs; bounded in M, because tokens are processed in chunks.
size_t linear_workspace_bytes(const LinearArgs& args);

// fp32 accumulation; the sum plus bias is rounded once, to nearest even, to x_dtype. A token with NaN or Inf in x has
// no finite y: NaN or Inf, which depends on the instruction set and on M. Returns kOk or an Error.
int linear(const LinearArgs& args, Isa isa, const Parallel& parallel);

// Bytes of workspace that linear_int8() needs.
size_t linear_int8_workspace_bytes(const LinearArgs& args);

// As linear(), with x rounded to int8 for each token and each block of columns (int8/blocks.h, int8/round_x.inl). The
// sums of products of a block are exact integers; blocks are added up in fp32, in order, so a row of y depends neither
// on M nor on the threads. A token with NaN or Inf in x gets NaN in all of y.
int linear_int8(const LinearArgs& args, Isa isa, const Parallel& parallel);

// out[N, K] of out_dtype, contiguous, in original column order: fl32(fl32(code - zero) * scale) + 0, or for the
// kind min fl32(fl32(code * scale) + zero) + 0, then rounded to nearest even. Returns kOk or an Error.
int dequantize(const Weight& weight, void* out, DType out_dtype, Isa isa, const Parallel& parallel);

// out[count, K] of out_dtype, contiguous: rows ids[i] of what dequantize() gives. Returns kOk or an Error; kErrorId for
// an id outside of 0..N - 1, and nothing has been written then.
int embedding(const Weight& weight, const int64_t* ids, int64_t count, void* out, DType out_dtype,
              const Parallel& parallel);

// Whether the segments of a weight have good values and cover it; every call asks. Returns kOk or an Error.
int check_weight(const Weight& weight);

const char* error_text(int code);

bool supported(Isa isa);           // compiled in, and this machine and its operating system can run it
const char* isa_refusal(Isa isa);  // why not; nullptr where it is supported
Isa best_isa();                    // never one that must be asked for, nor is it tried
const char* isa_name(Isa isa);

// What serves `tokens` tokens and more.
struct Path {
  int64_t tokens;
  const char* kernel;
};
constexpr int kMostPaths = 3;

// The kernels of a product of x in x_dtype, rounded to int8 or not, by the number of tokens. Returns how many there
// are.
int paths(Isa isa, DType x_dtype, bool int8, Path (&out)[kMostPaths]);

}  // namespace mpq::cpu

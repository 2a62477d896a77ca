// Operations of a whole warp. Lanes leave their operands and wait; the last one computes for all.
//
// mma: the 16 products of an element are exact, they and the accumulator are summed in double, and the sum is rounded
// once to fp32. Tensor cores keep fewer bits while they sum: tests need the tolerance of such an fp32 sum.

// Most of a simulation is compute_mma: its loops are to be vectorised whatever the flags of the build.
#pragma GCC optimize("O3")

#include <cstring>

#include "numbers.h"
#include "state.h"

namespace mpq::sim {
namespace {

constexpr uint32_t kM = 16, kN = 8, kK = 16;
// Eight columns of d. The compiler makes the best of what the machine has.
using Row = double __attribute__((vector_size(kN * sizeof(double))));

template <bool kBf16>
void compute_mma(const Operands* lanes) {
  uint16_t bits[kM * kK + kK * kN];  // a[16][16], then b[16][8]
  Row d[kM];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const Operands& o = lanes[lane];
    const auto* in = static_cast<const float*>(o.out);
    const uint32_t g = lane / 4, q = lane % 4;
    for (uint32_t j = 0; j < 4; ++j) std::memcpy(&bits[(g + 8 * (j % 2)) * kK + 2 * q + 8 * (j / 2)], &o.in[j], 4);
    uint16_t* b = bits + kM * kK + 2 * q * kN + g;
    b[0] = static_cast<uint16_t>(o.x);
    b[kN] = static_cast<uint16_t>(o.x >> 16);
    b[8 * kN] = static_cast<uint16_t>(o.y);
    b[9 * kN] = static_cast<uint16_t>(o.y >> 16);
    for (uint32_t i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * q + i % 2] = in[i];
  }
  double a[kM * kK];
  Row b[kK];
  for (uint32_t i = 0; i < kM * kK; ++i) a[i] = kBf16 ? bf16_to_float(bits[i]) : f16_to_float(bits[i]);
  for (uint32_t i = 0; i < kK * kN; ++i) {
    const uint16_t v = bits[kM * kK + i];
    b[i / kN][i % kN] = kBf16 ? bf16_to_float(v) : f16_to_float(v);
  }
  for (uint32_t m = 0; m < kM; ++m) {
    Row sum = d[m];
    for (uint32_t k = 0; k < kK; ++k) sum += a[m * kK + k] * b[k];
    d[m] = sum;
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    auto* out = static_cast<float*>(lanes[lane].out);
    for (uint32_t i = 0; i < 4; ++i) out[i] = static_cast<float>(d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
  }
  ++simulation.counters[kMmas];
}

void compute_ldmatrix(const Operands* lanes, const Thread* threads) {
  for (uint32_t row = 0; row < kLanes; ++row) {
    const unsigned char* data = read_shared(threads[row], "ldmatrix_x4", lanes[row].x, 16);
    for (uint32_t q = 0; q < 4; ++q) {
      std::memcpy(static_cast<uint32_t*>(lanes[row % 8 * 4 + q].out) + row / 8, data + 4 * q, 4);
    }
  }
}

void compute_shfl_xor(Operands* lanes, const Thread& thread) {
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane].y != lanes[0].y || lanes[lane].y >= kLanes) {
      fail(thread, "shfl_xor with mask %u in lane %u and %u in lane 0: one mask below 32 is needed", lanes[lane].y,
           lane, lanes[0].y);
    }
    *static_cast<uint32_t*>(lanes[lane].out) = lanes[lane ^ lanes[0].y].x;
  }
}

void compute(Op op, Warp& warp, Thread* threads) {
  if (op == Op::kMmaF16) compute_mma<false>(warp.operands);
  if (op == Op::kMmaBf16) compute_mma<true>(warp.operands);
  if (op == Op::kLdmatrix) compute_ldmatrix(warp.operands, threads);
  if (op == Op::kShflXor) compute_shfl_xor(warp.operands, threads[0]);
}

[[noreturn]] void fail_diverged(const Thread& t, const Warp& warp, Op op) {
  if (warp.exited) {
    fail(t, "%s needs all lanes of the warp: lanes 0x%08x have exited or do not exist", name_of(op), warp.exited);
  }
  const uint32_t others = warp.at_block_sync ? warp.at_block_sync : warp.arrived;
  fail(t, "lanes of a warp diverge: this one is at %s, lanes 0x%08x at %s", name_of(op), others,
       name_of(warp.at_block_sync ? Op::kBlockSync : warp.op));
}

// All lanes of the warp meet at `op`.
void meet(Op op, const Operands& operands) {
  Thread& t = *current;
  Warp& warp = *t.warp;
  if (warp.exited | warp.at_block_sync || (warp.arrived && warp.op != op)) fail_diverged(t, warp, op);
  warp.op = op;
  warp.operands[t.lane] = operands;
  warp.arrived |= t.bit;
  if (warp.arrived != kAllLanes) {
    warp.runnable &= ~t.bit;
    wait_for_turn();
    return;
  }
  warp.arrived = 0;
  warp.runnable = kAllLanes;
  compute(op, warp, &t.block->thread[warp.index * kLanes]);
  advance(*t.block, warp);
  wait_for_turn();
}

}  // namespace

void mma(bool bf16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  meet(bf16 ? Op::kMmaBf16 : Op::kMmaF16, {d, a, b0, b1});
}
void ldmatrix_x4(uint32_t* r, uint32_t address) { meet(Op::kLdmatrix, {r, nullptr, address, 0}); }
uint32_t shfl_xor(uint32_t v, int mask) {
  uint32_t result;
  meet(Op::kShflXor, {&result, nullptr, v, static_cast<uint32_t>(mask)});
  return result;
}
void warp_sync() { meet(Op::kWarpSync, {}); }

}  // namespace mpq::sim

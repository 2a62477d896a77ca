// From accumulators to y: warps of a row tile are added in shared memory in the order of their numbers; row groups that
// blocks share are added by the block that finishes last, from the workspace, in the order of the blocks' numbers. So
// the same input gives the same bits, whatever the order in which blocks run.
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "panel.cuh"
#include "params.h"
#include "work.cuh"

namespace mpq::cuda {

constexpr int kRowsOfSums = 68;  // floats from one token's 64 rows to the next: stores of a warp meet 32 banks

// Of a row group: first row of W, rows that exist (or more, where the band goes on).
struct Rows {
  int n0, count;
};

// Where a row group's results go.
struct Target {
  Rows rows;
  int64_t first_token;
  int tokens;
  int row_of_column0;  // row of W that column 0 of y belongs to: the expert's first
};

MPQ_DEVICE float load_bias(const Output& out, int64_t row) {
  if (out.bias_dtype == kDtypeF32) return dev::ld_constant(static_cast<const float*>(out.bias) + row);
  const uint16_t bits = dev::ld_constant(static_cast<const uint16_t*>(out.bias) + row);
  return out.bias_dtype == kDtypeF16 ? dev::f16_to_float(bits) : dev::bf16_to_float(bits);
}

template <bool kBf16>
MPQ_DEVICE void write_output(const Output& out, const Target& target, int token, int row_of_group, float v) {
  const int64_t row = target.rows.n0 + row_of_group;
  if (out.bias) v = dev::add(v, load_bias(out, row));
  dev::st_global(
      static_cast<uint16_t*>(out.y) + (target.first_token + token) * out.row_stride + (row - target.row_of_column0),
      from_float<kBf16>(v));
}

// Adds the warps' accumulators of one token tile and hands every sum to store(token, row, value); token and row count
// from the block's first token and the group's first row. Whole block.
template <int kTokenTiles, class Store>
MPQ_DEVICE void add_warps(const LinearParams& p, uint32_t base, const float (&y)[4][kTokenTiles][4], int n, int tokens,
                          int rows, const Store& store) {
  const int thread = int(dev::thread_index()), warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  const uint32_t slab = 8 * kRowsOfSums * sizeof(float);  // of one warp
  const uint32_t reduced = base + p.shared.panel;         // the panel is no longer needed
  dev::block_sync();
  MPQ_UNROLL for (int t = 0; t < 4; ++t) {
    MPQ_UNROLL for (int i = 0; i < 4; ++i) {
      const int token = 2 * q + (i & 1), row = 16 * t + 8 * (i >> 1) + g;
      float v = 0.0f;
      // n is a run-time number in unrolled code only in form.
      MPQ_UNROLL for (int j = 0; j < kTokenTiles; ++j) v = j == n ? y[t][j][i] : v;
      dev::st_shared(reduced + uint32_t(warp) * slab + uint32_t(token * kRowsOfSums + row) * 4, v);
    }
  }
  dev::block_sync();
  const int group_rows = kTileN << p.log2_group_rows, row_tiles = 1 << p.log2_group_rows;
  const int warps = int(dev::thread_count()) / 32;
  for (int i = thread; i < group_rows * 8; i += int(dev::thread_count())) {
    const int row = i & (group_rows - 1), token = i >> (6 + p.log2_group_rows);
    if (8 * n + token >= tokens || row >= rows) continue;
    const uint32_t place = reduced + uint32_t(row / kTileN) * slab + uint32_t(token * kRowsOfSums + row % kTileN) * 4;
    float sum = dev::ld_shared<float>(place);
    for (int w = row_tiles; w < warps; w += row_tiles)
      sum = dev::add(sum, dev::ld_shared<float>(place + uint32_t(w) * slab));
    store(8 * n + token, row, sum);
  }
}

// All of K was in this block: to y.
template <bool kBf16, int kTokenTiles>
MPQ_DEVICE void store_rows(const LinearParams& p, uint32_t base, const Target& target,
                           const float (&y)[4][kTokenTiles][4]) {
  MPQ_NO_UNROLL for (int n = 0; n < kTokenTiles && 8 * n < target.tokens; ++n) add_warps<kTokenTiles>(
      p, base, y, n, target.tokens, target.rows.count,
      [&](int token, int row, float sum) { write_output<kBf16>(p.out, target, token, row, sum); });
}

// Blocks first .. last have a part of K each; true in the block that is the last to get here. Whole block.
MPQ_DEVICE bool arrive_last(const LinearParams& p, uint32_t base, uint32_t first, uint32_t last) {
  dev::block_sync();
  uint32_t* counter = p.counters + dev::block_y() * dev::grid_x() + first;
  if (dev::thread_index() == 0) {
    const bool is_last = dev::count_arrival(counter, last - first) == last - first;  // 0 again for the next launch
    dev::st_shared(base + p.shared.flag, uint32_t(is_last));
  }
  dev::block_sync();
  return dev::ld_shared<uint32_t>(base + p.shared.flag);
}

}  // namespace mpq::cuda

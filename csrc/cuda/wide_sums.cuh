// From the accumulators of the kernels of wide.cuh to y.
//
//     two phases:      each of the two warps of a row tile keeps 16 of the 32 tokens, and adds the other's
//     several blocks:  accumulators go to the workspace as they lie in registers, 16 bytes a lane; the last block to
//                      arrive adds all, in the order of the blocks
//     y:               8 tokens at a time through shared memory, so that a row of y is written 128 bytes at a time
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "panel.cuh"
#include "params.h"
#include "wide.h"
#include "wide_unit.cuh"
#include "work.cuh"

namespace mpq::cuda {

template <int kTiles>
using Results = float[4][kTiles][4];  // of a warp: 64 rows x 8 kTiles tokens

// Rows of a row tile and tokens of a warp.
struct WideTarget {
  int64_t row;    // of W
  int rows;       // that exist from there, or more
  int64_t token;  // of x
  int tokens;     // that exist from there, or more
};

MPQ_DEVICE float bias_of(const Output& out, int64_t row) {
  if (out.bias_dtype == kDtypeF32) return dev::ld_constant(static_cast<const float*>(out.bias) + row);
  const uint16_t bits = dev::ld_constant(static_cast<const uint16_t*>(out.bias) + row);
  return out.bias_dtype == kDtypeF16 ? dev::f16_to_float(bits) : dev::bf16_to_float(bits);
}

template <bool kBf16, int kTiles>
MPQ_DEVICE void write_wide(const Output& out, uint32_t scratch, const WideTarget& target, const Results<kTiles>& y) {
  const uint32_t lane = dev::thread_index() % 32, g = lane / 4, q = lane % 4;
  const int row = 4 * int(lane & 15), rows_left = target.rows - row;  // that this lane writes
  float bias[4] = {};
  if (out.bias) {
    MPQ_UNROLL for (int i = 0; i < 4; ++i) {
      if (i < rows_left) bias[i] = bias_of(out, target.row + row + i);
    }
  }
  uint16_t* const to = static_cast<uint16_t*>(out.y) + target.row + row;
  const bool fours = rows_left >= 4 && out.row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(to) % 8 == 0;
  MPQ_UNROLL for (int n = 0; n < kTiles; ++n) {
    dev::warp_sync();
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      MPQ_UNROLL for (int i = 0; i < 4; ++i) {
        const uint32_t at = (2 * q + uint32_t(i & 1)) * kSumsStride + uint32_t(16 * t + 8 * (i >> 1)) + g;
        dev::st_shared(scratch + 4 * at, y[t][n][i]);
      }
    }
    dev::warp_sync();
    MPQ_NO_UNROLL for (int pass = 0; pass < 4; ++pass) {
      const int token = 2 * pass + int(lane >> 4);
      if (8 * n + token >= target.tokens || rows_left <= 0) continue;
      const uint4 v = dev::ld_shared<uint4>(scratch + uint32_t(token * kSumsStride + row) * 4);
      const uint32_t bits[4] = {v.x, v.y, v.z, v.w};
      uint16_t rounded[4];
      MPQ_UNROLL for (int i = 0; i < 4; ++i) {
        const float sum = dev::bits_to_float(bits[i]);
        rounded[i] = from_float<kBf16>(out.bias ? dev::add(sum, bias[i]) : sum);
      }
      uint16_t* const place = to + (target.token + 8 * n + token) * out.row_stride;
      if (fours) {
        dev::st_global(reinterpret_cast<uint2*>(place),
                       uint2{rounded[0] | uint32_t(rounded[1]) << 16, rounded[2] | uint32_t(rounded[3]) << 16});
        continue;
      }
      MPQ_UNROLL for (int i = 0; i < 4; ++i) {
        if (i < rows_left) dev::st_global(place + i, rounded[i]);
      }
    }
  }
}

// Blocks first .. last have a part of K each; true in the block that is the last to get here. Whole block.
MPQ_DEVICE bool is_last_part(const WideParams& params, uint32_t base, uint32_t first, uint32_t last) {
  const uint32_t flag = base + params.map.flag;
  dev::thread_fence();
  dev::block_sync();
  if (dev::thread_index() == 0) {
    uint32_t* counter = params.linear.counters + dev::block_y() * dev::grid_x() + first;
    const bool is_last = dev::atomic_add(counter, 1) == last - first;
    if (is_last) dev::st_global(counter, 0u);  // for the next launch
    dev::st_shared(flag, uint32_t(is_last));
  }
  dev::block_sync();
  const bool is_last = dev::ld_shared<uint32_t>(flag);
  dev::thread_fence();
  return is_last;
}

// A warp's results of an item whose other parts are in other blocks: true where all of them have been added. Whole
// block.
template <int kTiles>
MPQ_DEVICE bool add_parts(const WideParams& params, uint32_t base, const LinearWork& work, const Extent& extent,
                          Results<kTiles>& y) {
  const LinearParams& p = params.linear;
  const bool begun_before = extent.first_tile > 0;
  const uint32_t first = begun_before ? work.begin.first : work.end.first;
  const uint32_t last = begun_before ? work.begin.last : work.end.last;
  const uint32_t threads = dev::thread_count();
  const uint64_t pieces = uint64_t(threads) * (4 * kTiles);  // of 16 bytes, of one part
  // Two for each block: 0 for a row group that an earlier block begins, 1 for one that this block begins.
  const auto part = [&](uint32_t block, int slot) {
    return reinterpret_cast<float4*>(p.partials) +
           ((uint64_t{dev::block_y()} * dev::grid_x() + block) * 2 + uint32_t(slot)) * pieces + dev::thread_index();
  };
  float4* const mine = part(dev::block_x(), begun_before ? 0 : 1);
  MPQ_UNROLL for (int t = 0; t < 4; ++t) {
    MPQ_UNROLL for (int n = 0; n < kTiles; ++n) dev::st_global(mine + uint32_t(t * kTiles + n) * threads,
                                                               float4{y[t][n][0], y[t][n][1], y[t][n][2], y[t][n][3]});
  }
  if (!is_last_part(params, base, first, last)) return false;
  MPQ_NO_UNROLL for (uint32_t block = first; block <= last; ++block) {
    const float4* const from = part(block, block == first ? 1 : 0);
    float4 v[4][kTiles];
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      MPQ_UNROLL for (int n = 0; n < kTiles; ++n) v[t][n] =
          dev::ld_from_others(from + uint32_t(t * kTiles + n) * threads);
    }
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      MPQ_UNROLL for (int n = 0; n < kTiles; ++n) {
        const float values[4] = {v[t][n].x, v[t][n].y, v[t][n].z, v[t][n].w};
        MPQ_UNROLL for (int i = 0; i < 4; ++i) y[t][n][i] =
            block == first ? values[i] : dev::add(y[t][n][i], values[i]);
      }
    }
  }
  return true;
}

// Each of the two warps of a row tile gives the other half of its tokens away. Whole block.
MPQ_DEVICE void exchange_phases(const WideMap& map, uint32_t base, int phase, const Sums& y,
                                Results<kWarpTiles / 2>& kept) {
  const uint32_t lane = dev::thread_index() % 32, warp = dev::thread_index() / 32, slab = 8 * kSumsStride * 4;
  const uint32_t other =
      warp < uint32_t(map.row_tiles) ? warp + uint32_t(map.row_tiles) : warp - uint32_t(map.row_tiles);
  const uint32_t scratch = base + map.scratch + 16 * lane;
  MPQ_UNROLL for (int n = 0; n < kWarpTiles / 2; ++n) {
    constexpr int kHalf = kWarpTiles / 2;
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      uint32_t v[4];
      MPQ_UNROLL for (int i = 0; i < 4; ++i) v[i] = dev::float_to_bits(phase ? y[t][n][i] : y[t][kHalf + n][i]);
      dev::st_shared(scratch + warp * slab + 512 * t, uint4{v[0], v[1], v[2], v[3]});
    }
    dev::block_sync();
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      const uint4 v = dev::ld_shared<uint4>(scratch + other * slab + 512 * t);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      MPQ_UNROLL for (int i = 0; i < 4; ++i) kept[t][n][i] =
          dev::add(phase ? y[t][kHalf + n][i] : y[t][n][i], dev::bits_to_float(words[i]));
    }
    dev::block_sync();
  }
}

}  // namespace mpq::cuda

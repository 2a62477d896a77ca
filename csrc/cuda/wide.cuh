// y = x W^T + bias for 17 and more tokens, which tensor cores bind before memory does. As linear.cuh, but for:
//
//     x:       arrange.cu has put it into the workspace, with its sums, as shared memory wants it
//     steps:   all warps of a block multiply what one step has copied (wide_steps.cuh): weights and x, so that no panel
//              limits the part of K, and no copy of a warp needs bookkeeping of its own
//     warps:   64 rows x 32 tokens; two for each row tile, for two halves of 64 tokens, or, up to 32 tokens, for two
//              parts of the step
//     step s:  wait for step s, barrier | copies of step s + 2 | product                    one warp of a scheduler
//                                       | product | copies of step s + 2                    the other one
#pragma once

#include "device.cuh"
#include "params.h"
#include "wide.h"
#include "wide_steps.cuh"
#include "wide_sums.cuh"
#include "wide_unit.cuh"
#include "work.cuh"

namespace mpq::cuda {

// Which part of a step a warp multiplies, and where a lane finds it in stage 0.
template <int kPhases>
struct WideWarp {
  static constexpr uint32_t kTokens = kWarpTokens * (3 - kPhases);  // of the block
  uint32_t lane;
  int row_tile, half;  // half: of the tokens, or of the step
  uint32_t codes, scales, x, sums;

  MPQ_DEVICE WideWarp(const WideMap& map, uint32_t base) : lane(dev::thread_index() % 32) {
    const int warp = int(dev::thread_index() / 32);
    half = warp >= map.row_tiles;
    row_tile = half ? warp - map.row_tiles : warp;
    const uint32_t row = uint32_t(row_tile), first_token = kPhases == 1 ? uint32_t(kWarpTokens * half) : 0;
    codes = base + row * map.codes_pitch + 16 * lane;
    scales = base + uint32_t(map.row_tiles) * map.codes_pitch +
             (kPhases == 2 ? 2 * row + uint32_t(half) : row) * map.scales_pitch;
    x = base + map.x + (first_token + (lane & 7) + (lane >> 4) * 8) * 128;
    sums = base + map.sums + 4 * (first_token + 2 * (lane & 3));
  }
};

template <bool kBf16, int kPhases>
MPQ_DEVICE void multiply_step(const WideParams& params, const WideWarp<kPhases>& warp, const WideStep& step, int slot,
                              Sums& y) {
  const WideMap& map = params.map;
  const int unit = 1 << step.field(shape::kLog2Unit) << map.log2_units;
  WidePlace place;
  place.first = kPhases == 2 ? warp.half * unit : 0;
  place.count = step.count() - place.first < unit ? step.count() - place.first : unit;
  if (place.count <= 0 || warp.row_tile >= step.row_tiles()) return;
  const uint32_t stage = uint32_t(slot) * map.stage_bytes;
  place.step_tiles = kPhases * unit;
  place.codes = warp.codes + stage;
  place.scales = warp.scales + stage;
  place.tokens = WideWarp<kPhases>::kTokens;
  place.x_tile = place.tokens * 128;
  place.x = warp.x + stage;
  place.sums = warp.sums + stage;
  place.sums_pitch = map.sums_pitch;
  place.flush = 1 << step.field(shape::kLog2Flush);
  place.zero_kind = step.field(shape::kZeroKind);
  place.scale_dtype = params.linear.scale_dtype;
  const uint32_t bytes = place.scale_dtype == kDtypeF32 ? 4 : 2;
  place.scales_step = kTileN * (bytes + (place.zero_kind == kZeroInt          ? 1
                                         : zeros_like_scales(place.zero_kind) ? bytes
                                                                              : 0));
  wide_unit<kBf16>(y, place, step.field(shape::kBits), step.field(shape::kSubTile), warp.lane);
}

// Rows of the warp's row tile of a row group; groups must not decrease from call to call.
class WideRows {
 public:
  MPQ_DEVICE explicit WideRows(const WideParams& params) : p_(params.linear), row_tiles_(params.map.row_tiles) {}
  MPQ_DEVICE void find(uint32_t group, int row_tile, WideTarget& target) {
    while (index_ + 1 < p_.num_bands && uint32_t(band(index_ + 1).first_group) <= group) ++index_;
    const Band b = band(index_);
    const int before = (int(group - uint32_t(b.first_group)) * row_tiles_ + row_tile) * kTileN;
    target.row = b.n0 + before;
    target.rows = b.rows - before;
  }

 private:
  MPQ_DEVICE Band band(int i) const { return p_.bands ? load_words(p_.bands + i) : p_.inline_bands[i]; }
  const LinearParams& p_;
  int row_tiles_, index_ = 0;
};

// All of a row group's K that the block has is in y. Whole block.
template <bool kBf16, int kPhases>
MPQ_DEVICE void finish_item(const WideParams& params, uint32_t base, const WideWarp<kPhases>& warp,
                            const LinearWork& work, const Extent& extent, WideTarget target, Sums& y) {
  const uint32_t scratch =
      base + params.map.scratch + (dev::thread_index() / 32) * uint32_t(8 * kSumsStride * sizeof(float));
  const bool whole = extent.first_tile == 0 && extent.end_tile == params.linear.k_tiles;
  const int before = (kPhases == 2 ? kWarpTokens / 2 : kWarpTokens) * warp.half;
  target.token += before;
  target.tokens -= before;
  if constexpr (kPhases == 2) {
    Results<kWarpTiles / 2> kept;
    exchange_phases(params.map, base, warp.half, y, kept);
    if (whole || add_parts<kWarpTiles / 2>(params, base, work, extent, kept))
      write_wide<kBf16, kWarpTiles / 2>(params.linear.out, scratch, target, kept);
  } else if (whole || add_parts<kWarpTiles>(params, base, work, extent, y)) {
    write_wide<kBf16, kWarpTiles>(params.linear.out, scratch, target, y);
  }
}

template <bool kBf16, int kPhases>
MPQ_KERNEL(256)
wide_kernel(const MPQ_GRID_CONSTANT WideParams params) {
  const uint32_t base = dev::shared_base();
  const LinearParams& p = params.linear;
  const LinearWork work{p.cuts[dev::block_x()], p.cuts[dev::block_x() + 1], p.k_tiles};
  WideCopies<kPhases> copies(params, base, work);
  WideStep now = copies.copy_weights(0);
  dev::launch_dependents();
  dev::wait_for_earlier_kernels();
  copies.copy_x(now, 0);
  WideStep next = copies.copy_weights(1);
  copies.copy_x(next, 1);
  constexpr int kTokens = kWarpTokens * (3 - kPhases);
  const int64_t first_token = int64_t{dev::block_y()} * kTokens;
  const int tokens = p.in.tokens - first_token < kTokens ? int(p.in.tokens - first_token) : kTokens;
  const WideWarp<kPhases> warp(params.map, base);
  WideRows rows(params);
  Sums y = {};
  int slot = 0;
  while (now.item != kNoItem) {
    dev::cp_async_wait<kWideStages - 2>();
    dev::block_sync();  // the step is there; nobody reads the one before any more
    const int free_slot = slot == 0 ? kWideStages - 1 : slot - 1;
    WideStep after;
    // One of a scheduler's two warps copies while the other one multiplies.
    if (!warp.half) after = copies.copy_weights(free_slot), copies.copy_x(after, free_slot);
    multiply_step<kBf16, kPhases>(params, warp, now, slot, y);
    if (warp.half) after = copies.copy_weights(free_slot), copies.copy_x(after, free_slot);
    if (now.last()) {
      const Extent extent = work.extent(now.item);
      WideTarget target{0, 0, first_token, tokens};
      rows.find(extent.group, warp.row_tile, target);
      finish_item<kBf16, kPhases>(params, base, warp, work, extent, target, y);
      MPQ_UNROLL for (int t = 0; t < 4; ++t) {
        MPQ_UNROLL for (int n = 0; n < kWarpTiles; ++n) { MPQ_UNROLL for (int i = 0; i < 4; ++i) y[t][n][i] = 0.0f; }
      }
    }
    now = next;
    next = after;
    slot = slot == kWideStages - 1 ? 0 : slot + 1;
  }
}

}  // namespace mpq::cuda

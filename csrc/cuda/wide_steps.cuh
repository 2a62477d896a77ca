// Copies of weights and x for the kernels of wide.cuh, step by step: each warp copies its unit of weights, or half of
// what it shares with another warp, and its part of x, two steps ahead.
//
//     codes of a row tile:  | plane 0: tiles of the step | plane 1 | plane 2 |             the rest of a stage: wide.h
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "params.h"
#include "wide.h"
#include "work.cuh"
#include "zeros.cuh"

namespace mpq::cuda {

// A step as it stands in a stage. `shape` is the segment's (params.h), with the tiles of the step where units have
// their own number, and:
namespace step_shape {
constexpr int kLast = 24;      // 1: the item ends with this step
constexpr int kRowTiles = 25;  // row tiles that exist, 1..4
}  // namespace step_shape

struct WideStep {
  uint32_t item;  // kNoItem after the last step
  int32_t tile;   // first tile, counted over the whole of K
  uint32_t shape;

  MPQ_DEVICE int field(int at) const { return int(shape >> at & 15); }
  MPQ_DEVICE int count() const { return field(shape::kCount); }
  MPQ_DEVICE bool last() const { return shape >> step_shape::kLast & 1; }
  MPQ_DEVICE int row_tiles() const { return int(shape >> step_shape::kRowTiles & 7); }
};

// kPhases: units of a row tile in a step, one for each of its two warps; 1: the warps share a unit.
template <int kPhases>
class WideCopies {
 public:
  MPQ_DEVICE WideCopies(const WideParams& params, uint32_t base, const LinearWork& work)
      : params_(params), p_(params.linear), map_(params.map), work_(work), item_(work.first()) {
    const uint32_t warp = dev::thread_index() / 32;
    lane_ = dev::thread_index() % 32;
    half_ = warp >= uint32_t(map_.row_tiles);
    row_ = int(warp) - (half_ ? map_.row_tiles : 0);
    codes_to_ = base + uint32_t(row_) * map_.codes_pitch + 16 * lane_;
    scales_to_ = base + uint32_t(map_.row_tiles) * map_.codes_pitch +
                 (kPhases * uint32_t(row_) + (kPhases == 2 ? half_ : 0)) * map_.scales_pitch + 16 * lane_;
    x_to_ = base + map_.x + 16 * dev::thread_index();
    x_ = params_.x + uint64_t{dev::block_y()} * uint32_t(p_.k_tiles) * kTileBytes + 16 * dev::thread_index();
    if (item_ != kNoItem) enter_item();
  }

  // Sends the weights of the next step on their way to a stage.
  MPQ_DEVICE WideStep copy_weights(int slot) {
    WideStep step{item_, tile0_ + tile_, 0};
    if (item_ != kNoItem) {
      const uint32_t stage = uint32_t(slot) * map_.stage_bytes;
      const int unit = 1 << (shape_ >> shape::kLog2Unit & 15) << map_.log2_units, tiles = kPhases * unit;
      const int count = end_tile_ - tile_ < tiles ? end_tile_ - tile_ : tiles;
      const int first = kPhases == 2 ? int(half_) * unit : 0;
      const int mine = count - first < unit ? count - first : unit;
      if (row_ < rows_ && mine > 0) {
        copy_codes(codes_to_ + stage, first, mine, tiles);
        if (kPhases == 2 || half_) copy_scales(scales_to_ + stage, tile_ + first, mine);
      }
      tile_ += tiles;
      step.shape = shape_ | uint32_t(count) << shape::kCount | uint32_t(rows_) << step_shape::kRowTiles;
      if (tile_ >= end_tile_) step.shape |= uint32_t(!next_segment()) << step_shape::kLast;
    }
    return step;
  }

  // Its x, and the end of its group of copies.
  MPQ_DEVICE void copy_x(const WideStep& step, int slot) {
    if (step.item != kNoItem) {
      const uint32_t stage = uint32_t(slot) * map_.stage_bytes, threads = dev::thread_count();
      const int count = step.count();
      const char* from = x_ + uint64_t{uint32_t(step.tile)} * kTileBytes;
      uint32_t to = x_to_ + stage;
      // Four loads of 256 threads are all of a step.
      for (int left = count * int(kTileBytes) - 16 * int(dev::thread_index()); left > 0; left -= int(64 * threads)) {
        MPQ_UNROLL for (int i = 0; i < 4; ++i) {
          if (left > 16 * i * int(threads))
            dev::cp_async16(to + 16 * uint32_t(i) * threads, from + 16 * i * int(threads));
        }
        to += 64 * threads;
        from += 64 * threads;
      }
      const char* const sums =
          params_.sums + (uint64_t{dev::block_y()} * uint32_t(p_.k_tiles) + uint32_t(step.tile)) * map_.sums_pitch;
      MPQ_NO_UNROLL for (uint32_t at = 16 * dev::thread_index(); at < uint32_t(count) * map_.sums_pitch;
                         at += 16 * threads)
          dev::cp_async16(x_to_ - 16 * dev::thread_index() + stage + (map_.sums - map_.x) + at, sums + at);
    }
    dev::cp_async_commit();
  }

 private:
  static constexpr uint32_t kTileBytes = kWarpTokens * (3 - kPhases) * 128;

  // One word of a band.
  MPQ_DEVICE int32_t band(int i, int32_t Band::* word) const {
    return p_.bands ? dev::ld_constant(&(p_.bands[i].*word)) : p_.inline_bands[i].*word;
  }
  // False where the segment ends before tile `tile` of the whole of K.
  MPQ_DEVICE bool enter_segment(int i, int tile) {
    const Segment s = p_.segments ? load_words(p_.segments + i) : p_.inline_segments[i];
    segment_ = i;
    tile0_ = s.tile0;
    tile_ = tile - s.tile0;
    if (tile_ >= s.tiles) return false;
    const Extent extent = work_.extent(item_);
    end_tile_ = extent.end_tile - s.tile0 < s.tiles ? extent.end_tile - s.tile0 : s.tiles;
    shape_ = s.shape;
    rate_ = s.groups_per_tile;
    last_group_ = s.groups - 1;
    const int row_tile = first_row_ + row_;
    const uint32_t bits = shape_ & 15, tiles = uint32_t(row_tile * s.tiles);
    const auto plane = [&](int which, uint32_t width) {
      return static_cast<const char*>(p_.qweight) + (uint64_t{s.planes[which]} + tiles * (32 * width) + lane_) * 16;
    };
    first_ = plane(0, bits >= 4 ? 4 : bits >= 2 ? 2 : 1);
    second_ = plane(1, bits == 8 ? 4 : bits >= 6 ? 2 : 1);
    third_ = plane(2, 1);
    // A lane copies 16 bytes of a group's scales or zeros, or nothing.
    const int zero_kind = int(shape_ >> shape::kZeroKind & 15);
    const uint32_t bytes = p_.scale_dtype == kDtypeF32 ? 4 : 2, pieces = 4 * bytes;
    const uint32_t zero_bytes = zero_kind == kZeroInt ? 1 : zeros_like_scales(zero_kind) ? bytes : 0;
    const bool scales = lane_ < pieces;
    group_bytes_ = lane_ < pieces + 4 * zero_bytes ? kTileN * (scales ? bytes : zero_bytes) : 0;
    flush_bytes_ = kTileN * (bytes + zero_bytes);
    scales_ = static_cast<const char*>(scales ? p_.scales : p_.zeros) + 16 * (scales ? lane_ : lane_ - pieces) +
              (uint64_t{scales ? s.scales : s.zeros} + uint32_t(row_tile * s.groups)) * group_bytes_;
    return true;
  }
  MPQ_DEVICE void enter_item() {
    const Extent extent = work_.extent(item_);
    while (band_ + 1 < p_.num_bands && uint32_t(band(band_ + 1, &Band::first_group)) <= extent.group) ++band_;
    first_row_ = int(extent.group - uint32_t(band(band_, &Band::first_group))) * map_.row_tiles;
    rows_ = band(band_, &Band::row_tiles) - first_row_;
    if (rows_ > map_.row_tiles) rows_ = map_.row_tiles;
    for (int i = band(band_, &Band::first_segment); !enter_segment(i, extent.first_tile);) ++i;
  }
  // After the last tile of a segment; false where the item ends, and the next one begins.
  MPQ_DEVICE bool next_segment() {
    const int tile = tile0_ + end_tile_;
    if (tile < work_.extent(item_).end_tile) return enter_segment(segment_ + 1, tile);
    item_ = work_.after(item_);
    if (item_ != kNoItem) enter_item();
    return false;
  }

  // 512-byte rows of a plane: all of them, or every second one.
  MPQ_DEVICE void copy_rows(uint32_t to, const char* from, int rows) {
    constexpr int kStep = kPhases == 2 ? 1 : 2;
    if (kPhases == 1 && half_) to += 512, from += 512, --rows;
    for (; rows > 0; rows -= 4 * kStep, to += 2048 * kStep, from += 2048 * kStep) {
      MPQ_UNROLL for (int i = 0; i < 4; ++i) {
        if (rows > i * kStep) dev::cp_async16(to + 512 * kStep * i, from + 512 * kStep * i);
      }
    }
  }
  MPQ_DEVICE void copy_codes(uint32_t to, int first, int count, int tiles) {
    const uint32_t bits = shape_ & 15;
    const auto copy_plane = [&](const char* plane, uint32_t width) {
      copy_rows(to + uint32_t(first) * (512 * width), plane + uint32_t(tile_ + first) * (512 * width),
                count * int(width));
      to += uint32_t(tiles) * (512 * width);
    };
    copy_plane(first_, bits >= 4 ? 4 : bits >= 2 ? 2 : 1);
    if (bits == 3 || bits > 4) copy_plane(second_, bits == 8 ? 4 : bits >= 6 ? 2 : 1);
    if (bits == 7) copy_plane(third_, 1);
  }
  // For each flush 64 scales, then 64 zeros.
  MPQ_DEVICE void copy_scales(uint32_t to, int tile, int count) {
    if (!group_bytes_) return;
    const uint32_t log2_flush = shape_ >> shape::kLog2Flush & 15;
    const bool sub_tile = shape_ >> shape::kSubTile & 1;
    const int groups = sub_tile ? 4 >> log2_flush : 1, tiles = sub_tile ? 1 : 1 << log2_flush;
    MPQ_NO_UNROLL for (int end = tile + count; tile < end; tile += tiles) {
      // Where groups are wider than a tile, the middle of the tile is divided, so that no rounding crosses a border.
      int group = int(dev::fma(float(tile), rate_, rate_ < 1.0f ? 0.5f * rate_ : 0.25f));
      MPQ_NO_UNROLL for (int i = 0; i < groups; ++i, ++group, to += flush_bytes_) {
        // A last supertile may have fewer columns than groups would fill; x is zero there.
        const int there = group < last_group_ ? group : last_group_;
        dev::cp_async16(to, scales_ + uint64_t{uint32_t(there)} * group_bytes_);
      }
    }
  }

  const WideParams& params_;
  const LinearParams& p_;
  const WideMap& map_;
  LinearWork work_;
  uint32_t lane_, half_;
  int row_;  // row tile of the block
  uint32_t codes_to_, scales_to_, x_to_;
  const char* x_;
  // The next step: its row group, segment, and tiles of that.
  uint32_t item_;
  int band_ = 0, segment_ = 0, first_row_ = 0, rows_ = 0, tile0_ = 0, tile_ = 0, end_tile_ = 0, last_group_ = 0;
  uint32_t shape_ = 0, group_bytes_ = 0, flush_bytes_ = 0;
  float rate_ = 0.0f;
  const char *first_ = nullptr, *second_ = nullptr, *third_ = nullptr, *scales_ = nullptr;  // of this lane
};

}  // namespace mpq::cuda

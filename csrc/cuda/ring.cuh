// The ring: each warp copies its own units of weights to shared memory, kStages - 1 units ahead of the one it
// multiplies, across the borders of segments and row groups. A lane copies the very 16 bytes that it will read, so the
// codes need no barrier; only the descriptor of a unit passes from lane 0 to the others.
//
//     stage:  | plane 0: `unit` tiles | plane 1 | plane 2 | scales, zeros of flush 0 | of flush 1 | ...
//
// Row tile and phase: the warps of a block are `1 << log2_group_rows` row tiles side by side, and all warps of one row
// tile take its units in turn.
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "params.h"
#include "work.cuh"
#include "zeros.cuh"

namespace mpq::cuda {

// What a warp needs to know of a unit that has landed, 16 bytes.
struct Descriptor {
  uint32_t item;   // of the block's work, kNoItem after the last unit
  uint32_t tile;   // first tile, counted over the whole of K
  uint32_t shape;  // params.h
};

// Work (work.cuh) says which row groups the block has, and which tiles of them.
template <class Work>
class Ring {
 public:
  MPQ_DEVICE Ring(const LinearParams& p, uint32_t shared, const Work& work)
      : p_(p), work_(work), lane_(dev::thread_index() % 32) {
    const uint32_t warp = dev::thread_index() / 32;
    phases_ = int(dev::thread_count() / 32) >> p.log2_group_rows;
    phase_ = int(warp) >> p.log2_group_rows;
    row_ = int(warp) & ((1 << p.log2_group_rows) - 1);
    descriptors_ = shared + p.shared.descriptors + warp * kStages * 16;
    stages_ = shared + p.shared.ring + warp * kStages * p.shared.stage_bytes;
    enter_band(0);
    item_ = work.first();
    enter_item();
    MPQ_NO_UNROLL for (int i = 0; i < kStages - 1; ++i) issue(i);
  }

  // Waits for the oldest unit and issues one more copy. The unit is dropped by pop().
  MPQ_DEVICE Descriptor front() {
    dev::cp_async_wait<kStages - 2>();
    dev::warp_sync();
    const uint4 v = dev::ld_shared<uint4>(descriptors_ + 16 * uint32_t(slot_));
    return {v.x, v.y, v.z};
  }
  MPQ_DEVICE uint32_t front_address() const { return stages_ + uint32_t(slot_) * p_.shared.stage_bytes; }
  // Refills the stage that was consumed before the front one: every lane has passed a warp_sync since it read it.
  MPQ_DEVICE void refill() { issue(slot_ == 0 ? kStages - 1 : slot_ - 1); }
  MPQ_DEVICE void pop() { slot_ = slot_ == kStages - 1 ? 0 : slot_ + 1; }

 private:
  MPQ_DEVICE Band band(int i) const { return p_.bands ? load_words(p_.bands + i) : p_.inline_bands[i]; }
  MPQ_DEVICE void enter_band(int i) {
    index_ = i;
    band_ = band(i);
    const bool last = i + 1 == p_.num_bands;
    next_group_ = last ? kNoItem : uint32_t(band(i + 1).first_group);
    end_segment_ = last ? p_.num_segments : band(i + 1).first_segment;
  }
  MPQ_DEVICE void enter_segment(int i) {
    segment_index_ = i;
    segment_ = p_.segments ? load_words(p_.segments + i) : p_.inline_segments[i];
    // From here on the places of this lane's data of row tile row_tile_, tile 0.
    const uint32_t pieces = uint32_t(row_tile_ * segment_.tiles) * 32, bits = segment_.shape & 15;
    segment_.planes[0] += pieces * (bits >= 4 ? 4 : bits == 1 ? 1 : 2) + lane_;
    segment_.planes[1] += pieces * (bits == 8 ? 4 : bits >= 6 ? 2 : 1) + lane_;
    segment_.planes[2] += pieces + lane_;
    segment_.scales += uint32_t(row_tile_ * segment_.groups);
    segment_.zeros += uint32_t(row_tile_ * segment_.groups);
    log2_unit_ = int(segment_.shape >> shape::kLog2Unit & 15);
    const int end = item_end_ - segment_.tile0;
    end_tile_ = end < segment_.tiles ? end : segment_.tiles;
  }

  // To this warp's first unit of item_, or of a later one.
  MPQ_DEVICE void enter_item() {
    for (; item_ != kNoItem; item_ = work_.after(item_)) {
      const Extent extent = work_.extent(item_);
      while (extent.group >= next_group_) enter_band(index_ + 1);
      row_tile_ = int(extent.group - uint32_t(band_.first_group)) * (1 << p_.log2_group_rows) + row_;
      if (row_tile_ >= band_.row_tiles) continue;
      item_end_ = extent.end_tile;
      enter_segment(band_.first_segment);
      while (segment_.tile0 + segment_.tiles <= extent.first_tile) enter_segment(segment_index_ + 1);
      tile_ = extent.first_tile - segment_.tile0;
      if (skip(phase_)) return;
    }
  }

  // Moves on by `units` units; false where the block's part of the row group ends before.
  MPQ_DEVICE bool skip(int units) {
    for (;;) {
      const int left = (end_tile_ - tile_ + (1 << log2_unit_) - 1) >> log2_unit_;
      if (units < left) {
        tile_ += units << log2_unit_;
        return true;
      }
      units -= left;
      if (segment_index_ + 1 == end_segment_ || segment_.tile0 + segment_.tiles >= item_end_) return false;
      enter_segment(segment_index_ + 1);
      tile_ = 0;
    }
  }

  // `count` tiles of a plane of width kWidth, of which this lane's part of tile 0 is piece `first`.
  template <int kWidth>
  MPQ_DEVICE void copy_plane(uint32_t to, uint32_t first, int count) {
    const uint32_t piece = first + uint32_t(tile_) * (32 * kWidth);
    const char* from = static_cast<const char*>(p_.qweight) + uint64_t{piece} * 16;
    MPQ_NO_UNROLL for (int tile = 0; tile < count; ++tile) {
      MPQ_UNROLL for (int i = 0; i < kWidth; ++i) dev::cp_async16(to + 512 * i, from + 512 * i);
      to += 512 * kWidth;
      from += 512 * kWidth;
    }
  }

  MPQ_DEVICE uint32_t copy_codes(uint32_t to, int bits, int count) {
    // Constant indices only: an array indexed at run time would leave the registers.
    const uint32_t first = segment_.planes[0], second = segment_.planes[1], third = segment_.planes[2];
    if (bits >= 4) {
      copy_plane<4>(to, first, count);
      to += 2048 << log2_unit_;
      if (bits == 8) copy_plane<4>(to, second, count), to += 2048 << log2_unit_;
    }
    if (bits & 2) copy_plane<2>(to, bits >= 4 ? second : first, count), to += 1024 << log2_unit_;
    if (bits & 1) copy_plane<1>(to, bits == 7 ? third : bits == 1 ? first : second, count), to += 512 << log2_unit_;
    return to;
  }

  // A lane's 8 values of one block of 64, `bytes` each; lanes of the same rows copy the same ones.
  MPQ_DEVICE void copy_row_values(uint32_t to, const void* from, uint32_t block, uint32_t bytes) {
    const char* values = static_cast<const char*>(from) + (lane_ >> 2) * 8 * bytes + uint64_t{block} * (kTileN * bytes);
    dev::cp_async16(to + 16 * lane_, values);
    if (bytes == 4) dev::cp_async16(to + 16 * lane_ + 512, values + 16);
  }

  MPQ_DEVICE void copy_scales(uint32_t to, int count) {
    const uint32_t shape = segment_.shape, log2_flush = shape >> shape::kLog2Flush & 15;
    const int zero_kind = int(shape >> shape::kZeroKind & 15);
    const int parts = shape >> shape::kSubTile & 1 ? 4 : count;
    const int flushes = (parts + (1 << log2_flush) - 1) >> log2_flush;
    const float rate = segment_.groups_per_tile;
    // Where groups are wider than a tile, the middle of the tile is divided, so that no rounding crosses a border.
    int group = int(dev::fma(float(tile_), rate, rate < 1.0f ? 0.5f * rate : 0.25f));
    const uint32_t bytes = p_.scale_dtype == kDtypeF32 ? 4 : 2;
    MPQ_NO_UNROLL for (int i = 0; i < flushes; ++i, ++group) {
      // A last supertile may have fewer columns than groups would fill; x is zero there.
      const uint32_t there = uint32_t(group < segment_.groups ? group : segment_.groups - 1);
      copy_row_values(to, p_.scales, segment_.scales + there, bytes);
      to += 256 * bytes;
      if (zero_kind == kZeroInt) {
        const char* zeros = static_cast<const char*>(p_.zeros) + (lane_ >> 2) * 8;
        dev::cp_async8(to + 8 * lane_, zeros + uint64_t{segment_.zeros + there} * kTileN);
        to += 256;
      } else if (zeros_like_scales(zero_kind)) {
        copy_row_values(to, p_.zeros, segment_.zeros + there, bytes);
        to += 256 * bytes;
      }
    }
  }

  MPQ_DEVICE void issue(int slot) {
    uint32_t shape = 0;
    if (item_ != kNoItem) {
      const int unit = 1 << log2_unit_;
      const int count = end_tile_ - tile_ < unit ? end_tile_ - tile_ : unit;
      const uint32_t to = stages_ + uint32_t(slot) * p_.shared.stage_bytes;
      const uint32_t after = copy_codes(to + 16 * lane_, int(segment_.shape & 15), count) - 16 * lane_;
      copy_scales(after, count);
      shape = segment_.shape | uint32_t(count) << shape::kCount;
    }
    const uint32_t tile = uint32_t(segment_.tile0 + tile_);
    if (lane_ == 0) dev::st_shared(descriptors_ + 16 * uint32_t(slot), uint4{item_, tile, shape, 0});
    dev::cp_async_commit();
    if (item_ != kNoItem && !skip(phases_)) {
      item_ = work_.after(item_);
      enter_item();
    }
  }

  const LinearParams& p_;
  Work work_;
  uint32_t lane_;
  int phases_, phase_, row_;
  uint32_t descriptors_, stages_;
  int slot_ = 0;
  // The next unit to copy.
  uint32_t item_, next_group_ = 0;
  int item_end_ = 0;
  int index_ = 0, end_segment_ = 0, segment_index_ = 0;
  int row_tile_ = 0, tile_ = 0, end_tile_ = 0, log2_unit_ = 0;
  Band band_{};
  Segment segment_{};
};

}  // namespace mpq::cuda

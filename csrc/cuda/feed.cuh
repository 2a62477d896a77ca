// Weights on their way to shared memory: each warp copies its own units of supertiles, some of them ahead, by 16-byte
// asynchronous copies. A lane copies the very 16 bytes that it will read, so that codes need no barrier, and a slot is
// filled again as soon as its lanes have read it.
//
//     part of a warp:  | scales, zeros of unit 0 | of unit 1 | ...   | slot 0: plane 0, 1, 2 of a tile, of the next |
//     ...
//
// Units: one supertile, or two up to 4 bits where groups of scales are of whole pairs of them (segments.h); a unit lies
// in one group unless groups are narrower than a tile. The warps of one row tile take its units in turn.
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "params.h"
#include "zeros.cuh"

namespace mpq::cuda {

// Units on their way.
template <int kBits, bool kPairs>
constexpr int kSlots = slots_of(kBits, kPairs);

template <int kBits, int kPlane>
constexpr int kWidth = kPlaneWidth[kBits][kPlane];  // devices have no table

// What a warp copies of one segment.
struct Feed {
  const char* planes[3];      // this lane's 16 bytes of tile 0 of the row tile
  const char* scales;         // this lane's 16 bytes of the scales or the zeros of group 0
  bool copies_scales;         // this lane does
  uint32_t scales_step;       // bytes from one group to the next, for this lane
  uint32_t group_factor;      // params.h
  uint32_t scales_end;        // bytes of the scales of all units on their way
  uint32_t unit_scales;       // of one unit
  uint32_t codes, scales_to;  // where the lane's first slot and its scales are
  uint32_t slot, scale_slot;  // byte offsets of what is copied next
  int next, end, step;        // first tile of the next unit to copy; tiles end here; tiles to the warp's next unit
  int log2_parts, groups;     // groups in a tile, where they are narrower than that, else 0; of the segment
};

// What warp `phase` of `phases` of a row tile copies of tiles [first, end) of a segment into its `part` of shared
// memory. `side`: units whose scales are used at the same time.
template <int kBits, bool kPairs>
MPQ_DEVICE void begin_feed(Feed& f, const LinearParams& p, const Segment& s, uint32_t row_tile, uint32_t part,
                           int first, int end, int phase, int phases, int side) {
  const uint32_t lane = dev::thread_index() % 32, tiles = row_tile * uint32_t(s.tiles);
  const char* codes = static_cast<const char*>(p.qweight) + 16 * lane;
  const auto plane = [&](int i, int width) {
    f.planes[i] =
        width ? dev::held(codes + uint64_t{s.planes[i]} * 16 + uint64_t{tiles} * uint32_t(512 * width)) : codes;
  };
  plane(0, kWidth<kBits, 0>), plane(1, kWidth<kBits, 1>), plane(2, kWidth<kBits, 2>);
  const int zero = int(s.shape >> shape::kZeroKind & 15);
  const uint32_t scale_bytes = p.scale_dtype == kDtypeF32 ? 256 : 128;
  const uint32_t zero_bytes = zero == kZeroInt ? 64 : zeros_like_scales(zero) ? scale_bytes : 0;
  const bool of_zeros = lane >= 16;
  const uint32_t mine = 16 * (lane & 15), bytes = of_zeros ? zero_bytes : scale_bytes;
  const uint32_t block = (of_zeros ? s.zeros : s.scales) + row_tile * uint32_t(s.groups);
  f.scales = dev::held(static_cast<const char*>(of_zeros ? p.zeros : p.scales) + uint64_t{block} * bytes + mine);
  f.copies_scales = mine < bytes;
  f.scales_step = bytes;
  f.group_factor = s.group_factor;
  f.log2_parts = int(s.shape >> shape::kLog2Parts & 3);
  f.groups = s.groups;
  f.unit_scales = (scale_bytes + zero_bytes) << f.log2_parts;
  f.scales_end = f.unit_scales * uint32_t(kSlots<kBits, kPairs> + side);
  f.scales_to = part + mine + (of_zeros ? scale_bytes : 0);
  f.codes = part + p.shared.scale_bytes + 16 * lane;
  f.slot = f.scale_slot = 0;
  f.step = phases << kPairs;
  f.next = first + (phase << kPairs);
  f.end = end;
}

template <int kBits, int kTile, int kPlane>
MPQ_DEVICE void copy_plane(const Feed& f, uint32_t& to, bool there) {
  constexpr int kPieces = kWidth<kBits, kPlane>;
  const char* from = f.planes[kPlane] + uint64_t{uint32_t(f.next)} * (512 * kPieces);
  MPQ_UNROLL for (int i = 0; i < kPieces; ++i)
      dev::cp_async16_if(there, to + 512 * i, from + 512 * (kTile * kPieces + i));
  to += 512 * kPieces;
}
template <int kBits, int kTile>
MPQ_DEVICE void copy_tile(const Feed& f, bool there) {
  uint32_t to = f.codes + f.slot + kTile * 512 * kBits;
  copy_plane<kBits, kTile, 0>(f, to, there);
  copy_plane<kBits, kTile, 1>(f, to, there);
  copy_plane<kBits, kTile, 2>(f, to, there);
}

// kParts: groups may be narrower than a tile.
template <bool kParts>
MPQ_DEVICE void copy_scales(const Feed& f, bool there) {
  if (kParts && f.log2_parts) {
    const uint32_t part_bytes = f.unit_scales >> f.log2_parts;
    MPQ_NO_UNROLL for (int i = 0; i < 1 << f.log2_parts; ++i) {
      // A last supertile may have fewer columns than groups would fill; x is zero there.
      const int group = (f.next << f.log2_parts) + i, last = f.groups - 1;
      dev::cp_async16_if(there && f.copies_scales, f.scales_to + f.scale_slot + part_bytes * uint32_t(i),
                         f.scales + uint64_t{uint32_t(group < last ? group : last)} * f.scales_step);
    }
  } else {
    const uint32_t group = dev::multiply_high(2 * uint32_t(f.next), f.group_factor);
    dev::cp_async16_if(there && f.copies_scales, f.scales_to + f.scale_slot,
                       f.scales + uint64_t{group} * f.scales_step);
  }
}

// Copies the next unit into the slot at `f.slot`, whose last unit has been read by every lane. A group of copies
// for each tile, even where nothing is left, so that waiting is the same everywhere.
template <int kBits, bool kPairs, bool kParts>
MPQ_DEVICE void feed_unit(Feed& f) {
  constexpr uint32_t kUnitBytes = 512 * kBits << kPairs;
  const bool there = f.next < f.end;
  copy_tile<kBits, 0>(f, there);
  copy_scales<kParts>(f, there);
  dev::cp_async_commit();
  if constexpr (kPairs) {
    copy_tile<kBits, 1>(f, f.next + 1 < f.end);
    dev::cp_async_commit();
  }
  f.slot = f.slot == (kSlots<kBits, kPairs> - 1) * kUnitBytes ? 0 : f.slot + kUnitBytes;
  f.scale_slot = f.scale_slot + f.unit_scales == f.scales_end ? 0 : f.scale_slot + f.unit_scales;
  f.next += f.step;
}

}  // namespace mpq::cuda

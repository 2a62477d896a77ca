// y = x W^T + bias for up to 16 tokens, bound by the bytes of W. Eight warps a block, `1 << log2_group_rows` row tiles
// side by side, each with its share of the warps; a block has a part of K of one row group, or some row groups
// (params.h).
//
//     warp:    copies of its tiles ahead (feed.cuh) | products of a unit | scales of a group (group_sums.cuh)
//     block:   x to shared memory once ... at the end of a row group: add warps, add blocks (gather.cuh)
//
// Weights do not depend on the kernels ahead in the stream, x does: the first copies of weights are on their way before
// the block waits for x.
//
// Groups side by side (kSide = 4, up to 2 tokens): operand B has eight columns. The warp's units take turns at column
// pairs, x of the others is zero, and the scales of four groups are applied at once, by the lanes of their columns:
//
//     column of B:   0, 1: unit 4 i | 2, 3: unit 4 i + 1 | 4, 5: unit 4 i + 2 | 6, 7: unit 4 i + 3      tokens 0, 1
#pragma once

#include <type_traits>

#include "device.cuh"
#include "feed.cuh"
#include "gather.cuh"
#include "group_sums.cuh"
#include "linear.cuh"
#include "params.h"
#include "work.cuh"

namespace mpq::cuda {

// Where a lane finds x for ldmatrix, and who it is.
template <int kTokenTiles>
struct Tokens {
  uint32_t rows[kTokenTiles];  // tile 0 of the segment in the panel: its row of ldmatrix
  uint32_t zeros;              // the same place in a row of zeros
  uint32_t side;               // side by side: the turn at which the lane's row is x, else zeros
  uint32_t scales;             // of this warp's first unit
  uint32_t lane;
};

// The warp's units of a segment. kSide as above.
template <int kBits, bool kBf16, int kTokenTiles, int kSide, bool kPairs>
MPQ_DEVICE void multiply_units(Feed& f, int tile, const Tokens<kTokenTiles>& at, GroupKind kind,
                               float (&y)[4][kTokenTiles][4]) {
  GroupSums<kTokenTiles> sums{};
  uint32_t turn = 0, scales = 0;  // unit of the group of four; place of the scales of its first unit
  const uint32_t step = uint32_t(f.step) * (2 * kTileK);
  uint32_t rows[kTokenTiles];
  MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) rows[n] = at.rows[n] + uint32_t(tile) * (2 * kTileK);
  const auto add_four = [&](uint32_t last) {
    // Lanes of columns without a unit have sums of zero: any scale that is a number does.
    const uint32_t own = (at.lane & 3) <= last ? at.lane & 3 : last;
    uint32_t place = scales + own * f.unit_scales;
    if (place >= f.scales_end) place -= f.scales_end;
    add_group<kBits, kBf16, kTokenTiles>(y, sums, at.scales + place, kind, at.lane >> 2);
    sums = {};
    scales += kSide * f.unit_scales;
    if (scales >= f.scales_end) scales -= f.scales_end;
  };
  const auto multiply_unit = [&](auto second) {
    constexpr int kAfterUnit = (kSlots<kBits, kPairs> - 1) << kPairs;  // groups of copies
    dev::cp_async_wait<kAfterUnit + kPairs>();
    dev::warp_sync();
    uint32_t x[kTokenTiles];
    MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
      x[n] = kSide == 1 || at.side == turn ? rows[n] : at.zeros;
      rows[n] += step;
    }
    multiply_tile<kBits, kBf16, kTokenTiles, kSide == 1>(sums, f.codes + f.slot, x);
    if constexpr (decltype(second)::value) {
      MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) x[n] += 2 * kTileK;
      dev::cp_async_wait<kAfterUnit>();
      multiply_tile<kBits, kBf16, kTokenTiles, false>(sums, f.codes + f.slot + 512 * kBits, x);
    }
    feed_unit<kBits, kPairs, false>(f);
    if constexpr (kSide > 1) {
      if (turn == kSide - 1) add_four(kSide - 1);
      turn = (turn + 1) & (kSide - 1);
    } else {
      add_group<kBits, kBf16, kTokenTiles>(y, sums, at.scales + scales, kind, at.lane >> 2);
      scales = scales + f.unit_scales == f.scales_end ? 0 : scales + f.unit_scales;
    }
  };
  MPQ_NO_UNROLL for (; tile + kPairs < f.end; tile += f.step) multiply_unit(std::bool_constant<kPairs>{});
  if (kPairs && tile < f.end) multiply_unit(std::false_type{});
  if constexpr (kSide > 1) {
    if (turn) add_four(turn - 1);
  }
}

// The same where groups are 16 or 32 columns wide.
template <int kBits, bool kBf16, int kTokenTiles>
MPQ_DEVICE void multiply_parts(Feed& f, int tile, const Tokens<kTokenTiles>& at, GroupKind kind,
                               float (&y)[4][kTokenTiles][4]) {
  uint32_t scales = 0, x[kTokenTiles];
  const uint32_t part_bytes = f.unit_scales >> f.log2_parts;
  MPQ_NO_UNROLL for (; tile < f.end; tile += f.step) {
    dev::cp_async_wait<kSlots<kBits, false> - 1>();
    dev::warp_sync();
    // A chunk is 16 columns wide: the upper half of the lanes reads the same as the lower one.
    const uint32_t column = uint32_t(tile) * (2 * kTileK) - (at.lane >= 16 ? 32 : 0);
    MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) x[n] = at.rows[n] + column;
    uint32_t place = at.scales + scales;
    GroupSums<kTokenTiles> sums{};
    MPQ_NO_UNROLL for (int chunk = 0; chunk < 4; ++chunk) {
      multiply_one_chunk<kBits, kBf16, kTokenTiles>(sums, f.codes + f.slot, chunk, x);
      if (f.log2_parts == 1 && !(chunk & 1)) continue;
      add_group<kBits, kBf16, kTokenTiles>(y, sums, place, kind, at.lane >> 2);
      sums = {};
      place += part_bytes;
    }
    feed_unit<kBits, false, true>(f);
    scales = scales + f.unit_scales == f.scales_end ? 0 : scales + f.unit_scales;
  }
}

template <class Body>
MPQ_DEVICE void for_width(int bits, const Body& body) {
  switch (bits) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 5:
      return body(std::integral_constant<int, 5>{});
    case 6:
      return body(std::integral_constant<int, 6>{});
    case 7:
      return body(std::integral_constant<int, 7>{});
    case 8:
      return body(std::integral_constant<int, 8>{});
  }
}

template <bool kBf16, int kTokenTiles, int kSide>
MPQ_DEVICE Tokens<kTokenTiles> find_tokens(const LinearParams& p, uint32_t base, int tokens, uint32_t lane) {
  Tokens<kTokenTiles> at;
  const uint32_t row = lane & 7, column = (lane >> 3) * 16;
  at.lane = lane;
  at.zeros = base + p.shared.zero_row + column;
  at.side = kSide > 1 && int(row & 1) < tokens ? row >> 1 : ~0u;
  MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
    // Rows without a token repeat the last one: their results are not stored.
    const int token = kSide > 1 ? int(row & 1) : 8 * n + int(row);
    at.rows[n] = base + p.shared.panel + uint32_t(token < tokens ? token : tokens - 1) * p.shared.panel_stride + column;
  }
  return at;
}

// What a block multiplies at a time: tiles [begin, end) of K, of one segment of one row group.
template <bool kBf16, int kTokenTiles, int kSide, int kWidth>
class Decoder {
 public:
  MPQ_DEVICE explicit Decoder(const LinearParams& p) : p_(p), base_(dev::shared_base()) {
    const uint32_t thread = dev::thread_index(), warp = thread / 32;
    lane_ = thread % 32;
    row_ = int(warp) & ((1 << p.log2_group_rows) - 1);
    phase_ = int(warp) >> p.log2_group_rows;
    part_ = base_ + p.shared.ring + warp * p.shared.stage_bytes;
  }

  MPQ_DEVICE void run() {
    const uint32_t block = dev::block_x(), last_group = p_.cuts[block + 1].group;
    const int last_tile = int(p_.cuts[block + 1].tile);
    uint32_t group = p_.cuts[block].group;
    int first_tile = int(p_.cuts[block].tile), band = 0;
    bool more;
    MPQ_NO_UNROLL do {
      const int end_tile = group == last_group ? last_tile : p_.k_tiles;
      float y[4][kTokenTiles][4] = {};
      while (band + 1 < p_.num_bands && uint32_t(load_band(p_, band + 1).first_group) <= group) ++band;
      const Band b = load_band(p_, band);
      const int end_segment = band + 1 < p_.num_bands ? load_band(p_, band + 1).first_segment : p_.num_segments;
      MPQ_NO_UNROLL for (int begin = first_tile; begin < end_tile; begin += p_.shared.panel_tiles) {
        const int rest = end_tile - begin, end = begin + (rest < p_.shared.panel_tiles ? rest : p_.shared.panel_tiles);
        MPQ_NO_UNROLL for (int i = b.first_segment; i < end_segment; ++i) {
          const Segment s = load_segment(p_, i);
          if (s.tile0 + s.tiles <= begin || s.tile0 >= end) continue;
          run_segment(s, ((int(group) - b.first_group) << p_.log2_group_rows) + row_, b.row_tiles, begin, end, end_tile,
                      y);
        }
      }
      const int before = (int(group) - b.first_group) * (kTileN << p_.log2_group_rows);
      const Target target{{b.n0 + before, b.rows - before}, 0, p_.in.tokens, 0};
      gather<kBf16, kTokenTiles, kSide>(p_, base_, target, first_tile, end_tile, y);
      first_tile = 0;
      ++group;
      more = group < last_group || (group == last_group && last_tile > 0);
      if (more) dev::block_sync();
    }
    while (more);
  }

  // One segment in a band, one part of one row group, x all at once: the same, without what may be different.
  MPQ_DEVICE void run_once() {
    const Once what = find_once(dev::block_x());
    float y[4][kTokenTiles][4] = {};
    run_segment(p_.inline_segments[what.band], (what.group << p_.log2_group_rows) + row_,
                p_.inline_bands[what.band].row_tiles, what.first, what.end, what.end, y);
    // Found again: kept, it would take registers from the products.
    const Once now = find_once(dev::block_x_again());
    const Band& b = p_.inline_bands[now.band];
    const int before = now.group * (kTileN << p_.log2_group_rows);
    const Target target{{b.n0 + before, b.rows - before}, 0, p_.in.tokens, 0};
    gather<kBf16, kTokenTiles, kSide>(p_, base_, target, now.first, now.end, y);
  }

 private:
  static constexpr bool kOnce = kWidth != 0;
  static constexpr bool kParts = !kOnce && kSide == 1;

  // The one part of a block: row group of a band, tiles along K.
  struct Once {
    int band, group, first, end;
  };
  MPQ_DEVICE Once find_once(uint32_t block) const {
    const Cut &begin = p_.cuts[block], &end = p_.cuts[block + 1];
    int band = 0;
    if constexpr (kWidth < 0) {
      MPQ_UNROLL for (int i = 1; i < kOnceBands; ++i) {
        if (i < p_.num_bands && uint32_t(p_.inline_bands[i].first_group) <= begin.group) band = i;
      }
    }
    return {band, int(begin.group) - p_.inline_bands[band].first_group, int(begin.tile),
            end.group == begin.group ? int(end.tile) : p_.k_tiles};
  }

  // body(width, whether units are of two tiles), as constants.
  template <class Body>
  static MPQ_DEVICE void for_width(int bits, int pairs, const Body& body) {
    const auto with_width = [&](auto width) {
      if constexpr (decltype(width)::value > 4)
        body(width, std::false_type{});
      else if (pairs)
        body(width, std::true_type{});
      else
        body(width, std::false_type{});
    };
    if constexpr (kWidth > 0)
      body(std::integral_constant<int, kWidth>{}, std::bool_constant<(kWidth <= 4)>{});
    else
      mpq::cuda::for_width(bits, with_width);
  }

  // Tiles [begin, end) of K, which the panel has; `last`: the end of the block's part of K.
  MPQ_DEVICE void run_segment(const Segment& s, int row_tile, int row_tiles, int begin, int end, int last,
                              float (&y)[4][kTokenTiles][4]) {
    const int bits = int(s.shape & 15), pairs = int(s.shape >> shape::kPairs & 1);
    // Units that begin in the panel; the last one may end behind it.
    int first = begin - s.tile0, stop = end - s.tile0;
    if (first < 0) first = 0;
    first = (first + pairs) & ~pairs, stop = (stop + pairs) & ~pairs;
    if (stop > last - s.tile0) stop = last - s.tile0;
    if (stop > s.tiles) stop = s.tiles;
    if (row_tile >= row_tiles) stop = 0;
    stop = dev::held(stop);
    if (!kOnce) dev::warp_sync();  // the last segment's scales have been read
    Feed f;
    for_width(bits, pairs, [&](auto width, auto of_pairs) {
      constexpr bool kPairs = decltype(of_pairs)::value;
      begin_feed<decltype(width)::value, kPairs>(f, p_, s, uint32_t(row_tile), part_, first, stop, phase_,
                                                 8 >> p_.log2_group_rows, kSide);
      feed_unit<decltype(width)::value, kPairs, kParts>(f);
    });
    if (kOnce || panel_begin_ != begin || panel_end_ != end) {
      if (kOnce || panel_begin_ < 0) {
        dev::launch_dependents();
        dev::wait_for_earlier_kernels();
      } else {
        dev::block_sync();
      }
      const int tiles = end < last ? end + 1 - begin : end - begin;
      load_x<kBf16, kSide>(p_.in, p_.shared, base_, begin, tiles, [&] { fill(f, bits, pairs); });
      dev::block_sync();
      panel_begin_ = begin, panel_end_ = end;
    } else {
      fill(f, bits, pairs);
    }
    Tokens<kTokenTiles> at = find_tokens<kBf16, kTokenTiles, kSide>(p_, base_, p_.in.tokens, lane_);
    MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) at.rows[n] += uint32_t((s.tile0 - begin) * (2 * kTileK));
    at.scales = part_;
    const GroupKind kind{int(s.shape >> shape::kZeroKind & 15), p_.scale_dtype};
    first += phase_ << pairs;
    for_width(bits, pairs, [&](auto width, auto of_pairs) {
      constexpr int kBits = decltype(width)::value;
      constexpr bool kPairs = decltype(of_pairs)::value;
      const bool power = p_.scale_dtype == kDtypeF16;
      if (!kOnce && power) move_power<kBits, kBf16, kTokenTiles, -1>(y);
      if constexpr (kParts && !kPairs) {
        if (f.log2_parts)
          multiply_parts<kBits, kBf16, kTokenTiles>(f, first, at, kind, y);
        else
          multiply_units<kBits, kBf16, kTokenTiles, kSide, kPairs>(f, first, at, kind, y);
      } else {
        multiply_units<kBits, kBf16, kTokenTiles, kSide, kPairs>(f, first, at, kind, y);
      }
      if (power) move_power<kBits, kBf16, kTokenTiles, 1>(y);
    });
  }

  // The slots that are still empty.
  static MPQ_DEVICE void fill(Feed& f, int bits, int pairs) {
    for_width(bits, pairs, [&](auto width, auto of_pairs) {
      constexpr int kBits = decltype(width)::value;
      constexpr bool kPairs = decltype(of_pairs)::value;
      MPQ_UNROLL for (int i = 1; i < kSlots<kBits, kPairs>; ++i) feed_unit<kBits, kPairs, kParts>(f);
    });
  }

  const LinearParams& p_;
  uint32_t base_, lane_, part_;
  int row_, phase_;
  int panel_begin_ = -1, panel_end_ = -1;
};

// kWidth: of a weight of one segment, of units of two tiles up to 4 bits, of which no block has more than one part,
// with x in one piece. -1: the same of up to kOnceBands row bands of one segment each, of any width and groups of whole
// tiles. 0: anything.
template <bool kBf16, int kTokenTiles, int kSide, int kWidth>
MPQ_KERNEL_BESIDE(256, kTokenTiles == 1 && kWidth != 0 ? 2 : 1)
decode_kernel(const MPQ_GRID_CONSTANT LinearParams p) {
  Decoder<kBf16, kTokenTiles, kSide, kWidth> decoder(p);
  if constexpr (kWidth != 0)
    decoder.run_once();
  else
    decoder.run();
}

}  // namespace mpq::cuda

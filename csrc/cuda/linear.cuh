// y = x W^T + bias: one persistent block on each multiprocessor walks its share of the bytes of W (params.h), whatever
// the widths in it.
//
//     warps:   copy weights ahead (ring.cuh) | multiply units (unit.cuh)
//     block:   x to shared memory (panel.cuh) ... at the end of each row group: add warps, add blocks (reduce.cuh)
//
// Weights do not depend on the kernels ahead in the stream, x does: the first copies of weights are on their way before
// the block waits for x.
#pragma once

#include "device.cuh"
#include "panel.cuh"
#include "params.h"
#include "reduce.cuh"
#include "ring.cuh"
#include "unit.cuh"
#include "work.cuh"

namespace mpq::cuda {

// Consumes the warp's units of one item that begin before `end_tile`; the panel begins at `panel_tile`.
template <bool kBf16, int kTokenTiles, class Work>
MPQ_DEVICE void run_panel(const LinearParams& p, uint32_t base, Ring<Work>& ring, uint32_t item, int panel_tile,
                          int end_tile, int tokens, float (&y)[4][kTokenTiles][4]) {
  const uint32_t lane = dev::thread_index() % 32, token_row = lane & 7, column = (lane >> 3) * 16;
  for (;;) {
    const Descriptor d = ring.front();
    if (d.item != item || int(d.tile) >= end_tile) return;
    ring.refill();
    const auto field = [&](int at) { return int(d.shape >> at & 15); };
    const int bits = field(shape::kBits);
    const bool sub_tile = field(shape::kSubTile);
    UnitPlace<kTokenTiles> place;
    const uint32_t stage = ring.front_address();
    place.zero_kind = field(shape::kZeroKind);
    place.unit = 1 << field(shape::kLog2Unit);
    place.count = field(shape::kCount);
    place.flush = 1 << field(shape::kLog2Flush);
    place.scale_dtype = p.scale_dtype;
    place.codes = stage + 16 * lane;
    place.scales = stage + uint32_t(place.unit * bits) * 512 + 16 * lane;
    const uint32_t tile = d.tile - uint32_t(panel_tile);
    place.x = base + p.shared.panel + tile * (2 * kTileK);
    MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
      // Rows without a token repeat the last one: their results are not stored. A single chunk is 16 columns wide.
      const int row = 8 * n + int(token_row) < tokens ? 8 * n + int(token_row) : tokens - 1;
      place.rows[n] = uint32_t(row) * p.shared.panel_stride + (sub_tile ? column & 16 : column);
    }
    const uint32_t pair = 8 * (lane & 3);  // tokens 2q and 2q + 1
    place.tile_sums = base + p.shared.tile_sums + tile * (32 * kTokenTiles) + pair;
    place.chunk_sums = base + p.shared.chunk_sums + tile * (128 * kTokenTiles) + pair;
    run_unit<kBf16, kTokenTiles>(y, place, bits, sub_tile, lane);
    ring.pop();
  }
}

// One item for `tokens` rows of x from `first_token` on. Whole block.
template <bool kBf16, int kTokenTiles, class Work>
MPQ_DEVICE void run_item(const LinearParams& p, uint32_t base, Ring<Work>& ring, uint32_t item, const Extent& extent,
                         int64_t first_token, int tokens, float (&y)[4][kTokenTiles][4]) {
  const int room = p.shared.panel_tiles + kMaxUnit - 1;
  for (int tile = extent.first_tile; tile < extent.end_tile; tile += p.shared.panel_tiles) {
    const int rest = extent.end_tile - tile;
    dev::block_sync();
    load_panel<kBf16, kTokenTiles>(p.in, p.shared, base, first_token, tokens, tile, rest < room ? rest : room);
    dev::block_sync();
    run_panel<kBf16, kTokenTiles>(p, base, ring, item, tile, tile + p.shared.panel_tiles, tokens, y);
  }
}

// Row group -> its rows; groups must not decrease from call to call.
class RowFinder {
 public:
  MPQ_DEVICE explicit RowFinder(const LinearParams& p) : p_(p) {}
  MPQ_DEVICE Rows find(uint32_t group) {
    while (index_ + 1 < p_.num_bands && uint32_t(band(index_ + 1).first_group) <= group) ++index_;
    const Band b = band(index_);
    const int before = int(group - uint32_t(b.first_group)) * (kTileN << p_.log2_group_rows);
    return {b.n0 + before, b.rows - before};
  }

 private:
  MPQ_DEVICE Band band(int i) const { return p_.bands ? load_words(p_.bands + i) : p_.inline_bands[i]; }
  const LinearParams& p_;
  int index_ = 0;
};

}  // namespace mpq::cuda

// From the accumulators of a block's warps to y, in pieces of four floats that keep the places of the products:
//
//     piece i of a lane:  rows 16 t + g and + 8, tokens 8 n + 2 q and the next      i = 4 n + t
//     groups side by side (decode.cuh):  one piece, t = 2 (q & 1) + (q >> 1), tokens 0 and 1
//
// Warps of a row tile are added in shared memory in the order of their numbers. Row groups that blocks share are added
// by the block that finishes last, from the workspace, in the order of the blocks' numbers: the same input gives the
// same bits, whatever the order in which blocks run.
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "params.h"
#include "reduce.cuh"
#include "work.cuh"

namespace mpq::cuda {

template <int kTokenTiles, int kSide>
constexpr int kPieces = kSide > 1 ? 1 : 4 * kTokenTiles;

MPQ_DEVICE float4 add(float4 a, float4 b) {
  return float4{dev::add(a.x, b.x), dev::add(a.y, b.y), dev::add(a.z, b.z), dev::add(a.w, b.w)};
}

// Adds the four groups side by side: the four lanes of the same rows exchange what is not theirs.
MPQ_DEVICE float4 add_sides(const float (&y)[4][1][4], uint32_t lane) {
  float half[2][4], own[4];
  MPQ_UNROLL for (int t = 0; t < 2; ++t) {
    MPQ_UNROLL for (int i = 0; i < 4; ++i) {
      const float kept = lane & 1 ? y[2 + t][0][i] : y[t][0][i], given = lane & 1 ? y[t][0][i] : y[2 + t][0][i];
      half[t][i] = dev::add(kept, dev::shfl_xor(given, 1));
    }
  }
  MPQ_UNROLL for (int i = 0; i < 4; ++i) {
    const float kept = lane & 2 ? half[1][i] : half[0][i], given = lane & 2 ? half[0][i] : half[1][i];
    own[i] = dev::add(kept, dev::shfl_xor(given, 2));
  }
  return float4{own[0], own[1], own[2], own[3]};
}

// The block's pieces are numbered [row tile of the group][piece][lane].
template <bool kBf16, int kTokenTiles, int kSide>
MPQ_DEVICE void write_piece(const Output& out, const Target& target, int number, float4 v) {
  constexpr int kOf = kPieces<kTokenTiles, kSide>;
  const int lane = number & 31, i = (number >> 5) % kOf, row_tile = (number >> 5) / kOf, g = lane >> 2, q = lane & 3;
  const int t = kSide > 1 ? 2 * (q & 1) + (q >> 1) : i & 3, token = kSide > 1 ? 0 : 8 * (i >> 2) + 2 * q;
  const int row = row_tile * kTileN + 16 * t + g;
  const float values[4] = {v.x, v.y, v.z, v.w};
  float bias[2] = {0.0f, 0.0f};
  if (out.bias) {
    MPQ_UNROLL for (int h = 0; h < 2; ++h) {
      if (row + 8 * h < target.rows.count) bias[h] = load_bias(out, target.rows.n0 + row + 8 * h);
    }
  }
  uint16_t* to = static_cast<uint16_t*>(out.y) + token * out.row_stride + (target.rows.n0 + row);
  MPQ_UNROLL for (int k = 0; k < 4; ++k) {
    const float value = out.bias ? dev::add(values[k], bias[k >> 1]) : values[k];
    if (token + (k & 1) < target.tokens && row + 8 * (k >> 1) < target.rows.count)
      dev::st_global(to + 8 * (k >> 1) + (k & 1) * out.row_stride, from_float<kBf16>(value));
  }
}

// Partial sums of block i: slot 0 for a row group that an earlier block begins, slot 1 for one that this block begins.
template <int kTokenTiles, int kSide>
MPQ_DEVICE float4* pieces_of(const LinearParams& p, uint32_t block, int slot) {
  const uint32_t pieces = uint32_t(32 * kPieces<kTokenTiles, kSide>) << p.log2_group_rows;
  return reinterpret_cast<float4*>(p.partials) + (uint64_t{block} * 2 + uint32_t(slot)) * pieces;
}

// Adds the parts of blocks first .. last of a row group, four pieces of four parts at a time, and writes y. Whole
// block.
template <bool kBf16, int kTokenTiles, int kSide>
MPQ_DEVICE void add_blocks(const LinearParams& p, const Target& target, uint32_t first, uint32_t last, int pieces) {
  constexpr int kTogether = kSide > 1 ? 1 : 4, kBatch = 4;
  const float4* begin = pieces_of<kTokenTiles, kSide>(p, first, 0);
  const int threads = int(dev::thread_count()), parts = int(last - first) + 1;
  MPQ_NO_UNROLL for (int number = int(dev::thread_index()); number < pieces; number += threads * kTogether) {
    float4 sum[kTogether] = {}, v[kBatch][kTogether];
    int place[kTogether];
    MPQ_UNROLL for (int k = 0; k < kTogether; ++k) place[k] =
        number + k * threads < pieces ? number + k * threads : number;
    MPQ_NO_UNROLL for (int part = 0; part < parts; part += kBatch) {
      // Without branches, so that all loads are on their way together; what is too much is read and not used.
      MPQ_UNROLL for (int j = 0; j < kBatch; ++j) {
        const int there = part + j < parts ? part + j : parts - 1;
        const float4* from = begin + (2 * there + (there == 0)) * pieces;
        MPQ_UNROLL for (int k = 0; k < kTogether; ++k) v[j][k] = dev::ld_from_others(from + place[k]);
      }
      MPQ_UNROLL for (int j = 0; j < kBatch; ++j) {
        MPQ_UNROLL for (int k = 0; k < kTogether; ++k) sum[k] = part + j < parts ? add(sum[k], v[j][k]) : sum[k];
      }
    }
    MPQ_UNROLL for (int k = 0; k < kTogether; ++k) {
      if (number + k * threads < pieces) write_piece<kBf16, kTokenTiles, kSide>(p.out, target, place[k], sum[k]);
    }
  }
}

// The pieces of as many warps, `step` bytes apart, in the order of their numbers.
template <int kWarps>
MPQ_DEVICE float4 add_phases(uint32_t at, uint32_t step) {
  float4 v[kWarps];
  MPQ_UNROLL for (int i = 0; i < kWarps; ++i) v[i] = dev::ld_shared<float4>(at + uint32_t(i) * step);
  float4 sum = v[0];
  MPQ_UNROLL for (int i = 1; i < kWarps; ++i) sum = add(sum, v[i]);
  return sum;
}

// The end of a row group, or of the block's part of one. The shared memory of a warp's weights is free for its sums.
// Whole block.
template <bool kBf16, int kTokenTiles, int kSide>
MPQ_DEVICE void gather(const LinearParams& p, uint32_t base, const Target& target, int first_tile, int end_tile,
                       const float (&y)[4][kTokenTiles][4]) {
  constexpr int kOf = kPieces<kTokenTiles, kSide>;
  const uint32_t block = dev::block_x_again();
  const uint32_t lane = dev::thread_index() % 32, warp = dev::thread_index() / 32, ring = base + p.shared.ring;
  const uint32_t mine = ring + warp * p.shared.stage_bytes + 16 * lane;
  dev::warp_sync();
  if constexpr (kSide > 1) {
    dev::st_shared(mine, add_sides(y, lane));
  } else {
    MPQ_UNROLL for (int i = 0; i < kOf; ++i) {
      const float (&v)[4] = y[i & 3][i >> 2];
      dev::st_shared(mine + 512 * uint32_t(i), float4{v[0], v[1], v[2], v[3]});
    }
  }
  dev::block_sync();
  const bool whole = first_tile == 0 && end_tile == p.k_tiles, begun_before = first_tile > 0;
  const int pieces = (32 * kOf) << p.log2_group_rows, threads = int(dev::thread_count());
  const int phases = 8 >> p.log2_group_rows;
  const uint32_t phase_bytes = p.shared.stage_bytes << p.log2_group_rows;
  float4* to = pieces_of<kTokenTiles, kSide>(p, block, begun_before ? 0 : 1);
  MPQ_NO_UNROLL for (int number = int(dev::thread_index()); number < pieces; number += threads) {
    const uint32_t of_warp = uint32_t(number) % (32 * kOf);
    const uint32_t at = ring + uint32_t(number) / (32 * kOf) * p.shared.stage_bytes + 16 * of_warp;
    float4 sum;
    switch (phases) {
      case 8:
        sum = add_phases<8>(at, phase_bytes);
        break;
      case 4:
        sum = add_phases<4>(at, phase_bytes);
        break;
      case 2:
        sum = add_phases<2>(at, phase_bytes);
        break;
      default:
        sum = add_phases<1>(at, phase_bytes);
    }
    if (whole)
      write_piece<kBf16, kTokenTiles, kSide>(p.out, target, number, sum);
    else
      dev::st_global(to + number, sum);
  }
  if (whole) return;
  const Cut& cut = p.cuts[block + (begun_before ? 0 : 1)];
  const uint32_t first = cut.first, last = cut.last;
  if (arrive_last(p, base, first, last)) add_blocks<kBf16, kTokenTiles, kSide>(p, target, first, last, pieces);
}

}  // namespace mpq::cuda

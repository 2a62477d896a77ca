// The panel: a block's tokens x the columns that it works on, in shared memory, with the sums of x that zero points
// need.
//
//     row of a token:  | tile 0: 64 x 2 bytes | tile 1 | ... | 16 bytes of nothing |   so that the 8 rows that ldmatrix
//                                                                                       reads lie in different banks
//
// Beyond the last column x is zero. fp16 stays as it is, bf16 is multiplied by 2^80 (unit.cuh). A lane loads 8 columns.
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "params.h"
#include "unit.cuh"

namespace mpq::cuda {

template <bool kBf16>
MPQ_DEVICE float to_float(uint16_t bits) {
  if constexpr (kBf16)
    return dev::bf16_to_float(bits);
  else
    return dev::f16_to_float(bits);
}

template <bool kBf16>
MPQ_DEVICE uint16_t from_float(float v) {
  if constexpr (kBf16)
    return dev::float_to_bf16(v);
  else
    return dev::float_to_f16(v);
}

// silu(gate) * up, rounded after each of the two operations, as a model does that applies them one after the other.
template <bool kBf16>
MPQ_DEVICE uint16_t silu_mul(uint16_t gate, uint16_t up) {
  const float g = to_float<kBf16>(gate);
  const float silu = to_float<kBf16>(from_float<kBf16>(g / (1.0f + dev::exp(-g))));
  return from_float<kBf16>(dev::mul(silu, to_float<kBf16>(up)));
}

template <bool kBf16>
MPQ_DEVICE uint4 silu_mul(uint4 gate, uint4 up) {
  const uint32_t g[4] = {gate.x, gate.y, gate.z, gate.w}, u[4] = {up.x, up.y, up.z, up.w};
  uint32_t v[4];
  MPQ_UNROLL for (int i = 0; i < 4; ++i) {
    v[i] = silu_mul<kBf16>(uint16_t(g[i]), uint16_t(u[i])) |
           uint32_t(silu_mul<kBf16>(uint16_t(g[i] >> 16), uint16_t(u[i] >> 16))) << 16;
  }
  return uint4{v[0], v[1], v[2], v[3]};
}

// Columns [column, column + 8) of one row, as pairs of bit patterns; zero where there are none.
MPQ_DEVICE uint4 load_columns(const Input& in, const void* matrix, int64_t row, int column) {
  const uint16_t* from = static_cast<const uint16_t*>(matrix) + row * in.row_stride;
  if (in.vector_loads && column + 8 <= in.columns) return dev::ld_global(reinterpret_cast<const uint4*>(from + column));
  uint32_t v[4] = {};
  MPQ_UNROLL for (int i = 0; i < 8; ++i) {
    if (column + i >= in.columns) continue;
    const int place = in.perm ? dev::ld_constant(in.perm + column + i) : column + i;
    v[i >> 1] |= uint32_t(dev::ld_global(from + place)) << (16 * (i & 1));
  }
  return uint4{v[0], v[1], v[2], v[3]};
}

// Stores 8 columns of a token and their sums. The lanes of a tile are 8 neighbours, those of a chunk 2.
template <bool kBf16, int kTokenTiles>
MPQ_DEVICE void store_columns(const SharedMap& map, uint32_t base, uint4 v, int token, int column, bool stored,
                              bool chunk_sums) {
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
  float sum = 0.0f;
  MPQ_UNROLL for (int i = 0; i < 4; ++i) {
    const float low = to_float<kBf16>(uint16_t(words[i])), high = to_float<kBf16>(uint16_t(words[i] >> 16));
    sum = dev::add(sum, dev::add(low, high));
    if constexpr (kBf16) {
      const float factor = dev::bits_to_float(kBf16Factor);
      // Exact: only the exponent changes.
      words[i] = (dev::float_to_bits(dev::mul(low, factor)) >> 16) |
                 (dev::float_to_bits(dev::mul(high, factor)) & 0xffff0000u);
    }
  }
  const float chunk = dev::add(sum, dev::shfl_xor(sum, 1));
  const float half = dev::add(chunk, dev::shfl_xor(chunk, 2));
  const float tile = dev::add(half, dev::shfl_xor(half, 4));
  if (!stored) return;
  dev::st_shared(base + map.panel + uint32_t(token) * map.panel_stride + uint32_t(column) * 2,
                 uint4{words[0], words[1], words[2], words[3]});
  const uint32_t row = 32 * kTokenTiles;  // bytes of the sums of all tokens
  if (column % kTileK == 0) dev::st_shared(base + map.tile_sums + uint32_t(column / kTileK) * row + 4 * token, tile);
  if (chunk_sums && column % 16 == 0)
    dev::st_shared(base + map.chunk_sums + uint32_t(column / 16) * row + 4 * token, chunk);
}

// Columns of the sums that have no token, so that whole fragments can be read. Whole block.
template <int kTokenTiles>
MPQ_DEVICE void clear_sums(uint32_t sums, int rows, int tokens) {
  const int absent = 8 * kTokenTiles - tokens;
  for (int i = int(dev::thread_index()); i < rows * absent; i += int(dev::thread_count())) {
    const int row = i / absent, token = tokens + i - row * absent;
    dev::st_shared(sums + uint32_t(row * 8 * kTokenTiles + token) * 4, 0.0f);
  }
}

// 256 columns of a token: what the lanes of a warp load at a time.
struct Strip {
  int token, number;

  // On by `tokens` * strips + `rest`.
  MPQ_DEVICE void advance(int tokens, int rest, int strips) {
    token += tokens, number += rest;
    if (number >= strips) number -= strips, ++token;
  }
};

// kBatch loads are in flight for each lane.
template <bool kBf16, int kTokenTiles, bool kGate, int kBatch>
MPQ_DEVICE void load_strips(const Input& in, const SharedMap& map, uint32_t base, int64_t first_token, int tokens,
                            int first_tile, int tiles) {
  const int warps = int(dev::thread_count()) / 32, lane = int(dev::thread_index()) % 32;
  const int strips = (tiles + 3) / 4;
  const int warp = int(dev::thread_index()) / 32, step = warps / strips, rest = warps - step * strips;
  Strip load{warp / strips, 0};
  load.number = warp - load.token * strips;
  Strip store = load;
  while (store.token < tokens) {
    uint4 x[kBatch];
    MPQ_UNROLL for (int i = 0; i < kBatch; ++i) {
      const int column = first_tile * kTileK + load.number * 256 + lane * 8;
      x[i] = uint4{0, 0, 0, 0};
      if (load.token < tokens && column < in.columns) {
        x[i] = load_columns(in, in.x, first_token + load.token, column);
        if constexpr (kGate) x[i] = silu_mul<kBf16>(load_columns(in, in.gate, first_token + load.token, column), x[i]);
      }
      load.advance(step, rest, strips);
    }
    MPQ_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (store.token >= tokens) break;
      const int column = store.number * 256 + lane * 8;
      store_columns<kBf16, kTokenTiles>(map, base, x[i], store.token, column, column < tiles * kTileK, in.chunk_sums);
      store.advance(step, rest, strips);
    }
  }
}

// Loads `tiles` tiles of columns from tile `first_tile` on, for `tokens` rows of x from `first_token` on. Whole block.
template <bool kBf16, int kTokenTiles>
MPQ_DEVICE void load_panel(const Input& in, const SharedMap& map, uint32_t base, int64_t first_token, int tokens,
                           int first_tile, int tiles) {
  if (tokens < 8 * kTokenTiles) {
    clear_sums<kTokenTiles>(base + map.tile_sums, tiles, tokens);
    if (in.chunk_sums) clear_sums<kTokenTiles>(base + map.chunk_sums, 4 * tiles, tokens);
  }
  constexpr int kBatch = kTokenTiles == 4 ? 4 : 8;
  // With a gate one at a time: eight exponentials and divisions are code enough.
  if (in.gate)
    load_strips<kBf16, kTokenTiles, true, 1>(in, map, base, first_token, tokens, first_tile, tiles);
  else
    load_strips<kBf16, kTokenTiles, false, kBatch>(in, map, base, first_token, tokens, first_tile, tiles);
}

}  // namespace mpq::cuda

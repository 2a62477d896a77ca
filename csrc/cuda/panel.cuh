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
  // One at a time, moved in from above: eight of them side by side would be more code than all the rest.
  uint4 v{0, 0, 0, 0};
  MPQ_NO_UNROLL for (int i = column; i < column + 8; ++i) {
    uint32_t next = 0;
    if (i < in.columns) next = dev::ld_global(from + (in.perm ? dev::ld_constant(in.perm + i) : i));
    v.x = v.x >> 16 | v.y << 16, v.y = v.y >> 16 | v.z << 16, v.z = v.z >> 16 | v.w << 16, v.w = v.w >> 16 | next << 16;
  }
  return v;
}

// bf16 by 2^80. Exact: only the exponent changes.
MPQ_DEVICE uint4 scaled(uint4 v) {
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
  const float factor = dev::bits_to_float(kBf16Factor);
  MPQ_UNROLL for (int i = 0; i < 4; ++i) {
    const float low = dev::mul(dev::bf16_to_float(uint16_t(words[i])), factor);
    const float high = dev::mul(dev::bf16_to_float(uint16_t(words[i] >> 16)), factor);
    words[i] = (dev::float_to_bits(low) >> 16) | (dev::float_to_bits(high) & 0xffff0000u);
  }
  return uint4{words[0], words[1], words[2], words[3]};
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

// The same for kernels that take the sums of x by products: x alone, and a row of zeros as wide as two tiles.
//
// Rows of 256 columns are taken by the warps in turn.
template <bool kBf16, bool kGate>
MPQ_DEVICE void load_rows_of_x(const Input& in, const SharedMap& map, uint32_t base, int first_tile, int tiles) {
  const int lane = int(dev::thread_index()) % 32, warps = int(dev::thread_count()) / 32, strips = (tiles + 3) / 4;
  int token = 0, strip = int(dev::thread_index()) / 32;
  for (;;) {
    while (strip >= strips && token < in.tokens) strip -= strips, ++token;
    if (token >= in.tokens) return;
    const int column = strip * 256 + lane * 8, at = first_tile * kTileK + column;
    uint4 x{0, 0, 0, 0};
    if (at < in.columns) {
      x = load_columns(in, in.x, token, at);
      if constexpr (kGate) x = silu_mul<kBf16>(load_columns(in, in.gate, token, at), x);
    }
    if (column < tiles * kTileK) {
      const uint32_t to = base + map.panel + uint32_t(token) * map.panel_stride + uint32_t(column) * 2;
      dev::st_shared(to, kBf16 ? scaled(x) : x);
    }
    strip += warps;
  }
}

// between(): what is to be done while the first loads are on their way. A thread loads four pieces of 8 columns of
// one row at a time with up to two tokens (kSide > 1), else one piece of eight rows.
template <bool kBf16, int kSide, class Between>
MPQ_DEVICE void load_x(const Input& in, const SharedMap& map, uint32_t base, int first_tile, int tiles,
                       const Between& between) {
  constexpr int kBatch = kSide > 1 ? 4 : 8, kThreads = 256, kPieces = kSide > 1 ? kBatch : 1,
                kRows = kSide > 1 ? 1 : kBatch;
  const bool simple = in.vector_loads && !in.gate && in.columns % 8 == 0;
  const int thread = int(dev::thread_index());
  const int pieces = tiles * (kTileK / 8), there = in.columns / 8 - first_tile * (kTileK / 8);  // in memory
  const uint16_t* row = static_cast<const uint16_t*>(in.x) + first_tile * kTileK;
  uint4 x[kBatch];
  const auto load_batch = [&](int token, int piece) {
    MPQ_UNROLL for (int i = 0; i < kBatch; ++i) {
      const int of_row = piece + i % kPieces * kThreads, m = token + i / kPieces;
      x[i] = uint4{0, 0, 0, 0};
      if (of_row < there && (kRows == 1 || m < in.tokens))
        x[i] = dev::ld_global(reinterpret_cast<const uint4*>(row + (i / kPieces) * in.row_stride + 8 * piece) +
                              i % kPieces * kThreads);
    }
  };
  const auto store_batch = [&](int token, int piece) {
    const uint32_t to = base + map.panel + uint32_t(token) * map.panel_stride + uint32_t(piece) * 16;
    MPQ_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (piece + i % kPieces * kThreads < pieces && (kRows == 1 || token + i / kPieces < in.tokens))
        dev::st_shared(to + uint32_t(i / kPieces) * map.panel_stride + uint32_t(i % kPieces * kThreads * 16),
                       kBf16 ? scaled(x[i]) : x[i]);
    }
  };
  if (simple) load_batch(0, thread);
  between();
  if (thread < 16) dev::st_shared(base + map.zero_row + 16 * uint32_t(thread), uint4{0, 0, 0, 0});
  if (!simple) {
    if (in.gate)
      load_rows_of_x<kBf16, true>(in, map, base, first_tile, tiles);
    else
      load_rows_of_x<kBf16, false>(in, map, base, first_tile, tiles);
    return;
  }
  int token = 0, piece = thread;
  for (;;) {
    store_batch(token, piece);
    piece += kPieces * kThreads;
    if (piece >= pieces) {
      token += kRows, piece = thread, row += kRows * in.row_stride;
      if (token >= in.tokens) return;
    }
    load_batch(token, piece);
  }
}

}  // namespace mpq::cuda

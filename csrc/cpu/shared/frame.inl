// The frame of a product, whatever its arithmetic: row blocks, columns of x through the permutation, rows of y.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/inline.h"
#include "cpu/shared/codes.inl"
#include "cpu/shared/convert.inl"
#include "cpu/simd/simd.h"
#include "generated/layout.h"

namespace mpq::cpu {
namespace {

constexpr int64_t kFewBlocks = 16;        // work items worth having before tokens are split among them
constexpr int kTokenBlock = 6;            // tokens whose sums one pass keeps in registers
constexpr int kPairs = kSet > 2 ? 2 : 1;  // row groups whose vectors are gathered together

// One row tile of a segment.
struct TileSource {
  const Segment& segment;
  DType scale_dtype;
  int64_t row_tile;
};

// 64 rows (fewer at the end) of one row band.
struct RowBlock {
  const Segment* segments;
  int count;
  int64_t row_tile;
  int64_t row;   // first row in [0, N)
  int64_t rows;  // 1..64
};

// Segments of the row band that starts at `first`.
inline int band_size(const Weight& weight, int first) {
  int next = first + 1;
  while (next < weight.num_segments && weight.segments[next].n0 == weight.segments[first].n0) ++next;
  return next - first;
}

inline int64_t count_row_blocks(const Weight& weight) {
  int64_t blocks = 0;
  for (int i = 0; i < weight.num_segments; i += band_size(weight, i)) {
    blocks += ceil_div(weight.segments[i].n1 - weight.segments[i].n0, kTileN);
  }
  return blocks;
}

inline RowBlock row_block(const Weight& weight, int64_t index) {
  int first = 0;
  for (;;) {
    const Segment& s = weight.segments[first];
    const int64_t tiles = ceil_div(s.n1 - s.n0, kTileN);
    if (index < tiles) {
      const int64_t row = s.n0 + index * kTileN;
      const int64_t left = s.n1 - row;
      return {&s, band_size(weight, first), index, row, left < kTileN ? left : kTileN};
    }
    index -= tiles;
    first += band_size(weight, first);
  }
}

inline void run(const Parallel& parallel, int64_t n, void (*task)(void*, int64_t, int64_t), void* ctx) {
  if (parallel.run) {
    parallel.run(parallel.pool, n, task, ctx);
  } else {
    task(ctx, 0, n);
  }
}

// rows[n] of a supertile from positions[8 g + 4 h + t].
MPQ_INLINE void to_row_order(const float* positions, int64_t stride, float* rows, int64_t row_stride) {
  for (int n = 0; n < 64; ++n) rows[n * row_stride] = positions[(8 * (n & 7) + 4 * (n >> 3 & 1) + (n >> 4)) * stride];
}

MPQ_INLINE F load_row(const float* p) { return load(p); }
MPQ_INLINE I load_row(const uint32_t* p) { return load_i(p); }
MPQ_INLINE F set_all(float v) { return set1(v); }
MPQ_INLINE I set_all(uint32_t v) { return set1_i(v); }

// acc[m][v] = add(acc[m][v], tile[k][vector v of positions], x[m][k]) for k = 0, 1, ..., one after the other.
template <int T, typename A, typename W, typename Add>
MPQ_INLINE void add_places(A (&acc)[T][kTileVectors], const W* tile, const W* x, int64_t stride, int64_t places,
                           Add add) {
  for (int64_t k = 0; k < places; ++k) {
    decltype(load_row(tile)) w[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) w[v] = load_row(tile + 64 * k + kLanes * v);
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m) {
      const auto value = set_all(x[m * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) acc[m][v] = add(acc[m][v], w[v], value);
    }
  }
}

// Gathers up to 64 columns of x from k on, through the permutation.
inline void gather_columns(const LinearArgs& args, const char* row, int64_t k, int64_t count, char* raw) {
  const int32_t* perm = args.weight.perm + k;
  const int64_t width = dtype_bytes(args.x_dtype);
  for (int64_t i = 0; i < count; ++i) {
    int32_t column;
    __builtin_memcpy(&column, perm + i, sizeof column);
    if (width == 4) {
      __builtin_memcpy(raw + 4 * i, row + 4 * static_cast<int64_t>(column), 4);
    } else {
      __builtin_memcpy(raw + 2 * i, row + 2 * static_cast<int64_t>(column), 2);
    }
  }
}

// Up to 64 columns of a row of x from k on, in packed order, as fp32; zero beyond `count`.
inline void load_columns(const LinearArgs& args, const char* row, int64_t k, int64_t count, float* values) {
  if (!args.weight.perm) return to_f32_partial(row + k * dtype_bytes(args.x_dtype), args.x_dtype, count, values);
  alignas(64) char raw[256];
  gather_columns(args, row, k, count, raw);
  to_f32_partial(raw, args.x_dtype, count, values);
}

// y[tokens from first on][rows of the block] from sums in position order.
inline void finish_rows(const LinearArgs& args, const RowBlock& block, int64_t first, int64_t count,
                        const float* sums) {
  alignas(64) float bias[64] = {};
  if (args.bias) {
    to_f32_partial(bytes_at(args.bias, block.row * dtype_bytes(args.bias_dtype)), args.bias_dtype, block.rows, bias);
  }
  for (int64_t m = 0; m < count; ++m) {
    alignas(64) float rows[64];
    to_row_order(sums + 64 * m, 1, rows, 1);
    for (int i = 0; i < 64; i += kLanes) store(rows + i, add(load(rows + i), load(bias + i)));
    char* out = static_cast<char*>(args.y) + ((first + m) * args.weight.N + block.row) * dtype_bytes(args.x_dtype);
    from_f32_partial(rows, args.x_dtype, block.rows, out);
  }
}

}  // namespace
}  // namespace mpq::cpu

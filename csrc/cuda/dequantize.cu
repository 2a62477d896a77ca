// W as a dense matrix in caller's memory, columns in their original order. Before a product of many tokens: a matrix
// product reads every weight once for each block of tokens, and a dense one costs no decoding.

#include "fp32_weights.cuh"
#include "launch.h"
#include "ring.cuh"

namespace mpq::cuda {

namespace {

constexpr int kWarps = 4;

MPQ_DEVICE uint16_t round_to(float v, int dtype) {
  return dtype == kDtypeF16 ? dev::float_to_f16(v) : dev::float_to_bf16(v);
}

struct Place {
  int64_t row;  // of W, of the first row of this lane's row tile
  int rows;     // that exist from there
  int column;   // packed column of the chunk
};

// One column, wherever the permutation puts it.
MPQ_DEVICE void store_one(const DequantizeParams& p, int64_t row, int column, float v) {
  const Input& in = p.linear.in;
  if (column >= in.columns) return;
  const int64_t place = row * in.columns + (in.perm ? dev::ld_constant(in.perm + column) : column);
  if (p.out_dtype == kDtypeF32)
    dev::st_global(static_cast<float*>(p.out) + place, v);
  else
    dev::st_global(static_cast<uint16_t*>(p.out) + place, round_to(v, p.out_dtype));
}

// 16-bit output in the original order: neighbours exchange pairs, so that a lane stores four columns and four lanes 32
// bytes of a row.
MPQ_DEVICE void store_fours(const DequantizeParams& p, const Place& place, const float (&v)[4][4][2], uint32_t lane) {
  const bool odd = lane & 1;
  const int column = place.column + (odd ? 8 : 0) + 2 * int(lane & 2);
  MPQ_UNROLL for (int t = 0; t < 4; ++t) {
    MPQ_UNROLL for (int h = 0; h < 2; ++h) {
      uint32_t pair[2];
      MPQ_UNROLL for (int m = 0; m < 2; ++m) pair[m] =
          round_to(v[t][2 * m + h][0], p.out_dtype) | uint32_t(round_to(v[t][2 * m + h][1], p.out_dtype)) << 16;
      const uint32_t other = dev::shfl_xor(odd ? pair[0] : pair[1], 1);
      const int row = 16 * t + 8 * h + int(lane >> 2);
      if (row >= place.rows || column >= p.linear.in.columns) continue;
      uint16_t* to = static_cast<uint16_t*>(p.out) + (place.row + row) * p.linear.in.columns + column;
      dev::st_global(reinterpret_cast<uint2*>(to), odd ? uint2{other, pair[1]} : uint2{pair[0], other});
    }
  }
}

// Block (i, j): row tile i, the j-th strip of supertiles along K; a warp takes one supertile.
MPQ_KERNEL(32 * kWarps)
dequantize_kernel(const MPQ_GRID_CONSTANT DequantizeParams p) {
  const LinearParams& w = p.linear;
  const uint32_t lane = dev::thread_index() % 32;
  dev::wait_for_earlier_kernels();
  const int index = find_band(w, dev::block_x());
  const Band band = load_band(w, index);
  const int row_tile = int(dev::block_x()) - band.first_group;
  const int global_tile = int(dev::block_y()) * kWarps + int(dev::thread_index()) / 32;
  if (global_tile >= w.k_tiles) return;
  const int end = index + 1 < w.num_bands ? load_band(w, index + 1).first_segment : w.num_segments;
  int i = band.first_segment;
  Segment s = load_segment(w, i);
  while (global_tile >= s.tile0 + s.tiles && ++i < end) s = load_segment(w, i);
  if (i == end || global_tile < s.tile0) return;  // in another launch
  const int tile = global_tile - s.tile0;
  // Rows of 8-byte stores begin at multiples of 8 bytes.
  const bool fours = p.out_dtype != kDtypeF32 && !w.in.perm && w.in.columns % 4 == 0 && w.in.vector_loads;
  MPQ_NO_UNROLL for (int chunk = 0; chunk < 4; ++chunk) {
    float v[4][4][2];
    switch_bits(bits_of(s), [&]<int kBits>() { decode_chunk<kBits>(w, s, row_tile, tile, chunk, lane, v); });
    const Place place{band.n0 + int64_t{row_tile} * kTileN, band.rows - row_tile * kTileN,
                      global_tile * kTileK + 16 * chunk};
    if (fours) {
      store_fours(p, place, v, lane);
      continue;
    }
    MPQ_UNROLL for (int j = 0; j < 32; ++j) {
      const int t = j >> 3, r = j >> 1 & 3, row = 16 * t + 8 * (r & 1) + int(lane >> 2);
      if (row < place.rows)
        store_one(p, place.row + row, place.column + 8 * (r >> 1) + 2 * int(lane & 3) + (j & 1), v[t][r][j & 1]);
    }
  }
}

}  // namespace

int launch_dequantize(dev::Launch how, const DequantizeParams& params) {
  how.threads = 32 * kWarps;
  how.grid_y = uint32_t((params.linear.k_tiles + kWarps - 1) / kWarps);
  return dev::launch(dequantize_kernel, how, params);
}

int warmup_dequantize() { return dev::load(dequantize_kernel); }

}  // namespace mpq::cuda

// Rows of W by number, for token embeddings: the values of dequantize.cu, without the other rows.

#include "fp32_weights.cuh"
#include "launch.h"
#include "ring.cuh"

namespace mpq::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kQuads = kThreads / 4;  // four lanes hold a row's 16 columns of a chunk

MPQ_DEVICE void store_value(const EmbeddingParams& p, int64_t place, float v) {
  if (p.out_dtype == kDtypeF32)
    dev::st_global(static_cast<float*>(p.out) + place, v);
  else
    dev::st_global(static_cast<uint16_t*>(p.out) + place,
                   p.out_dtype == kDtypeF16 ? dev::float_to_f16(v) : dev::float_to_bf16(v));
}

// The band of a row; the number of bands for one that is in another launch.
MPQ_DEVICE int band_of_row(const LinearParams& w, int64_t row) {
  int index = 0;
  for (; index < w.num_bands; ++index) {
    const Band band = load_band(w, index);
    if (row >= band.n0 && row < int64_t{band.n0} + band.rows) break;
  }
  return index;
}

// Block (i, j): the i-th id, the j-th strip of chunks along K; four threads take one chunk of 16 columns. They decode
// what four lanes of a warp hold of all rows of the supertile, and store their own.
MPQ_KERNEL(kThreads)
embedding_kernel(const MPQ_GRID_CONSTANT EmbeddingParams p) {
  const LinearParams& w = p.linear;
  dev::wait_for_earlier_kernels();
  const int64_t id = dev::ld_constant(p.ids + dev::block_x());
  if (id < 0 || id >= p.rows) dev::trap("an id is outside of the rows of the weight");
  const int index = band_of_row(w, id);
  if (index == w.num_bands) return;
  const Band band = load_band(w, index);
  const int chunk = int(dev::block_y()) * kQuads + int(dev::thread_index()) / 4, global_tile = chunk / 4;
  if (global_tile >= w.k_tiles) return;
  const int end = index + 1 < w.num_bands ? load_band(w, index + 1).first_segment : w.num_segments;
  int i = band.first_segment;
  Segment s = load_segment(w, i);
  while (global_tile >= s.tile0 + s.tiles && ++i < end) s = load_segment(w, i);
  if (i == end || global_tile < s.tile0) return;  // in another launch
  const int row = int(id - band.n0), row_tile = row / kTileN, in_tile = row % kTileN;
  const uint32_t lane = uint32_t(in_tile & 7) * 4 + dev::thread_index() % 4;
  float v[4][4][2];
  switch_bits(bits_of(s), [&]<int kBits>() {
    decode_chunk<kBits>(w, s, band.row_tiles, row_tile, global_tile - s.tile0, chunk % 4, lane, v);
  });
  MPQ_UNROLL for (int j = 0; j < 32; ++j) {  // constant indices: registers
    const int t = j >> 3, r = j >> 1 & 3, e = j & 1;
    const int column = 16 * chunk + 8 * (r >> 1) + 2 * int(lane & 3) + e;
    if (in_tile >> 4 != t || (in_tile >> 3 & 1) != (r & 1) || column >= w.in.columns) continue;
    const int place = w.in.perm ? dev::ld_constant(w.in.perm + column) : column;
    store_value(p, int64_t{dev::block_x()} * w.in.columns + place, v[t][r][e]);
  }
}

}  // namespace

int launch_embedding(dev::Launch how, const EmbeddingParams& params) {
  how.threads = kThreads;
  how.grid_y = uint32_t((4 * params.linear.k_tiles + kQuads - 1) / kQuads);
  return dev::launch(embedding_kernel, how, params);
}

int warmup_embedding() { return dev::load(embedding_kernel); }

}  // namespace mpq::cuda

// y = x W^T + bias for weights in which some group of columns is neither 16, 32, 64 n nor a whole segment: one warp
// decodes every weight to fp32 and multiplies without tensor cores. Right for every group size, not made to be fast.

#include "fp32_weights.cuh"
#include "launch.h"
#include "linear.cuh"

namespace mpq::cuda {

namespace {

constexpr int kWarps = 4;

template <bool kBf16>
MPQ_DEVICE float load_x(const Input& in, int64_t token, int column) {
  if (column >= in.columns) return 0.0f;
  const int64_t place = token * in.row_stride + (in.perm ? dev::ld_constant(in.perm + column) : column);
  uint16_t v = dev::ld_global(static_cast<const uint16_t*>(in.x) + place);
  if (in.gate) v = silu_mul<kBf16>(dev::ld_global(static_cast<const uint16_t*>(in.gate) + place), v);
  return to_float<kBf16>(v);
}

// Block (i, j): row tile i, token j. The warps take supertiles in turn and are added in their order.
template <bool kBf16>
MPQ_KERNEL(32 * kWarps)
generic_kernel(const MPQ_GRID_CONSTANT LinearParams p) {
  const uint32_t base = dev::shared_base(), lane = dev::thread_index() % 32;
  const int warp = int(dev::thread_index()) / 32;
  dev::wait_for_earlier_kernels();
  const int index = find_band(p, dev::block_x());
  const Band band = load_band(p, index);
  const int row_tile = int(dev::block_x()) - band.first_group;
  const int end = index + 1 < p.num_bands ? load_band(p, index + 1).first_segment : p.num_segments;
  const int64_t token = dev::block_y();
  float sums[8] = {};  // [4 h + t]
  for (int i = band.first_segment; i < end; ++i) {
    const Segment s = load_segment(p, i);
    for (int tile = warp; tile < s.tiles; tile += kWarps) {
      MPQ_NO_UNROLL for (int chunk = 0; chunk < 4; ++chunk) {
        float v[4][4][2];
        switch_bits(bits_of(s), [&]<int kBits>() { decode_chunk<kBits>(p, s, row_tile, tile, chunk, lane, v); });
        MPQ_UNROLL for (int j = 0; j < 4; ++j) {
          const int m = j >> 1, e = j & 1;
          const float x =
              load_x<kBf16>(p.in, token, (s.tile0 + tile) * kTileK + 16 * chunk + 8 * m + 2 * int(lane & 3) + e);
          MPQ_UNROLL for (int r = 0; r < 8; ++r) sums[r] = dev::fma(v[r & 3][2 * m + (r >> 2)][e], x, sums[r]);
        }
      }
    }
  }
  MPQ_UNROLL for (int r = 0; r < 8; ++r) {
    sums[r] = dev::add(sums[r], dev::shfl_xor(sums[r], 1));
    sums[r] = dev::add(sums[r], dev::shfl_xor(sums[r], 2));
    const uint32_t row = 16 * (r & 3) + 8 * (r >> 2) + (lane >> 2);
    if ((lane & 3) == 0) dev::st_shared(base + (uint32_t(warp) * kTileN + row) * 4, sums[r]);
  }
  dev::block_sync();
  const int row = int(dev::thread_index());
  if (row >= kTileN || row_tile * kTileN + row >= band.rows) return;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum = dev::add(sum, dev::ld_shared<float>(base + uint32_t(w * kTileN + row) * 4));
  const Target target{{band.n0 + row_tile * kTileN, band.rows - row_tile * kTileN}, token, 1, 0};
  write_output<kBf16>(p.out, target, 0, row, sum);
}

}  // namespace

int launch_generic(bool bf16, dev::Launch how, const LinearParams& params) {
  how.threads = 32 * kWarps;
  how.shared_bytes = kWarps * kTileN * 4;
  return dev::launch(bf16 ? generic_kernel<true> : generic_kernel<false>, how, params);
}

int warmup_generic() {
  if (int error = dev::load(generic_kernel<false>)) return error;
  if (int error = dev::load(generic_kernel<true>)) return error;
  return 0;
}

}  // namespace mpq::cuda

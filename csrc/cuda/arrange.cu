// x for the kernels of wide.cuh, in the order that their shared memory has, with the sums of x that zero points need:
// done once, where each of a hundred blocks would do it again.
//
//     a token in a tile:  | piece 0 ^ t | piece 1 ^ t | ... | piece 7 ^ t |     t: number of the token, modulo 8
//
// A piece is 8 columns, 16 bytes. In this order the 8 rows that ldmatrix reads lie in different banks. Beyond the last
// column and the last token x is zero; bf16 is multiplied by 2^80 (unit.cuh).

#include "launch.h"
#include "panel.cuh"

namespace mpq::cuda {

namespace {

constexpr int kThreads = 256;

// A piece and its sum.
template <bool kBf16>
MPQ_DEVICE float scale_piece(uint32_t (&words)[4]) {
  float sums[4];
  MPQ_UNROLL for (int j = 0; j < 4; ++j) {
    const float low = to_float<kBf16>(uint16_t(words[j])), high = to_float<kBf16>(uint16_t(words[j] >> 16));
    sums[j] = dev::add(low, high);
    if constexpr (kBf16) {
      const float factor = dev::bits_to_float(kBf16Factor);
      // Exact: only the exponent changes.
      words[j] = (dev::float_to_bits(dev::mul(low, factor)) >> 16) |
                 (dev::float_to_bits(dev::mul(high, factor)) & 0xffff0000u);
    }
  }
  return dev::add(dev::add(sums[0], sums[1]), dev::add(sums[2], sums[3]));
}

// Block (i, j): tile i of the j-th block of tokens. The lanes of a tile are 8 neighbours, those of a chunk 2.
template <bool kBf16>
MPQ_KERNEL(kThreads)
arrange_kernel(const MPQ_GRID_CONSTANT ArrangeParams p) {
  dev::launch_dependents();
  dev::wait_for_earlier_kernels();
  const uint64_t record = uint64_t{dev::block_y()} * dev::grid_x() + dev::block_x();
  const uint32_t tokens = uint32_t(p.block_tokens), number = dev::thread_index() % 8;
  const int column = int(dev::block_x() * kTileK + 8 * number);
  float* const sums_to = reinterpret_cast<float*>(p.sums + record * p.sums_pitch);
  MPQ_NO_UNROLL for (uint32_t token = dev::thread_index() / 8; token < tokens; token += kThreads / 8) {
    const int64_t row = int64_t{dev::block_y()} * tokens + token;
    uint4 v{0, 0, 0, 0};
    if (row < p.in.tokens && column < p.in.columns) {
      v = load_columns(p.in, p.in.x, row, column);
      if (p.in.gate) v = silu_mul<kBf16>(load_columns(p.in, p.in.gate, row, column), v);
    }
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
    const float sum = scale_piece<kBf16>(words);
    const float chunk = dev::add(sum, dev::shfl_xor(sum, 1));
    const float half = dev::add(chunk, dev::shfl_xor(chunk, 2));
    const float tile = dev::add(half, dev::shfl_xor(half, 4));
    dev::st_global(reinterpret_cast<uint4*>(p.x + (record * tokens + token) * 128 + (number ^ (token & 7)) * 16),
                   uint4{words[0], words[1], words[2], words[3]});
    if (number == 0) dev::st_global(sums_to + token, tile);
    if (p.in.chunk_sums && number % 2 == 0) dev::st_global(sums_to + (1 + number / 2) * tokens + token, chunk);
  }
}

}  // namespace

int launch_arrange(bool bf16, dev::Launch how, const ArrangeParams& params) {
  how.threads = kThreads;
  how.shared_bytes = 0;
  how.grid_x = uint32_t((params.in.columns + kTileK - 1) / kTileK);
  return dev::launch(bf16 ? arrange_kernel<true> : arrange_kernel<false>, how, params);
}

int warmup_arrange() {
  if (int error = dev::load(arrange_kernel<false>)) return error;
  return dev::load(arrange_kernel<true>);
}

}  // namespace mpq::cuda

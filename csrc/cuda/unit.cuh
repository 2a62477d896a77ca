// One unit of work of a warp: 64 rows x up to four supertiles along K, times 8, 16 or 32 tokens.
//
//     y[row][token] += scale' * (sum of code' * x - zero' * sum of x)         for each group of columns
//
// where code' is the masked field (unpack.cuh) and scale', zero' carry its power of two, so that a product with one-hot
// x is fl32(fl32(code - zero) * scale), bit for bit. Kind `min`: y += scale' * sum of code' * x, then y += zero * sum
// of x, which is fl32(fl32(code * scale) + zero).
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "params.h"
#include "unpack.cuh"
#include "zeros.cuh"

namespace mpq::cuda {

// code' = code * 2^(shift - kExponent). bf16 x is multiplied by 2^80 on its way to shared memory: without it products
// would fall below the range of fp32.
template <bool kBf16>
constexpr int kExponent = kBf16 ? 133 - 80 : 24;
constexpr uint32_t kBf16Factor = 0x67800000u;  // 2^80, an fp32

// 2^exponent
constexpr MPQ_DEVICE uint32_t power_of_two(int exponent) { return uint32_t(127 + exponent) << 23; }

// Where a lane finds the parts of its unit in shared memory.
template <int kTokenTiles>
struct UnitPlace {
  uint32_t codes;              // its 16 bytes of the first row of the first plane
  uint32_t scales;             // its 8 scales of the first group
  uint32_t x;                  // first column of the unit
  uint32_t rows[kTokenTiles];  // bytes from there to its row of ldmatrix, for each 8 tokens
  uint32_t tile_sums;          // of token 2q, first tile
  uint32_t chunk_sums;         // of token 2q, first chunk
  int unit, count;             // tiles that have room, tiles there are
  int flush;                   // tiles (or chunks) that share scales
  int zero_kind, scale_dtype;
};

// kFirst: d is written, not added to.
template <bool kBf16, bool kFirst = false>
MPQ_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kBf16 && kFirst)
    dev::mma_bf16_first(d, a, b0, b1);
  else if constexpr (kFirst)
    dev::mma_f16_first(d, a, b0, b1);
  else if constexpr (kBf16)
    dev::mma_bf16(d, a, b0, b1);
  else
    dev::mma_f16(d, a, b0, b1);
}

// Eight values in the order of a lane's rows: [4 h + t].
MPQ_DEVICE void load_row_values(float (&v)[8], uint32_t address, int dtype) {
  const uint4 first = dev::ld_shared<uint4>(address);
  const uint32_t words[4] = {first.x, first.y, first.z, first.w};
  if (dtype == kDtypeF32) {
    const uint4 second = dev::ld_shared<uint4>(address + 512);
    const uint32_t more[4] = {second.x, second.y, second.z, second.w};
    MPQ_UNROLL for (int i = 0; i < 4; ++i) v[i] = dev::bits_to_float(words[i]), v[4 + i] = dev::bits_to_float(more[i]);
  } else if (dtype == kDtypeF16) {
    MPQ_UNROLL for (int i = 0; i < 8; ++i) v[i] = dev::f16_to_float(uint16_t(words[i >> 1] >> (16 * (i & 1))));
  } else {
    MPQ_UNROLL for (int i = 0; i < 8; ++i) v[i] = dev::bf16_to_float(uint16_t(words[i >> 1] >> (16 * (i & 1))));
  }
}

// Bytes of 8 values for each of 32 lanes.
MPQ_DEVICE uint32_t row_values_bytes(int dtype) { return dtype == kDtypeF32 ? 1024 : 512; }

// Adds a finished group of columns to y and clears its sums. sum_x[n]: sums of x over the group for tokens 2q and 2q +
// 1 of each 8.
template <int kBits, bool kBf16, int kTokenTiles>
MPQ_DEVICE void flush_group(float (&y)[4][kTokenTiles][4], float (&sums)[4][kTokenTiles][4],
                            const float2 (&sum_x)[kTokenTiles], uint32_t& scales, int zero_kind, int scale_dtype,
                            uint32_t lane) {
  float scale[8], zero[8];
  float offset = 0.0f;  // zero[i] - offset is the zero point
  load_row_values(scale, scales, scale_dtype);
  scales += row_values_bytes(scale_dtype);
  if (zero_kind == kZeroInt) {
    // Lanes have 8 bytes here, and 16 in front. A byte below the mantissa of 2^23 is the number 2^23 + byte.
    const uint2 bytes = dev::ld_shared<uint2>(scales - 8 * lane);
    scales += 256;
    offset = 8388608.0f;
    MPQ_UNROLL for (int i = 0; i < 8; ++i) zero[i] =
        dev::bits_to_float(dev::byte_permute(i < 4 ? bytes.x : bytes.y, 0x4b000000u, 0x7650u | uint32_t(i & 3)));
  } else if (zeros_like_scales(zero_kind)) {
    load_row_values(zero, scales, scale_dtype);
    scales += row_values_bytes(scale_dtype);
  } else {
    MPQ_UNROLL for (int i = 0; i < 8; ++i) zero[i] = fixed_zero<kBits>(zero_kind);
  }
  const bool min = zero_kind == kZeroMin;
  MPQ_UNROLL for (int t = 0; t < 4; ++t) {
    MPQ_UNROLL for (int h = 0; h < 2; ++h) {
      const int power = kExponent<kBf16> - Unpack<kBits>::shift(t, h);
      const float s = dev::mul(scale[4 * h + t], dev::bits_to_float(power_of_two(power)));
      const float unscale = dev::bits_to_float(power_of_two(-power));
      const float z = min ? 0.0f : dev::fma(zero[4 * h + t], -unscale, dev::mul(offset, unscale));
      MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
        float& first = sums[t][n][2 * h];
        float& second = sums[t][n][2 * h + 1];
        y[t][n][2 * h] = dev::fma(s, dev::fma(z, sum_x[n].x, first), y[t][n][2 * h]);
        y[t][n][2 * h + 1] = dev::fma(s, dev::fma(z, sum_x[n].y, second), y[t][n][2 * h + 1]);
        first = 0.0f;
        second = 0.0f;
      }
    }
  }
  if (!min) return;
  MPQ_UNROLL for (int t = 0; t < 4; ++t) {
    MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
      MPQ_UNROLL for (int h = 0; h < 2; ++h) {
        y[t][n][2 * h] = dev::fma(zero[4 * h + t], sum_x[n].x, y[t][n][2 * h]);
        y[t][n][2 * h + 1] = dev::fma(zero[4 * h + t], sum_x[n].y, y[t][n][2 * h + 1]);
      }
    }
  }
}

// One k16 chunk into the sums. b: operand B, [token tile][2].
template <int kBits, bool kBf16, int kTokenTiles>
MPQ_DEVICE void multiply_chunk(float (&sums)[4][kTokenTiles][4], const Words& words,
                               const uint32_t (&b)[kTokenTiles][4], int half) {
  uint32_t a[4][4];
  Unpack<kBits>::run(words, a);
  MPQ_UNROLL for (int t = 0; t < 4; ++t) {
    MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) mma<kBf16>(sums[t][n], a[t], b[n][2 * half], b[n][2 * half + 1]);
  }
}

MPQ_DEVICE void unpack4(uint32_t (&to)[4], uint4 v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }

// Planes that a width has, after its first.
template <int kBits>
struct Planes {
  static constexpr bool four = kBits >= 4, eight = kBits == 8,
                        two = kBits == 2 || kBits == 3 || kBits == 6 || kBits == 7, one = kBits & 1;
  // Widths above 4 come one tile at a time (segments.h), so that their places are constants.
  static MPQ_DEVICE int unit(int unit) { return kBits > 4 ? 1 : unit; }
  // Bytes from a unit's first byte to tile `tile` of a plane.
  static MPQ_DEVICE uint32_t second_four_at(int) { return 2048; }
  static MPQ_DEVICE uint32_t two_at(int, int tile) { return (four ? 2048 : 0) + 1024 * tile; }
  static MPQ_DEVICE uint32_t one_at(int unit, int tile) {
    return (four ? 2048 : 0) + (two ? 1024 * Planes::unit(unit) : 0) + 512 * tile;
  }
};

// A whole supertile: 16-byte loads. `codes` is the lane's place in the unit, `x` that of the tile's first column.
template <int kBits, bool kBf16, int kTokenTiles>
MPQ_DEVICE void multiply_tile(float (&sums)[4][kTokenTiles][4], uint32_t codes, int unit, int tile, uint32_t x,
                              const uint32_t (&rows)[kTokenTiles]) {
  using P = Planes<kBits>;
  Words w;
  uint32_t ones[4], twos[4];
  if constexpr (P::one) unpack4(ones, dev::ld_shared<uint4>(codes + P::one_at(unit, tile)));
  MPQ_UNROLL for (int pair = 0; pair < 2; ++pair) {
    uint32_t b[kTokenTiles][4];
    MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) dev::ldmatrix_x4(b[n], x + rows[n] + 64 * pair);
    if constexpr (P::two) unpack4(twos, dev::ld_shared<uint4>(codes + P::two_at(unit, tile) + 512 * pair));
    MPQ_UNROLL for (int half = 0; half < 2; ++half) {
      const int c = 2 * pair + half;
      if constexpr (P::four) unpack4(w.high, dev::ld_shared<uint4>(codes + 2048 * tile + 512 * c));
      if constexpr (P::eight) unpack4(w.low, dev::ld_shared<uint4>(codes + 2048 + 512 * c));
      if constexpr (P::two) w.two[0] = twos[2 * half], w.two[1] = twos[2 * half + 1];
      if constexpr (P::one) w.one = ones[c];
      multiply_chunk<kBits, kBf16, kTokenTiles>(sums, w, b, half);
    }
  }
}

// One k16 chunk, for scales that change inside a supertile; such units are one tile long.
template <int kBits, bool kBf16, int kTokenTiles>
MPQ_DEVICE void multiply_one_chunk(float (&sums)[4][kTokenTiles][4], uint32_t codes, int chunk, uint32_t x,
                                   const uint32_t (&rows)[kTokenTiles]) {
  using P = Planes<kBits>;
  Words w;
  uint32_t b[kTokenTiles][4];
  MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) dev::ldmatrix_x4(b[n], x + rows[n] + 32 * chunk);
  if constexpr (P::four) unpack4(w.high, dev::ld_shared<uint4>(codes + 512 * chunk));
  if constexpr (P::eight) unpack4(w.low, dev::ld_shared<uint4>(codes + 2048 + 512 * chunk));
  if constexpr (P::two) {
    const uint2 v = dev::ld_shared<uint2>(codes + P::two_at(1, 0) + 512 * (chunk >> 1) + 8 * (chunk & 1));
    w.two[0] = v.x, w.two[1] = v.y;
  }
  if constexpr (P::one) w.one = dev::ld_shared<uint32_t>(codes + P::one_at(1, 0) + 4 * chunk);
  multiply_chunk<kBits, kBf16, kTokenTiles>(sums, w, b, 0);
}

template <int kTokenTiles>
MPQ_DEVICE void add_sums(float2 (&total)[kTokenTiles], uint32_t address) {
  MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
    const float2 v = dev::ld_shared<float2>(address + 32 * n);
    total[n].x = dev::add(total[n].x, v.x);
    total[n].y = dev::add(total[n].y, v.y);
  }
}

template <int kTokenTiles>
MPQ_DEVICE void clear(float2 (&total)[kTokenTiles]) {
  MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) total[n] = float2{0.0f, 0.0f};
}

// Groups of 64 columns or more.
template <int kBits, bool kBf16, int kTokenTiles>
MPQ_DEVICE void run_unit(float (&y)[4][kTokenTiles][4], UnitPlace<kTokenTiles> place, uint32_t lane) {
  float sums[4][kTokenTiles][4] = {};
  MPQ_NO_UNROLL for (int tile = 0; tile < place.count;) {
    const int stop = place.flush < place.count - tile ? tile + place.flush : place.count;
    float2 sum_x[kTokenTiles];
    clear(sum_x);
    MPQ_NO_UNROLL do {
      multiply_tile<kBits, kBf16, kTokenTiles>(sums, place.codes, place.unit, tile, place.x, place.rows);
      add_sums(sum_x, place.tile_sums);
      place.tile_sums += 32 * kTokenTiles;
      place.x += 2 * kTileK;
    }
    while (++tile < stop);
    flush_group<kBits, kBf16, kTokenTiles>(y, sums, sum_x, place.scales, place.zero_kind, place.scale_dtype, lane);
  }
}

// Groups of 16 or 32 columns.
template <int kBits, bool kBf16, int kTokenTiles>
MPQ_DEVICE void run_sub_tile(float (&y)[4][kTokenTiles][4], UnitPlace<kTokenTiles> place, uint32_t lane) {
  float sums[4][kTokenTiles][4] = {};
  float2 sum_x[kTokenTiles];
  clear(sum_x);
  MPQ_NO_UNROLL for (int chunk = 0; chunk < 4; ++chunk) {
    multiply_one_chunk<kBits, kBf16, kTokenTiles>(sums, place.codes, chunk, place.x, place.rows);
    add_sums(sum_x, place.chunk_sums + 32 * kTokenTiles * chunk);
    if ((chunk + 1) & (place.flush - 1)) continue;
    flush_group<kBits, kBf16, kTokenTiles>(y, sums, sum_x, place.scales, place.zero_kind, place.scale_dtype, lane);
    clear(sum_x);
  }
}

// The width is the same for the whole warp.
template <bool kBf16, int kTokenTiles>
MPQ_DEVICE void run_unit(float (&y)[4][kTokenTiles][4], const UnitPlace<kTokenTiles>& place, int bits, bool sub_tile,
                         uint32_t lane) {
#define MPQ_CASE(width)                                        \
  case width:                                                  \
    if (sub_tile)                                              \
      run_sub_tile<width, kBf16, kTokenTiles>(y, place, lane); \
    else                                                       \
      run_unit<width, kBf16, kTokenTiles>(y, place, lane);     \
    break;
  switch (bits) {
    MPQ_CASE(1)
    MPQ_CASE(2)
    MPQ_CASE(3)
    MPQ_CASE(4)
    MPQ_CASE(5)
    MPQ_CASE(6)
    MPQ_CASE(7)
    MPQ_CASE(8)
  }
#undef MPQ_CASE
}

}  // namespace mpq::cuda

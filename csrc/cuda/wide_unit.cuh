// A warp's part of a step: 64 rows x up to two supertiles along K, times 32 tokens (unit.cuh has the arithmetic).
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "params.h"
#include "unit.cuh"
#include "unpack.cuh"
#include "wide.h"
#include "zeros.cuh"

namespace mpq::cuda {

constexpr int kWarpTiles = kWarpTokens / 8;

using Sums = float[4][kWarpTiles][4];  // [t][tokens][accumulator]

// Where a lane finds its unit in shared memory.
struct WidePlace {
  uint32_t codes;                     // its 16 bytes of the first row of plane 0 of the step's first tile
  int step_tiles;                     // that planes have room for
  int first, count;                   // tiles of the unit, from the step's first
  uint32_t x, x_tile;                 // its row of ldmatrix in the step's first tile; bytes of a tile
  uint32_t sums, sums_pitch, tokens;  // sums of x of the warp's token 2q; bytes of a tile's; tokens of the block
  uint32_t scales, scales_step;       // of the unit's first flush; bytes from one to the next
  int flush;                          // tiles (or chunks) that share scales
  int zero_kind, scale_dtype;
};

// A lane's 8 rows of 64 values that begin at `address`, [4 h + t].
MPQ_DEVICE void load_rows(float (&v)[8], uint32_t address, int dtype, uint32_t lane) {
  const uint32_t g = lane >> 2;
  if (dtype == kDtypeF32) {
    const uint4 a = dev::ld_shared<uint4>(address + 32 * g), b = dev::ld_shared<uint4>(address + 32 * g + 16);
    const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    MPQ_UNROLL for (int i = 0; i < 8; ++i) v[i] = dev::bits_to_float(words[i]);
    return;
  }
  const uint4 a = dev::ld_shared<uint4>(address + 16 * g);
  const uint32_t words[4] = {a.x, a.y, a.z, a.w};
  if (dtype == kDtypeF16) {
    MPQ_UNROLL for (int i = 0; i < 8; ++i) v[i] = dev::f16_to_float(uint16_t(words[i >> 1] >> (16 * (i & 1))));
  } else {
    MPQ_UNROLL for (int i = 0; i < 8; ++i) v[i] = dev::bf16_to_float(uint16_t(words[i >> 1] >> (16 * (i & 1))));
  }
}

// Adds a finished group of columns to y. `scales`: its 64 scales, then its zeros.
template <int kBits, bool kBf16>
MPQ_DEVICE void wide_flush(Sums& y, const Sums& sums, const float2 (&sum_x)[kWarpTiles], uint32_t scales, int zero_kind,
                           int scale_dtype, uint32_t lane) {
  float scale[8], zero[8];
  float offset = 0.0f;  // zero - offset is the zero point
  load_rows(scale, scales, scale_dtype, lane);
  scales += kTileN * (scale_dtype == kDtypeF32 ? 4 : 2);
  if (zero_kind == kZeroInt) {
    const uint2 packed = dev::ld_shared<uint2>(scales + 8 * (lane >> 2));
    offset = 8388608.0f;  // a byte below the mantissa of 2^23 is the number 2^23 + byte
    MPQ_UNROLL for (int i = 0; i < 8; ++i) zero[i] =
        dev::bits_to_float(dev::byte_permute(i < 4 ? packed.x : packed.y, 0x4b000000u, 0x7650u | uint32_t(i & 3)));
  } else if (zeros_like_scales(zero_kind)) {
    load_rows(zero, scales, scale_dtype, lane);
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
      MPQ_UNROLL for (int n = 0; n < kWarpTiles; ++n) {
        float &first = y[t][n][2 * h], &second = y[t][n][2 * h + 1];
        first = dev::fma(s, dev::fma(z, sum_x[n].x, sums[t][n][2 * h]), first);
        second = dev::fma(s, dev::fma(z, sum_x[n].y, sums[t][n][2 * h + 1]), second);
      }
    }
  }
  if (!min) return;
  MPQ_UNROLL for (int t = 0; t < 4; ++t) {
    MPQ_UNROLL for (int n = 0; n < kWarpTiles; ++n) {
      MPQ_UNROLL for (int i = 0; i < 4; ++i) y[t][n][i] =
          dev::fma(zero[4 * (i >> 1) + t], i & 1 ? sum_x[n].y : sum_x[n].x, y[t][n][i]);
    }
  }
}

MPQ_DEVICE void add_wide_sums(float2 (&sum_x)[kWarpTiles], uint32_t from) {
  MPQ_UNROLL for (int n = 0; n < kWarpTiles; ++n) {
    const float2 v = dev::ld_shared<float2>(from + 32 * n);
    sum_x[n].x = dev::add(sum_x[n].x, v.x);
    sum_x[n].y = dev::add(sum_x[n].y, v.y);
  }
}

// Bytes from a step's codes to tile `tile` of a plane, for `tiles` tiles of a step.
template <int kBits>
struct WidePlanes {
  static constexpr bool four = kBits >= 4, eight = kBits == 8,
                        two = kBits == 2 || kBits == 3 || kBits == 6 || kBits == 7, one = kBits & 1;
  static MPQ_DEVICE uint32_t second_four_at(int tiles, int tile) { return uint32_t(2048 * (tiles + tile)); }
  static MPQ_DEVICE uint32_t two_at(int tiles, int tile) { return uint32_t((four ? 2048 : 0) * tiles + 1024 * tile); }
  static MPQ_DEVICE uint32_t one_at(int tiles, int tile) {
    return uint32_t(((four ? 2048 : 0) + (two ? 1024 : 0)) * tiles + 512 * tile);
  }
};

// A lane's words of one chunk.
template <int kBits>
MPQ_DEVICE Words load_words_of_chunk(const WidePlace& place, int tile, int chunk) {
  using P = WidePlanes<kBits>;
  Words w{};
  const uint32_t at = place.codes + 512 * uint32_t(chunk);
  if constexpr (P::four) unpack4(w.high, dev::ld_shared<uint4>(at + 2048 * uint32_t(tile)));
  if constexpr (P::eight) unpack4(w.low, dev::ld_shared<uint4>(at + P::second_four_at(place.step_tiles, tile)));
  if constexpr (P::two) {
    const uint2 v = dev::ld_shared<uint2>(place.codes + P::two_at(place.step_tiles, tile) + 512 * uint32_t(chunk >> 1) +
                                          8 * uint32_t(chunk & 1));
    w.two[0] = v.x, w.two[1] = v.y;
  }
  if constexpr (P::one)
    w.one = dev::ld_shared<uint32_t>(place.codes + P::one_at(place.step_tiles, tile) + 4 * uint32_t(chunk));
  return w;
}

template <int kBits, bool kBf16>
MPQ_DEVICE void wide_chunk(Sums& sums, const Words& words, uint32_t x, uint32_t lane, int chunk) {
  // Matrices: columns 0..7 and 8..15 of 8 tokens, then those of the next 8.
  const uint32_t piece = ((2 * uint32_t(chunk) + (lane >> 3 & 1)) ^ (lane & 7)) * 16;
  uint32_t a[4][4], b[kWarpTiles / 2][4];
  MPQ_UNROLL for (int n = 0; n < kWarpTiles / 2; ++n) dev::ldmatrix_x4(b[n], x + 2048 * n + piece);
  Unpack<kBits>::run(words, a);
  MPQ_UNROLL for (int t = 0; t < 4; ++t) {
    MPQ_UNROLL for (int n = 0; n < kWarpTiles; ++n)
        mma<kBf16>(sums[t][n], a[t], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
  }
}

// A whole supertile. Words are loaded a chunk ahead.
template <int kBits, bool kBf16>
MPQ_DEVICE void wide_tile(Sums& sums, const WidePlace& place, int tile, uint32_t lane) {
  const uint32_t x = place.x + uint32_t(tile) * place.x_tile;
  Words next = load_words_of_chunk<kBits>(place, tile, 0);
  MPQ_UNROLL for (int chunk = 0; chunk < 4; ++chunk) {
    const Words words = next;
    if (chunk < 3) next = load_words_of_chunk<kBits>(place, tile, chunk + 1);
    wide_chunk<kBits, kBf16>(sums, words, x, lane, chunk);
  }
}

template <int kBits, bool kBf16>
MPQ_DEVICE void wide_unit(Sums& y, const WidePlace& place, bool sub_tile, uint32_t lane) {
  uint32_t scales = place.scales;
  if (!sub_tile) {
    MPQ_NO_UNROLL for (int tile = 0; tile < place.count; scales += place.scales_step) {
      const int stop = place.flush < place.count - tile ? tile + place.flush : place.count;
      Sums sums = {};
      float2 sum_x[kWarpTiles] = {};
      MPQ_NO_UNROLL do {
        wide_tile<kBits, kBf16>(sums, place, place.first + tile, lane);
        add_wide_sums(sum_x, place.sums + uint32_t(place.first + tile) * place.sums_pitch);
      }
      while (++tile < stop);
      wide_flush<kBits, kBf16>(y, sums, sum_x, scales, place.zero_kind, place.scale_dtype, lane);
    }
    return;
  }
  // Groups of 16 or 32 columns. Chunks are numbered through all tiles.
  MPQ_NO_UNROLL for (int chunk = 0; chunk < 4 * place.count; scales += place.scales_step) {
    const int stop = chunk + place.flush, tile = place.first + chunk / 4;
    const uint32_t x = place.x + uint32_t(tile) * place.x_tile;
    uint32_t sums_at = place.sums + uint32_t(tile) * place.sums_pitch + uint32_t(1 + chunk % 4) * (4 * place.tokens);
    Sums sums = {};
    float2 sum_x[kWarpTiles] = {};
    MPQ_NO_UNROLL do {
      const Words words = load_words_of_chunk<kBits>(place, tile, chunk % 4);
      wide_chunk<kBits, kBf16>(sums, words, x, lane, chunk % 4);
      add_wide_sums(sum_x, sums_at);
      sums_at += 4 * place.tokens;
    }
    while (++chunk < stop);
    wide_flush<kBits, kBf16>(y, sums, sum_x, scales, place.zero_kind, place.scale_dtype, lane);
  }
}

// The width is the same for the whole warp.
template <bool kBf16>
MPQ_DEVICE void wide_unit(Sums& y, const WidePlace& place, int bits, bool sub_tile, uint32_t lane) {
#define MPQ_CASE(width)                                \
  case width:                                          \
    wide_unit<width, kBf16>(y, place, sub_tile, lane); \
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

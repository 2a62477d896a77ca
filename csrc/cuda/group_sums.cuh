// Products of one group of scales, and what becomes of them.
//
//     y[row][token] += scale * (sum of code' * x - zero' * sum of x)              for each group of columns
//     kind `min`:  y += scale * sum of code' * x, then y += zero' * sum of x
//
// code' = code * 2^-p is the masked field (unpack.cuh). With scales of fp16 y has that power too and loses it once, at
// the end of a segment; other scales take it along, since they may be too small. The sum of x is one more product, with
// ones. So a product with one-hot x is fl32(fl32(code - zero) * scale), or fl32(fl32(code * scale) + zero), bit for
// bit.
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "unit.cuh"
#include "unpack.cuh"
#include "zeros.cuh"

namespace mpq::cuda {

template <int kTokenTiles>
struct GroupSums {
  float codes[4][kTokenTiles][4];  // [t][n]: rows 16 t + g and + 8, tokens 8 n + 2 q and the next
  float x[kTokenTiles][4];         // every row the same
};

// code' = code * 2^-power_of(t, h)
template <bool kBf16, int kBits>
constexpr MPQ_DEVICE int power_of(int t, int h) {
  return kExponent<kBf16> - Unpack<kBits>::shift(t, h);
}

// One k16 chunk. kFirst: nothing is in the sums yet. b: operand B, [token tile][2 for each chunk of a pair].
template <int kBits, bool kBf16, int kTokenTiles, bool kFirst>
MPQ_DEVICE void multiply_chunk(GroupSums<kTokenTiles>& sums, const Words& words, const uint32_t (&b)[kTokenTiles][4],
                               int half) {
  // 2^-80 in bf16 takes back what x was multiplied by.
  constexpr uint32_t kOne = kBf16 ? 0x17801780u : 0x3c003c00u;
  constexpr uint32_t ones[4] = {kOne, kOne, kOne, kOne};
  uint32_t a[4][4];
  Unpack<kBits>::run(words, a);
  MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
    MPQ_UNROLL for (int t = 0; t < 4; ++t)
        mma<kBf16, kFirst>(sums.codes[t][n], a[t], b[n][2 * half], b[n][2 * half + 1]);
    mma<kBf16, kFirst>(sums.x[n], ones, b[n][2 * half], b[n][2 * half + 1]);
  }
}

// A supertile whose codes are at `codes` for this lane; x[n]: the lane's address for ldmatrix of its first 32 columns.
template <int kBits, bool kBf16, int kTokenTiles, bool kFirst>
MPQ_DEVICE void multiply_tile(GroupSums<kTokenTiles>& sums, uint32_t codes, const uint32_t (&x)[kTokenTiles]) {
  using P = Planes<kBits>;
  Words w;
  uint32_t ones[4], twos[4];
  if constexpr (P::one) unpack4(ones, dev::ld_shared<uint4>(codes + P::one_at(1, 0)));
  MPQ_UNROLL for (int pair = 0; pair < 2; ++pair) {
    uint32_t b[kTokenTiles][4];
    MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) dev::ldmatrix_x4(b[n], x[n] + 64 * pair);
    if constexpr (P::two) unpack4(twos, dev::ld_shared<uint4>(codes + P::two_at(1, 0) + 512 * pair));
    MPQ_UNROLL for (int half = 0; half < 2; ++half) {
      const int c = 2 * pair + half;
      if constexpr (P::four) unpack4(w.high, dev::ld_shared<uint4>(codes + 512 * c));
      if constexpr (P::eight) unpack4(w.low, dev::ld_shared<uint4>(codes + 2048 + 512 * c));
      if constexpr (P::two) w.two[0] = twos[2 * half], w.two[1] = twos[2 * half + 1];
      if constexpr (P::one) w.one = ones[c];
      if (pair == 0 && half == 0)
        multiply_chunk<kBits, kBf16, kTokenTiles, kFirst>(sums, w, b, half);
      else
        multiply_chunk<kBits, kBf16, kTokenTiles, false>(sums, w, b, half);
    }
  }
}

// One k16 chunk of a supertile, where scales change inside of it. Its chunk is 16 columns wide: lanes of the upper
// half read the same as those of the lower one.
template <int kBits, bool kBf16, int kTokenTiles>
MPQ_DEVICE void multiply_one_chunk(GroupSums<kTokenTiles>& sums, uint32_t codes, int chunk,
                                   const uint32_t (&x)[kTokenTiles]) {
  using P = Planes<kBits>;
  Words w;
  uint32_t b[kTokenTiles][4];
  MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) dev::ldmatrix_x4(b[n], x[n] + 32 * uint32_t(chunk));
  if constexpr (P::four) unpack4(w.high, dev::ld_shared<uint4>(codes + 512 * chunk));
  if constexpr (P::eight) unpack4(w.low, dev::ld_shared<uint4>(codes + 2048 + 512 * chunk));
  if constexpr (P::two) {
    const uint2 v = dev::ld_shared<uint2>(codes + P::two_at(1, 0) + 512 * (chunk >> 1) + 8 * (chunk & 1));
    w.two[0] = v.x, w.two[1] = v.y;
  }
  if constexpr (P::one) w.one = dev::ld_shared<uint32_t>(codes + P::one_at(1, 0) + 4 * chunk);
  multiply_chunk<kBits, kBf16, kTokenTiles, false>(sums, w, b, 0);
}

// Eight neighbours, the values of a lane's rows in the order [4 h + t].
MPQ_DEVICE void load_rows(float (&v)[8], uint32_t address, int dtype) {
  const uint4 first = dev::ld_shared<uint4>(address);
  const uint32_t words[4] = {first.x, first.y, first.z, first.w};
  if (dtype == kDtypeF16) {
    MPQ_UNROLL for (int i = 0; i < 8; ++i) v[i] = dev::f16_to_float(uint16_t(words[i >> 1] >> (16 * (i & 1))));
  } else if (dtype == kDtypeF32) {
    const uint4 second = dev::ld_shared<uint4>(address + 16);
    const uint32_t more[4] = {second.x, second.y, second.z, second.w};
    MPQ_UNROLL for (int i = 0; i < 4; ++i) v[i] = dev::bits_to_float(words[i]), v[4 + i] = dev::bits_to_float(more[i]);
  } else {
    MPQ_UNROLL for (int i = 0; i < 8; ++i) v[i] = dev::bf16_to_float(uint16_t(words[i >> 1] >> (16 * (i & 1))));
  }
}

// How the scales of a group lie in shared memory: 64 of `dtype`, then the zeros.
struct GroupKind {
  int zero, dtype;
};

// y += scale * (sums of codes - zero * sums of x)
template <int kTokenTiles>
MPQ_DEVICE void add_scaled(float (&y)[4][kTokenTiles][4], const GroupSums<kTokenTiles>& sums, const float (&scale)[8],
                           const float (&zero)[8]) {
  MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      MPQ_UNROLL for (int i = 0; i < 4; ++i) {
        const int row = 4 * (i >> 1) + t;
        const float difference = dev::fma(-zero[row], sums.x[n][i & 1], sums.codes[t][n][i]);
        y[t][n][i] = dev::fma(scale[row], difference, y[t][n][i]);
      }
    }
  }
}

// Zeros of a byte each, with the power of the codes. A byte below the mantissa of 2^(23 - power) is the number
// 2^(23 - power) + byte * 2^-power.
template <int kBits, bool kBf16>
MPQ_DEVICE void load_bytes(float (&zero)[8], uint32_t address) {
  const uint2 bytes = dev::ld_shared<uint2>(address);
  MPQ_UNROLL for (int i = 0; i < 8; ++i) {
    const uint32_t magic = power_of_two(23 - power_of<kBf16, kBits>(i & 3, i >> 2));
    const uint32_t sum = dev::byte_permute(i < 4 ? bytes.x : bytes.y, magic, 0x7650u | uint32_t(i & 3));
    zero[i] = dev::add(dev::bits_to_float(sum), -dev::bits_to_float(magic));
  }
}

// Adds a finished group to y. scales: address of its scales; g: lane / 4.
template <int kBits, bool kBf16, int kTokenTiles>
MPQ_DEVICE void add_group(float (&y)[4][kTokenTiles][4], const GroupSums<kTokenTiles>& sums, uint32_t scales,
                          GroupKind kind, uint32_t g) {
  float scale[8], zero[8];
  if (kind.dtype == kDtypeF16 && kind.zero == kZeroInt) {  // first, because most weights are so
    load_rows(scale, scales + 16 * g, kDtypeF16);
    load_bytes<kBits, kBf16>(zero, scales + 128 + 8 * g);
    add_scaled<kTokenTiles>(y, sums, scale, zero);
    return;
  }
  const uint32_t eight = kind.dtype == kDtypeF32 ? 32 : 16, zeros = scales + 8 * eight;
  const bool min = kind.zero == kZeroMin, power_in_y = kind.dtype == kDtypeF16;
  load_rows(scale, scales + eight * g, kind.dtype);
  if (kind.zero == kZeroInt) {
    load_bytes<kBits, kBf16>(zero, zeros + 8 * g);
  } else {
    if (zeros_like_scales(kind.zero)) {
      load_rows(zero, zeros + eight * g, kind.dtype);
    } else {
      MPQ_UNROLL for (int i = 0; i < 8; ++i) zero[i] = fixed_zero<kBits>(kind.zero);
    }
    MPQ_UNROLL for (int i = 0; i < 8; ++i) {
      const float down = dev::bits_to_float(power_of_two(-power_of<kBf16, kBits>(i & 3, i >> 2)));
      zero[i] = dev::mul(zero[i], min && !power_in_y ? 1.0f : down);
    }
  }
  if (!power_in_y) {
    MPQ_UNROLL for (int i = 0; i < 8; ++i) scale[i] =
        dev::mul(scale[i], dev::bits_to_float(power_of_two(power_of<kBf16, kBits>(i & 3, i >> 2))));
  }
  if (!min) {
    add_scaled<kTokenTiles>(y, sums, scale, zero);
    return;
  }
  MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      MPQ_UNROLL for (int i = 0; i < 4; ++i) {
        const int row = 4 * (i >> 1) + t;
        y[t][n][i] = dev::fma(scale[row], sums.codes[t][n][i], y[t][n][i]);
        y[t][n][i] = dev::fma(zero[row], sums.x[n][i & 1], y[t][n][i]);
      }
    }
  }
}

// To (kUp = -1) or from (1) sums that have the power of the codes.
template <int kBits, bool kBf16, int kTokenTiles, int kUp>
MPQ_DEVICE void move_power(float (&y)[4][kTokenTiles][4]) {
  MPQ_UNROLL for (int t = 0; t < 4; ++t) {
    MPQ_UNROLL for (int n = 0; n < kTokenTiles; ++n) {
      MPQ_UNROLL for (int i = 0; i < 4; ++i) y[t][n][i] =
          dev::mul(y[t][n][i], dev::bits_to_float(power_of_two(kUp * power_of<kBf16, kBits>(t, i >> 1))));
    }
  }
}

}  // namespace mpq::cuda

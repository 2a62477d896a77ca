// Weights as fp32 numbers, for kernels that do not multiply codes: two roundings (zeros.cuh), any group size.
#pragma once

#include "device.cuh"
#include "generated/layout.h"
#include "params.h"
#include "unpack.cuh"
#include "work.cuh"
#include "zeros.cuh"

namespace mpq::cuda {

MPQ_DEVICE int bits_of(const Segment& s) { return int(s.shape >> shape::kBits & 15); }
MPQ_DEVICE int zero_kind_of(const Segment& s) { return int(s.shape >> shape::kZeroKind & 15); }
// The band of a row group.
MPQ_DEVICE int find_band(const LinearParams& p, uint32_t group) {
  int band = 0;
  while (band + 1 < p.num_bands && uint32_t(load_band(p, band + 1).first_group) <= group) ++band;
  return band;
}

// Eight neighbours of a tensor of `dtype`, which begin at a multiple of eight.
MPQ_DEVICE void load_eight(float (&v)[8], const void* from, uint64_t index, int dtype) {
  if (dtype == kDtypeF32) {
    const uint4* words = reinterpret_cast<const uint4*>(static_cast<const float*>(from) + index);
    const uint4 a = dev::ld_constant(words), b = dev::ld_constant(words + 1);
    const uint32_t bits[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    MPQ_UNROLL for (int i = 0; i < 8; ++i) v[i] = dev::bits_to_float(bits[i]);
    return;
  }
  const uint4 a = dev::ld_constant(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + index));
  const uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
  MPQ_UNROLL for (int i = 0; i < 8; ++i) {
    const uint16_t bits = uint16_t(pairs[i >> 1] >> (16 * (i & 1)));
    v[i] = dtype == kDtypeF16 ? dev::f16_to_float(bits) : dev::bf16_to_float(bits);
  }
}

// Of the blocks of 64 scales of a segment, that of a row tile and group.
MPQ_DEVICE uint64_t scale_block(const Segment& s, uint32_t row_tile, uint32_t group) {
  return uint64_t{row_tile} * uint32_t(s.groups) + group;
}

// What a lane multiplies its 8 rows of one group by, [4 h + t].
template <int kBits>
struct RowScales {
  float scale[8], zero[8];

  MPQ_DEVICE void load(const LinearParams& p, const Segment& s, int row_tile, int group, uint32_t lane) {
    const uint64_t block = scale_block(s, uint32_t(row_tile), uint32_t(group));
    const uint32_t rows = (lane >> 2) * 8;
    load_eight(scale, p.scales, (s.scales + block) * kTileN + rows, p.scale_dtype);
    const uint64_t place = (s.zeros + block) * kTileN + rows;
    if (zero_kind_of(s) == kZeroInt) {
      const uint2 bytes =
          dev::ld_constant(reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p.zeros) + place));
      MPQ_UNROLL for (int i = 0; i < 8; ++i) zero[i] = float((i < 4 ? bytes.x : bytes.y) >> (8 * (i & 3)) & 255);
    } else if (zeros_like_scales(zero_kind_of(s))) {
      load_eight(zero, p.zeros, place, p.scale_dtype);
    } else {
      MPQ_UNROLL for (int i = 0; i < 8; ++i) zero[i] = fixed_zero<kBits>(zero_kind_of(s));
    }
  }
};

MPQ_DEVICE void load_four(uint32_t (&to)[4], const uint32_t* from) {
  const uint4 v = dev::ld_constant(reinterpret_cast<const uint4*>(from));
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// A lane's words of chunk `chunk` of a supertile.
template <int kBits>
MPQ_DEVICE Words load_chunk(const LinearParams& p, const Segment& s, uint64_t tile, int chunk, uint32_t lane) {
  constexpr bool kFour = kBits >= 4, kTwo = kBits == 2 || kBits == 3 || kBits == 6 || kBits == 7, kOne = kBits & 1;
  const uint32_t* words = static_cast<const uint32_t*>(p.qweight);
  Words w{};
  if constexpr (kFour) {
    const uint64_t at = tile * 512 + uint32_t(chunk) * 128 + lane * 4;
    load_four(w.high, words + uint64_t{s.planes[0]} * 4 + at);
    if constexpr (kBits == 8) load_four(w.low, words + uint64_t{s.planes[1]} * 4 + at);
  }
  if constexpr (kTwo) {
    const uint64_t at = tile * 256 + uint32_t(chunk >> 1) * 128 + lane * 4 + uint32_t(chunk & 1) * 2;
    const uint2 two = dev::ld_constant(reinterpret_cast<const uint2*>(words + uint64_t{s.planes[kFour]} * 4 + at));
    w.two[0] = two.x, w.two[1] = two.y;
  }
  if constexpr (kOne)
    w.one = dev::ld_constant(words + uint64_t{s.planes[kFour + kTwo]} * 4 + tile * 128 + lane * 4 + uint32_t(chunk));
  return w;
}

// Weights of one chunk: [t][r][e] of row 16 t + 8 h + g, column 16 chunk + 8 m + 2 q + e, r = 2 m + h.
template <int kBits>
MPQ_DEVICE void decode_chunk(const LinearParams& p, const Segment& s, int row_tile, int tile, int chunk, uint32_t lane,
                             float (&v)[4][4][2]) {
  uint32_t a[4][4];
  const uint64_t place = uint64_t(uint32_t(row_tile)) * uint32_t(s.tiles) + uint32_t(tile);
  Unpack<kBits>::run(load_chunk<kBits>(p, s, place, chunk, lane), a);
  const int first = tile * kTileK + 16 * chunk, last_group = s.groups - 1;
  const bool one_group = s.groups == 1 || s.group_size % 16 == 0;
  RowScales<kBits> rows;
  // Four passes, one for each of the lane's columns, or one for all of them. Indices stay constants: registers.
  MPQ_NO_UNROLL for (int pass = one_group ? 4 : 0; pass < (one_group ? 5 : 4); ++pass) {
    const int column = one_group ? first : first + 8 * (pass >> 1) + 2 * int(lane & 3) + (pass & 1);
    const int group = s.groups == 1 ? 0 : column / s.group_size;
    rows.load(p, s, row_tile, group < last_group ? group : last_group, lane);  // beyond: padding
    MPQ_UNROLL for (int j = 0; j < 4; ++j) {
      const int m = j >> 1, e = j & 1;
      if (pass != 4 && pass != j) continue;
      MPQ_UNROLL for (int t = 0; t < 4; ++t) {
        MPQ_UNROLL for (int h = 0; h < 2; ++h) {
          const uint32_t code = (a[t][2 * m + h] >> (16 * e) & 0xffffu) >> Unpack<kBits>::shift(t, h);
          const int row = 4 * h + t;
          v[t][2 * m + h][e] = weight_of(float(code), rows.scale[row], rows.zero[row], zero_kind_of(s));
        }
      }
    }
  }
}

template <class Body>
MPQ_DEVICE void switch_bits(int bits, const Body& body) {
  switch (bits) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    case 5:
      return body.template operator()<5>();
    case 6:
      return body.template operator()<6>();
    case 7:
      return body.template operator()<7>();
    default:
      return body.template operator()<8>();
  }
}

}  // namespace mpq::cuda

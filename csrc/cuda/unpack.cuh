// Packed words to operand A of the tensor cores, by masks alone.
//
// A field of a word, masked in place, is the bit pattern of a 16-bit float whose exponent is zero: for fp16 the number
// code * 2^(shift - 24), for bf16 code * 2^(shift - 133), where `shift` is the place of the field in its half. The
// layout puts every code of an accumulator row at the same shift, so the power of two joins the scale, and no weight
// costs an addition or a multiplication. Fields reach up to bit 7: subnormals and the first binade of normal numbers
// are one linear range.
//
// a[t][r] holds the pair of columns 16 c + 8 m + 2 q and the next one of row 16 t + 8 h + g, with r = 2 m + h.
#pragma once

#include "device.cuh"

namespace mpq::cuda {

constexpr MPQ_DEVICE uint32_t both_halves(uint32_t mask) { return mask * 0x00010001u; }

using dev::bit_select;

// Words of one k16 chunk: 4 of a plane of width 4, 2 of one of width 2, 1 of one of width 1.
struct Words {
  uint32_t high[4];  // width 4, the first plane
  uint32_t low[4];   // width 4, the second plane of 8 bits
  uint32_t two[2];
  uint32_t one;
};

template <int kBits>
struct Unpack;

template <>
struct Unpack<1> {
  static constexpr MPQ_DEVICE int shift(int t, int h) { return 4 * (t & 1) + 2 * (t >> 1) + h; }
  static MPQ_DEVICE void run(const Words& w, uint32_t (&a)[4][4]) {
    MPQ_UNROLL for (int m = 0; m < 2; ++m) {
      const uint32_t word = w.one >> (8 * m);
      MPQ_UNROLL for (int t = 0; t < 4; ++t) {
        MPQ_UNROLL for (int h = 0; h < 2; ++h) a[t][2 * m + h] = word & both_halves(1u << shift(t, h));
      }
    }
  }
};

template <>
struct Unpack<2> {
  static constexpr MPQ_DEVICE int shift(int t, int h) { return 4 * (t & 1) + 2 * h; }
  static MPQ_DEVICE void run(const Words& w, uint32_t (&a)[4][4]) {
    MPQ_UNROLL for (int m = 0; m < 2; ++m) {
      MPQ_UNROLL for (int t = 0; t < 4; ++t) {
        const uint32_t word = w.two[t >> 1] >> (8 * m);
        MPQ_UNROLL for (int h = 0; h < 2; ++h) a[t][2 * m + h] = word & both_halves(3u << shift(t, h));
      }
    }
  }
};

// The pair of a 2-bit field at bits 2..3 of a nibble is joined by its 1-bit field on either side: row half 0 at bits
// 0..2 of the nibble, row half 1 at bits 1..3. What stands beside them is removed by the mask.
template <>
struct Unpack<3> {
  static constexpr MPQ_DEVICE int shift(int t, int h) { return 4 * (t & 1) + h; }
  static MPQ_DEVICE void run(const Words& w, uint32_t (&a)[4][4]) {
    MPQ_UNROLL for (int u = 0; u < 2; ++u) {
      const uint32_t ones = u ? w.one >> 2 : w.one, twos = w.two[u];
      const uint32_t rows0 = bit_select(0x66666666u, twos << 1, ones), rows8 = bit_select(0xccccccccu, twos, ones);
      MPQ_UNROLL for (int m = 0; m < 2; ++m) {
        MPQ_UNROLL for (int v = 0; v < 2; ++v) {
          const int t = 2 * u + v;
          a[t][2 * m] = (rows0 >> (8 * m)) & both_halves(7u << shift(t, 0));
          a[t][2 * m + 1] = (rows8 >> (8 * m)) & both_halves(7u << shift(t, 1));
        }
      }
    }
  }
};

template <>
struct Unpack<4> {
  static constexpr MPQ_DEVICE int shift(int, int h) { return 4 * h; }
  static MPQ_DEVICE void run(const Words& w, uint32_t (&a)[4][4]) {
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      MPQ_UNROLL for (int m = 0; m < 2; ++m) {
        MPQ_UNROLL for (int h = 0; h < 2; ++h) a[t][2 * m + h] =
            (w.high[t] >> (8 * m)) & both_halves(15u << shift(t, h));
      }
    }
  }
};

// Widths 5, 6 and 7 have the 4-bit field above the rest in each byte: row half 0 is moved down to bit 0, row half 1
// keeps its upper nibble in place and ends where its lower bits begin.
template <int kBits>
MPQ_DEVICE void split_bytes(uint32_t rows0, uint32_t rows8, uint32_t (&a)[4]) {
  constexpr uint32_t mask = (1u << kBits) - 1;
  a[0] = rows0 & both_halves(mask);
  a[1] = rows8 & both_halves(mask << (8 - kBits));
  if constexpr (kBits == 8) {
    // Bytes 1 and 3, each below a byte of zero: one instruction in place of two.
    a[2] = dev::byte_permute(rows0, 0, 0x4341);
    a[3] = dev::byte_permute(rows8, 0, 0x4341);
  } else {
    a[2] = (rows0 >> 8) & both_halves(mask);
    a[3] = (rows8 >> 8) & both_halves(mask << (8 - kBits));
  }
}

// Moves bits up (positive) or down.
template <int kUp>
MPQ_DEVICE uint32_t move(uint32_t word) {
  if constexpr (kUp >= 0)
    return word << kUp;
  else
    return word >> -kUp;
}

template <>
struct Unpack<5> {
  static constexpr MPQ_DEVICE int shift(int, int h) { return h ? 3 : 0; }
  template <int t>
  static MPQ_DEVICE void tile(const Words& w, uint32_t (&a)[4]) {
    constexpr int bit = 4 * (t & 1) + 2 * (t >> 1);  // of row half 0 in the 1-bit plane; row half 1 is next to it
    const uint32_t rows0 = bit_select(0x1e1e1e1eu, w.high[t] << 1, move<-bit>(w.one));
    const uint32_t rows8 = bit_select(0xf0f0f0f0u, w.high[t], move<3 - (bit + 1)>(w.one));
    split_bytes<5>(rows0, rows8, a);
  }
  static MPQ_DEVICE void run(const Words& w, uint32_t (&a)[4][4]) {
    tile<0>(w, a[0]), tile<1>(w, a[1]), tile<2>(w, a[2]), tile<3>(w, a[3]);
  }
};

template <>
struct Unpack<6> {
  static constexpr MPQ_DEVICE int shift(int, int h) { return h ? 2 : 0; }
  static MPQ_DEVICE void run(const Words& w, uint32_t (&a)[4][4]) {
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      const uint32_t twos = t & 1 ? w.two[t >> 1] >> 4 : w.two[t >> 1];
      split_bytes<6>(bit_select(0x3c3c3c3cu, w.high[t] << 2, twos), bit_select(0xf0f0f0f0u, w.high[t], twos), a[t]);
    }
  }
};

template <>
struct Unpack<7> {
  static constexpr MPQ_DEVICE int shift(int, int h) { return h ? 1 : 0; }
  template <int t>
  static MPQ_DEVICE void tile(const Words& w, uint32_t (&a)[4]) {
    constexpr int two = 4 * (t & 1), one = 4 * (t & 1) + 2 * (t >> 1);
    const uint32_t low0 = bit_select(0x06060606u, move<1 - two>(w.two[t >> 1]), move<-one>(w.one));
    const uint32_t low8 = bit_select(0x0c0c0c0cu, move<-two>(w.two[t >> 1]), move<-one>(w.one));
    split_bytes<7>(bit_select(0x78787878u, w.high[t] << 3, low0), bit_select(0xf0f0f0f0u, w.high[t], low8), a);
  }
  static MPQ_DEVICE void run(const Words& w, uint32_t (&a)[4][4]) {
    tile<0>(w, a[0]), tile<1>(w, a[1]), tile<2>(w, a[2]), tile<3>(w, a[3]);
  }
};

template <>
struct Unpack<8> {
  static constexpr MPQ_DEVICE int shift(int, int) { return 0; }
  static MPQ_DEVICE void run(const Words& w, uint32_t (&a)[4][4]) {
    MPQ_UNROLL for (int t = 0; t < 4; ++t) {
      const uint32_t rows0 = bit_select(0xf0f0f0f0u, w.high[t] << 4, w.low[t]);
      const uint32_t rows8 = bit_select(0xf0f0f0f0u, w.high[t], w.low[t] >> 4);
      split_bytes<8>(rows0, rows8, a[t]);
    }
  }
};

}  // namespace mpq::cuda

// From the words of a segment's planes to codes: where a chunk's words are, merging planes, conversion to float.
//
// The lanes of a vector are (q, t) of one chunk of 16 columns and one row group g; a merged word holds four codes of a
// row, byte j = 2 e + m.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/inline.h"
#include "cpu/simd/simd.h"
#include "generated/layout.h"

namespace mpq::cpu {
namespace {

template <int J>
struct Index {
  static constexpr int value = J;
};

// body(Index<0>) ... body(Index<3>): shift counts and shuffles have to be compile-time constants.
template <typename Body>
MPQ_INLINE void for_each_of_4(Body body) {
  body(Index<0>{});
  body(Index<1>{});
  body(Index<2>{});
  body(Index<3>{});
}

// Column, inside its chunk, of place 4 * j + q.
MPQ_INLINE int column_of(int place) {
  const int j = place >> 2;
  return 8 * (j & 1) + 2 * (place & 3) + (j >> 1);
}

// The supertiles of one row tile of a segment: per plane, [col_tiles, 128 * width] words.
struct Stripe {
  const uint32_t* planes[3];
};

MPQ_INLINE int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

inline Stripe stripe_of(const Segment& segment, int64_t row_tile) {
  const int64_t col_tiles = ceil_div(segment.k1 - segment.k0, kTileK);
  Stripe stripe{};
  for (int i = 0; i < kPlaneCount[segment.bits]; ++i) {
    stripe.planes[i] = segment.planes[i] + row_tile * col_tiles * 128 * kPlaneWidth[segment.bits][i];
  }
  return stripe;
}

// Words of plane P of one chunk (16 columns), the C-th of its supertile: lanes (q, t) of the part, row group g.
template <int Bits, int P, int C>
MPQ_INLINE I load_plane(const Stripe& stripe, int64_t chunk, int g, int part) {
  constexpr int width = kPlaneWidth[Bits][P];
  const uint32_t* words = stripe.planes[P] + chunk * width / 4 * 128 + g * 16;  // 4 / width chunks share their words
  if constexpr (width == 4) return load_plane4(words, part);
  if constexpr (width == 2) return load_plane2<C>(words, part);
  if constexpr (width == 1) return load_plane1<C>(words, part);
}

// Bit of a byte where the widest plane has the codes of row half H.
template <int Bits, int H>
constexpr int natural_start() {
  constexpr int natural[9] = {0, 1, 2, 1, 4, 3, 2, 1, 0};
  return natural[Bits] * H;
}

// Bit of a byte where a merged code of row half H starts. Dirty decoders may leave it where the widest plane has it.
template <int Bits, int H>
constexpr int field_start() {
  return decodes_dirty(Bits) ? natural_start<Bits, H>() : 0;
}

// Bits of a code below those of plane P.
template <int Bits, int P>
constexpr int bits_below() {
  return (P < 1 ? kPlaneWidth[Bits][1] : 0) + (P < 2 ? kPlaneWidth[Bits][2] : 0);
}

// Plane P of the loaded words, moved so that the merged code starts at bit Start of a byte; the rest is garbage.
template <int Bits, int H, int P, int Start>
MPQ_INLINE I place_plane(I words) {
  return shift<Start + bits_below<Bits, P>() - kPlaneWidth[Bits][P] * H>(words);
}

template <int Bits, int P, int Start>
constexpr uint32_t plane_mask() {
  return 0x01010101u * (((1u << kPlaneWidth[Bits][P]) - 1) << (Start + bits_below<Bits, P>()));
}

// Lays plane P over what the lower planes have put together.
template <int Bits, int H, int P, int Start, bool Clean>
MPQ_INLINE I overlay(I low, I words) {
  const I field = place_plane<Bits, H, P, Start>(words);
  if constexpr (Clean) return insert(low, field, plane_mask<Bits, P, Start>());
  return select(low, field, plane_mask<Bits, P, Start>());
}

// Words whose bytes hold the codes of row half H at bit Start, with nothing around them if Clean.
template <int Bits, int H, int Start, bool Clean>
MPQ_INLINE I merge(const I (&words)[3]) {
  constexpr int last = kPlaneCount[Bits] - 1;
  I out = place_plane<Bits, H, last, Start>(words[last]);
  if constexpr (Clean) out = keep(out, plane_mask<Bits, last, Start>());
  if constexpr (last > 1) out = overlay<Bits, H, 1, Start, Clean>(out, words[1]);
  if constexpr (last > 0) out = overlay<Bits, H, 0, Start, Clean>(out, words[0]);
  return out;
}

// True if C does not matter to load_codes: every chunk has its own words.
template <int Bits>
constexpr bool chunks_have_words() {
  return kPlaneWidth[Bits][kPlaneCount[Bits] - 1] == 4;
}

// The words of every plane of one chunk, the C-th of its supertile.
template <int Bits, int C>
MPQ_INLINE void load_planes(const Stripe& stripe, int64_t chunk, int g, int part, I (&words)[3]) {
  words[0] = load_plane<Bits, 0, C>(stripe, chunk, g, part);
  if constexpr (kPlaneCount[Bits] > 1) words[1] = load_plane<Bits, 1, C>(stripe, chunk, g, part);
  if constexpr (kPlaneCount[Bits] > 2) words[2] = load_plane<Bits, 2, C>(stripe, chunk, g, part);
}

// out[h] = merged words of the rows 16 t + 8 h + g of one chunk, the C-th of its supertile.
template <int Bits, int C>
MPQ_INLINE void load_codes(const Stripe& stripe, int64_t chunk, int g, int part, I (&out)[2]) {
  I words[3] = {};
  load_planes<Bits, C>(stripe, chunk, g, part, words);
  out[0] = merge<Bits, 0, field_start<Bits, 0>(), !decodes_dirty(Bits)>(words);
  out[1] = merge<Bits, 1, field_start<Bits, 1>(), !decodes_dirty(Bits)>(words);
}

// The same with nothing but the code in each byte: at its natural bits if Natural, else at bit 0.
template <int Bits, int C, bool Natural>
MPQ_INLINE void load_clean_codes(const Stripe& stripe, int64_t chunk, int g, int part, I (&out)[2]) {
  I words[3] = {};
  load_planes<Bits, C>(stripe, chunk, g, part, words);
  out[0] = merge<Bits, 0, 0, true>(words);
  out[1] = merge<Bits, 1, Natural ? natural_start<Bits, 1>() : 0, true>(words);
}

// The codes of byte J, as floats.
template <int Bits, int H, int J>
MPQ_INLINE F code_floats(I merged) {
  return to_float<Bits, 8 * J + field_start<Bits, H>()>(merged);
}

}  // namespace
}  // namespace mpq::cpu

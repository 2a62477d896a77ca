// Where the segments of a weight lie in its tensors (docs/format.md, sections 3 to 5).
#pragma once

#include <cstdint>

#include "generated/layout.h"
#include "include/mpq.h"

namespace mpq {

inline int64_t tiles(int64_t extent, int64_t tile) { return (extent + tile - 1) / tile; }

// Whether a segment has a meaning in a weight [N, K], so that what follows may be counted. N, K: below 2^31.
inline bool fits(const mpq_segment& s, int64_t N, int64_t K) {
  const bool place = 0 <= s.n0 && s.n0 < s.n1 && s.n1 <= N && 0 <= s.k0 && s.k0 < s.k1 && s.k1 <= K;
  return place && s.k0 % kTileK == 0 && 1 <= s.bits && s.bits <= 8 && s.group_size > 0 &&
         (s.k1 - s.k0) % s.group_size == 0 && is_zero_kind(s.zero);
}

inline int64_t plane_words(const mpq_segment& s, int plane) {
  return tiles(s.n1 - s.n0, kTileN) * tiles(s.k1 - s.k0, kTileK) * 128 * kPlaneWidth[s.bits][plane];
}

inline int64_t scale_count(const mpq_segment& s) {
  return (s.k1 - s.k0) / s.group_size * tiles(s.n1 - s.n0, kTileN) * kTileN;
}

// Elements of the segments so far: first of all those of the next one.
struct Places {
  int64_t words = 0, scales = 0, zeros = 0;

  void add(const mpq_segment& s) {
    for (int p = 0; p < kPlaneCount[s.bits]; ++p) words += plane_words(s, p);
    scales += scale_count(s);
    if (stores_zeros(s.zero)) zeros += scale_count(s);
  }
};

}  // namespace mpq

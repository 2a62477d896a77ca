// Rows of W by number, for token embeddings: the values of dequantize.cu, without the other rows.

#include "fp32_weights.cuh"
#include "launch.h"
#include "ring.cuh"

namespace mpq::cuda {

namespace {

constexpr int kThreads = 128;
constexpr uint32_t kMaxGridY = 65535;

// Row n and column k of a supertile, in the coordinates of docs/format.md.
struct Cell {
  uint32_t t, h, g, c, m, q, e, lane;

  MPQ_DEVICE Cell(uint32_t n, uint32_t k)
      : t(n >> 4), h(n >> 3 & 1), g(n & 7), c(k >> 4), m(k >> 3 & 1), q(k >> 1 & 3), e(k & 1), lane(4 * g + q) {}
};

// One code: a field of one word of every plane.
template <int kBits>
MPQ_DEVICE uint32_t load_code(const LinearParams& p, const Segment& s, uint64_t tile, const Cell& at) {
  constexpr bool kFour = kBits >= 4, kTwo = kBits == 2 || kBits == 3 || kBits == 6 || kBits == 7, kOne = kBits & 1;
  const uint32_t* words = static_cast<const uint32_t*>(p.qweight);
  const uint32_t shift = 16 * at.e + 8 * at.m;
  uint32_t code = 0;
  if constexpr (kFour) {
    const uint64_t word = tile * 512 + (at.c * 32 + at.lane) * 4 + at.t;
    code = dev::ld_constant(words + uint64_t{s.planes[0]} * 4 + word) >> (shift + 4 * at.h) & 15;
    if constexpr (kBits == 8)
      code = code << 4 | (dev::ld_constant(words + uint64_t{s.planes[1]} * 4 + word) >> (shift + 4 * at.h) & 15);
  }
  if constexpr (kTwo) {
    const uint64_t word = tile * 256 + ((at.c >> 1) * 32 + at.lane) * 4 + (at.c & 1) * 2 + (at.t >> 1);
    const uint32_t place = shift + 4 * (at.t & 1) + 2 * at.h;
    code = code << 2 | (dev::ld_constant(words + uint64_t{s.planes[kFour]} * 4 + word) >> place & 3);
  }
  if constexpr (kOne) {
    const uint64_t word = tile * 128 + at.lane * 4 + at.c;
    const uint32_t place = shift + 4 * (at.t & 1) + 2 * (at.t >> 1) + at.h;
    code = code << 1 | (dev::ld_constant(words + uint64_t{s.planes[kFour + kTwo]} * 4 + word) >> place & 1);
  }
  return code;
}

MPQ_DEVICE float load_scalar(const void* from, uint64_t index, int dtype) {
  if (dtype == kDtypeF32) return dev::ld_constant(static_cast<const float*>(from) + index);
  const uint16_t bits = dev::ld_constant(static_cast<const uint16_t*>(from) + index);
  return dtype == kDtypeF16 ? dev::f16_to_float(bits) : dev::bf16_to_float(bits);
}

template <int kBits>
MPQ_DEVICE float load_zero(const LinearParams& p, const Segment& s, uint64_t place) {
  const int kind = zero_kind_of(s);
  if (kind == kZeroInt) return float(dev::ld_constant(static_cast<const uint8_t*>(p.zeros) + place));
  return zeros_like_scales(kind) ? load_scalar(p.zeros, place, p.scale_dtype) : fixed_zero<kBits>(kind);
}

// Row `row` of a band, column `column` of the weight, in the packed order.
MPQ_DEVICE float load_weight(const LinearParams& p, const Segment& s, uint32_t row, int column) {
  const uint32_t row_tile = row / kTileN, tile = uint32_t(column / kTileK - s.tile0);
  const Cell at(row % kTileN, uint32_t(column) % kTileK);
  const uint32_t group = s.groups == 1 ? 0 : uint32_t((column - s.tile0 * kTileK) / s.group_size);
  const uint64_t block = scale_block(s, row_tile, group);
  const uint32_t position = 8 * at.g + 4 * at.h + at.t;
  const float scale = load_scalar(p.scales, (s.scales + block) * kTileN + position, p.scale_dtype);
  float v = 0;
  switch_bits(bits_of(s), [&]<int kBits>() {
    const uint32_t code = load_code<kBits>(p, s, uint64_t{row_tile} * uint32_t(s.tiles) + tile, at);
    const float zero = load_zero<kBits>(p, s, (s.zeros + block) * kTileN + position);
    v = weight_of(float(code), scale, zero, zero_kind_of(s));
  });
  return v;
}

MPQ_DEVICE void store_value(const EmbeddingParams& p, int64_t place, float v) {
  if (p.out_dtype == kDtypeF32)
    dev::st_global(static_cast<float*>(p.out) + place, v);
  else
    dev::st_global(static_cast<uint16_t*>(p.out) + place,
                   p.out_dtype == kDtypeF16 ? dev::float_to_f16(v) : dev::float_to_bf16(v));
}

// Block (i, j): the i-th id, the j-th strip of columns and every grid_y-th after it; a thread takes one column.
MPQ_KERNEL(kThreads)
embedding_kernel(const MPQ_GRID_CONSTANT EmbeddingParams p) {
  const LinearParams& w = p.linear;
  dev::wait_for_earlier_kernels();
  const int64_t id = dev::ld_global(p.ids + dev::block_x());
  if (id < 0 || id >= p.rows) dev::trap("an id is outside of the rows of the weight");
  Band band{};
  int index = 0;
  for (; index < w.num_bands; ++index) {
    band = load_band(w, index);
    if (id >= band.n0 && id < int64_t{band.n0} + band.rows) break;
  }
  if (index == w.num_bands) return;  // in another launch
  const int end = index + 1 < w.num_bands ? load_band(w, index + 1).first_segment : w.num_segments;
  for (int64_t column = int64_t{dev::block_y()} * kThreads + dev::thread_index(); column < w.in.columns;
       column += int64_t{dev::grid_y()} * kThreads) {
    const int tile = int(column / kTileK);
    for (int i = band.first_segment; i < end; ++i) {  // a column in none of them is in another launch
      const Segment s = load_segment(w, i);
      if (tile < s.tile0 || tile >= s.tile0 + s.tiles) continue;
      const int place = w.in.perm ? dev::ld_constant(w.in.perm + column) : int(column);
      store_value(p, int64_t{dev::block_x()} * w.in.columns + place,
                  load_weight(w, s, uint32_t(id - band.n0), int(column)));
    }
  }
}

}  // namespace

int launch_embedding(dev::Launch how, const EmbeddingParams& params) {
  const int64_t strips = (int64_t{params.linear.in.columns} + kThreads - 1) / kThreads;
  how.threads = kThreads;
  how.grid_y = strips < kMaxGridY ? uint32_t(strips) : kMaxGridY;
  return dev::launch(embedding_kernel, how, params);
}

int warmup_embedding() { return dev::load(embedding_kernel); }

}  // namespace mpq::cuda

// Rows of W by number. Only the words of the wanted rows are read: 4 words of 32 in every plane and chunk, so portable
// code is as fast as memory lets it be, and there is no need of one for each instruction set.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/shared/convert.inl"
#include "generated/layout.h"

namespace mpq::cpu {

namespace {

struct EmbeddingJob {
  const Weight* weight;
  std::vector<int> bands;  // first segment of each row band
  const int64_t* ids;
  char* out;
  DType dtype;
};

// Where the codes of one row lie: row 16 t + 8 h + g of its supertile.
struct RowPlace {
  int t, h, g;

  explicit RowPlace(int64_t row) : t(static_cast<int>(row >> 4)), h(row >> 3 & 1), g(row & 7) {}

  // Word of a plane of this width with columns 16 c + 2 q, + 1, + 8, + 9, and the lowest bit of the row's fields there.
  int word(int width, int c, int q) const {
    const int lane = 4 * g + q;
    if (width == 4) return (c * 32 + lane) * 4 + t;
    if (width == 2) return ((c >> 1) * 32 + lane) * 4 + (c & 1) * 2 + (t >> 1);
    return lane * 4 + c;
  }
  int bit(int width) const {
    if (width == 4) return 4 * h;
    return width == 2 ? 4 * (t & 1) + 2 * h : 4 * (t & 1) + 2 * (t >> 1) + h;
  }
};

// codes[64] of one row of supertile `tile` of a segment.
void load_row_codes(const Segment& s, int64_t tile, const RowPlace& place, uint32_t* codes) {
  for (int k = 0; k < 64; ++k) codes[k] = 0;
  for (int p = 0; p < kPlaneCount[s.bits]; ++p) {
    const int width = kPlaneWidth[s.bits][p];
    const uint32_t* words = s.planes[p] + tile * 128 * width;
    const uint32_t mask = (1u << width) - 1;
    for (int c = 0; c < 4; ++c) {
      for (int q = 0; q < 4; ++q) {
        const uint32_t word = load_word(words + place.word(width, c, q)) >> place.bit(width);
        uint32_t* to = codes + 16 * c + 2 * q;
        to[0] = to[0] << width | (word & mask);
        to[8] = to[8] << width | (word >> 8 & mask);
        to[1] = to[1] << width | (word >> 16 & mask);
        to[9] = to[9] << width | (word >> 24 & mask);
      }
    }
  }
}

float load_scalar(const void* from, int64_t index, DType dtype) {
  const char* at = bytes_at(from, index * dtype_bytes(dtype));
  if (dtype == DType::kF32) {
    float value;
    __builtin_memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t bits;
  __builtin_memcpy(&bits, at, sizeof bits);
  return dtype == DType::kF16 ? from_f16(bits) : float_of(uint32_t{bits} << 16);
}

float load_zero(const Segment& s, int64_t index, DType scale_dtype) {
  if (!stores_zeros(s.zero_kind)) return kFixedZero[s.zero_kind][s.bits];
  if (s.zero_kind == kZeroInt) return static_cast<float>(static_cast<const uint8_t*>(s.zeros)[index]);
  return load_scalar(s.zeros, index, scale_dtype);
}

// Row `row` of a segment, counted from its first, to a row of K values.
void write_row(const EmbeddingJob& job, const Segment& s, int64_t row, char* out) {
  const Weight& weight = *job.weight;
  const int64_t groups = (s.k1 - s.k0) / s.group_size, col_tiles = ceil_div(s.k1 - s.k0, kTileK);
  const int64_t row_tile = row / kTileN;
  const RowPlace place(row % kTileN);
  const int64_t first_scale = row_tile * groups * kTileN + kRowPosition[row % kTileN];
  for (int64_t tile = 0; tile < col_tiles; ++tile) {
    const int64_t first = tile * kTileK, count = std::min<int64_t>(s.k1 - s.k0 - first, kTileK);
    uint32_t codes[64];
    load_row_codes(s, row_tile * col_tiles + tile, place, codes);
    alignas(64) float values[64] = {};
    for (int64_t k = 0; k < count;) {
      const int64_t group = (first + k) / s.group_size;
      const int64_t end = std::min<int64_t>((group + 1) * s.group_size - first, count);
      const int64_t index = first_scale + group * kTileN;
      const float scale = load_scalar(s.scales, index, weight.scale_dtype),
                  zero = load_zero(s, index, weight.scale_dtype);
      // + 0: -0 becomes +0, as everywhere.
      if (s.zero_kind == kZeroMin) {
        for (; k < end; ++k) values[k] = static_cast<float>(codes[k]) * scale + zero + 0.0f;
      } else {
        for (; k < end; ++k) values[k] = (static_cast<float>(codes[k]) - zero) * scale + 0.0f;
      }
    }
    write_columns(weight.perm, s.k0 + first, count, values, job.dtype, out);
  }
}

void embedding_items(void* ctx, int64_t begin, int64_t end) {
  const EmbeddingJob& job = *static_cast<const EmbeddingJob*>(ctx);
  const Weight& weight = *job.weight;
  const int64_t row_bytes = weight.K * dtype_bytes(job.dtype);
  for (int64_t i = begin; i < end; ++i) {
    const auto after = std::upper_bound(job.bands.begin(), job.bands.end(), job.ids[i],
                                        [&](int64_t id, int first) { return id < weight.segments[first].n0; });
    const int first = *(after - 1), last = after == job.bands.end() ? weight.num_segments : *after;
    for (int j = first; j < last; ++j) {
      write_row(job, weight.segments[j], job.ids[i] - weight.segments[j].n0, job.out + i * row_bytes);
    }
  }
}

}  // namespace

void embedding_rows(const Weight& weight, const int64_t* ids, int64_t count, void* out, DType out_dtype,
                    const Parallel& parallel) {
  EmbeddingJob job{&weight, {}, ids, static_cast<char*>(out), out_dtype};
  for (int i = 0; i < weight.num_segments; ++i) {
    if (i == 0 || weight.segments[i].n0 != weight.segments[i - 1].n0) job.bands.push_back(i);
  }
  if (parallel.run) return parallel.run(parallel.pool, count, embedding_items, &job);
  embedding_items(&job, 0, count);
}

}  // namespace mpq::cpu

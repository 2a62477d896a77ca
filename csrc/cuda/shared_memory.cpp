#include "shared_memory.h"

#include <algorithm>

#include "generated/layout.h"
#include "segments.h"

namespace mpq::cuda {

namespace {

constexpr int kLanes = 32;
constexpr int kRowsOfSums = 68;  // floats between two tokens of reduced rows: no bank conflicts

uint32_t round_up(uint32_t value, uint32_t unit) { return (value + unit - 1) / unit * unit; }

// Shared memory of one unit: codes, then 32 copies (one a lane) of 8 scales and 8 zeros for each flush.
uint32_t unit_bytes(const mpq_segment& s, int max_unit, int scale_dtype) {
  const int log2 = log2_unit(s, max_unit), unit = 1 << log2;
  const uint32_t flushes = (sub_tile(s) ? 4u : uint32_t(unit)) >> log2_flush(s, log2);
  const uint32_t scale = kScaleBytes[scale_dtype], zero = uint32_t(zero_bytes(s.zero, scale));
  return uint32_t(unit) * 512 * s.bits + flushes * kLanes * 8 * (scale + zero);
}

}  // namespace

bool map_shared(const mpq_linear_args& args, const mpq_device& device, const Shape& shape, int max_unit,
                LinearParams& params) {
  const mpq_weight& w = args.weight;
  SharedMap& m = params.shared;
  m.stage_bytes = 0;
  for (int i = 0; i < w.num_segments; ++i)
    m.stage_bytes = std::max(m.stage_bytes, unit_bytes(w.segments[i], max_unit, w.scale_dtype));
  m.descriptors = 0;
  m.flag = round_up(shape.warps * kStages * 16, 128);
  m.ring = m.flag + 128;
  m.panel = m.ring + shape.warps * kStages * m.stage_bytes;
  const int tokens = int(std::min<int64_t>(args.tokens, shape.token_tiles * 8));
  const uint32_t reduced = shape.warps * 8 * kRowsOfSums * sizeof(float);
  const uint32_t sums = uint32_t(shape.token_tiles) * 8 * sizeof(float) * (params.in.chunk_sums ? 5 : 1);
  const int64_t limit = device.shared_bytes;
  for (int tiles = std::min<int>(params.k_tiles, 4096);; tiles = tiles / 2) {
    const uint32_t loaded = uint32_t(tiles + kMaxUnit - 1);
    m.panel_tiles = tiles;
    m.panel_stride = loaded * kTileK * 2 + 16;
    const uint32_t panel = round_up(std::max(uint32_t(tokens) * m.panel_stride, reduced), 128);
    m.tile_sums = m.panel + panel;
    m.chunk_sums = m.tile_sums + loaded * uint32_t(shape.token_tiles) * 8 * sizeof(float);
    m.total = m.tile_sums + loaded * sums;
    if (int64_t{m.total} <= limit) return true;
    if (tiles < 2) return false;
  }
}

bool map_decode(const mpq_linear_args& args, const mpq_device& device, const Shape& shape, int tiles, int side,
                LinearParams& params) {
  const mpq_weight& w = args.weight;
  SharedMap& m = params.shared;
  uint32_t codes = 0;
  m = {};
  for (int i = 0; i < w.num_segments; ++i) {
    const mpq_segment& s = w.segments[i];
    const uint32_t slots = uint32_t(slots_of(s.bits, pairs(s))), scale = kScaleBytes[w.scale_dtype];
    const uint32_t of_group = kTileN * (scale + uint32_t(zero_bytes(s.zero, scale)));
    const uint32_t groups = sub_tile(s) ? uint32_t(kTileK / s.group_size) : 1;
    codes = std::max(codes, slots * 512 * uint32_t(s.bits) << pairs(s));
    m.scale_bytes = std::max(m.scale_bytes, groups * of_group * (slots + uint32_t(side)));
  }
  m.stage_bytes = m.scale_bytes + codes;
  m.zero_row = 0;
  m.flag = 256;
  m.ring = 384;
  // A warp's sums lie where its weights were.
  m.stage_bytes = std::max(m.stage_bytes, kLanes * 16 * uint32_t(side > 1 ? 1 : 4 * shape.token_tiles));
  m.panel = m.ring + round_up(shape.warps * m.stage_bytes, 128);
  const int most = tiles;
  for (;; tiles = (tiles / 2 + 1) & -2) {
    m.panel_tiles = tiles;
    m.panel_stride = uint32_t(tiles + (tiles < most)) * kTileK * 2 + 16;
    m.total = m.panel + round_up(uint32_t(args.tokens) * m.panel_stride, 128);
    if (int64_t{m.total} <= device.shared_bytes) return true;
    if (tiles <= 2) return false;
  }
}

}  // namespace mpq::cuda

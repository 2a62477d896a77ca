#include <algorithm>

#include "generated/layout.h"
#include "segments.h"
#include "wide.h"

namespace mpq::cuda {

namespace {

uint32_t round_up(uint32_t value, uint32_t unit) { return (value + unit - 1) / unit * unit; }

constexpr int kMostLog2Units = 2;

// The shape of a block. Long steps before short ones: copying and waiting cost each step the same.
struct Choice {
  int row_tiles, phases, unit, log2_units;
};

void fill(const mpq_linear_args& args, const LinearParams& params, const Choice& choice, WideMap& map) {
  const mpq_weight& w = args.weight;
  map = {};
  map.row_tiles = choice.row_tiles;
  map.phases = choice.phases;
  map.log2_units = choice.log2_units;
  uint32_t tiles = 1;
  for (int i = 0; i < w.num_segments; ++i) {
    const mpq_segment& s = w.segments[i];
    const int log2 = log2_unit(s, choice.unit), unit = 1 << log2;
    const uint32_t flushes = ((sub_tile(s) ? 4u : uint32_t(unit)) >> log2_flush(s, log2)) << choice.log2_units;
    const uint32_t scale = kScaleBytes[w.scale_dtype], zero = uint32_t(zero_bytes(s.zero, scale));
    tiles = std::max(tiles, uint32_t(choice.phases * unit) << choice.log2_units);
    map.codes_pitch = std::max(map.codes_pitch, (uint32_t(choice.phases * unit) << choice.log2_units) * 512 * s.bits);
    map.scales_pitch = std::max(map.scales_pitch, flushes * kTileN * (scale + zero));
  }
  const uint32_t tokens = uint32_t(tokens_of_block(map)), rows = uint32_t(choice.row_tiles);
  // 1024 bytes are a tile of 8 tokens: the order of the pieces of x repeats after them.
  map.x = round_up(rows * (map.codes_pitch + uint32_t(choice.phases) * map.scales_pitch), 1024);
  map.sums = map.x + tiles * tokens * (2 * kTileK);
  map.sums_pitch = tokens * sizeof(float) * (params.in.chunk_sums ? 5 : 1);
  map.stage_bytes = round_up(map.sums + tiles * map.sums_pitch, 1024);
  map.scratch = kWideStages * map.stage_bytes;
  map.flag = map.scratch + 2 * rows * 8 * kSumsStride * uint32_t(sizeof(float));
  map.total = map.flag + 16;
}

}  // namespace

bool map_wide(const mpq_linear_args& args, const mpq_device& device, const LinearParams& params, WideMap& map,
              int& max_unit) {
  const int most_rows = 1 << params.log2_group_rows, most_phases = args.tokens <= kWarpTokens ? 2 : 1;
  for (int phases = most_phases; phases >= 1; --phases) {
    for (int unit = kWideUnit; unit >= 1; unit /= 2) {
      max_unit = unit;
      for (int log2_units = kMostLog2Units; log2_units >= 0; --log2_units) {
        if (phases * unit << log2_units > kStepTiles) continue;
        fill(args, params, {most_rows, phases, unit, log2_units}, map);
        if (int64_t{map.total} <= device.shared_bytes) return true;
      }
    }
  }
  return false;
}

}  // namespace mpq::cuda

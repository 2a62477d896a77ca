#include "work_list.h"

#include <algorithm>

#include "cut_work.h"
#include "generated/layout.h"
#include "segments.h"

namespace mpq::cuda {

namespace {

// Blocks that a launch has for one block of tokens.
uint32_t blocks_of(const mpq_linear_args& args, const Shape& shape, uint32_t multiprocessors) {
  const uint32_t token_blocks = uint32_t(std::max<int64_t>(ceil_div(args.tokens, 8 * shape.token_tiles), 1));
  return std::clamp(multiprocessors / token_blocks, 1u, uint32_t{kMaxBlocks});
}

Shape choose_shape(const mpq_linear_args& args, uint32_t multiprocessors, bool wide) {
  struct Row {
    int64_t max_tokens;
    Shape shape;
  };
  // Group rows: x is read once for each row group, partial sums are written once for each; for few tokens the second
  // weighs more. Warps: as many as their registers allow, because at 2 bits two thirds of all issue slots are in use.
  // Computed, not measured.
  static constexpr Row kShapes[] = {{4, {1, 0, 12}}, {8, {1, 1, 12}}, {16, {2, 2, 8}}, {INT64_MAX, {4, 2, 8}}};
  // Tokens of a block: one warp of each row tile for 32, two for 64, or both for 32 and half of K each.
  static constexpr Row kWideShapes[] = {{kWarpTokens, {4, 2, 8}}, {INT64_MAX, {8, 2, 8}}};
  const Row* row = wide ? kWideShapes : kShapes;
  while (args.tokens > row->max_tokens) ++row;
  Shape shape = row->shape;
  int64_t most_tiles = 1;
  for (int i = 0; i < args.weight.num_segments; ++i)
    most_tiles = std::max(most_tiles, ceil_div(args.weight.segments[i].n1 - args.weight.segments[i].n0, kTileN));
  while (shape.log2_group_rows > 0 && (1 << (shape.log2_group_rows - 1)) >= most_tiles) --shape.log2_group_rows;
  shape.log2_group_rows =
      log2_rows_for_one_part(args.weight, shape.log2_group_rows, 2, blocks_of(args, shape, multiprocessors));
  return shape;
}

}  // namespace

bool TableReader::next(Segment& segment, Band& band) {
  const int i = index_++;
  const mpq_segment& s = weight_.segments[i];
  const bool begins = i == 0 || !same_band(weight_, i - 1, i);
  const int64_t row_tiles = ceil_div(s.n1 - s.n0, kTileN), tiles = ceil_div(s.k1 - s.k0, kTileK);
  if (begins) {
    band = {int32_t(s.n0), int32_t(s.n1 - s.n0), int32_t(row_tiles), groups_, i};
    groups_ += int(ceil_div(row_tiles, int64_t{1} << log2_group_rows_));
  }
  segment = {};
  for (int p = 0; p < kPlaneCount[s.bits]; ++p) {
    segment.planes[p] = uint32_t(pieces_);
    pieces_ += uint64_t(row_tiles * tiles * 32 * kPlaneWidth[s.bits][p]);
  }
  segment.groups = int32_t((s.k1 - s.k0) / s.group_size);
  segment.group_size = int32_t(s.group_size);
  segment.scales = uint32_t(scales_);
  segment.zeros = uint32_t(zeros_);
  scales_ += uint64_t(segment.groups * row_tiles);
  if (stores_zeros(s.zero)) zeros_ += uint64_t(segment.groups * row_tiles);
  segment.tile0 = int32_t(s.k0 / kTileK);
  segment.tiles = int32_t(tiles);
  segment.groups_per_tile = single_group(s) ? 0.0f : float(kTileK) / float(s.group_size);
  const int log2 = log2_unit(s, max_unit_);
  segment.shape = uint32_t(s.bits) << shape::kBits | uint32_t(s.zero) << shape::kZeroKind |
                  uint32_t(sub_tile(s)) << shape::kSubTile | uint32_t(log2) << shape::kLog2Unit |
                  uint32_t(log2_flush(s, log2)) << shape::kLog2Flush;
  return begins;
}

int prepare_linear(const mpq_linear_args& args, const mpq_device& device, LinearLaunch& launch, LinearParams& params,
                   bool experts) {
  const mpq_weight& w = args.weight;
  launch = {};
  params.in = {args.x, args.x_gate, w.perm, args.x_row_stride, int32_t(args.tokens), int32_t(w.in_features), 0, 0};
  const auto whole = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  params.in.vector_loads = !w.perm && whole(args.x) && whole(args.x_gate) && args.x_row_stride % 8 == 0;
  params.out = {args.y, args.bias, args.y_row_stride, args.bias_dtype};
  params.qweight = w.qweight;
  params.scales = w.scales;
  params.zeros = w.zeros;
  params.scale_dtype = w.scale_dtype;
  params.k_tiles = int32_t(ceil_div(w.in_features, kTileK));
  int num_bands = 0;
  uint32_t row_tiles = 0;
  for (int i = 0; i < w.num_segments; ++i) {
    const mpq_segment& s = w.segments[i];
    if (i == 0 || !same_band(w, i - 1, i)) ++num_bands, row_tiles += uint32_t(ceil_div(s.n1 - s.n0, kTileN));
    launch.generic |= !tensor_core_group(s);
    params.in.chunk_sums |= s.group_size % kTileK != 0 && !single_group(s);
  }
  params.num_bands = num_bands;
  params.num_segments = w.num_segments;
  launch.wide = args.tokens > kMostNarrowTokens && !launch.generic && !experts;
  Shape shape = choose_shape(args, uint32_t(device.multiprocessors), launch.wide);
  if (launch.generic) shape.log2_group_rows = 0;
  params.log2_group_rows = shape.log2_group_rows;
  int max_unit = kMaxUnit;
  while (launch.wide && !map_wide(args, device, params, launch.map, max_unit)) {
    if (shape.log2_group_rows == 0) return MPQ_ERROR_DEVICE;
    params.log2_group_rows = --shape.log2_group_rows;
  }
  if (launch.wide) {
    shape.warps = threads_of_block(launch.map) / 32;
    shape.token_tiles = tokens_of_block(launch.map) / 8;
  }
  // Where shared memory is short: shorter units first, fewer warps then, as many for each row tile of a group.
  const uint32_t row_tiles_of_group = 1u << shape.log2_group_rows;
  while (!launch.generic && !launch.wide && !map_shared(args, device, shape, max_unit, params)) {
    if (max_unit > 1)
      max_unit /= 2;
    else if (shape.warps > row_tiles_of_group)
      shape.warps = std::max(shape.warps / 2 / row_tiles_of_group, 1u) * row_tiles_of_group, max_unit = kMaxUnit;
    else
      return MPQ_ERROR_DEVICE;
  }
  launch.shape = shape;
  launch.max_unit = max_unit;
  launch.grid_y = uint32_t(ceil_div(args.tokens, 8 * shape.token_tiles));
  bool split = false;
  if (launch.generic) {
    launch.grid_x = row_tiles;
    launch.grid_y = uint32_t(args.tokens);
  } else {
    const uint32_t blocks = blocks_of(args, shape, uint32_t(device.multiprocessors));
    launch.grid_x = cut_work(w, shape.log2_group_rows, max_unit, blocks, params, split);
  }
  size_t bytes = 0;
  params.bands = nullptr;
  params.segments = nullptr;
  if (num_bands > kInlineBands || w.num_segments > kInlineSegments) {
    launch.table = true;
    bytes = (num_bands * sizeof(Band) + w.num_segments * sizeof(Segment) + 15) / 16 * 16;
  } else {
    TableReader reader(w, max_unit, shape.log2_group_rows);
    Band band{};
    for (int i = 0, b = 0; reader.more(); ++i)
      if (reader.next(params.inline_segments[i], band)) params.inline_bands[b++] = band;
  }
  launch.partials_offset = bytes;
  if (split)
    bytes += size_t{launch.grid_x} * launch.grid_y * 2 * (8 * shape.token_tiles) * (kTileN << shape.log2_group_rows) *
             sizeof(float);
  if (launch.wide) {
    const size_t tiles = size_t{launch.grid_y} * uint32_t(params.k_tiles);
    launch.x_offset = bytes;
    launch.sums_offset = launch.x_offset + tiles * uint32_t(tokens_of_block(launch.map)) * (2 * kTileK);
    bytes = launch.sums_offset + tiles * launch.map.sums_pitch;
  }
  launch.workspace_bytes = bytes;
  return MPQ_OK;
}

}  // namespace mpq::cuda

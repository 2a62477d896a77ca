#include "plan.h"

#include <algorithm>
#include <climits>

#include "generated/layout.h"

namespace mpq::cuda {

namespace {

constexpr int kLanes = 32;
constexpr int kScaleBytes[3] = {4, 2, 2};  // by mpq_dtype
constexpr int kRowsOfSums = 68;            // floats between two tokens of reduced rows: no bank conflicts
constexpr uint32_t kUnitCodeBytes = 4096;  // a unit's codes: two 4-bit tiles, one 8-bit tile

uint32_t round_up(uint32_t value, uint32_t unit) { return (value + unit - 1) / unit * unit; }

bool single_group(const mpq_segment& s) { return s.group_size == s.k1 - s.k0; }

// Tiles of a unit, as a power of two: no more than the codes' bytes allow, and in step with the groups of scales.
int log2_unit(const mpq_segment& s, int max_unit) {
  int log2 = 0;
  for (int unit = 2; unit <= max_unit; unit *= 2) {
    const int64_t columns = int64_t{unit} * kTileK;
    const bool fits = uint32_t(unit) * 512 * s.bits <= kUnitCodeBytes;
    const bool whole = s.group_size % kTileK == 0 && (s.group_size % columns == 0 || columns % s.group_size == 0);
    if (!fits || !(whole || single_group(s))) break;
    ++log2;
  }
  return log2;
}

// Tiles, or chunks of a tile, that share scales inside a unit, as a power of two.
int log2_flush(const mpq_segment& s, int log2_unit) {
  if (single_group(s)) return log2_unit;
  if (s.group_size % kTileK) return s.group_size / 32;  // 16 -> 0, 32 -> 1
  int log2 = 0;
  while (log2 < log2_unit && s.group_size % (int64_t{kTileK} << (log2 + 1)) == 0) ++log2;
  return log2;
}

bool sub_tile(const mpq_segment& s) { return !single_group(s) && s.group_size % kTileK != 0; }

// Shared memory of one unit: codes, then 32 copies (one a lane) of 8 scales and 8 zeros for each flush.
uint32_t unit_bytes(const mpq_segment& s, int max_unit, int scale_dtype) {
  const int log2 = log2_unit(s, max_unit), unit = 1 << log2;
  const uint32_t flushes = (sub_tile(s) ? 4u : uint32_t(unit)) >> log2_flush(s, log2);
  const uint32_t scale = kLanes * 8 * kScaleBytes[scale_dtype];
  const uint32_t zero = s.zero == MPQ_ZERO_INT ? kLanes * 8 : s.zero == MPQ_ZERO_FLOAT ? scale : 0;
  return uint32_t(unit) * 512 * s.bits + flushes * (scale + zero);
}

// Bytes read for one tile: what the work is balanced by.
int64_t tile_cost(const mpq_segment& s, int scale_dtype) {
  const int64_t zero = s.zero == MPQ_ZERO_INT ? 1 : s.zero == MPQ_ZERO_FLOAT ? kScaleBytes[scale_dtype] : 0;
  return 512 * s.bits + kTileN * kTileK * (kScaleBytes[scale_dtype] + zero) / s.group_size;
}

bool same_band(const mpq_weight& w, int a, int b) { return b < w.num_segments && w.segments[a].n0 == w.segments[b].n0; }

// Walks the row groups in order and says where a share of all bytes ends.
class Cutter {
 public:
  Cutter(const mpq_linear_args& args, int max_unit, int log2_group_rows)
      : w_(args.weight), max_unit_(max_unit), group_rows_(1 << log2_group_rows) {
    for (int i = 0; i < w_.num_segments; i = next_) {
      enter(i);
      total_ += row_tiles_ * row_cost_;
    }
    enter(0);
  }
  int64_t total() const { return total_; }

  // Costs must not decrease from call to call.
  Cut at(int64_t cost) {
    while (cost >= begin_ + row_tiles_ * row_cost_) {
      if (next_ >= w_.num_segments) return {uint32_t(first_group_ + groups()), 0, 0, 0};
      begin_ += row_tiles_ * row_cost_;
      first_group_ += groups();
      enter(next_);
    }
    const int64_t group = (cost - begin_) / (group_rows_ * row_cost_);
    int64_t rest = cost - begin_ - group * group_rows_ * row_cost_;
    const int64_t rows = std::min<int64_t>(group_rows_, row_tiles_ - group * group_rows_);
    for (int i = first_; i < next_; ++i) {
      const mpq_segment& s = w_.segments[i];
      const int64_t tiles = ceil_div(s.k1 - s.k0, kTileK), cost_of_tile = rows * tile_cost(s, w_.scale_dtype);
      if (rest >= tiles * cost_of_tile) {
        rest -= tiles * cost_of_tile;
        continue;
      }
      const int64_t tile = (rest / cost_of_tile) >> log2_unit(s, max_unit_) << log2_unit(s, max_unit_);
      return {uint32_t(first_group_ + group), uint32_t(s.k0 / kTileK + tile), 0, 0};
    }
    return {uint32_t(first_group_ + group + 1), 0, 0, 0};
  }

 private:
  int64_t groups() const { return ceil_div(row_tiles_, group_rows_); }
  void enter(int segment) {
    first_ = segment;
    row_cost_ = 0;
    for (next_ = segment; next_ == segment || same_band(w_, segment, next_); ++next_) {
      const mpq_segment& s = w_.segments[next_];
      row_cost_ += ceil_div(s.k1 - s.k0, kTileK) * tile_cost(s, w_.scale_dtype);
    }
    row_tiles_ = ceil_div(w_.segments[segment].n1 - w_.segments[segment].n0, kTileN);
  }

  const mpq_weight& w_;
  int max_unit_, group_rows_;
  int first_ = 0, next_ = 0;
  int64_t row_cost_ = 0, row_tiles_ = 0, begin_ = 0, first_group_ = 0, total_ = 0;
};

// Fills params.cuts for at most `blocks` blocks of equal bytes; returns how many have work, and whether any row group
// is shared.
uint32_t cut_work(const mpq_linear_args& args, const Shape& shape, int max_unit, uint32_t blocks, LinearParams& params,
                  bool& split) {
  Cutter cutter(args, max_unit, shape.log2_group_rows);
  Cut* cuts = params.cuts;
  uint32_t used = 0;
  for (uint32_t i = 0; i <= blocks; ++i) {
    // total * i may pass 2^63 for weights of petabytes only.
    const Cut cut = cutter.at(i == blocks ? cutter.total() : cutter.total() * i / blocks);
    if (i && cut.group == cuts[used].group && cut.tile == cuts[used].tile) continue;
    used = i ? used + 1 : 0;
    cuts[used] = cut;
  }
  split = false;
  for (uint32_t i = 1; i < used; ++i) {
    if (cuts[i].tile == 0) continue;
    split = true;
    const bool same = cuts[i - 1].group == cuts[i].group && cuts[i - 1].tile != 0;
    cuts[i].first = same ? cuts[i - 1].first : uint16_t(i - 1);
  }
  for (uint32_t i = used; i-- > 1;) {
    if (cuts[i].tile == 0) continue;
    const bool same = cuts[i + 1].group == cuts[i].group && i + 1 < used;
    cuts[i].last = same ? cuts[i + 1].last : uint16_t(i);
  }
  return used;
}

Shape choose_shape(const mpq_linear_args& args, const mpq_device& device) {
  struct Row {
    int64_t max_tokens;
    Shape shape;
  };
  // Group rows: x is read once for each row group, partial sums are written once for each; for few tokens the second
  // weighs more. Warps: as many as their registers allow, because at 2 bits two thirds of all issue slots are in use.
  // Computed, not measured.
  static constexpr Row kShapes[] = {{4, {1, 0, 12}}, {8, {1, 1, 12}}, {16, {2, 2, 8}}, {INT64_MAX, {4, 2, 8}}};
  const Row* row = kShapes;
  while (args.tokens > row->max_tokens) ++row;
  Shape shape = row->shape;
  int64_t most_tiles = 1;
  for (int i = 0; i < args.weight.num_segments; ++i)
    most_tiles = std::max(most_tiles, ceil_div(args.weight.segments[i].n1 - args.weight.segments[i].n0, kTileN));
  while (shape.log2_group_rows > 0 && (1 << (shape.log2_group_rows - 1)) >= most_tiles) --shape.log2_group_rows;
  (void)device;
  return shape;
}

// Lays out shared memory; false where it does not fit.
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

}  // namespace

bool tensor_core_group(const mpq_segment& s) {
  return single_group(s) || s.group_size % kTileK == 0 || s.group_size == 16 || s.group_size == 32;
}

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
  if (s.zero != MPQ_ZERO_NONE) zeros_ += uint64_t(segment.groups * row_tiles);
  segment.tile0 = int32_t(s.k0 / kTileK);
  segment.tiles = int32_t(tiles);
  segment.groups_per_tile = single_group(s) ? 0.0f : float(kTileK) / float(s.group_size);
  const int log2 = log2_unit(s, max_unit_);
  segment.shape = uint32_t(s.bits) << shape::kBits | uint32_t(s.zero) << shape::kZeroKind |
                  uint32_t(sub_tile(s)) << shape::kSubTile | uint32_t(log2) << shape::kLog2Unit |
                  uint32_t(log2_flush(s, log2)) << shape::kLog2Flush;
  return begins;
}

int plan_linear(const mpq_linear_args& args, const mpq_device& device, LinearPlan& plan, LinearParams& params) {
  const mpq_weight& w = args.weight;
  plan = {};
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
    plan.generic |= !tensor_core_group(s);
    params.in.chunk_sums |= s.group_size % kTileK != 0 && !single_group(s);
  }
  params.num_bands = num_bands;
  params.num_segments = w.num_segments;
  Shape shape = choose_shape(args, device);
  if (plan.generic) shape.log2_group_rows = 0;
  params.log2_group_rows = shape.log2_group_rows;
  int max_unit = kMaxUnit;
  // Where shared memory is short: shorter units first, fewer warps then.
  while (!plan.generic && !map_shared(args, device, shape, max_unit, params)) {
    if (max_unit > 1)
      max_unit /= 2;
    else if (shape.warps > (1u << shape.log2_group_rows))
      shape.warps /= 2, max_unit = kMaxUnit;
    else
      return MPQ_ERROR_DEVICE;
  }
  plan.shape = shape;
  plan.max_unit = max_unit;
  plan.grid_y = uint32_t(ceil_div(args.tokens, 8 * shape.token_tiles));
  bool split = false;
  if (plan.generic) {
    plan.grid_x = row_tiles;
    plan.grid_y = uint32_t(args.tokens);
  } else {
    const uint32_t blocks = uint32_t(device.multiprocessors) / std::max(plan.grid_y, 1u);
    plan.grid_x = cut_work(args, shape, max_unit, std::clamp(blocks, 1u, uint32_t{kMaxBlocks}), params, split);
  }
  size_t bytes = 0;
  params.bands = nullptr;
  params.segments = nullptr;
  if (num_bands > kInlineBands || w.num_segments > kInlineSegments) {
    plan.table = true;
    bytes = (num_bands * sizeof(Band) + w.num_segments * sizeof(Segment) + 15) / 16 * 16;
  } else {
    TableReader reader(w, max_unit, shape.log2_group_rows);
    Band band{};
    for (int i = 0, b = 0; reader.more(); ++i)
      if (reader.next(params.inline_segments[i], band)) params.inline_bands[b++] = band;
  }
  plan.partials_offset = bytes;
  if (split)
    bytes += size_t{plan.grid_x} * plan.grid_y * 2 * (8 * shape.token_tiles) * (kTileN << shape.log2_group_rows) *
             sizeof(float);
  plan.workspace_bytes = bytes;
  return MPQ_OK;
}

}  // namespace mpq::cuda

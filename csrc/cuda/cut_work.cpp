#include "cut_work.h"

#include <algorithm>

#include "generated/layout.h"
#include "segments.h"

namespace mpq::cuda {

namespace {

// Walks the row groups in order and says where a share of all bytes ends.
class Cutter {
 public:
  Cutter(const mpq_weight& weight, int max_unit, int log2_group_rows)
      : w_(weight), max_unit_(max_unit), group_rows_(1 << log2_group_rows) {
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

// Parts that each row group is cut into where all cost the same and whole parts leave few blocks idle; 0 elsewhere. A
// block then has one part of one row group: one panel and one reduction instead of two.
uint32_t even_parts(const mpq_weight& w, int group_rows, uint32_t blocks, uint32_t& groups) {
  constexpr uint32_t kLeastBlocks = 90;  // percent; computed, not measured (docs/kernels.md)
  groups = 0;
  for (int i = 0; i < w.num_segments; ++i) {
    const mpq_segment &s = w.segments[i], &one = w.segments[0];
    const bool alike = s.bits == one.bits && s.group_size == one.group_size && s.zero == one.zero;
    if (s.k1 - s.k0 != w.in_features || !alike) return 0;
    groups += uint32_t(ceil_div(ceil_div(s.n1 - s.n0, kTileN), group_rows));
  }
  const uint32_t parts = blocks / groups;
  return uint64_t{groups} * parts * 100 >= uint64_t{blocks} * kLeastBlocks ? parts : 0;
}

}  // namespace

uint32_t cut_work(const mpq_weight& weight, int log2_group_rows, int max_unit, uint32_t blocks, LinearParams& params,
                  bool& split) {
  Cutter cutter(weight, max_unit, log2_group_rows);
  Cut* cuts = params.cuts;
  uint32_t used = 0, groups = 0;
  const uint32_t parts = even_parts(weight, 1 << log2_group_rows, blocks, groups);
  if (parts) blocks = groups * parts;
  const auto even = [&](uint32_t i) {
    const int log2 = log2_unit(weight.segments[0], max_unit);
    const int64_t units = ceil_div(ceil_div(weight.in_features, kTileK), int64_t{1} << log2);
    return Cut{i / parts, uint32_t(units * (i % parts) / parts << log2), 0, 0};
  };
  for (uint32_t i = 0; i <= blocks; ++i) {
    // total * i may pass 2^63 for weights of petabytes only.
    const Cut cut = parts ? even(i) : cutter.at(i == blocks ? cutter.total() : cutter.total() * i / blocks);
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

}  // namespace mpq::cuda

#include "cut_work.h"

#include <algorithm>
#include <array>
#include <numeric>

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
      const int log2 = std::max(log2_unit(s, max_unit_), int(pairs(s)));
      const int64_t tile = (rest / cost_of_tile) >> log2 << log2;
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

// The bytes of the row groups, in order, as far as there is room.
struct GroupCosts {
  std::array<int64_t, kMaxBlocks> costs;
  uint32_t count = 0;
  int64_t total = 0;

  // False where there are more than `most`.
  bool fill(const mpq_weight& w, int log2_group_rows, uint32_t most) {
    for (int i = 0, next; i < w.num_segments; i = next) {
      int64_t of_row_tile = 0;
      for (next = i; next == i || same_band(w, i, next); ++next) {
        const mpq_segment& s = w.segments[next];
        of_row_tile += ceil_div(s.k1 - s.k0, kTileK) * tile_cost(s, w.scale_dtype);
      }
      for (int64_t rows = ceil_div(w.segments[i].n1 - w.segments[i].n0, kTileN); rows > 0;
           rows -= 1 << log2_group_rows) {
        if (count == most) return false;
        costs[count] = std::min<int64_t>(rows, 1 << log2_group_rows) * of_row_tile;
        total += costs[count++];
      }
    }
    return true;
  }
};

// Where blocks begin, as bytes from the beginning of the weight.
struct Starts {
  std::array<int64_t, kMaxBlocks + 1> at;
  uint32_t blocks = 0;
};

// What a block may have above the average for the sake of having one part: an eighth, or the bytes that it could read
// while it loads x and adds partial sums once more (4 us, modelled; at 4.3 TB/s for 132 blocks).
constexpr int64_t kOverAverage = 8, kBytesOverAverage = 128 << 10;

bool one_part_each(const mpq_weight& w, int log2_group_rows, uint32_t blocks, Starts& starts) {
  GroupCosts groups;
  if (!groups.fill(w, log2_group_rows, blocks)) return false;
  std::array<uint32_t, kMaxBlocks> parts;
  std::fill_n(parts.begin(), groups.count, 1);
  // Always to the group whose parts are the largest; the order of equal ones does not matter, but is the same each
  // time.
  const auto larger = [&](uint32_t a, uint32_t b) {
    const int64_t of_a = groups.costs[a] * parts[b], of_b = groups.costs[b] * parts[a];
    return of_a != of_b ? of_a < of_b : a > b;
  };
  std::array<uint32_t, kMaxBlocks> heap;
  std::iota(heap.begin(), heap.begin() + groups.count, 0u);
  std::make_heap(heap.begin(), heap.begin() + groups.count, larger);
  for (uint32_t left = blocks - groups.count; left > 0; --left) {
    std::pop_heap(heap.begin(), heap.begin() + groups.count, larger);
    ++parts[heap[groups.count - 1]];
    std::push_heap(heap.begin(), heap.begin() + groups.count, larger);
  }
  const uint32_t largest = heap[0];
  const int64_t average = groups.total / blocks, most = groups.costs[largest] / parts[largest];
  if (most > average + std::max(average / kOverAverage, kBytesOverAverage)) return false;
  // What is left over would give a few groups one part more, and the others nothing.
  int64_t begin = 0;
  for (uint32_t g = 0; g < groups.count; begin += groups.costs[g++]) {
    while (parts[g] > 1 && groups.costs[g] * parts[largest] <= groups.costs[largest] * (parts[g] - 1)) --parts[g];
    for (uint32_t i = 0; i < parts[g]; ++i) starts.at[starts.blocks++] = begin + groups.costs[g] * i / parts[g];
  }
  starts.at[starts.blocks] = begin;
  return true;
}

// Some row groups for each block, all of K: no partial sums. Where there are more groups than blocks, and the blocks
// with the most have at most an eighth above the average.
bool whole_groups_each(const mpq_weight& w, int log2_group_rows, uint32_t blocks, Starts& starts) {
  int64_t total = 0, begin = 0, most = 0, of_block = 0;
  const auto for_each_group = [&](const auto& body) {
    for (int i = 0, next; i < w.num_segments; i = next) {
      int64_t of_row_tile = 0;
      for (next = i; next == i || same_band(w, i, next); ++next) {
        const mpq_segment& s = w.segments[next];
        of_row_tile += ceil_div(s.k1 - s.k0, kTileK) * tile_cost(s, w.scale_dtype);
      }
      for (int64_t rows = ceil_div(w.segments[i].n1 - w.segments[i].n0, kTileN); rows > 0; rows -= 1 << log2_group_rows)
        body(std::min<int64_t>(rows, 1 << log2_group_rows) * of_row_tile);
    }
  };
  for_each_group([&](int64_t cost) { total += cost; });
  const int64_t average = total / blocks, limit = average + average / kOverAverage;
  starts.blocks = 0;
  for_each_group([&](int64_t cost) {
    // A block goes on until one more group would be too much.
    if (begin == 0 || of_block + cost > limit) {
      if (starts.blocks < blocks) starts.at[starts.blocks] = begin;
      ++starts.blocks;
      of_block = 0;
    }
    of_block += cost, begin += cost;
    most = std::max(most, of_block);
  });
  if (starts.blocks > blocks || most > limit) return false;
  starts.at[starts.blocks] = begin;
  return true;
}

void equal_bytes(int64_t total, uint32_t blocks, Starts& starts) {
  // total * i may pass 2^63 for weights of petabytes only.
  for (uint32_t i = 0; i <= blocks; ++i) starts.at[i] = i == blocks ? total : total * i / blocks;
  starts.blocks = blocks;
}

}  // namespace

int log2_rows_for_one_part(const mpq_weight& weight, int least, int most, uint32_t blocks) {
  for (int log2 = least; log2 <= most; ++log2) {
    Starts starts;
    if (one_part_each(weight, log2, blocks, starts)) return log2;
  }
  // The largest, so that a block has few of them.
  for (int log2 = most; log2 >= least; --log2) {
    Starts starts;
    if (whole_groups_each(weight, log2, blocks, starts)) return log2;
  }
  return least;
}

uint32_t cut_work(const mpq_weight& weight, int log2_group_rows, int max_unit, uint32_t blocks, LinearParams& params,
                  bool& split) {
  Cutter cutter(weight, max_unit, log2_group_rows);
  Starts starts;
  if (!one_part_each(weight, log2_group_rows, blocks, starts) &&
      !whole_groups_each(weight, log2_group_rows, blocks, starts))
    equal_bytes(cutter.total(), blocks, starts);
  Cut* cuts = params.cuts;
  uint32_t used = 0;
  for (uint32_t i = 0; i <= starts.blocks; ++i) {
    const Cut cut = cutter.at(starts.at[i]);
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

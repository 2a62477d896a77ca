// csrc/cuda/cut_work.cpp: who works on which bytes, for shapes of real layers and random ones.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/cut_work.h"
#include "cuda/segments.h"

namespace {

using namespace mpq::cuda;

#define EXPECT(condition)                                             \
  if (!(condition)) {                                                 \
    std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
    std::exit(1);                                                     \
  }

// Bands of one segment each.
struct Weight {
  std::vector<mpq_segment> segments;
  mpq_weight weight{};

  explicit Weight(int64_t columns) { weight.in_features = columns, weight.scale_dtype = MPQ_F16; }
  Weight(const Weight& other) : segments(other.segments), weight(other.weight) { weight.segments = segments.data(); }
  Weight& add(int64_t rows, int bits, int64_t group_size = 128) {
    const int64_t n0 = weight.out_features;
    segments.push_back({n0, n0 + rows, 0, weight.in_features, group_size, bits, MPQ_ZERO_INT});
    weight.out_features += rows;
    weight.segments = segments.data(), weight.num_segments = int32_t(segments.size());
    return *this;
  }
};

struct Result {
  LinearParams params{};
  uint32_t blocks = 0;
  bool split = false;
  int64_t most = 0, total = 0;  // bytes of the busiest block and of all
  uint32_t most_groups = 0;     // row groups, whole or in part, of one block
};

Result cut(const Weight& weight, int log2_group_rows, uint32_t blocks, int max_unit = 4) {
  Result r;
  r.blocks = cut_work(weight.weight, log2_group_rows, max_unit, blocks, r.params, r.split);
  EXPECT(r.blocks >= 1 && r.blocks <= blocks);
  const int64_t tiles = ceil_div(weight.weight.in_features, 64);
  std::vector<int64_t> cost_of_tile;  // of each row group
  for (const mpq_segment& s : weight.segments) {
    for (int64_t rows = ceil_div(s.n1 - s.n0, 64); rows > 0; rows -= 1 << log2_group_rows)
      cost_of_tile.push_back(std::min<int64_t>(rows, 1 << log2_group_rows) * tile_cost(s, weight.weight.scale_dtype));
  }
  const Cut* cuts = r.params.cuts;
  EXPECT(cuts[0].group == 0 && cuts[0].tile == 0);
  EXPECT(cuts[r.blocks].group == cost_of_tile.size() && cuts[r.blocks].tile == 0);
  bool split = false;
  for (uint32_t i = 0; i < r.blocks; ++i) {
    const Cut a = cuts[i], b = cuts[i + 1];
    EXPECT(a.group < b.group || (a.group == b.group && a.tile < b.tile));
    int64_t bytes = 0;
    uint32_t groups = 0;
    for (uint32_t g = a.group; g < b.group || (g == b.group && b.tile > 0); ++g, ++groups) {
      const int64_t first = g == a.group ? a.tile : 0, end = g == b.group ? b.tile : tiles;
      bytes += (end - first) * cost_of_tile[g];
    }
    r.most = std::max(r.most, bytes), r.total += bytes, r.most_groups = std::max(r.most_groups, groups);
    split |= b.tile != 0;
    if (i && a.tile) {
      EXPECT(a.first < i && a.last >= i);
      EXPECT(cuts[a.first].group < a.group || cuts[a.first].tile == 0);
      EXPECT(cuts[a.last + 1].group > a.group);
    }
  }
  EXPECT(split == r.split);
  return r;
}

void one_part_for_each_block() {
  // 128 row tiles on 132 multiprocessors: four stay idle rather than all have two parts.
  const Result square = cut(Weight(8192).add(8192, 4), 0, 132);
  EXPECT(square.blocks == 128 && square.most_groups == 1 && !square.split);
  const Result half = cut(Weight(4096).add(4096, 4), 0, 132);
  EXPECT(half.blocks == 128 && half.most_groups == 1 && half.split && half.most * 128 == half.total);
  const Result sixteen_tokens = cut(Weight(8192).add(8192, 2), 2, 132);
  EXPECT(sixteen_tokens.blocks == 128 && sixteen_tokens.most_groups == 1);
  const Result one_group = cut(Weight(1 << 16).add(64, 4), 0, 132);
  EXPECT(one_group.blocks == 132 && one_group.most_groups == 1);
}

void widths_side_by_side() {
  const Result two = cut(Weight(4096).add(4096, 4, 64).add(2048, 8, 64), 0, 132);
  EXPECT(two.most_groups == 1 && two.most * 132 * 8 <= two.total * 9);
  const Result qkv = cut(Weight(4096).add(4096, 4).add(1024, 3).add(1024, 8), 0, 132);
  EXPECT(qkv.most_groups == 1);
}

void larger_row_groups() {
  // 224 and 448 row tiles: parts of 2 and of 4 of them.
  const Weight gate(Weight(4096).add(14336, 4)), both(Weight(4096).add(28672, 4));
  EXPECT(log2_rows_for_one_part(gate.weight, 0, 2, 132) == 1);
  EXPECT(cut(gate, 1, 132).most_groups == 1);
  EXPECT(log2_rows_for_one_part(both.weight, 0, 2, 132) == 2);
  EXPECT(cut(both, 2, 132).most_groups == 1);
  const Weight square(Weight(8192).add(8192, 4));
  EXPECT(log2_rows_for_one_part(square.weight, 0, 2, 132) == 0);
  // 2004 row tiles: 16 of them for a block, in as few groups as may be.
  const Weight head(Weight(4096).add(128256, 4));
  EXPECT(log2_rows_for_one_part(head.weight, 0, 2, 132) == 2);
  EXPECT(log2_rows_for_one_part(head.weight, 0, 3, 132) == 3);
  const Result whole = cut(head, 3, 132);
  EXPECT(whole.blocks == 126 && whole.most_groups == 2 && !whole.split && whole.most * 126 * 100 <= whole.total * 101);
}

void equal_bytes_where_parts_would_not_be() {
  // 100 groups on 132 multiprocessors: one part each would leave a quarter of them idle for 0.25 MB.
  const Result uneven = cut(Weight(28672).add(6400, 4), 0, 132);
  EXPECT(uneven.blocks == 132 && uneven.most * 132 * 100 <= uneven.total * 103);
  // Five groups for four blocks: none of them whole.
  const Result many = cut(Weight(4096).add(320, 4), 0, 4);
  EXPECT(many.blocks == 4 && many.most * 4 * 100 <= many.total * 110);
}

void random_shapes() {
  std::mt19937 random(1);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int i = 0; i < 20000; ++i) {
    Weight weight(64 * pick(1, 200));
    for (int64_t bands = pick(1, 5); bands > 0; --bands)
      weight.add(pick(1, 3000), int(pick(1, 8)), pick(0, 1) ? 64 : weight.weight.in_features);
    const int unit = 1 << pick(0, 2), log2_rows = int(pick(0, 2));
    const uint32_t blocks = uint32_t(pick(1, kMaxBlocks));
    const Result r = cut(weight, log2_rows, blocks, unit);
    // A block begins at a unit: up to one of the costliest too many at either end.
    int64_t of_unit = 0;
    for (const mpq_segment& s : weight.segments)
      of_unit = std::max(of_unit, (tile_cost(s, MPQ_F16) << log2_rows) * unit);
    const int64_t average = r.total / blocks;
    EXPECT(r.most <= average + std::max<int64_t>(average / 8, 128 << 10) + 2 * of_unit);
  }
}

}  // namespace

int main() {
  one_part_for_each_block();
  widths_side_by_side();
  larger_row_groups();
  equal_bytes_where_parts_would_not_be();
  random_shapes();
}

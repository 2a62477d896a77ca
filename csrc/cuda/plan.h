// Turns arguments into kernel parameters: which block reads which bytes, what lies where in shared memory and in the
// workspace. Pure functions of values, on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "include/mpq.h"
#include "params.h"

namespace mpq::cuda {

// Threads, and tokens of 8 for one block.
struct Shape {
  int token_tiles;  // 1, 2 or 4
  int log2_group_rows;
  uint32_t warps;
};

struct LinearPlan {
  bool generic;  // groups that tensor cores cannot take: one slower kernel for all of them
  Shape shape;
  int max_unit;  // tiles that a warp may copy at a time
  uint32_t grid_x, grid_y;
  size_t table_offset, partials_offset, workspace_bytes;  // table_offset 0: no table
};

// MPQ_OK or why these arguments are refused. Pointers are compared with null and aligned, never read.
int check_weight(const mpq_weight& weight);
int check_linear(const mpq_linear_args& args);
int check_device(const mpq_device& device);

// Bands and segments in order, as kernels see them.
class TableReader {
 public:
  TableReader(const mpq_weight& weight, int max_unit, int log2_group_rows)
      : weight_(weight), max_unit_(max_unit), log2_group_rows_(log2_group_rows) {}
  bool more() const { return index_ < weight_.num_segments; }
  // The next segment; true where it begins a band, which is then filled too.
  bool next(Segment& segment, Band& band);
  int groups() const { return groups_; }

 private:
  const mpq_weight& weight_;
  int max_unit_, log2_group_rows_;
  int index_ = 0, groups_ = 0;
  uint64_t pieces_ = 0, scales_ = 0, zeros_ = 0;
};

// Fills `params` but for the addresses inside the workspace, and `plan`. Arguments must have been checked.
int plan_linear(const mpq_linear_args& args, const mpq_device& device, LinearPlan& plan, LinearParams& params);

// Groups that tensor cores take: 16, 32 or a multiple of 64 columns, or the whole segment.
bool tensor_core_group(const mpq_segment& segment);

inline int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

}  // namespace mpq::cuda

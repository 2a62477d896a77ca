// Turns arguments into kernel parameters: which block reads which bytes (cut_work.h), what lies where in shared memory
// (shared_memory.h) and in the workspace. Pure functions of values, on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "include/mpq.h"
#include "params.h"
#include "shared_memory.h"
#include "wide.h"

namespace mpq::cuda {

// One launch of the kernels of linear.
struct LinearLaunch {
  bool generic;  // groups that tensor cores cannot take: one slower kernel for all of them
  bool wide;     // more than 16 tokens: the kernels of wide.cuh, with their map of shared memory
  WideMap map;
  Shape shape;
  int max_unit;  // tiles that a warp may copy at a time
  uint32_t grid_x, grid_y;
  bool table;  // bands and segments lie at the beginning of the workspace: too many for the parameters
  size_t partials_offset, workspace_bytes;
  size_t x_offset, sums_offset;  // of the arranged x, where `wide`
};

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

// Fills `params` but for the addresses inside the workspace, and `launch`. Arguments must have been checked. experts:
// for the kernels of grouped.cu.
int prepare_linear(const mpq_linear_args& args, const mpq_device& device, LinearLaunch& launch, LinearParams& params,
                   bool experts = false);

}  // namespace mpq::cuda

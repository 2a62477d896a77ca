// Parameters of a launch of mpq_linear, from the project's own planner: csrc/cuda/work_list.h.
// benchmarks/gpu/model/problem.py compiles and runs it.
//
//     plan N K M capability multiprocessors shared_bytes scale_dtype x_dtype < lines "n0 n1 k0 k1 group_size bits zero"
//
// writes a line of JSON, then the bytes of the parameters: LinearParams, or WideParams and ArrangeParams. Addresses are
// made up: problem.py says what lies where.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/check.h"
#include "cuda/work_list.h"
#include "generated/layout.h"
#include "include/mpq.h"

using namespace mpq::cuda;

namespace {

void* address(uint64_t number) { return reinterpret_cast<void*>(number << 32); }

int fail(const char* what, int status) {
  fprintf(stderr, "%s: mpq_status %d\n", what, status);
  return 1;
}

}  // namespace

int main(int count, char** words) {
  if (count != 9) return fail("arguments", count);
  const auto number = [&](int i) { return atoll(words[i]); };
  std::vector<mpq_segment> segments;
  for (mpq_segment s;
       scanf("%ld %ld %ld %ld %ld %d %d", &s.n0, &s.n1, &s.k0, &s.k1, &s.group_size, &s.bits, &s.zero) == 7;)
    segments.push_back(s);
  mpq_linear_args args{};
  args.weight = {number(1), number(2),       address(1),           address(2),        address(3),
                 nullptr,   segments.data(), int(segments.size()), int32_t(number(7))};
  args.tokens = number(3);
  args.x = address(4), args.x_row_stride = args.weight.in_features;
  args.y = address(5), args.y_row_stride = args.weight.out_features;
  args.x_dtype = int32_t(number(8));
  const mpq_device device{0, int32_t(number(4)), int32_t(number(5)), int32_t(number(6))};
  if (int status = check_device(device)) return fail("device", status);
  if (int status = check_linear(args, args.weight.out_features)) return fail("weight", status);
  LinearLaunch launch;
  static LinearParams params;
  if (int status = prepare_linear(args, device, launch, params)) return fail("plan", status);
  if (launch.table || launch.generic) return fail("only launches without tables, on tensor cores, are modelled", 0);
  params.counters = static_cast<uint32_t*>(address(6));
  params.partials = static_cast<float*>(address(7));
  printf(
      "{\"phases\": %d, \"arrange_bytes\": %zu, \"grid\": [%u, %u], \"warps\": %u, \"token_tiles\": %d, "
      "\"group_rows\": %d, \"cuts\": [",
      launch.wide ? launch.map.phases : 0, launch.wide ? sizeof(ArrangeParams) : 0, launch.grid_x, launch.grid_y,
      launch.shape.warps, launch.shape.token_tiles, mpq::kTileN << launch.shape.log2_group_rows);
  for (uint32_t i = 0; i <= launch.grid_x; ++i) {
    const Cut& c = params.cuts[i];
    printf("%s[%u, %u, %u, %u]", i ? ", " : "", c.group, c.tile, unsigned(c.first), unsigned(c.last));
  }
  printf("]}\n");
  if (!launch.wide) return fwrite(&params, sizeof params, 1, stdout) != 1;
  const WideParams wide{params, launch.map, static_cast<char*>(address(8)), static_cast<char*>(address(9))};
  const ArrangeParams arrange{params.in, wide.x, wide.sums, tokens_of_block(launch.map), launch.map.sums_pitch};
  return fwrite(&wide, sizeof wide, 1, stdout) != 1 || fwrite(&arrange, sizeof arrange, 1, stdout) != 1;
}

// Experts of a mixture: y[i] = x[i] W_e^T + bias_e for the rows i of expert e, all experts in one launch, whatever
// their widths. Each item is a whole row group for up to 8, 16 or 32 rows of x; an expert without rows has no items.

#include "launch.h"
#include "linear.cuh"

namespace mpq::cuda {

namespace {

// Item -> expert, row group, block of tokens. items_before[e] (shared memory) counts the items of the experts before e.
struct GroupedWork {
  const GroupedParams& p;
  uint32_t items_before;
  int block_tokens;

  struct Item {
    int expert;
    uint32_t group;
    int first_token, tokens;
  };

  MPQ_DEVICE uint32_t before(int expert) const { return dev::ld_shared<uint32_t>(items_before + 4 * uint32_t(expert)); }
  MPQ_DEVICE Item find(uint32_t item) const {
    int low = 0, high = p.num_experts;  // before(low) <= item < before(high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (before(middle) <= item)
        low = middle;
      else
        high = middle;
    }
    const int begin = dev::ld_global(p.offsets + low), end = dev::ld_global(p.offsets + low + 1);
    const uint32_t blocks = uint32_t(end - begin + block_tokens - 1) / uint32_t(block_tokens);
    const uint32_t place = item - before(low), group = place / blocks;
    const int first = begin + int(place - group * blocks) * block_tokens;
    return {low, uint32_t(dev::ld_constant(p.expert_groups + low)) + group, first,
            end - first < block_tokens ? end - first : block_tokens};
  }

  MPQ_DEVICE uint32_t checked(uint32_t item) const { return item < before(p.num_experts) ? item : kNoItem; }
  MPQ_DEVICE uint32_t first() const { return checked(dev::block_x()); }
  MPQ_DEVICE uint32_t after(uint32_t item) const { return checked(item + dev::grid_x()); }
  MPQ_DEVICE Extent extent(uint32_t item) const { return {find(item).group, 0, p.linear.k_tiles}; }
};

// items_before, from what all threads counted. Warp 0 adds 32 experts at a time: in step i lanes know the sum over
// their 2^i neighbours, and take that of the lower half if they are in the upper one.
MPQ_DEVICE void count_items(const GroupedParams& p, uint32_t table, int block_tokens) {
  for (int e = int(dev::thread_index()); e < p.num_experts; e += int(dev::thread_count())) {
    const int rows = dev::ld_global(p.offsets + e + 1) - dev::ld_global(p.offsets + e);
    const int groups = dev::ld_constant(p.expert_groups + e + 1) - dev::ld_constant(p.expert_groups + e);
    dev::st_shared(table + 4 * uint32_t(e), uint32_t((rows + block_tokens - 1) / block_tokens) * uint32_t(groups));
  }
  dev::block_sync();
  const uint32_t lane = dev::thread_index() % 32, experts = uint32_t(p.num_experts);
  if (dev::thread_index() < 32) {
    uint32_t all_before = 0;
    MPQ_NO_UNROLL for (uint32_t first = 0; first < experts; first += 32) {
      const uint32_t e = first + lane, at = table + 4 * e;
      uint32_t sum = e < experts ? dev::ld_shared<uint32_t>(at) : 0, before = 0;
      MPQ_UNROLL for (uint32_t step = 1; step < 32; step *= 2) {
        const uint32_t others = dev::shfl_xor(sum, int(step));
        if (lane & step) before += others;
        sum += others;
      }
      if (e < experts) dev::st_shared(at, all_before + before);
      all_before += sum;
    }
    if (lane == 0) dev::st_shared(table + 4 * experts, all_before);
  }
  dev::block_sync();
}

template <bool kBf16, int kTokenTiles>
MPQ_KERNEL(256)
grouped_kernel(const MPQ_GRID_CONSTANT GroupedParams p) {
  const uint32_t base = dev::shared_base();
  const GroupedWork work{p, base + p.items_before, 8 * kTokenTiles};
  dev::wait_for_earlier_kernels();
  count_items(p, work.items_before, work.block_tokens);
  Ring<GroupedWork> ring(p.linear, base, work);
  RowFinder finder(p.linear);
  for (uint32_t item = work.first(); item != kNoItem; item = work.after(item)) {
    const GroupedWork::Item place = work.find(item);
    float y[4][kTokenTiles][4] = {};
    run_item<kBf16, kTokenTiles>(p.linear, base, ring, item, {place.group, 0, p.linear.k_tiles}, place.first_token,
                                 place.tokens, y);
    const Target target{finder.find(place.group), place.first_token, place.tokens, place.expert * p.expert_rows};
    store_rows<kBf16, kTokenTiles>(p.linear, base, target, y);
  }
}

}  // namespace

int launch_grouped(bool bf16, int token_tiles, const dev::Launch& how, const GroupedParams& params) {
  if (token_tiles == 1) return dev::launch(bf16 ? grouped_kernel<true, 1> : grouped_kernel<false, 1>, how, params);
  if (token_tiles == 2) return dev::launch(bf16 ? grouped_kernel<true, 2> : grouped_kernel<false, 2>, how, params);
  return dev::launch(bf16 ? grouped_kernel<true, 4> : grouped_kernel<false, 4>, how, params);
}

int warmup_grouped() {
  if (int error = dev::load(grouped_kernel<false, 1>)) return error;
  if (int error = dev::load(grouped_kernel<false, 2>)) return error;
  if (int error = dev::load(grouped_kernel<false, 4>)) return error;
  if (int error = dev::load(grouped_kernel<true, 1>)) return error;
  if (int error = dev::load(grouped_kernel<true, 2>)) return error;
  if (int error = dev::load(grouped_kernel<true, 4>)) return error;
  return 0;
}

}  // namespace mpq::cuda

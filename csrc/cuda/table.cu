// Tables that do not fit into the parameters of a kernel travel to the workspace as parameters of this one: no copy
// from host memory, which a captured graph would read again when the memory has long been someone else's.

#include "launch.h"

namespace mpq::cuda {

namespace {

MPQ_KERNEL(256)
table_kernel(const MPQ_GRID_CONSTANT TableChunk chunk) {
  dev::wait_for_earlier_kernels();
  for (uint32_t i = dev::thread_index(); i < chunk.count; i += dev::thread_count())
    dev::st_global(chunk.to + i, chunk.words[i]);
}

}  // namespace

int launch_table(dev::Launch how, const TableChunk& chunk) {
  how.threads = 256;
  return dev::launch(table_kernel, how, chunk);
}

int warmup_table() { return dev::load(table_kernel); }

}  // namespace mpq::cuda

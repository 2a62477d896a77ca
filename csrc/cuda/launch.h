// Kernels of each regime, as functions of the host. All return 0 or the error of the launch.
#pragma once

#include "device.cuh"
#include "params.h"
#include "wide.h"

namespace mpq::cuda {

// Up to 16 tokens: token_tiles 1 or 2, of 8 tokens each.
int launch_decode(bool bf16, int token_tiles, const dev::Launch& how, const LinearParams& params);
// More: 32 or 64 for each block.
int launch_wide(bool bf16, const dev::Launch& how, const WideParams& params);
// x for them. how: the grid's second dimension is the blocks of tokens.
int launch_arrange(bool bf16, dev::Launch how, const ArrangeParams& params);
int launch_generic(bool bf16, dev::Launch how, const LinearParams& params);
int launch_grouped(bool bf16, int token_tiles, const dev::Launch& how, const GroupedParams& params);
int launch_dequantize(dev::Launch how, const DequantizeParams& params);
int launch_embedding(dev::Launch how, const EmbeddingParams& params);
int launch_table(dev::Launch how, const TableChunk& chunk);

// Loads every kernel onto the current device.
int warmup_decode(), warmup_wide(), warmup_arrange(), warmup_generic(), warmup_grouped(), warmup_dequantize(),
    warmup_embedding(), warmup_table();

}  // namespace mpq::cuda

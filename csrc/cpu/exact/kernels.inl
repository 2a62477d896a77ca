// linear and dequantize of one instruction set; see kernels.h.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/exact/decode.inl"
#include "cpu/exact/decode_float.inl"
#include "cpu/exact/tile.inl"
#include "cpu/inline.h"
#include "cpu/kernels.h"
#include "cpu/shared/codes.inl"
#include "cpu/shared/convert.inl"
#include "cpu/shared/frame.inl"
#include "cpu/simd/simd.h"

namespace mpq::cpu {
namespace {

// One chunk of tokens of a linear call.
struct LinearJob {
  const LinearArgs* args;
  float* x;         // [tokens, padded_k]: fp32 in chunk order, permuted, zero beyond K
  uint32_t* pairs;  // Tokens::pairs, or null where nothing wants them
  float* sums;      // Tokens::sums, or null
  bool tiny;        // an x of the job is too small for products of pairs
  const Products* products;
  int64_t token0;  // in args
  int64_t tokens;
  int64_t row_blocks;
  int64_t splits;  // ranges of tokens that are separate work items
};

// words[i] = columns 2 i and 2 i + 1 of 64 values of bf16. Returns whether one is too small for products of pairs.
MPQ_INLINE bool pair_columns(const float* values, uint32_t* words) {
  uint32_t bits[64];
  __builtin_memcpy(bits, values, sizeof bits);
  uint32_t tiny = 0;
  for (int i = 0; i < 64; ++i) tiny |= static_cast<uint32_t>((bits[i] & 0x7fffffff) - 1 < kSmallestPaired - 1);
  for (int i = 0; i < 32; ++i) words[i] = bits[2 * i] >> 16 | bits[2 * i + 1];
  return tiny;
}

// Sums of 4 times 16 values, one token's of Tokens::sums.
MPQ_INLINE void sum_chunks(const float* values, float* sums) {
  for (int c = 0; c < 4; ++c) {
    float sum[8];
    for (int i = 0; i < 8; ++i) sum[i] = values[16 * c + i] + values[16 * c + 8 + i];
    sums[c * kTokenChunk] = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
  }
}

void prepare_tokens(void* ctx, int64_t begin, int64_t end) {
  LinearJob& job = *static_cast<LinearJob*>(ctx);
  const LinearArgs& args = *job.args;
  const int64_t K = args.weight.K;
  const int64_t width = dtype_bytes(args.x_dtype);
  bool tiny = false;
  for (int64_t m = begin; m < end; ++m) {
    const char* row = bytes_at(args.x, (job.token0 + m) * args.x_row_stride * width);
    float* out = job.x + m * padded_k(K);
    for (int64_t k = 0; k < K; k += 64) {
      const int64_t count = K - k < 64 ? K - k : 64;
      alignas(64) float values[64];
      load_columns(args, row, k, count, values);
      for (int c = 0; c < 64; c += 16) {
        for (int place = 0; place < 16; ++place) out[k + c + place] = values[c + column_of(place)];
      }
      if (job.pairs) tiny |= pair_columns(values, job.pairs + (m * padded_k(K) + k) / 2);
      if (job.sums) sum_chunks(values, job.sums + k / 16 * kTokenChunk + m);
    }
  }
  if (tiny) __atomic_store_n(&job.tiny, true, __ATOMIC_RELAXED);
}

// Work item: one row block and one range of the job's tokens.
void linear_items(void* ctx, int64_t begin, int64_t end) {
  const LinearJob& job = *static_cast<const LinearJob*>(ctx);
  const LinearArgs& args = *job.args;
  const Weight& weight = args.weight;
  alignas(64) float sums[kTokenChunk * 64];
  for (int64_t item = begin; item < end; ++item) {
    const RowBlock block = row_block(weight, item % job.row_blocks);
    const int64_t split = item / job.row_blocks;
    const int64_t first = job.tokens * split / job.splits;
    const int64_t count = job.tokens * (split + 1) / job.splits - first;
    const int64_t stride = padded_k(weight.K);
    const Tokens x{job.x + first * stride, job.pairs ? job.pairs + first * stride / 2 : nullptr,
                   job.sums ? job.sums + first : nullptr, stride};
    for (int64_t i = 0; i < 64 * count; ++i) sums[i] = 0.0f;
    for (int i = 0; i < block.count; ++i) {
      const Segment& segment = block.segments[i];
      if (!groups_are_chunks(segment)) {
        tile_segment(segment, weight.scale_dtype, block.row_tile, x, count, sums);
      } else if (job.tokens <= job.products->decode_tokens) {
        job.products->decode[segment.bits][count](segment, weight.scale_dtype, block.row_tile, x, sums);
      } else {
        job.products->tile(segment, weight.scale_dtype, block.row_tile, x, count, sums);
      }
    }
    finish_rows(args, block, job.token0 + first, count, sums);
  }
}

constexpr Products kFloatProducts = products_of<FloatMath>(kTokenBlock, tile_segment);

void linear_tokens(const LinearArgs& args, const Parallel& parallel, const Products* pairs) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(args.workspace);
  const uintptr_t aligned = (address + kAlignment - 1) / kAlignment * kAlignment;
  float* x = reinterpret_cast<float*>(aligned);
  LinearJob job{&args, x, nullptr, nullptr, false, nullptr, 0, 0, count_row_blocks(args.weight), 1};
  const int64_t chunks = ceil_div(args.M, kTokenChunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    job.token0 = args.M * chunk / chunks;
    job.tokens = args.M * (chunk + 1) / chunks - job.token0;
    const int64_t pass = pairs ? pairs->pass_tokens : kTokenBlock;
    const int64_t most = ceil_div(job.tokens, 2 * pass);  // so that no range is shorter than a pass
    const int64_t wanted = ceil_div(kFewBlocks, job.row_blocks);
    job.splits = job.tokens <= kDecodeTokens ? 1 : (wanted < most ? wanted : most);
    const int64_t values = job.tokens * padded_k(args.weight.K);
    if (pairs) job.pairs = reinterpret_cast<uint32_t*>(x + values);
    if (pairs && job.tokens > kPairedDecodeTokens) job.sums = x + values + values / 2;
    job.tiny = false;
    if (job.tokens <= kDecodeTokens) {
      prepare_tokens(&job, 0, job.tokens);
    } else {
      run(parallel, job.tokens, prepare_tokens, &job);
    }
    job.products = pairs && !job.tiny ? pairs : &kFloatProducts;
    run(parallel, job.row_blocks * job.splits, linear_items, &job);
  }
}

struct DequantizeJob {
  const Weight* weight;
  char* out;
  DType dtype;
};

void dequantize_items(void* ctx, int64_t begin, int64_t end) {
  const DequantizeJob& job = *static_cast<const DequantizeJob*>(ctx);
  const int64_t row_bytes = job.weight->K * dtype_bytes(job.dtype);
  alignas(64) float tile[64 * 64];  // [column in chunk order][row position]
  alignas(64) float rows[64 * 64];  // [row][column]
  for (int64_t item = begin; item < end; ++item) {
    const RowBlock block = row_block(*job.weight, item);
    for (int i = 0; i < block.count; ++i) {
      const Segment& s = block.segments[i];
      for (int64_t k = s.k0; k < s.k1; k += 64) {
        const int64_t count = s.k1 - k < 64 ? s.k1 - k : 64;
        const int64_t first = (k - s.k0) / 16;
        const int64_t chunks = ceil_div(count, 16);
        kDequantizeTile[s.bits]({s, job.weight->scale_dtype, block.row_tile}, first, first + chunks, tile);
        for (int64_t c = 0; c < 16 * chunks; ++c) {
          const int64_t column = (c & ~int64_t{15}) + column_of(static_cast<int>(c & 15));
          to_row_order(tile + 64 * c, 1, rows + column, 64);
        }
        for (int64_t n = 0; n < block.rows; ++n) {
          float* row = rows + 64 * n;
          for (int v = 0; v < 64; v += kLanes) store(row + v, add(load(row + v), zeros_f()));  // -0 becomes +0
          write_columns(job.weight->perm, k, count, row, job.dtype, job.out + (block.row + n) * row_bytes);
        }
      }
    }
  }
}

void dequantize_weight(const Weight& weight, void* out, DType out_dtype, const Parallel& parallel) {
  DequantizeJob job{&weight, static_cast<char*>(out), out_dtype};
  run(parallel, count_row_blocks(weight), dequantize_items, &job);
}

}  // namespace
}  // namespace mpq::cpu

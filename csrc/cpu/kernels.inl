// linear and dequantize of one instruction set. Included after a simd header; see kernels.h.
#include "generated/layout.h"

// clang-format off: each file uses the names of those before it.
#include "cpu/codes.inl"
#include "cpu/convert.inl"
#include "cpu/blocks.inl"
#include "cpu/prefetch.inl"
#include "cpu/decode.inl"
#include "cpu/decode_float.inl"
#include "cpu/tile.inl"
// clang-format on

namespace mpq::cpu {
namespace {

// One chunk of tokens of a linear call.
struct LinearJob {
  const LinearArgs* args;
  float* x;  // [tokens, padded_k]: fp32 in chunk order, permuted, zero beyond K
  const Decoders* decoders;
  const uint32_t* pairs;  // Tokens::pairs, where the decoders want them
  int64_t token0;         // in args
  int64_t tokens;
  int64_t row_blocks;
  int64_t splits;  // ranges of tokens that are separate work items
};

void prepare_tokens(void* ctx, int64_t begin, int64_t end) {
  const LinearJob& job = *static_cast<const LinearJob*>(ctx);
  const LinearArgs& args = *job.args;
  const int64_t K = args.weight.K;
  const int64_t width = dtype_bytes(args.x_dtype);
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
    }
  }
}

// Tokens::pairs of a job whose x are prepared and bf16. False when a value is too small for them.
bool prepare_pairs(const LinearJob& job, uint32_t* pairs) {
  uint32_t tiny = 0;
  const int64_t words = job.tokens * padded_k(job.args->weight.K) / 2;
  for (int64_t w = 0; w < words; w += 8) {
    for (int i = 0; i < 8; ++i) {
      // Columns 2 i and 2 i + 1 of a chunk: places 4 j + q with q = i % 4, j = i / 4 and 2 more.
      uint32_t bits[2];
      for (int e = 0; e < 2; ++e) {
        __builtin_memcpy(bits + e, job.x + 2 * w + (i & 3) + 4 * (i >> 2) + 8 * e, 4);
        const uint32_t size = bits[e] & 0x7fffffff;
        tiny |= static_cast<uint32_t>(size - 1 < kSmallestPaired - 1);
      }
      pairs[w + i] = bits[0] >> 16 | bits[1];
    }
  }
  return !tiny;
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
    const Tokens x{job.x + first * padded_k(weight.K), job.pairs, padded_k(weight.K)};
    for (int64_t i = 0; i < 64 * count; ++i) sums[i] = 0.0f;
    for (int i = 0; i < block.count; ++i) {
      const Segment& segment = block.segments[i];
      if (job.tokens <= kDecodeTokens && groups_are_chunks(segment)) {
        job.decoders->of[segment.bits][count](segment, weight.scale_dtype, block.row_tile, x, sums);
      } else {
        tile_segment({segment, weight.scale_dtype, block.row_tile}, x, count, sums);
      }
    }
    finish_rows(args, block, job.token0 + first, count, sums);
  }
}

void linear_tokens(const LinearArgs& args, const Parallel& parallel, const Decoders* pairs) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(args.workspace);
  const uintptr_t aligned = (address + kAlignment - 1) / kAlignment * kAlignment;
  LinearJob job{&args, reinterpret_cast<float*>(aligned), &kDecodeFloat, nullptr, 0, 0, count_row_blocks(args.weight),
                1};
  const int64_t chunks = ceil_div(args.M, kTokenChunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    job.token0 = args.M * chunk / chunks;
    job.tokens = args.M * (chunk + 1) / chunks - job.token0;
    const int64_t most = ceil_div(job.tokens, 2 * kTokenBlock);
    const int64_t wanted = ceil_div(kFewBlocks, job.row_blocks);
    job.splits = job.tokens <= kDecodeTokens ? 1 : (wanted < most ? wanted : most);
    if (job.tokens <= kDecodeTokens) {
      prepare_tokens(&job, 0, job.tokens);
      uint32_t* words = reinterpret_cast<uint32_t*>(job.x + job.tokens * padded_k(args.weight.K));
      if (pairs && prepare_pairs(job, words)) {
        job.decoders = pairs;
        job.pairs = words;
      }
    } else {
      run(parallel, job.tokens, prepare_tokens, &job);
    }
    run(parallel, job.row_blocks * job.splits, linear_items, &job);
  }
}

struct DequantizeJob {
  const Weight* weight;
  char* out;
  DType dtype;
};

// Writes one row of `count` columns from k on: `values` are fp32 in column order.
void write_columns(const DequantizeJob& job, int64_t row, int64_t k, int64_t count, const float* values) {
  const Weight& weight = *job.weight;
  const int64_t width = dtype_bytes(job.dtype);
  char* out = job.out + row * weight.K * width;
  if (!weight.perm) return from_f32_partial(values, job.dtype, count, out + k * width);
  alignas(64) char raw[256];
  from_f32_64(values, job.dtype, raw);
  for (int64_t i = 0; i < count; ++i) {
    int32_t column;
    __builtin_memcpy(&column, weight.perm + k + i, sizeof column);
    __builtin_memcpy(out + column * width, raw + i * width, static_cast<size_t>(width));
  }
}

void dequantize_items(void* ctx, int64_t begin, int64_t end) {
  const DequantizeJob& job = *static_cast<const DequantizeJob*>(ctx);
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
          write_columns(job, block.row + n, k, count, row);
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

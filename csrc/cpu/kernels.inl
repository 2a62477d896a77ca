// linear and dequantize of one instruction set. Included after a simd header; see kernels.h.
#include "generated/layout.h"

// clang-format off: each file uses the names of those before it.
#include "cpu/codes.inl"
#include "cpu/convert.inl"
#include "cpu/decode.inl"
#include "cpu/tile.inl"
// clang-format on

namespace mpq::cpu {
namespace {

constexpr int64_t kDecodeTokens = 4;  // up to here codes are multiplied directly
constexpr int64_t kFewBlocks = 16;    // work items worth having before tokens are split among them

// 64 rows (fewer at the end) of one row band.
struct RowBlock {
  const Segment* segments;
  int count;
  int64_t row_tile;
  int64_t row;   // first row in [0, N)
  int64_t rows;  // 1..64
};

// Segments of the row band that starts at `first`.
inline int band_size(const Weight& weight, int first) {
  int next = first + 1;
  while (next < weight.num_segments && weight.segments[next].n0 == weight.segments[first].n0) ++next;
  return next - first;
}

inline int64_t count_row_blocks(const Weight& weight) {
  int64_t blocks = 0;
  for (int i = 0; i < weight.num_segments; i += band_size(weight, i)) {
    blocks += ceil_div(weight.segments[i].n1 - weight.segments[i].n0, kTileN);
  }
  return blocks;
}

inline RowBlock row_block(const Weight& weight, int64_t index) {
  int first = 0;
  for (;;) {
    const Segment& s = weight.segments[first];
    const int64_t tiles = ceil_div(s.n1 - s.n0, kTileN);
    if (index < tiles) {
      const int64_t row = s.n0 + index * kTileN;
      const int64_t left = s.n1 - row;
      return {&s, band_size(weight, first), index, row, left < kTileN ? left : kTileN};
    }
    index -= tiles;
    first += band_size(weight, first);
  }
}

inline void run(const Parallel& parallel, int64_t n, void (*task)(void*, int64_t, int64_t), void* ctx) {
  if (parallel.run) {
    parallel.run(parallel.pool, n, task, ctx);
  } else {
    task(ctx, 0, n);
  }
}

// rows[n] of a supertile from positions[8 g + 4 h + t].
MPQ_INLINE void to_row_order(const float* positions, int64_t stride, float* rows, int64_t row_stride) {
  for (int n = 0; n < 64; ++n) rows[n * row_stride] = positions[(8 * (n & 7) + 4 * (n >> 3 & 1) + (n >> 4)) * stride];
}

// One chunk of tokens of a linear call.
struct LinearJob {
  const LinearArgs* args;
  float* x;        // [tokens, padded_k]: fp32 in chunk order, permuted, zero beyond K
  int64_t token0;  // in args
  int64_t tokens;
  int64_t row_blocks;
  int64_t splits;  // ranges of tokens that are separate work items
};

// Gathers up to 64 columns of x from k on, through the permutation.
inline void gather_columns(const LinearArgs& args, const char* row, int64_t k, int64_t count, char* raw) {
  const int32_t* perm = args.weight.perm + k;
  const int64_t width = dtype_bytes(args.x_dtype);
  for (int64_t i = 0; i < count; ++i) {
    int32_t column;
    __builtin_memcpy(&column, perm + i, sizeof column);
    if (width == 4) {
      __builtin_memcpy(raw + 4 * i, row + 4 * static_cast<int64_t>(column), 4);
    } else {
      __builtin_memcpy(raw + 2 * i, row + 2 * static_cast<int64_t>(column), 2);
    }
  }
}

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
      if (args.weight.perm) {
        alignas(64) char raw[256];
        gather_columns(args, row, k, count, raw);
        to_f32_partial(raw, args.x_dtype, count, values);
      } else {
        to_f32_partial(row + k * width, args.x_dtype, count, values);
      }
      for (int c = 0; c < 64; c += 16) {
        for (int place = 0; place < 16; ++place) out[k + c + place] = values[c + column_of(place)];
      }
    }
  }
}

// y[tokens][rows of the block] from sums in position order.
void finish_rows(const LinearJob& job, const RowBlock& block, int64_t first, int64_t count, const float* sums) {
  const LinearArgs& args = *job.args;
  alignas(64) float bias[64] = {};
  if (args.bias) {
    to_f32_partial(bytes_at(args.bias, block.row * dtype_bytes(args.bias_dtype)), args.bias_dtype, block.rows, bias);
  }
  for (int64_t m = 0; m < count; ++m) {
    alignas(64) float rows[64];
    to_row_order(sums + 64 * m, 1, rows, 1);
    for (int i = 0; i < 64; i += kLanes) store(rows + i, add(load(rows + i), load(bias + i)));
    const int64_t token = job.token0 + first + m;
    char* out = static_cast<char*>(args.y) + (token * args.weight.N + block.row) * dtype_bytes(args.x_dtype);
    from_f32_partial(rows, args.x_dtype, block.rows, out);
  }
}

// Work item: one row block and one range of the job's tokens.
void linear_items(void* ctx, int64_t begin, int64_t end) {
  const LinearJob& job = *static_cast<const LinearJob*>(ctx);
  const Weight& weight = job.args->weight;
  alignas(64) float sums[kTokenChunk * 64];
  for (int64_t item = begin; item < end; ++item) {
    const RowBlock block = row_block(weight, item % job.row_blocks);
    const int64_t split = item / job.row_blocks;
    const int64_t first = job.tokens * split / job.splits;
    const int64_t count = job.tokens * (split + 1) / job.splits - first;
    const Tokens x{job.x + first * padded_k(weight.K), padded_k(weight.K)};
    for (int64_t i = 0; i < 64 * count; ++i) sums[i] = 0.0f;
    for (int i = 0; i < block.count; ++i) {
      const Segment& segment = block.segments[i];
      if (job.tokens <= kDecodeTokens && groups_are_chunks(segment)) {
        kDecodeSegment[segment.bits][count](segment, weight.scale_dtype, block.row_tile, x, sums);
      } else {
        tile_segment({segment, weight.scale_dtype, block.row_tile}, x, count, sums);
      }
    }
    finish_rows(job, block, first, count, sums);
  }
}

void linear_tokens(const LinearArgs& args, const Parallel& parallel) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(args.workspace);
  const uintptr_t aligned = (address + kAlignment - 1) / kAlignment * kAlignment;
  LinearJob job{&args, reinterpret_cast<float*>(aligned), 0, 0, count_row_blocks(args.weight), 1};
  const int64_t chunks = ceil_div(args.M, kTokenChunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    job.token0 = args.M * chunk / chunks;
    job.tokens = args.M * (chunk + 1) / chunks - job.token0;
    const int64_t most = ceil_div(job.tokens, 2 * kTokenBlock);
    const int64_t wanted = ceil_div(kFewBlocks, job.row_blocks);
    job.splits = job.tokens <= kDecodeTokens ? 1 : (wanted < most ? wanted : most);
    if (job.tokens <= kDecodeTokens) {
      prepare_tokens(&job, 0, job.tokens);
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

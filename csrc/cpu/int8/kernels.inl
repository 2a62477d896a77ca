// linear_int8 of one instruction set; see kernels.h.
#pragma once

#include <cstdint>

#include "cpu/cpu.h"
#include "cpu/int8/blocks.h"
#include "cpu/int8/decode.inl"
#include "cpu/int8/round_x.inl"
#include "cpu/int8/tile.inl"
#include "cpu/int8/tile_registers.inl"
#include "cpu/kernels.h"
#include "cpu/shared/codes.inl"
#include "cpu/shared/convert.inl"
#include "cpu/shared/frame.inl"
#include "cpu/tiles/registers.inl"

namespace mpq::cpu {
namespace {

// One chunk of tokens of a linear_int8 call.
struct Int8Job {
  const LinearArgs* args;
  const Place* places;  // of each segment's blocks in what is stored for a token
  uint32_t* words;      // [tokens, stored.chunk chunks]
  float* scales;        // [tokens, stored.block]
  float* sums;          // [tokens, stored.block]
  Place stored;
  bool spread;     // for decode
  int64_t token0;  // in args
  int64_t tokens;
  int64_t row_blocks;
  int64_t splits;  // ranges of tokens that are separate work items

  int64_t chunk_words() const { return spread ? kSpreadWords : kTokenWords; }
};

void prepare_int8(void* ctx, int64_t begin, int64_t end) {
  const Int8Job& job = *static_cast<const Int8Job*>(ctx);
  const LinearArgs& args = *job.args;
  for (int64_t m = begin; m < end; ++m) {
    const char* row = bytes_at(args.x, (job.token0 + m) * args.x_row_stride * dtype_bytes(args.x_dtype));
    uint32_t* words = job.words + m * job.stored.chunk * job.chunk_words();
    for (int i = 0; i < args.weight.num_segments; ++i) {
      if (blocks_owner(args.weight, i) != i) continue;
      const Place place = job.places[i];
      const int64_t block = m * job.stored.block + place.block;
      round_segment(args, args.weight.segments[i], row, job.spread, words + place.chunk * job.chunk_words(),
                    job.scales + block, job.sums + block);
    }
  }
}

// sums[tokens][64] += W[row tile of this segment] @ x, for words that are not spread.
template <typename Tiles>
void tile_int8(const TileSource& source, const Int8Tokens& x, int64_t tokens, ItemTiles<Tiles>& item, float* sums) {
  alignas(64) uint32_t tile[kMostChunks * 256];
  const Segment& segment = source.segment;
  const Stripe stripe = stripe_of(segment, source.row_tile);
  const Blocks blocks = blocks_of(segment);
  GroupParams params;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const Block columns = block_at(blocks, b);
    if (b % blocks.per_group == 0) load_group(segment, source.scale_dtype, source.row_tile, columns.group, params);
    kUnpackBlock[segment.bits](stripe, columns, tile);
    const Int8Tokens here{x.words + b * blocks.slots * kTokenWords, x.scales + b, x.sums + b, x.words_stride,
                          x.blocks_stride};
    const Int8Tile block{tile, 4 * columns.chunks, &params, here};
    if constexpr (Tiles::kTokens > 0) {
      if (tokens >= Tiles::kTokens) {
        multiply_tiles(item, block, tokens, sums);
        continue;
      }
    }
    multiply_rounds(block, segment.bits == 8, tokens, sums);
  }
}

// Work item: one row block and one range of the job's tokens.
template <typename Tiles>
void int8_items(void* ctx, int64_t begin, int64_t end) {
  const Int8Job& job = *static_cast<const Int8Job*>(ctx);
  const LinearArgs& args = *job.args;
  const Weight& weight = args.weight;
  const int64_t words_stride = job.stored.chunk * job.chunk_words();
  alignas(64) float sums[kTokenChunk * 64];
  for (int64_t item = begin; item < end; ++item) {
    const RowBlock block = row_block(weight, item % job.row_blocks);
    const int64_t split = item / job.row_blocks;
    const int64_t first = job.tokens * split / job.splits;
    const int64_t count = job.tokens * (split + 1) / job.splits - first;
    for (int64_t i = 0; i < 64 * count; ++i) sums[i] = 0.0f;
    ItemTiles<Tiles> tiles;
    for (int i = 0; i < block.count; ++i) {
      const Segment& segment = block.segments[i];
      const Place place = job.places[&segment - weight.segments];
      const int64_t blocks = first * job.stored.block + place.block;
      const Int8Tokens x{job.words + first * words_stride + place.chunk * job.chunk_words(), job.scales + blocks,
                         job.sums + blocks, words_stride, job.stored.block};
      const TileSource source{segment, weight.scale_dtype, block.row_tile};
      if (job.spread) {
        kDecodeInt8[segment.bits][count](source, x, sums);
      } else {
        tile_int8(source, x, count, tiles, sums);
      }
    }
    finish_rows(args, block, job.token0 + first, count, sums);
  }
}

// Lays out the workspace: places, then words, then scales and sums of as many tokens as are held at a time.
Int8Job int8_job(const LinearArgs& args) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(args.workspace);
  char* at = reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
  Place* places = reinterpret_cast<Place*>(at);
  Int8Job job{&args,
              places,
              nullptr,
              nullptr,
              nullptr,
              place_blocks(args.weight, places),
              args.M <= kDecodeTokens,
              0,
              0,
              count_row_blocks(args.weight),
              1};
  const int64_t held = args.M < kTokenChunk ? args.M : kTokenChunk;
  at += ceil_div(args.weight.num_segments * sizeof(Place), kAlignment) * kAlignment;
  job.words = reinterpret_cast<uint32_t*>(at);
  job.scales = reinterpret_cast<float*>(job.words + held * job.stored.chunk * job.chunk_words());
  job.sums = job.scales + held * job.stored.block;
  return job;
}

template <typename Tiles>
void linear_int8_tokens(const LinearArgs& args, const Parallel& parallel) {
  Int8Job job = int8_job(args);
  const int64_t chunks = ceil_div(args.M, kTokenChunk);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    job.token0 = args.M * chunk / chunks;
    job.tokens = args.M * (chunk + 1) / chunks - job.token0;
    constexpr int64_t kPass = Tiles::kTokens > 0 ? Tiles::kTokens : kTokenBlock;
    const int64_t most = ceil_div(job.tokens, 2 * kPass);  // so that no range is shorter than a pass
    const int64_t wanted = ceil_div(kFewBlocks, job.row_blocks);
    job.splits = job.spread ? 1 : (wanted < most ? wanted : most);
    if (job.spread) {
      prepare_int8(&job, 0, job.tokens);
    } else {
      run(parallel, job.tokens, prepare_int8, &job);
    }
    run(parallel, job.row_blocks * job.splits, int8_items<Tiles>, &job);
  }
}

}  // namespace
}  // namespace mpq::cpu

// The C interface: check, prepare, enqueue.

#include <algorithm>
#include <climits>
#include <cstring>

#include "check.h"
#include "generated/layout.h"
#include "include/mpq.h"
#include "launch.h"
#include "segments.h"
#include "work_list.h"

namespace mpq::cuda {

namespace {

constexpr uint32_t kMaxGridY = 65535;

int launched(int error) { return error ? MPQ_ERROR_CUDA + error : MPQ_OK; }

// Sends words to device memory as parameters of kernels, in as few launches as they need.
class TableWriter {
 public:
  TableWriter(const dev::Launch& how, void* to) : how_(how) {
    chunk_.to = static_cast<uint32_t*>(to), chunk_.count = 0;
  }
  template <class T>
  int add(const T& value) {
    static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= sizeof(TableChunk::words));
    if (chunk_.count + sizeof(T) / 4 > TableChunk::kWords) {
      if (int status = flush()) return status;
    }
    memcpy(chunk_.words + chunk_.count, &value, sizeof(T));
    chunk_.count += sizeof(T) / 4;
    return MPQ_OK;
  }
  int flush() {
    const int error = chunk_.count ? launch_table(how_, chunk_) : 0;
    chunk_.to += chunk_.count;
    chunk_.count = 0;
    return launched(error);
  }

 private:
  dev::Launch how_;
  TableChunk chunk_;
};

// Bands, then segments, then for experts the first row group of each, at `to`.
int write_table(const mpq_weight& w, const LinearLaunch& launch, const dev::Launch& how, char* to, int num_experts,
                LinearParams& params) {
  TableWriter writer(how, to);
  params.bands = reinterpret_cast<const Band*>(to);
  params.segments = reinterpret_cast<const Segment*>(to + params.num_bands * sizeof(Band));
  const int log2_rows = launch.generic ? 0 : launch.shape.log2_group_rows;
  Segment segment;
  Band band;
  for (TableReader reader(w, launch.max_unit, log2_rows); reader.more();) {
    if (!reader.next(segment, band)) continue;
    if (int status = writer.add(band)) return status;
  }
  for (TableReader reader(w, launch.max_unit, log2_rows); reader.more();) {
    reader.next(segment, band);
    if (int status = writer.add(segment)) return status;
  }
  if (num_experts) {
    const int64_t rows = w.out_features / num_experts;
    TableReader reader(w, launch.max_unit, log2_rows);
    while (reader.more()) {
      if (reader.next(segment, band) && band.n0 % rows == 0) {
        if (int status = writer.add(band.first_group)) return status;
      }
    }
    if (int status = writer.add(reader.groups())) return status;
  }
  return writer.flush();
}

// The part of the parameters that needs addresses. how: grid and stream.
int place(const mpq_linear_args& a, const LinearLaunch& launch, const dev::Launch& how, int num_experts,
          LinearParams& params) {
  char* workspace = static_cast<char*>(a.workspace);
  if (launch.workspace_bytes > a.workspace_bytes) return MPQ_ERROR_WORKSPACE;
  if ((launch.workspace_bytes && !workspace) || (!num_experts && !a.counters)) return MPQ_ERROR_NULL;
  if (reinterpret_cast<uintptr_t>(workspace) % 16 || reinterpret_cast<uintptr_t>(a.counters) % 4)
    return MPQ_ERROR_ALIGNMENT;
  params.counters = static_cast<uint32_t*>(a.counters);
  params.partials = reinterpret_cast<float*>(workspace + launch.partials_offset);
  if (!launch.table) return MPQ_OK;
  dev::Launch one = how;
  one.grid_x = one.grid_y = 1;
  one.shared_bytes = 0;
  return write_table(a.weight, launch, one, workspace, num_experts, params);
}

dev::Launch launch_of(const mpq_linear_args& a, const LinearLaunch& launch, const LinearParams& params, void* stream) {
  dev::Launch how;
  how.grid_x = launch.grid_x;
  how.grid_y = launch.grid_y;
  how.threads = launch.shape.warps * 32;
  how.shared_bytes = launch.generic ? 0 : launch.wide ? launch.map.total : params.shared.total;
  how.stream = static_cast<dev::Stream>(stream);
  how.overlap = (a.flags & MPQ_OVERLAP) != 0 && !launch.table;
  return how;
}

// x is arranged first. The product may begin with the weights meanwhile, where devices can: it is behind that kernel
// alone.
int run_wide(const mpq_linear_args& a, const mpq_device& device, const LinearLaunch& launch, dev::Launch how,
             const LinearParams& params) {
  constexpr int kOverlapCapability = 90;
  const bool bf16 = a.x_dtype == MPQ_BF16;
  char* const workspace = static_cast<char*>(a.workspace);
  const WideParams wide{params, launch.map, workspace + launch.x_offset, workspace + launch.sums_offset};
  const ArrangeParams arrange{params.in, wide.x, wide.sums, tokens_of_block(launch.map), launch.map.sums_pitch};
  if (int error = launch_arrange(bf16, how, arrange)) return launched(error);
  how.overlap = device.capability >= kOverlapCapability;
  return launched(launch_wide(bf16, how, wide));
}

int run_linear(const mpq_linear_args& a, const mpq_device& device, void* stream) {
  LinearLaunch launch;
  LinearParams params;
  if (int status = prepare_linear(a, device, launch, params)) return status;
  const dev::Launch how = launch_of(a, launch, params, stream);
  if (int status = place(a, launch, how, 0, params)) return status;
  const bool bf16 = a.x_dtype == MPQ_BF16;
  if (launch.generic) return launched(launch_generic(bf16, how, params));
  if (launch.wide) return run_wide(a, device, launch, how, params);
  return launched(launch_decode(bf16, launch.shape.token_tiles, how, params));
}

// Tokens of one launch; the grid's second dimension is limited.
mpq_linear_args part_of(const mpq_linear_args& a, int64_t begin) {
  // One token for each block is the least that any kernel has.
  mpq_linear_args part = a;
  const int64_t bytes = 2;
  part.x = static_cast<const char*>(a.x) + begin * a.x_row_stride * bytes;
  if (a.x_gate) part.x_gate = static_cast<const char*>(a.x_gate) + begin * a.x_row_stride * bytes;
  part.y = static_cast<char*>(a.y) + begin * a.y_row_stride * bytes;
  part.tokens = std::min<int64_t>(a.tokens - begin, kMaxGridY);
  return part;
}

int check_grouped(const mpq_grouped_args& a) {
  const mpq_weight& w = a.linear.weight;
  if (int status = check_linear(a.linear, a.num_experts > 0 ? w.out_features / a.num_experts : 0)) return status;
  if (a.num_experts < 1 || a.num_experts > 4096 || w.out_features % a.num_experts) return MPQ_ERROR_GROUPED;
  if (!a.offsets) return MPQ_ERROR_NULL;
  const int64_t rows = w.out_features / a.num_experts;
  for (int i = 0; i < w.num_segments; ++i) {
    const mpq_segment& s = w.segments[i];
    if (s.n0 / rows != (s.n1 - 1) / rows || !tensor_core_group(s)) return MPQ_ERROR_GROUPED;
  }
  return MPQ_OK;
}

// Prepares as for the tokens of a typical expert; full row groups, so no partial sums.
int prepare_grouped(const mpq_grouped_args& a, const mpq_device& device, LinearLaunch& launch, GroupedParams& params) {
  mpq_linear_args typical = a.linear;
  typical.tokens = std::max<int64_t>(1, ceil_div(a.linear.tokens, a.num_experts));
  if (typical.tokens > 16) typical.tokens = 32;
  if (typical.tokens <= 16) typical.tokens = typical.tokens <= 8 ? 8 : 16;
  if (int status = prepare_linear(typical, device, launch, params.linear, true)) return status;
  params.linear.in.tokens = int32_t(a.linear.tokens);
  params.linear.out.row_stride = a.linear.y_row_stride;
  params.num_experts = a.num_experts;
  params.expert_rows = int32_t(a.linear.weight.out_features / a.num_experts);
  params.offsets = a.offsets;
  params.items_before = params.linear.shared.total;
  params.linear.shared.total += uint32_t(a.num_experts + 1) * 4;
  if (int64_t{params.linear.shared.total} > device.shared_bytes) return MPQ_ERROR_DEVICE;
  launch.table = true;
  launch.workspace_bytes = params.linear.num_bands * sizeof(Band) + params.linear.num_segments * sizeof(Segment) +
                           size_t(a.num_experts + 1) * 4;
  launch.partials_offset = 0;
  launch.grid_x = uint32_t(device.multiprocessors);
  launch.grid_y = 1;
  return MPQ_OK;
}

// What kernels that only decode are told of a weight, but for its segments.
LinearParams decoding_params(const mpq_weight& weight) {
  LinearParams w{};
  w.in.perm = weight.perm;
  w.in.columns = int32_t(weight.in_features);
  w.qweight = weight.qweight;
  w.scales = weight.scales;
  w.zeros = weight.zeros;
  w.scale_dtype = weight.scale_dtype;
  w.k_tiles = int32_t(ceil_div(weight.in_features, mpq::kTileK));
  return w;
}

// Launches of as many segments as fit into the parameters `w`; a band may go on in the next one. send(row tiles of all
// bands of a launch) -> 0 or an error.
template <class Send>
int in_parts(const mpq_weight& weight, LinearParams& w, const Send& send) {
  uint32_t row_tiles = 0;
  Segment segment;
  Band band;
  for (TableReader reader(weight, 1, 0);;) {
    const bool more = reader.more(), begins = more && reader.next(segment, band);
    if (!more || w.num_segments == kInlineSegments || (begins && w.num_bands == kInlineBands)) {
      if (int error = send(row_tiles)) return launched(error);
      row_tiles = 0;
      w.num_bands = w.num_segments = 0;
    }
    if (!more) return MPQ_OK;
    if (begins || w.num_bands == 0) {
      w.inline_bands[w.num_bands++] = {band.n0, band.rows, band.row_tiles, int32_t(row_tiles), w.num_segments};
      row_tiles += uint32_t(band.row_tiles);
    }
    w.inline_segments[w.num_segments++] = segment;
  }
}

int run_dequantize(const mpq_dequantize_args& a, void* stream) {
  DequantizeParams params{decoding_params(a.weight), a.out, a.out_dtype};
  params.linear.in.vector_loads = reinterpret_cast<uintptr_t>(a.out) % 8 == 0;
  dev::Launch how;
  how.stream = static_cast<dev::Stream>(stream);
  return in_parts(a.weight, params.linear, [&](uint32_t row_tiles) {
    how.grid_x = row_tiles;
    return launch_dequantize(how, params);
  });
}

int run_embedding(const mpq_embedding_args& a, void* stream) {
  EmbeddingParams params{decoding_params(a.weight), a.ids, a.out, a.weight.out_features, a.out_dtype};
  dev::Launch how;
  how.stream = static_cast<dev::Stream>(stream);
  how.grid_x = uint32_t(a.count);
  return in_parts(a.weight, params.linear, [&](uint32_t) { return launch_embedding(how, params); });
}

int check_out(const void* out, int32_t dtype) {
  if (dtype < MPQ_F32 || dtype > MPQ_BF16) return MPQ_ERROR_DTYPE;
  return reinterpret_cast<uintptr_t>(out) % (dtype == MPQ_F32 ? 4 : 2) ? MPQ_ERROR_ALIGNMENT : MPQ_OK;
}

}  // namespace

}  // namespace mpq::cuda

using namespace mpq::cuda;

extern "C" {

uint32_t mpq_version(void) { return MPQ_VERSION; }
const char* mpq_layout_id(void) { return mpq::kLayoutId; }

const char* mpq_error_text(int status) {
  switch (status) {
    case MPQ_OK:
      return "no error";
    case MPQ_ERROR_NULL:
      return "a pointer that is needed is null";
    case MPQ_ERROR_SHAPE:
      return "out_features, in_features and num_segments must be positive, tokens not negative";
    case MPQ_ERROR_DTYPE:
      return "x must be fp16 or bf16; scales and bias fp32, fp16 or bf16";
    case MPQ_ERROR_SEGMENT:
      return "a segment has bits outside 1..8, an unknown kind of zeros, rows or columns outside the weight, a first "
             "column that is not a multiple of 64, or a group_size that does not divide its columns";
    case MPQ_ERROR_COVER:
      return "segments must tile the weight in row bands, sorted by n0, then k0";
    case MPQ_ERROR_ALIGNMENT:
      return "qweight, scales, zeros and workspace must begin at multiples of 16 bytes, everything else at multiples "
             "of "
             "its element";
    case MPQ_ERROR_STRIDE:
      return "x_row_stride must not be negative, y_row_stride not below out_features";
    case MPQ_ERROR_WORKSPACE:
      return "the workspace is smaller than mpq_workspace_size() says";
    case MPQ_ERROR_DEVICE:
      return "needs compute capability 8.0 or later, and 99 KB of shared memory for a block";
    case MPQ_ERROR_SIZE:
      return "out_features, in_features or tokens beyond 2^31, or more than 64 GB of codes";
    case MPQ_ERROR_GROUPED:
      return "experts: 1..4096 of them with equal rows, no row band across two, and groups of 16, 32, 64 n columns or "
             "a "
             "whole segment";
    default:
      break;
  }
#if defined(__CUDACC__)
  if (status >= MPQ_ERROR_CUDA) return cudaGetErrorString(static_cast<cudaError_t>(status - MPQ_ERROR_CUDA));
#endif
  return status >= MPQ_ERROR_CUDA ? "the launch failed" : "unknown error";
}

int mpq_device_query(int ordinal, mpq_device* device) {
  if (!device) return MPQ_ERROR_NULL;
#if defined(__CUDACC__)
  int major = 0, minor = 0, count = 0, shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  if (!error) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, ordinal);
  if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  if (error) return MPQ_ERROR_CUDA + static_cast<int>(error);
  *device = {ordinal, 10 * major + minor, count, shared};
  return MPQ_OK;
#else
  *device = {ordinal, 90, 5, 227 * 1024};  // few blocks, so that small weights are shared and owned
  return MPQ_OK;
#endif
}

int mpq_warmup(const mpq_device* device) {
  if (!device) return MPQ_ERROR_NULL;
  if (int status = check_device(*device)) return status;
  for (auto* load : {warmup_decode, warmup_wide, warmup_arrange, warmup_generic, warmup_grouped, warmup_dequantize,
                     warmup_embedding, warmup_table}) {
    if (int error = load()) return launched(error);
  }
  return MPQ_OK;
}

int mpq_workspace_size(const mpq_linear_args* args, const mpq_device* device, size_t* bytes) {
  if (!args || !device || !bytes) return MPQ_ERROR_NULL;
  if (int status = check_linear(*args, args->weight.out_features)) return status;
  if (int status = check_device(*device)) return status;
  LinearLaunch launch;
  LinearParams params;
  const int status = prepare_linear(part_of(*args, 0), *device, launch, params);
  *bytes = launch.workspace_bytes;
  return status;
}

int mpq_linear(const mpq_linear_args* args, const mpq_device* device, void* stream) {
  if (!args || !device) return MPQ_ERROR_NULL;
  if (int status = check_linear(*args, args->weight.out_features)) return status;
  if (int status = check_device(*device)) return status;
  for (int64_t begin = 0; begin < args->tokens; begin += kMaxGridY) {
    if (int status = run_linear(part_of(*args, begin), *device, stream)) return status;
  }
  return MPQ_OK;
}

int mpq_grouped_workspace_size(const mpq_grouped_args* args, const mpq_device* device, size_t* bytes) {
  if (!args || !device || !bytes) return MPQ_ERROR_NULL;
  if (int status = check_grouped(*args)) return status;
  if (int status = check_device(*device)) return status;
  LinearLaunch launch;
  GroupedParams params;
  const int status = prepare_grouped(*args, *device, launch, params);
  *bytes = launch.workspace_bytes;
  return status;
}

int mpq_grouped_linear(const mpq_grouped_args* args, const mpq_device* device, void* stream) {
  if (!args || !device) return MPQ_ERROR_NULL;
  if (int status = check_grouped(*args)) return status;
  if (int status = check_device(*device)) return status;
  if (args->linear.tokens == 0) return MPQ_OK;
  LinearLaunch launch;
  GroupedParams params;
  if (int status = prepare_grouped(*args, *device, launch, params)) return status;
  const mpq::dev::Launch how = launch_of(args->linear, launch, params.linear, stream);
  if (int status = place(args->linear, launch, how, args->num_experts, params.linear)) return status;
  params.expert_groups = reinterpret_cast<const int32_t*>(params.linear.segments + params.linear.num_segments);
  return launched(launch_grouped(args->linear.x_dtype == MPQ_BF16, launch.shape.token_tiles, how, params));
}

int mpq_dequantize(const mpq_dequantize_args* args, const mpq_device* device, void* stream) {
  if (!args || !device || !args->out) return MPQ_ERROR_NULL;
  if (int status = check_weight(args->weight)) return status;
  if (int status = check_device(*device)) return status;
  if (int status = check_out(args->out, args->out_dtype)) return status;
  return run_dequantize(*args, stream);
}

int mpq_embedding(const mpq_embedding_args* args, const mpq_device* device, void* stream) {
  if (!args || !device) return MPQ_ERROR_NULL;
  if (int status = check_weight(args->weight)) return status;
  if (int status = check_device(*device)) return status;
  if (args->count < 0) return MPQ_ERROR_SHAPE;
  if (args->count > INT_MAX) return MPQ_ERROR_SIZE;
  if (args->count == 0) return MPQ_OK;
  if (!args->ids || !args->out) return MPQ_ERROR_NULL;
  if (reinterpret_cast<uintptr_t>(args->ids) % 8) return MPQ_ERROR_ALIGNMENT;
  if (int status = check_out(args->out, args->out_dtype)) return status;
  return run_embedding(*args, stream);
}

}  // extern "C"

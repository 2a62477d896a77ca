// The operators on CUDA devices: a thin layer of the LibTorch stable ABI over the C interface of include/mpq.h. Checks
// tensors, owns scratch and counters, chooses between packed and dense products.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "generated/layout.h"
#include "include/mpq.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kSegmentInts = 7;  // n0, n1, k0, k1, bits, group_size, zero kind: mpq_kernels/layout.py segment_ints

// Above so many tokens W is made dense for torch's own product. From the counts of instructions and bytes, not
// measured: at 256 tokens and 8192 x 8192 the packed product is bound by mma.sync (57 us at 600 TFLOP/s), and so are
// decoding to memory and a dense product (39 + 43 us).
struct Crossover {
  int capability;
  int64_t tokens;
};
constexpr Crossover kCrossovers[] = {{80, 256}, {90, 256}};

void check_status(int status) { STD_TORCH_CHECK(status == MPQ_OK, "mpq_kernels: ", mpq_error_text(status)); }

int32_t to_dtype(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return MPQ_F32;
    case ScalarType::Half:
      return MPQ_F16;
    case ScalarType::BFloat16:
      return MPQ_BF16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

// What is asked of a device once and kept.
const mpq_device& device_info(int32_t index) {
  static std::mutex mutex;
  static std::map<int32_t, mpq_device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(index);
  if (found == known.end()) {
    mpq_device device;
    check_status(mpq_device_query(index, &device));
    found = known.emplace(index, device).first;
  }
  return found->second;
}

// Torch's current stream. The symbol is in the CUDA part of torch, which a build without CUDA does not have.
cudaStream_t current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const auto get = reinterpret_cast<Get>([] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  }());
  STD_TORCH_CHECK(get, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch has no current stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Counters for calls that may not run at the same time: one set for each stream and, because a graph may be replayed on
// any stream, one for each capture, cleared at the beginning of the graph.
Tensor counters_for(const Tensor& like, int32_t device, cudaStream_t stream) {
  struct Entry {
    std::optional<Tensor> eager, captured;
    unsigned long long capture = 0;
  };
  static std::mutex mutex;
  // Never destroyed: at exit the allocator may be gone first.
  static auto* entries = new std::map<std::pair<int32_t, cudaStream_t>, Entry>;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &capture);
  STD_TORCH_CHECK(error == cudaSuccess, "cudaStreamGetCaptureInfo: ", cudaGetErrorString(error));
  const std::lock_guard<std::mutex> lock(mutex);
  Entry& entry = (*entries)[{device, stream}];
  const bool capturing = status == cudaStreamCaptureStatusActive;
  std::optional<Tensor>& counters = capturing ? entry.captured : entry.eager;
  if (!counters || (capturing && entry.capture != capture)) {
    counters = torch::stable::new_zeros(like, std::vector<int64_t>{MPQ_COUNTER_BYTES}, ScalarType::Byte);
    if (capturing) entry.capture = capture;
  }
  return *counters;
}

// Checks the tensors of a packed weight against its table.
struct PackedView {
  std::vector<mpq_segment> segments;
  mpq_weight weight{};

  PackedView(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
             const std::optional<Tensor>& perm, const std::vector<int64_t>& table, int64_t N, int64_t K) {
    STD_TORCH_CHECK(!table.empty() && table.size() % kSegmentInts == 0, "segments must hold ", kSegmentInts,
                    " integers each, not ", table.size(), " in all");
    for (size_t i = 0; i < table.size(); i += kSegmentInts) {
      const int64_t* s = table.data() + i;
      segments.push_back({s[0], s[1], s[2], s[3], s[5], static_cast<int32_t>(s[4]), static_cast<int32_t>(s[6])});
    }
    const int32_t device = qweight.get_device_index();
    check(qweight, "qweight", ScalarType::Int, device);
    check(scales, "scales", scales.scalar_type(), device);
    weight = {N,
              K,
              qweight.data_ptr(),
              scales.data_ptr(),
              nullptr,
              nullptr,
              segments.data(),
              static_cast<int32_t>(segments.size()),
              to_dtype(scales.scalar_type(), "scales")};
    if (zeros) {
      check(*zeros, "zeros", zeros->scalar_type(), device);
      weight.zeros = zeros->data_ptr();
    }
    if (perm) {
      check(*perm, "perm", ScalarType::Int, device);
      STD_TORCH_CHECK(perm->numel() == K, "perm must have in_features=", K, " elements, not ", perm->numel());
      weight.perm = static_cast<const int32_t*>(perm->data_ptr());
    }
    check_sizes(qweight, scales, zeros);
  }

 private:
  static void check(const Tensor& tensor, const char* name, ScalarType type, int32_t device) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, " must be on CUDA device ", device);
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name, " must be one-dimensional and contiguous");
  }

  // The segments must account for every element, so that no kernel reads outside a tensor.
  void check_sizes(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros) const {
    int64_t words = 0, scale_count = 0, zero_count = 0;
    for (const mpq_segment& s : segments) {
      STD_TORCH_CHECK(s.group_size > 0 && s.n1 > s.n0 && s.k1 > s.k0, "a segment is empty or has no group_size");
      const int64_t row_tiles = (s.n1 - s.n0 + mpq::kTileN - 1) / mpq::kTileN;
      const int64_t blocks = row_tiles * ((s.k1 - s.k0) / s.group_size) * mpq::kTileN;
      words += row_tiles * ((s.k1 - s.k0 + mpq::kTileK - 1) / mpq::kTileK) * 128 * s.bits;
      scale_count += blocks;
      if (s.zero == MPQ_ZERO_NONE) continue;
      zero_count += blocks;
      STD_TORCH_CHECK(zeros, "a segment has zeros, but there is no tensor of them");
      const ScalarType type = s.zero == MPQ_ZERO_INT ? ScalarType::Byte : scales.scalar_type();
      STD_TORCH_CHECK(zeros->scalar_type() == type, "zeros have the wrong dtype");
    }
    STD_TORCH_CHECK(qweight.numel() == words, "qweight must have ", words, " words, not ", qweight.numel());
    STD_TORCH_CHECK(scales.numel() == scale_count, "scales must have ", scale_count, " elements, not ", scales.numel());
    STD_TORCH_CHECK((zeros ? zeros->numel() : 0) == zero_count, "zeros must have ", zero_count, " elements");
  }
};

// The parts of the arguments that linear and grouped_linear share. Keeps what must live until the call is enqueued.
struct Call {
  PackedView view;
  Tensor x, y;
  int32_t device_index;
  mpq_linear_args args{};

  Call(const Tensor& input, PackedView packed, const std::optional<Tensor>& bias, int64_t columns, int64_t in_features)
      : view(std::move(packed)), x(input), y(input), device_index(input.get_device_index()) {
    STD_TORCH_CHECK(x.is_cuda(), "x must be on a CUDA device");
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                    "x must be float16 or bfloat16 on CUDA devices: convert it, or run the model in one of them");
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == in_features, "x must be (..., in_features=", in_features,
                    "), its last dimension is ", x.dim() ? x.size(x.dim() - 1) : 0);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = columns;
    y = torch::stable::new_empty(x, shape);
    // Rows that lie apart are read where they are.
    const bool strided = x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= in_features;
    if (!strided) x = torch::stable::contiguous(x);
    args.weight = view.weight;
    args.x = x.data_ptr();
    args.x_row_stride = strided ? x.stride(0) : in_features;
    args.x_dtype = to_dtype(type, "x");
    args.tokens = y.numel() / columns;
    args.y = y.data_ptr();
    args.y_row_stride = columns;
    if (!bias) return;
    STD_TORCH_CHECK(bias->is_cuda() && bias->get_device_index() == device_index && bias->is_contiguous() &&
                        bias->numel() == view.weight.out_features,
                    "bias must be contiguous, on the device of x, with out_features=", view.weight.out_features,
                    " elements");
    args.bias = bias->data_ptr();
    args.bias_dtype = to_dtype(bias->scalar_type(), "bias");
  }

  Tensor scratch(size_t bytes) {
    Tensor t = torch::stable::new_empty(x, std::vector<int64_t>{static_cast<int64_t>(bytes)}, ScalarType::Byte);
    args.workspace = bytes ? t.data_ptr() : nullptr;
    args.workspace_bytes = bytes;
    return t;
  }
};

Tensor dense_linear(Call& call, const std::optional<Tensor>& bias, cudaStream_t stream) {
  const mpq_weight& w = call.view.weight;
  Tensor dense = torch::stable::new_empty(call.x, std::vector<int64_t>{w.out_features, w.in_features});
  const mpq_dequantize_args args{w, dense.data_ptr(), call.args.x_dtype};
  check_status(mpq_dequantize(&args, &device_info(call.device_index), stream));
  std::optional<Tensor> rounded;
  if (bias) rounded = torch::stable::to(*bias, call.x.scalar_type());
  std::array<StableIValue, 3> stack{torch::stable::detail::from(call.x), torch::stable::detail::from(dense),
                                    torch::stable::detail::from(rounded)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

int64_t most_packed_tokens(const mpq_device& device) {
  int64_t tokens = kCrossovers[0].tokens;
  for (const Crossover& row : kCrossovers) {
    if (row.capability <= device.capability) tokens = row.tokens;
  }
  return tokens;
}

Tensor run_linear(Call& call, const std::optional<Tensor>& bias) {
  if (call.args.tokens == 0) return call.y;
  const torch::stable::accelerator::DeviceGuard guard(call.device_index);
  const mpq_device& device = device_info(call.device_index);
  const cudaStream_t stream = current_stream(call.device_index);
  if (!call.args.x_gate && call.args.tokens > most_packed_tokens(device)) return dense_linear(call, bias, stream);
  size_t bytes = 0;
  check_status(mpq_workspace_size(&call.args, &device, &bytes));
  const Tensor counters = counters_for(call.x, call.device_index, stream), scratch = call.scratch(bytes);
  call.args.counters = counters.data_ptr();
  check_status(mpq_linear(&call.args, &device, stream));
  return call.y;
}

// x (..., K) fp16 or bf16 -> y (..., N) of the same dtype.
Tensor linear(Tensor x, Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
              std::optional<Tensor> bias, std::vector<int64_t> segments, int64_t out_features, int64_t in_features) {
  STD_TORCH_CHECK(out_features > 0 && in_features > 0, "out_features and in_features must be positive");
  Call call(x, PackedView(qweight, scales, zeros, perm, segments, out_features, in_features), bias, out_features,
            in_features);
  return run_linear(call, bias);
}

// linear(silu(gate) * up) without the launches of the activation; both (..., K), contiguous or made so.
Tensor silu_mul_linear(Tensor gate, Tensor up, Tensor qweight, Tensor scales, std::optional<Tensor> zeros,
                       std::optional<Tensor> perm, std::optional<Tensor> bias, std::vector<int64_t> segments,
                       int64_t out_features, int64_t in_features) {
  STD_TORCH_CHECK(out_features > 0 && in_features > 0, "out_features and in_features must be positive");
  STD_TORCH_CHECK(gate.sizes().equals(up.sizes()) && gate.scalar_type() == up.scalar_type() && gate.is_cuda() &&
                      gate.get_device_index() == up.get_device_index(),
                  "gate and up must have one shape, dtype and device");
  up = torch::stable::contiguous(up);
  gate = torch::stable::contiguous(gate);
  Call call(up, PackedView(qweight, scales, zeros, perm, segments, out_features, in_features), bias, out_features,
            in_features);
  call.args.x_gate = gate.data_ptr();
  return run_linear(call, bias);
}

// x (T, K), rows sorted by expert; offsets (E + 1) int32 -> y (T, out_features / E).
Tensor grouped_linear(Tensor x, Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
                      std::optional<Tensor> bias, Tensor offsets, std::vector<int64_t> segments, int64_t out_features,
                      int64_t in_features) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be (tokens, in_features)");
  STD_TORCH_CHECK(offsets.is_cuda() && offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 &&
                      offsets.is_contiguous() && offsets.numel() >= 2,
                  "offsets must be a contiguous int32 tensor of experts + 1 elements on the device of x");
  const int64_t experts = offsets.numel() - 1;
  STD_TORCH_CHECK(out_features > 0 && in_features > 0 && out_features % experts == 0, "out_features=", out_features,
                  " is not a multiple of the ", experts, " experts");
  Call call(x, PackedView(qweight, scales, zeros, perm, segments, out_features, in_features), bias,
            out_features / experts, in_features);
  STD_TORCH_CHECK(offsets.get_device_index() == call.device_index, "offsets must be on the device of x");
  if (call.args.tokens == 0) return call.y;
  const torch::stable::accelerator::DeviceGuard guard(call.device_index);
  const mpq_device& device = device_info(call.device_index);
  mpq_grouped_args args{call.args, static_cast<const int32_t*>(offsets.data_ptr()), static_cast<int32_t>(experts)};
  size_t bytes = 0;
  check_status(mpq_grouped_workspace_size(&args, &device, &bytes));
  const Tensor scratch = call.scratch(bytes);
  args.linear = call.args;
  check_status(mpq_grouped_linear(&args, &device, current_stream(call.device_index)));
  return call.y;
}

// -> W [N, K] in the original column order.
Tensor dequantize(Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
                  std::vector<int64_t> segments, int64_t out_features, int64_t in_features, ScalarType dtype) {
  STD_TORCH_CHECK(out_features > 0 && in_features > 0, "out_features and in_features must be positive");
  const PackedView view(qweight, scales, zeros, perm, segments, out_features, in_features);
  const int32_t index = qweight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  Tensor out = torch::stable::new_empty(qweight, std::vector<int64_t>{out_features, in_features}, dtype);
  const mpq_dequantize_args args{view.weight, out.data_ptr(), to_dtype(dtype, "dtype")};
  check_status(mpq_dequantize(&args, &device_info(index), current_stream(index)));
  return out;
}

// Loads every kernel onto a device; returns its compute capability.
int64_t cuda_warmup(int64_t index) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(index));
  const mpq_device& device = device_info(static_cast<int32_t>(index));
  check_status(mpq_warmup(&device));
  return device.capability;
}

std::string cuda_layout_id() { return mpq_layout_id(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mpq, m) {
  m.def("cuda_warmup(int device) -> int");
  m.def(
      "silu_mul_linear(Tensor gate, Tensor up, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? "
      "bias, "
      "int[] segments, int out_features, int in_features) -> Tensor");
  m.def("cuda_layout_id() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mpq, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("silu_mul_linear", TORCH_BOX(&silu_mul_linear));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

STABLE_TORCH_LIBRARY_IMPL(mpq, CompositeExplicitAutograd, m) {
  m.impl("cuda_warmup", TORCH_BOX(&cuda_warmup));
  m.impl("cuda_layout_id", TORCH_BOX(&cuda_layout_id));
}

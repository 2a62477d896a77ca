// The operators on CUDA devices: a thin layer of the LibTorch stable ABI over the C interface of include/mpq.h. Checks
// tensors, owns scratch and counters, chooses between packed and dense products.

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
#include <tuple>
#include <utility>
#include <vector>

#include "generated/layout.h"
#include "include/mpq.h"
#include "torch/counters.h"
#include "torch/device.h"
#include "torch/operands.h"
#include "torch/schemas.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace device = mpq::device;

// Above so many tokens W is made dense for torch's own product. Modelled, not measured, at 8192 x 8192 on an H200: the
// packed product takes 65 us at 4 bits and 90 us at 8 for 65 to 128 tokens, 93 and 128 us for 129 to 192; decoding to
// memory and a dense product 73 and 80 us, which is their bytes at 4.3 TB/s and two steps of a graph.
struct Crossover {
  int capability;
  int64_t tokens;
};
constexpr Crossover kCrossovers[] = {{80, 128}, {90, 128}};

void check_status(int status) { STD_TORCH_CHECK(status == MPQ_OK, "mpq_kernels: ", mpq_error_text(status)); }

// What is asked of a device once and kept.
const mpq_device& device_info(int32_t index) {
  static std::mutex mutex;
  static std::map<int32_t, mpq_device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(index);
  if (found == known.end()) {
    mpq_device info;
    check_status(mpq_device_query(index, &info));
    found = known.emplace(index, info).first;
  }
  return found->second;
}

// Never destroyed: a graph may return its counters while the process ends.
auto* const counter_sets = new mpq::CounterSets<device::Machine, MPQ_COUNTER_BYTES>;

// A packed weight whose tensors have been checked, as the C interface takes it.
struct PackedView {
  std::vector<mpq_segment> segments;
  mpq_weight weight{};

  PackedView(const mpq::PackedTensors& packed, const mpq::Place& place) {
    check_packed(packed, place);
    segments.reserve(packed.table.size() / mpq::kSegmentInts);
    for_each_segment(packed, [&](const mpq::PlacedSegment& s) {
      segments.push_back({s.n0, s.n1, s.k0, s.k1, s.group_size, s.bits, s.zero_kind});
    });
    weight.out_features = packed.N;
    weight.in_features = packed.K;
    weight.qweight = packed.qweight.data_ptr();
    weight.scales = packed.scales.data_ptr();
    weight.zeros = packed.zeros ? packed.zeros->data_ptr() : nullptr;
    weight.perm = packed.perm ? static_cast<const int32_t*>(packed.perm->data_ptr()) : nullptr;
    weight.segments = segments.data();
    weight.num_segments = static_cast<int32_t>(segments.size());
    weight.scale_dtype = mpq::to_dtype(packed.scales.scalar_type(), "scales");
  }
};

// Where the operands of a call must be: on the device of one of them.
mpq::Place place_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(device::on_device(tensor), name, " must be on a CUDA device");
  return device::place_of(tensor);
}

// The parts of the arguments that linear and grouped_linear share. Keeps what must live until the call is enqueued.
struct Call {
  mpq::Place place;
  PackedView view;
  Tensor x, y;
  mpq_linear_args args{};

  Call(const Tensor& input, const mpq::PackedTensors& packed, const std::optional<Tensor>& bias, int64_t columns)
      : place(place_of(input, "x")), view(packed, place), x(input), y(input) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                    "x must be float16 or bfloat16 on CUDA devices: convert it, or run the model in one of them");
    mpq::check_x(x, packed.K);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = columns;
    y = torch::stable::new_empty(x, shape);
    args.weight = view.weight;
    args.x_row_stride = mpq::row_stride(x, packed.K);
    args.x = x.data_ptr();
    args.x_dtype = mpq::to_dtype(type, "x");
    args.tokens = y.numel() / columns;
    args.y = y.data_ptr();
    args.y_row_stride = columns;
    if (!bias) return;
    mpq::check_bias(*bias, packed.N, place);
    args.bias = bias->data_ptr();
    args.bias_dtype = mpq::to_dtype(bias->scalar_type(), "bias");
  }

  Tensor scratch(size_t bytes) {
    Tensor t = torch::stable::new_empty(x, std::vector<int64_t>{static_cast<int64_t>(bytes)}, ScalarType::Byte);
    args.workspace = bytes ? t.data_ptr() : nullptr;
    args.workspace_bytes = bytes;
    return t;
  }
};

Tensor dense_linear(Call& call, const std::optional<Tensor>& bias, device::Stream stream) {
  const mpq_weight& w = call.view.weight;
  Tensor dense = torch::stable::new_empty(call.x, std::vector<int64_t>{w.out_features, w.in_features});
  const mpq_dequantize_args args{w, dense.data_ptr(), call.args.x_dtype};
  check_status(mpq_dequantize(&args, &device_info(call.place.index), stream));
  std::optional<Tensor> rounded;
  if (bias) rounded = torch::stable::to(*bias, call.x.scalar_type());
  std::array<StableIValue, 3> stack{torch::stable::detail::from(call.x), torch::stable::detail::from(dense),
                                    torch::stable::detail::from(rounded)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

int64_t most_packed_tokens(const mpq_device& info) {
  int64_t tokens = kCrossovers[0].tokens;
  for (const Crossover& row : kCrossovers) {
    if (row.capability <= info.capability) tokens = row.tokens;
  }
  return tokens;
}

Tensor run_linear(Call& call, const std::optional<Tensor>& bias) {
  if (call.args.tokens == 0) return call.y;
  const device::DeviceGuard guard(call.place.index);
  const mpq_device& info = device_info(call.place.index);
  const device::Stream stream = device::current_stream(call.place.index);
  if (call.args.tokens > most_packed_tokens(info)) return dense_linear(call, bias, stream);
  size_t bytes = 0;
  check_status(mpq_workspace_size(&call.args, &info, &bytes));
  const Tensor scratch = call.scratch(bytes);
  call.args.counters = counter_sets->of(call.place.index, stream);
  check_status(mpq_linear(&call.args, &info, stream));
  return call.y;
}

// x (..., K) fp16 or bf16 -> y (..., N) of the same dtype.
Tensor linear(Tensor x, Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
              std::optional<Tensor> bias, std::vector<int64_t> segments, int64_t out_features, int64_t in_features) {
  Call call(x, {qweight, scales, zeros, perm, segments, out_features, in_features}, bias, out_features);
  return run_linear(call, bias);
}

Tensor silu_mul(const Tensor& gate, const Tensor& up) {
  std::array<StableIValue, 1> silu{torch::stable::detail::from(gate)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::silu", "", silu.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, 2> product{silu[0], torch::stable::detail::from(up)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", product.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(product[0]);
}

// linear(silu(gate) * up) without the launches of the activation; both (..., K), contiguous or made so.
Tensor silu_mul_linear(Tensor gate, Tensor up, Tensor qweight, Tensor scales, std::optional<Tensor> zeros,
                       std::optional<Tensor> perm, std::optional<Tensor> bias, std::vector<int64_t> segments,
                       int64_t out_features, int64_t in_features) {
  STD_TORCH_CHECK(gate.sizes().equals(up.sizes()) && gate.scalar_type() == up.scalar_type() &&
                      device::on_device(gate) && device::index_of(gate) == device::index_of(up),
                  "gate and up must have one shape, dtype and device");
  up = torch::stable::contiguous(up);
  gate = torch::stable::contiguous(gate);
  const mpq::Place place = place_of(up, "up");
  if (up.dim() && up.size(-1) > 0 && up.numel() / up.size(-1) > most_packed_tokens(device_info(place.index))) {
    // The dense product takes one x; the same two operations, each rounded to its dtype.
    return linear(silu_mul(gate, up), qweight, scales, zeros, perm, bias, segments, out_features, in_features);
  }
  Call call(up, {qweight, scales, zeros, perm, segments, out_features, in_features}, bias, out_features);
  call.args.x_gate = gate.data_ptr();
  return run_linear(call, bias);
}

// x (T, K), rows sorted by expert; offsets (E + 1) int32 -> y (T, out_features / E).
Tensor grouped_linear(Tensor x, Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
                      std::optional<Tensor> bias, Tensor offsets, std::vector<int64_t> segments, int64_t out_features,
                      int64_t in_features) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be (tokens, in_features)");
  const int64_t experts = mpq::check_offsets(offsets, out_features, place_of(x, "x"));
  Call call(x, {qweight, scales, zeros, perm, segments, out_features, in_features}, bias, out_features / experts);
  if (call.args.tokens == 0) return call.y;
  const device::DeviceGuard guard(call.place.index);
  const mpq_device& info = device_info(call.place.index);
  mpq_grouped_args args{call.args, static_cast<const int32_t*>(offsets.data_ptr()), static_cast<int32_t>(experts)};
  size_t bytes = 0;
  check_status(mpq_grouped_workspace_size(&args, &info, &bytes));
  const Tensor scratch = call.scratch(bytes);
  args.linear = call.args;
  check_status(mpq_grouped_linear(&args, &info, device::current_stream(call.place.index)));
  return call.y;
}

// -> W [N, K] in the original column order.
Tensor dequantize(Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
                  std::vector<int64_t> segments, int64_t out_features, int64_t in_features, ScalarType dtype) {
  const mpq::Place place = place_of(qweight, "qweight");
  const PackedView view({qweight, scales, zeros, perm, segments, out_features, in_features}, place);
  const device::DeviceGuard guard(place.index);
  Tensor out = torch::stable::new_empty(qweight, std::vector<int64_t>{out_features, in_features}, dtype);
  const mpq_dequantize_args args{view.weight, out.data_ptr(), mpq::to_dtype(dtype, "dtype")};
  check_status(mpq_dequantize(&args, &device_info(place.index), device::current_stream(place.index)));
  return out;
}

// ids (...) -> rows (..., K) of what dequantize gives.
Tensor embedding(Tensor ids, Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
                 std::vector<int64_t> segments, int64_t out_features, int64_t in_features, ScalarType dtype) {
  const mpq::Place place = place_of(qweight, "qweight");
  const PackedView view({qweight, scales, zeros, perm, segments, out_features, in_features}, place);
  const device::DeviceGuard guard(place.index);
  const Tensor rows = mpq::row_ids(ids, place);
  Tensor out = torch::stable::new_empty(qweight, mpq::rows_shape(ids, in_features), dtype);
  const mpq_embedding_args args{view.weight, static_cast<const int64_t*>(rows.data_ptr()), rows.numel(), out.data_ptr(),
                                mpq::to_dtype(dtype, "dtype")};
  check_status(mpq_embedding(&args, &device_info(place.index), device::current_stream(place.index)));
  return out;
}

// Loads every kernel onto a device; returns its compute capability.
int64_t cuda_warmup(int64_t index) {
  const device::DeviceGuard guard(static_cast<int32_t>(index));
  const mpq_device& info = device_info(static_cast<int32_t>(index));
  check_status(mpq_warmup(&info));
  return info.capability;
}

std::string cuda_layout_id() { return mpq_layout_id(); }

// CUDA versions of the runtime in this library and of the driver, 1000 major + 10 minor; asks no device.
std::tuple<int64_t, int64_t> cuda_versions() {
  const device::Versions found = device::versions();
  return {found.runtime, found.driver};
}

}  // namespace

#if defined(MPQ_SIM)
STABLE_TORCH_LIBRARY(mpq_simulated, m) {
  m.def(mpq::schemas::kLinear);
  m.def(mpq::schemas::kGroupedLinear);
  m.def(mpq::schemas::kDequantize);
  m.def(mpq::schemas::kEmbedding);
  m.def(mpq::schemas::kSiluMulLinear);
}
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(MPQ_NAMESPACE, m) {
  m.def("cuda_warmup(int device) -> int");
  m.def("cuda_layout_id() -> str");
  m.def("cuda_versions() -> (int, int)");
}

STABLE_TORCH_LIBRARY_IMPL(MPQ_NAMESPACE, MPQ_KEY, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("silu_mul_linear", TORCH_BOX(&silu_mul_linear));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("embedding", TORCH_BOX(&embedding));
}

STABLE_TORCH_LIBRARY_IMPL(MPQ_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_warmup", TORCH_BOX(&cuda_warmup));
  m.impl("cuda_layout_id", TORCH_BOX(&cuda_layout_id));
  m.impl("cuda_versions", TORCH_BOX(&cuda_versions));
}

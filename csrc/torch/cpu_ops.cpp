// Torch operators over the CPU kernels, through the LibTorch stable ABI: one binary for torch 2.11 and later.
// This file only checks tensors and turns them into pointers.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/cpu.h"
#include "generated/layout.h"
#include "torch/isa.h"
#include "torch/operands.h"
#include "torch/schemas.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cpu = mpq::cpu;
using mpq::current_isa;

const mpq::Place kCpu{true, 0};

// Torch's own thread pool, so that the threads of the model and of these kernels never compete.
cpu::Parallel torch_pool(int64_t work) {
  if (work < cpu::kSerialWork) return {nullptr, nullptr};
  return {[](void*, int64_t n, void (*task)(void*, int64_t, int64_t), void* ctx) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { task(ctx, begin, end); });
          },
          nullptr};
}

cpu::DType to_dtype(ScalarType type, const char* name) { return static_cast<cpu::DType>(mpq::to_dtype(type, name)); }

// perm [K]: packed column j is column perm[j] of x, which has K.
const int32_t* check_perm(const Tensor& perm, int64_t K) {
  const auto* values = static_cast<const int32_t*>(perm.data_ptr());
  uint32_t largest = 0;  // negative values are large ones
  for (int64_t k = 0; k < K; ++k) largest = std::max(largest, static_cast<uint32_t>(values[k]));
  STD_TORCH_CHECK(largest < K, "perm has a value outside 0..", K - 1);
  return values;
}

// Pointers of a packed weight whose tensors have been checked.
struct WeightView {
  std::vector<cpu::Segment> segments;
  cpu::Weight weight{};

  explicit WeightView(const mpq::PackedTensors& packed) {
    check_packed(packed, kCpu);
    weight.scale_dtype = to_dtype(packed.scales.scalar_type(), "scales");
    if (packed.perm) weight.perm = check_perm(*packed.perm, packed.K);
    const auto* words = static_cast<const uint32_t*>(packed.qweight.data_ptr());
    const auto* scales = static_cast<const char*>(packed.scales.data_ptr());
    const auto* zeros = packed.zeros ? static_cast<const char*>(packed.zeros->data_ptr()) : nullptr;
    const int64_t scale_bytes = packed.scales.element_size(),
                  zero_bytes = packed.zeros ? packed.zeros->element_size() : 0;
    segments.reserve(packed.table.size() / mpq::kSegmentInts);
    for_each_segment(packed, [&](const mpq::PlacedSegment& s) {
      cpu::Segment out{s.n0, s.n1, s.k0, s.k1, s.bits, s.group_size, s.zero_kind, {}, nullptr, nullptr};
      for (int p = 0; p < mpq::kPlaneCount[s.bits]; ++p) out.planes[p] = words + s.planes[p];
      out.scales = scales + s.scales * scale_bytes;
      if (mpq::stores_zeros(s.zero_kind)) out.zeros = zeros + s.zeros * zero_bytes;
      segments.push_back(out);
    });
    weight.N = packed.N;
    weight.K = packed.K;
    weight.segments = segments.data();
    weight.num_segments = static_cast<int>(segments.size());
  }
};

void check_status(int status) { STD_TORCH_CHECK(status == 0, cpu::error_text(status)); }

// One of the two products of cpu.h.
struct Product {
  size_t (*workspace_bytes)(const cpu::LinearArgs& args);
  int (*run)(const cpu::LinearArgs& args, cpu::Isa isa, const cpu::Parallel& parallel);
};

// A tensor of so many bytes as the workspace of `args`.
Tensor give_workspace(const Tensor& like, size_t bytes, cpu::LinearArgs& args) {
  const int64_t floats = static_cast<int64_t>(bytes / sizeof(float)) + 1;
  Tensor held = torch::stable::new_empty(like, std::vector<int64_t>{floats}, ScalarType::Float);
  args.workspace = held.data_ptr();
  args.workspace_bytes = bytes;
  return held;
}

constexpr Product kExact{cpu::linear_workspace_bytes, cpu::linear};
constexpr Product kInt8{cpu::linear_int8_workspace_bytes, cpu::linear_int8};

// x (..., K) -> y (..., N), same dtype.
template <const Product& product>
Tensor linear(Tensor x, Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
              std::optional<Tensor> bias, std::vector<int64_t> segments, int64_t out_features, int64_t in_features) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU, like the weight");
  mpq::check_x(x, in_features);
  const WeightView view({qweight, scales, zeros, perm, segments, out_features, in_features});
  cpu::LinearArgs args{};
  args.x_dtype = to_dtype(x.scalar_type(), "x");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor y = torch::stable::new_empty(x, shape);
  args.M = y.numel() / out_features;
  if (args.M == 0) return y;
  args.x_row_stride = mpq::row_stride(x, in_features);
  args.x = x.data_ptr();
  args.weight = view.weight;
  if (bias) {
    mpq::check_bias(*bias, out_features, kCpu);
    args.bias = bias->data_ptr();
    args.bias_dtype = to_dtype(bias->scalar_type(), "bias");
  }
  args.y = y.data_ptr();
  const Tensor workspace = give_workspace(x, product.workspace_bytes(args), args);
  check_status(product.run(args, current_isa(), torch_pool(args.M * in_features * out_features)));
  return y;
}

// The segments of a stacked weight, each with its rows counted from the first row of its expert: expert e is a weight
// of its own with the segments first[e]..first[e + 1], over the same words, scales and zeros.
struct ExpertSegments {
  std::vector<cpu::Segment> segments;
  std::vector<int> first;

  ExpertSegments(std::vector<cpu::Segment> stacked, int64_t experts, int64_t rows) : segments(std::move(stacked)) {
    first.reserve(experts + 1);
    for (int i = 0; i < static_cast<int>(segments.size()); ++i) {
      cpu::Segment& s = segments[i];
      const int64_t expert = s.n0 / rows;
      STD_TORCH_CHECK(s.n1 <= (expert + 1) * rows, "segment rows ", s.n0, "..", s.n1, " lie in two experts of ", rows,
                      " rows each; a row band belongs to one expert");
      if (expert == static_cast<int64_t>(first.size())) first.push_back(i);
      s.n0 -= expert * rows;
      s.n1 -= expert * rows;
    }
    first.push_back(static_cast<int>(segments.size()));
  }

  cpu::Weight weight(cpu::Weight stacked, int64_t expert, int64_t rows) const {
    stacked.N = rows;
    stacked.segments = segments.data() + first[expert];
    stacked.num_segments = first[expert + 1] - first[expert];
    return stacked;
  }
};

// Rows offsets[e]..offsets[e + 1] of the T rows of x belong to expert e. Returns the most rows that one expert has.
int64_t most_rows(const Tensor& offsets, int64_t experts, int64_t T) {
  const auto* values = static_cast<const int32_t*>(offsets.data_ptr());
  STD_TORCH_CHECK(values[0] == 0, "offsets must begin with 0, not ", values[0]);
  int64_t most = 0;
  for (int64_t e = 0; e < experts; ++e) {
    STD_TORCH_CHECK(values[e] <= values[e + 1], "offsets must not decrease, and offsets[", e + 1, "]=", values[e + 1],
                    " follows ", values[e]);
    most = std::max<int64_t>(most, values[e + 1] - values[e]);
  }
  STD_TORCH_CHECK(values[experts] == T, "offsets must end with the rows of x, ", T, ", not ", values[experts]);
  return most;
}

// x (T, K), its rows sorted by expert; a weight of E * N rows, N for each expert -> y (T, N), same dtype.
template <const Product& product>
Tensor grouped_linear(Tensor x, Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
                      std::optional<Tensor> bias, Tensor offsets, std::vector<int64_t> segments, int64_t out_features,
                      int64_t in_features) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU, like the weight");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == in_features, "x must be (T, in_features=", in_features, ")");
  const WeightView view({qweight, scales, zeros, perm, segments, out_features, in_features});
  cpu::LinearArgs args{};
  args.x_dtype = to_dtype(x.scalar_type(), "x");
  const int64_t experts = mpq::check_offsets(offsets, out_features, kCpu), rows = out_features / experts;
  args.M = most_rows(offsets, experts, x.size(0));
  args.weight = view.weight;
  if (bias) {
    mpq::check_bias(*bias, out_features, kCpu);
    args.bias_dtype = to_dtype(bias->scalar_type(), "bias");
  }
  const ExpertSegments stack(view.segments, experts, rows);
  Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), rows});
  if (args.M == 0) return y;
  args.x_row_stride = mpq::row_stride(x, in_features);
  const auto* from = static_cast<const int32_t*>(offsets.data_ptr());
  size_t most = 0;  // all experts use one workspace in turn
  for (int64_t e = 0; e < experts; ++e) {
    args.M = from[e + 1] - from[e];
    args.weight = stack.weight(view.weight, e, rows);
    most = std::max(most, product.workspace_bytes(args));
  }
  const Tensor workspace = give_workspace(x, most, args);
  for (int64_t e = 0; e < experts; ++e) {
    args.M = from[e + 1] - from[e];
    if (args.M == 0) continue;
    args.weight = stack.weight(view.weight, e, rows);
    args.x = static_cast<const char*>(x.data_ptr()) + from[e] * args.x_row_stride * x.element_size();
    args.y = static_cast<char*>(y.data_ptr()) + from[e] * rows * y.element_size();
    if (bias) args.bias = static_cast<const char*>(bias->data_ptr()) + e * rows * bias->element_size();
    check_status(product.run(args, current_isa(), torch_pool(args.M * in_features * rows)));
  }
  return y;
}

// -> W [N, K] in the original column order.
Tensor dequantize(Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
                  std::vector<int64_t> segments, int64_t out_features, int64_t in_features, ScalarType dtype) {
  const WeightView view({qweight, scales, zeros, perm, segments, out_features, in_features});
  const cpu::DType out_dtype = to_dtype(dtype, "dtype");
  Tensor out = torch::stable::new_empty(qweight, std::vector<int64_t>{out_features, in_features}, dtype);
  check_status(
      cpu::dequantize(view.weight, out.data_ptr(), out_dtype, current_isa(), torch_pool(in_features * out_features)));
  return out;
}

// ids (...) -> rows (..., K) of what dequantize gives.
Tensor embedding(Tensor ids, Tensor qweight, Tensor scales, std::optional<Tensor> zeros, std::optional<Tensor> perm,
                 std::vector<int64_t> segments, int64_t out_features, int64_t in_features, ScalarType dtype) {
  const WeightView view({qweight, scales, zeros, perm, segments, out_features, in_features});
  const cpu::DType out_dtype = to_dtype(dtype, "dtype");
  const Tensor rows = mpq::row_ids(ids, kCpu);
  const int64_t count = rows.numel();
  const auto* values = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(0 <= values[i] && values[i] < out_features, "index out of range: ids hold ", values[i],
                    ", and the embedding has rows 0..", out_features - 1);
  }
  Tensor out = torch::stable::new_empty(qweight, mpq::rows_shape(ids, in_features), dtype);
  check_status(cpu::embedding(view.weight, values, count, out.data_ptr(), out_dtype, torch_pool(count * in_features)));
  return out;
}

std::string layout_id() { return mpq::kLayoutId; }

}  // namespace

STABLE_TORCH_LIBRARY(mpq, m) {
  m.def(mpq::schemas::kLinear);
  m.def(mpq::schemas::kGroupedLinear);
  m.def(mpq::schemas::kLinearInt8);
  m.def(mpq::schemas::kGroupedLinearInt8);
  m.def(mpq::schemas::kDequantize);
  m.def(mpq::schemas::kEmbedding);
  m.def(mpq::schemas::kSiluMulLinear);  // no kernel here: the CUDA library has one
  m.def("layout_id() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mpq, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear<kExact>));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear<kExact>));
  m.impl("linear_int8", TORCH_BOX(&linear<kInt8>));
  m.impl("grouped_linear_int8", TORCH_BOX(&grouped_linear<kInt8>));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("embedding", TORCH_BOX(&embedding));
}

STABLE_TORCH_LIBRARY_IMPL(mpq, CompositeExplicitAutograd, m) { m.impl("layout_id", TORCH_BOX(&layout_id)); }

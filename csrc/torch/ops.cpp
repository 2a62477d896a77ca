// Torch operators over the CPU kernels, through the LibTorch stable ABI: one binary for torch 2.11 and later.
// This file only checks tensors and turns them into pointers; the schemas are stated here once, their fakes stand in
// mpq_kernels/ops.py.

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

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cpu = mpq::cpu;
using mpq::current_isa;

constexpr int64_t kSegmentInts = 7;  // n0, n1, k0, k1, bits, group_size, zero kind: mpq_kernels/layout.py segment_ints

// Below this many multiplications waking a second thread costs more than it saves. One against two threads, 4 bits, M =
// 1, 2-core AMD EPYC: 768 x 768 18.6 and 22.5 us, 1024 x 1024 27.6 and 18.1 us; this is between the two.
constexpr int64_t kSerialWork = 3 << 18;

// Torch's own thread pool, so that the threads of the model and of these kernels never compete.
cpu::Parallel torch_pool(int64_t work) {
  if (work < kSerialWork) return {nullptr, nullptr};
  return {[](void*, int64_t n, void (*task)(void*, int64_t, int64_t), void* ctx) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { task(ctx, begin, end); });
          },
          nullptr};
}

cpu::DType to_dtype(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return cpu::DType::kF32;
    case ScalarType::Half:
      return cpu::DType::kF16;
    case ScalarType::BFloat16:
      return cpu::DType::kBF16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// Pointers of a packed weight, checked against the segment table so that no kernel reads outside a tensor.
struct WeightView {
  std::vector<cpu::Segment> segments;
  cpu::Weight weight{};

  WeightView(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
             const std::optional<Tensor>& perm, const std::vector<int64_t>& table, int64_t N, int64_t K) {
    STD_TORCH_CHECK(N > 0 && K > 0, "out_features and in_features must be positive, not ", N, " and ", K);
    STD_TORCH_CHECK(!table.empty() && table.size() % kSegmentInts == 0, "segments must hold ", kSegmentInts,
                    " integers each, not ", table.size(), " in all");
    check(qweight, "qweight", ScalarType::Int);
    check(scales, "scales", scales.scalar_type());
    weight.scale_dtype = to_dtype(scales.scalar_type(), "scales");
    if (zeros) check(*zeros, "zeros", zeros->scalar_type());
    if (perm) {
      check(*perm, "perm", ScalarType::Int);
      STD_TORCH_CHECK(perm->numel() == K, "perm must have in_features=", K, " elements, not ", perm->numel());
      weight.perm = static_cast<const int32_t*>(perm->data_ptr());
      uint32_t largest = 0;  // negative values are large ones
      for (int64_t k = 0; k < K; ++k) largest = std::max(largest, static_cast<uint32_t>(weight.perm[k]));
      STD_TORCH_CHECK(largest < K, "perm has a value outside 0..", K - 1);
    }
    place_segments(qweight, scales, zeros, table, N, K);
    weight.N = N;
    weight.K = K;
    weight.segments = segments.data();
    weight.num_segments = static_cast<int>(segments.size());
  }

 private:
  static void check(const Tensor& tensor, const char* name, ScalarType type) {
    STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU, like x");
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
    STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name, " must be one-dimensional and contiguous");
  }

  static void check_segment(const cpu::Segment& s, int64_t N, int64_t K, const cpu::Segment* previous) {
    STD_TORCH_CHECK(s.bits >= 1 && s.bits <= 8, "bits=", s.bits, " is not 1..8");
    STD_TORCH_CHECK(
        0 <= s.n0 && s.n0 < s.n1 && s.n1 <= N && 0 <= s.k0 && s.k0 < s.k1 && s.k1 <= K && s.k0 % mpq::kTileK == 0,
        "segment rows ", s.n0, "..", s.n1, ", columns ", s.k0, "..", s.k1, " do not fit ", N, " x ", K);
    STD_TORCH_CHECK(s.group_size > 0 && (s.k1 - s.k0) % s.group_size == 0, "group_size=", s.group_size,
                    " does not divide the ", s.k1 - s.k0, " columns of a segment");
    STD_TORCH_CHECK(s.zero_kind >= mpq::kZeroNone && s.zero_kind <= mpq::kZeroFloat, "unknown kind of zeros");
    const bool same_band = previous && previous->n0 == s.n0 && previous->n1 == s.n1 && previous->k1 == s.k0;
    const bool next_band = s.k0 == 0 && (previous ? previous->n1 == s.n0 && previous->k1 == K : s.n0 == 0);
    STD_TORCH_CHECK(same_band || next_band, "segments must tile the weight in row bands, sorted by n0, then k0");
  }

  void place_segments(const Tensor& qweight, const Tensor& scales, const std::optional<Tensor>& zeros,
                      const std::vector<int64_t>& table, int64_t N, int64_t K) {
    const auto* words = static_cast<const uint32_t*>(qweight.data_ptr());
    const auto* scale = static_cast<const char*>(scales.data_ptr());
    const auto* zero = zeros ? static_cast<const char*>(zeros->data_ptr()) : nullptr;
    int64_t word = 0, scale_count = 0, zero_count = 0;
    segments.reserve(table.size() / kSegmentInts);
    for (size_t i = 0; i < table.size(); i += kSegmentInts) {
      cpu::Segment s{table[i],
                     table[i + 1],
                     table[i + 2],
                     table[i + 3],
                     static_cast<int>(table[i + 4]),
                     table[i + 5],
                     static_cast<int>(table[i + 6]),
                     {},
                     nullptr,
                     nullptr};
      check_segment(s, N, K, segments.empty() ? nullptr : &segments.back());
      const int64_t rows = ceil_div(s.n1 - s.n0, mpq::kTileN), cols = ceil_div(s.k1 - s.k0, mpq::kTileK);
      for (int p = 0; p < mpq::kPlaneCount[s.bits]; ++p) {
        s.planes[p] = words + word;
        word += rows * cols * 128 * mpq::kPlaneWidth[s.bits][p];
      }
      const int64_t count = (s.k1 - s.k0) / s.group_size * rows * mpq::kTileN;
      s.scales = scale + scale_count * scales.element_size();
      scale_count += count;
      if (s.zero_kind != mpq::kZeroNone) {
        STD_TORCH_CHECK(zeros.has_value(), "segments name zeros, but none were given");
        STD_TORCH_CHECK(
            zeros->scalar_type() == (s.zero_kind == mpq::kZeroInt ? ScalarType::Byte : scales.scalar_type()),
            "integer zeros must be uint8, float zeros must have the dtype of the scales");
        s.zeros = zero + zero_count * zeros->element_size();
        zero_count += count;
      }
      segments.push_back(s);
    }
    STD_TORCH_CHECK(segments.back().n1 == N && segments.back().k1 == K, "segments do not cover ", N, " x ", K);
    STD_TORCH_CHECK(qweight.numel() == word, "qweight must have ", word, " words, not ", qweight.numel());
    STD_TORCH_CHECK(scales.numel() == scale_count, "scales must have ", scale_count, " elements, not ", scales.numel());
    STD_TORCH_CHECK((zeros ? zeros->numel() : 0) == zero_count, "zeros must have ", zero_count, " elements, not ",
                    zeros ? zeros->numel() : 0);
  }
};

void check_bias(const Tensor& bias, int64_t out_features) {
  STD_TORCH_CHECK(bias.is_cpu() && bias.is_contiguous() && bias.numel() == out_features,
                  "bias must be contiguous on the CPU with out_features=", out_features, " elements");
}

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
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == in_features, "x must be (..., in_features=", in_features,
                  "), its last dimension is ", x.dim() ? x.size(x.dim() - 1) : 0);
  const WeightView view(qweight, scales, zeros, perm, segments, out_features, in_features);
  cpu::LinearArgs args{};
  args.x_dtype = to_dtype(x.scalar_type(), "x");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor y = torch::stable::new_empty(x, shape);
  args.M = y.numel() / out_features;
  if (args.M == 0) return y;
  // A 2-D x with unit column stride is read where it lies, whatever its row stride; anything else is made contiguous.
  const bool strided = x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= in_features;
  if (!strided) x = torch::stable::contiguous(x);
  args.x = x.data_ptr();
  args.x_row_stride = strided ? x.stride(0) : in_features;
  args.weight = view.weight;
  if (bias) {
    check_bias(*bias, out_features);
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

// Rows offsets[e]..offsets[e + 1] of the T rows of x belong to expert e. Returns the most rows of one expert.
int64_t check_offsets(const Tensor& offsets, int64_t T, int64_t out_features) {
  STD_TORCH_CHECK(offsets.is_cpu(), "offsets must be on the CPU, like x");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.is_contiguous(),
                  "offsets must be int32, one-dimensional and contiguous");
  const int64_t experts = offsets.numel() - 1;
  STD_TORCH_CHECK(experts > 0, "offsets must have one element for each expert and one more, not ", offsets.numel());
  STD_TORCH_CHECK(out_features % experts == 0, "out_features=", out_features, " rows do not share out among ", experts,
                  " experts, as many as offsets name");
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
  const WeightView view(qweight, scales, zeros, perm, segments, out_features, in_features);
  cpu::LinearArgs args{};
  args.x_dtype = to_dtype(x.scalar_type(), "x");
  args.M = check_offsets(offsets, x.size(0), out_features);
  args.weight = view.weight;
  if (bias) {
    check_bias(*bias, out_features);
    args.bias_dtype = to_dtype(bias->scalar_type(), "bias");
  }
  const int64_t experts = offsets.numel() - 1, rows = out_features / experts;
  const ExpertSegments stack(view.segments, experts, rows);
  Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), rows});
  if (args.M == 0) return y;
  const bool strided = x.stride(1) == 1 && x.stride(0) >= in_features;
  if (!strided) x = torch::stable::contiguous(x);
  args.x_row_stride = strided ? x.stride(0) : in_features;
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
  const WeightView view(qweight, scales, zeros, perm, segments, out_features, in_features);
  const cpu::DType out_dtype = to_dtype(dtype, "dtype");
  Tensor out = torch::stable::new_empty(qweight, std::vector<int64_t>{out_features, in_features}, dtype);
  check_status(
      cpu::dequantize(view.weight, out.data_ptr(), out_dtype, current_isa(), torch_pool(in_features * out_features)));
  return out;
}

std::string layout_id() { return mpq::kLayoutId; }

}  // namespace

STABLE_TORCH_LIBRARY(mpq, m) {
  m.def(
      "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, int[] segments, "
      "int out_features, int in_features) -> Tensor");
  m.def(
      "grouped_linear(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "Tensor offsets, int[] segments, int out_features, int in_features) -> Tensor");
  m.def(
      "linear_int8(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, int[] segments, "
      "int out_features, int in_features) -> Tensor");
  m.def(
      "grouped_linear_int8(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? bias, "
      "Tensor offsets, int[] segments, int out_features, int in_features) -> Tensor");
  m.def(
      "dequantize(Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, int[] segments, int out_features, "
      "int in_features, ScalarType dtype) -> Tensor");
  m.def("layout_id() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mpq, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear<kExact>));
  m.impl("grouped_linear", TORCH_BOX(&grouped_linear<kExact>));
  m.impl("linear_int8", TORCH_BOX(&linear<kInt8>));
  m.impl("grouped_linear_int8", TORCH_BOX(&grouped_linear<kInt8>));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}

STABLE_TORCH_LIBRARY_IMPL(mpq, CompositeExplicitAutograd, m) { m.impl("layout_id", TORCH_BOX(&layout_id)); }

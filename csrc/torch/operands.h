// What every backend's operators check of their operands, in the same words, so that no kernel reads outside a tensor,
// and how the table of segments is read.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "format/ids.h"
#include "generated/layout.h"

namespace mpq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device that all tensors of a call must be on.
struct Place {
  bool cpu;
  int32_t index;

  bool holds(const Tensor& tensor) const {
    return cpu ? tensor.is_cpu() : tensor.is_cuda() && tensor.get_device_index() == index;
  }
  std::string name() const { return cpu ? "the CPU" : "CUDA device " + std::to_string(index); }
};

// A packed weight [N, K] as operators take it, perm: [K]; the others are as long as the table says.
struct PackedTensors {
  const Tensor& qweight;
  const Tensor& scales;
  const std::optional<Tensor>& zeros;
  const std::optional<Tensor>& perm;
  const std::vector<int64_t>& table;  // [segments, kSegmentInts]
  int64_t N, K;
};

// A segment, and its first elements in the tensors of the weight.
struct PlacedSegment {
  int64_t n0, n1, k0, k1, group_size;
  int bits, zero_kind;
  int64_t planes[3], scales, zeros;
};

// The number of a dtype, for every backend (format/ids.h).
inline int to_dtype(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return kDtypeF32;
    case ScalarType::Half:
      return kDtypeF16;
    case ScalarType::BFloat16:
      return kDtypeBF16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

inline void check_vector(const Tensor& tensor, const char* name, ScalarType type, const Place& place) {
  STD_TORCH_CHECK(place.holds(tensor), name, " must be on ", place.name(), ", like the other operands");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name, " must be one-dimensional and contiguous");
}

constexpr int64_t kMaxExtent = INT32_MAX;

// Everything but the segments; see for_each_segment. The values of perm are not read.
inline void check_packed(const PackedTensors& w, const Place& place) {
  // With these limits no count below leaves 63 bits.
  STD_TORCH_CHECK(0 < w.N && w.N <= kMaxExtent && 0 < w.K && w.K <= kMaxExtent,
                  "out_features and in_features must be 1..", kMaxExtent, ", not ", w.N, " and ", w.K);
  STD_TORCH_CHECK(!w.table.empty() && w.table.size() % kSegmentInts == 0, "segments must hold ", int{kSegmentInts},
                  " integers each, not ", w.table.size(), " in all");
  check_vector(w.qweight, "qweight", ScalarType::Int, place);
  check_vector(w.scales, "scales", w.scales.scalar_type(), place);
  to_dtype(w.scales.scalar_type(), "scales");
  if (w.zeros) check_vector(*w.zeros, "zeros", w.zeros->scalar_type(), place);
  if (!w.perm) return;
  check_vector(*w.perm, "perm", ScalarType::Int, place);
  STD_TORCH_CHECK(w.perm->numel() == w.K, "perm must have in_features=", w.K, " elements, not ", w.perm->numel());
}

inline void check_segment(const PlacedSegment& s, const PlacedSegment* previous, int64_t N, int64_t K) {
  STD_TORCH_CHECK(0 <= s.n0 && s.n0 < s.n1 && s.n1 <= N && 0 <= s.k0 && s.k0 < s.k1 && s.k1 <= K && s.k0 % kTileK == 0,
                  "segment rows ", s.n0, "..", s.n1, ", columns ", s.k0, "..", s.k1, " do not fit ", N, " x ", K);
  STD_TORCH_CHECK(s.group_size > 0 && (s.k1 - s.k0) % s.group_size == 0, "group_size=", s.group_size,
                  " does not divide the ", s.k1 - s.k0, " columns of a segment");
  const bool same_band = previous && previous->n0 == s.n0 && previous->n1 == s.n1 && previous->k1 == s.k0;
  const bool next_band = s.k0 == 0 && (previous ? previous->n1 == s.n0 && previous->k1 == K : s.n0 == 0);
  STD_TORCH_CHECK(same_band || next_band, "segments must tile the weight in row bands, sorted by n0, then k0");
}

inline void check_zeros(const PackedTensors& w, int zero_kind) {
  STD_TORCH_CHECK(w.zeros.has_value(), "segments name zeros, but none were given");
  STD_TORCH_CHECK(w.zeros->scalar_type() == (zero_kind == kZeroInt ? ScalarType::Byte : w.scales.scalar_type()),
                  "integer zeros must be uint8, float zeros must have the dtype of the scales");
}

// visit(segment) in the order of the table. The segments must account for every element of every tensor.
template <class Visit>
void for_each_segment(const PackedTensors& w, const Visit& visit) {
  int64_t word = 0, scale = 0, zero = 0;
  PlacedSegment last{};
  for (size_t i = 0; i < w.table.size(); i += kSegmentInts) {
    const int64_t* ints = w.table.data() + i;
    PlacedSegment s{};
    s.n0 = ints[kSegmentN0], s.n1 = ints[kSegmentN1], s.k0 = ints[kSegmentK0], s.k1 = ints[kSegmentK1];
    s.group_size = ints[kSegmentGroupSize];
    const int64_t bits = ints[kSegmentBits], zero_kind = ints[kSegmentZero];
    STD_TORCH_CHECK(1 <= bits && bits <= 8, "bits=", bits, " is not 1..8");
    STD_TORCH_CHECK(is_zero_kind(zero_kind), "unknown kind of zeros");
    s.bits = static_cast<int>(bits), s.zero_kind = static_cast<int>(zero_kind);
    check_segment(s, i ? &last : nullptr, w.N, w.K);
    const int64_t row_tiles = (s.n1 - s.n0 + kTileN - 1) / kTileN, col_tiles = (s.k1 - s.k0 + kTileK - 1) / kTileK;
    for (int p = 0; p < kPlaneCount[s.bits]; ++p) {
      s.planes[p] = word;
      word += row_tiles * col_tiles * 128 * kPlaneWidth[s.bits][p];
    }
    const int64_t count = (s.k1 - s.k0) / s.group_size * row_tiles * kTileN;
    s.scales = scale;
    s.zeros = zero;
    scale += count;
    if (stores_zeros(s.zero_kind)) {
      check_zeros(w, s.zero_kind);
      zero += count;
    }
    visit(s);
    last = s;
  }
  STD_TORCH_CHECK(last.n1 == w.N && last.k1 == w.K, "segments do not cover ", w.N, " x ", w.K);
  const int64_t zeros = w.zeros ? w.zeros->numel() : 0;
  STD_TORCH_CHECK(w.qweight.numel() == word, "qweight must have ", word, " words, not ", w.qweight.numel());
  STD_TORCH_CHECK(w.scales.numel() == scale, "scales must have ", scale, " elements, not ", w.scales.numel());
  STD_TORCH_CHECK(zeros == zero, "zeros must have ", zero, " elements, not ", zeros);
}

// x (..., K)
inline void check_x(const Tensor& x, int64_t K) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == K, "x must be (..., in_features=", K,
                  "), its last dimension is ", x.dim() ? x.size(x.dim() - 1) : 0);
}

// Elements from row to row of x. A 2-D x with unit column stride is read where it lies, whatever its row stride;
// anything else is made contiguous.
inline int64_t row_stride(Tensor& x, int64_t K) {
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= K) return x.stride(0);
  x = torch::stable::contiguous(x);
  return K;
}

inline void check_bias(const Tensor& bias, int64_t N, const Place& place) {
  STD_TORCH_CHECK(place.holds(bias) && bias.is_contiguous() && bias.numel() == N, "bias must be contiguous on ",
                  place.name(), " with out_features=", N, " elements");
}

// ids: int64 or int32, contiguous or made so, of any shape. Returned as int64.
inline Tensor row_ids(const Tensor& ids, const Place& place) {
  STD_TORCH_CHECK(place.holds(ids), "ids must be on ", place.name(), ", like the weight");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
                  "ids must be int64 or int32");
  return torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
}

// Of the rows that ids look up: those of ids, and K.
inline std::vector<int64_t> rows_shape(const Tensor& ids, int64_t K) {
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(K);
  return shape;
}

// offsets (E + 1) of E experts with equal shares of the rows of W. Returns E; the values are not read.
inline int64_t check_offsets(const Tensor& offsets, int64_t out_features, const Place& place) {
  STD_TORCH_CHECK(place.holds(offsets), "offsets must be on ", place.name(), ", like x");
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.is_contiguous(),
                  "offsets must be int32, one-dimensional and contiguous");
  const int64_t experts = offsets.numel() - 1;
  STD_TORCH_CHECK(experts > 0, "offsets must have one element for each expert and one more, not ", offsets.numel());
  STD_TORCH_CHECK(out_features % experts == 0, "out_features=", out_features, " rows do not share out among ", experts,
                  " experts, as many as offsets name");
  return experts;
}

}  // namespace mpq

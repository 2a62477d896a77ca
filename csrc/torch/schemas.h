// Schemas of the operators, each once; the fakes, which say the same of shapes and dtypes, stand in the Python package.
#pragma once

namespace mpq::schemas {

#define MPQ_WEIGHT "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm"
#define MPQ_TABLE "int[] segments, int out_features, int in_features"
#define MPQ_LINEAR "(Tensor x, " MPQ_WEIGHT ", Tensor? bias, " MPQ_TABLE ") -> Tensor"
#define MPQ_GROUPED "(Tensor x, " MPQ_WEIGHT ", Tensor? bias, Tensor offsets, " MPQ_TABLE ") -> Tensor"

constexpr char kLinear[] = "linear" MPQ_LINEAR;
constexpr char kLinearInt8[] = "linear_int8" MPQ_LINEAR;
constexpr char kGroupedLinear[] = "grouped_linear" MPQ_GROUPED;
constexpr char kGroupedLinearInt8[] = "grouped_linear_int8" MPQ_GROUPED;
constexpr char kDequantize[] = "dequantize(" MPQ_WEIGHT ", " MPQ_TABLE ", ScalarType dtype) -> Tensor";
constexpr char kEmbedding[] = "embedding(Tensor ids, " MPQ_WEIGHT ", " MPQ_TABLE ", ScalarType dtype) -> Tensor";
constexpr char kSiluMulLinear[] =
    "silu_mul_linear(Tensor gate, Tensor up, " MPQ_WEIGHT ", Tensor? bias, " MPQ_TABLE ") -> Tensor";

#undef MPQ_WEIGHT
#undef MPQ_TABLE
#undef MPQ_LINEAR
#undef MPQ_GROUPED

}  // namespace mpq::schemas

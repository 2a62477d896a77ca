// What custom operators need of the C interface of ONNX Runtime, version 16 of it (1.16 and later): that package's
// wheel has no headers. The runtime keeps these structures as they are and adds at their ends, so numbers and order
// hold for later versions too. After the C API of ONNX Runtime (onnxruntime_c_api), MIT,
// https://github.com/microsoft/onnxruntime
#pragma once

#include <cstddef>
#include <cstdint>

namespace mpq::ort {

constexpr uint32_t kApiVersion = 16;

struct Status;
struct SessionOptions;
struct Domain;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;

enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16 };
enum ErrorCode : int { kInvalidArgument = 2 };

// The table of functions: each has a fixed place.
struct Api {
  void* functions[276];

  template <class Function>
  Function at(int place) const {
    return reinterpret_cast<Function>(functions[place]);
  }

  Status* create_status(ErrorCode code, const char* text) const {
    return at<Status* (*)(ErrorCode, const char*)>(0)(code, text);
  }
  Status* create_domain(const char* name, Domain** domain) const {
    return at<Status* (*)(const char*, Domain**)>(26)(name, domain);
  }
  Status* domain_add(Domain* domain, const struct CustomOp* op) const {
    return at<Status* (*)(Domain*, const struct CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, Domain* domain) const {
    return at<Status* (*)(SessionOptions*, Domain*)>(28)(options, domain);
  }
  Status* tensor_data(Value* value, void** data) const { return at<Status* (*)(Value*, void**)>(51)(value, data); }
  Status* element_type(const TensorInfo* info, int* type) const {
    return at<Status* (*)(const TensorInfo*, int*)>(60)(info, type);
  }
  Status* rank(const TensorInfo* info, size_t* rank) const {
    return at<Status* (*)(const TensorInfo*, size_t*)>(61)(info, rank);
  }
  Status* dimensions(const TensorInfo* info, int64_t* sizes, size_t rank) const {
    return at<Status* (*)(const TensorInfo*, int64_t*, size_t)>(62)(info, sizes, rank);
  }
  Status* tensor_info(const Value* value, TensorInfo** info) const {
    return at<Status* (*)(const Value*, TensorInfo**)>(65)(value, info);
  }
  Status* input(const KernelContext* context, size_t index, const Value** value) const {
    return at<Status* (*)(const KernelContext*, size_t, const Value**)>(90)(context, index, value);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** value) const {
    return at<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, sizes, rank,
                                                                                        value);
  }
  void release_status(Status* status) const { at<void (*)(Status*)>(93)(status); }
  void release_tensor_info(TensorInfo* info) const { at<void (*)(TensorInfo*)>(99)(info); }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp* op, const Api* api, const KernelInfo* info);
  const char* (*name)(const CustomOp* op);
  const char* (*provider)(const CustomOp* op);  // null: the CPU's
  int (*input_type)(const CustomOp* op, size_t index);
  size_t (*input_count)(const CustomOp* op);
  int (*output_type)(const CustomOp* op, size_t index);
  size_t (*output_count)(const CustomOp* op);
  void (*compute)(void* kernel, KernelContext* context);
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp* op, size_t index);  // 0: required
  int (*output_characteristic)(const CustomOp* op, size_t index);
  int (*input_memory)(const CustomOp* op, size_t index);  // 0: the provider's
  int (*variadic_input_least)(const CustomOp* op);
  int (*variadic_input_same)(const CustomOp* op);
  int (*variadic_output_least)(const CustomOp* op);
  int (*variadic_output_same)(const CustomOp* op);
  Status* (*create_kernel_with_status)(const CustomOp* op, const Api* api, const KernelInfo* info, void** kernel);
  Status* (*compute_with_status)(void* kernel, KernelContext* context);
  void* later[7];  // of version 17 and 18: shape inference, versions, memory that outputs share with inputs
};

}  // namespace mpq::ort

// Custom operators of ONNX Runtime: give its sessions this library (register_custom_ops_library). Domain mpq_kernels.
//
//     Linear     x (..., K) float, float16, bfloat16 -> y (..., N) of the same type
//     Embedding  ids (...) int64                     -> rows (..., K) float
//
// Further inputs of both, in this order: qweight, scales, zeros, perm, bias (Linear alone), as their bytes, uint8,
// without elements where there is none; table, int64: out_features, in_features, dtype of the scales, dtype of the
// bias, mpq_activations, then seven integers for each segment (mpq_kernels/format/codes.py, SEGMENT_INTS).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "capi/ort.h"
#include "include/mpq_cpu.h"

namespace {

namespace ort = mpq::ort;

constexpr int64_t kHeader = 5, kSegmentInts = 7;

// Thrown by what follows, and caught in compute(): a status of the runtime's, or a text of ours.
struct Failure {
  ort::Status* status;
  std::string text;
};

struct Tensor {
  const void* data;
  std::vector<int64_t> shape;
  int type;
  int64_t count;
};

class Context {
 public:
  Context(const ort::Api& api, ort::KernelContext* context) : api_(api), context_(context) {}

  Tensor input(size_t index) const {
    const ort::Value* value = nullptr;
    ort::TensorInfo* info = nullptr;
    check(api_.input(context_, index, &value));
    check(api_.tensor_info(value, &info));
    Tensor out{nullptr, {}, 0, 1};
    size_t rank = 0;
    ort::Status* status = api_.element_type(info, &out.type);
    if (!status) status = api_.rank(info, &rank);
    out.shape.resize(rank);
    if (!status) status = api_.dimensions(info, out.shape.data(), rank);
    api_.release_tensor_info(info);
    check(status);
    for (const int64_t size : out.shape) out.count *= size;
    void* data = nullptr;
    check(api_.tensor_data(const_cast<ort::Value*>(value), &data));
    out.data = data;
    return out;
  }

  void* output(const std::vector<int64_t>& shape) const {
    ort::Value* value = nullptr;
    void* data = nullptr;
    check(api_.output(context_, 0, shape.data(), shape.size(), &value));
    check(api_.tensor_data(value, &data));
    return data;
  }

 private:
  static void check(ort::Status* status) {
    if (status) throw Failure{status, ""};
  }

  const ort::Api& api_;
  ort::KernelContext* context_;
};

void check(int status) {
  if (status) throw Failure{nullptr, mpq_cpu_error_text(status)};
}

// The weight of the inputs from `first` on; all have the sizes that the table asks for.
struct View {
  std::vector<mpq_segment> segments;
  mpq_weight weight{};
  int32_t bias_dtype;
  mpq_cpu cpu{};

  View(const Context& context, size_t first, const Tensor& table) {
    const auto* v = static_cast<const int64_t*>(table.data);
    if (table.type != ort::kInt64 || table.count < kHeader || (table.count - kHeader) % kSegmentInts)
      throw Failure{nullptr, "the table has no header and seven integers for each segment"};
    for (int64_t i = kHeader; i < table.count; i += kSegmentInts) {
      const int64_t* s = v + i;
      segments.push_back({s[0], s[1], s[2], s[3], s[5], static_cast<int32_t>(s[4]), static_cast<int32_t>(s[6])});
    }
    weight.out_features = v[0];
    weight.in_features = v[1];
    weight.scale_dtype = static_cast<int32_t>(v[2]);
    weight.segments = segments.data();
    weight.num_segments = static_cast<int32_t>(segments.size());
    bias_dtype = static_cast<int32_t>(v[3]);
    mpq_weight_bytes wanted;
    check(mpq_cpu_weight_bytes(&weight, &wanted));
    weight.qweight = bytes(context.input(first), wanted.qweight, "qweight");
    weight.scales = bytes(context.input(first + 1), wanted.scales, "scales");
    weight.zeros = bytes(context.input(first + 2), wanted.zeros, "zeros");
    const Tensor perm = context.input(first + 3);
    if (perm.count) weight.perm = static_cast<const int32_t*>(bytes(perm, wanted.perm, "perm"));
    check(mpq_cpu_query(MPQ_CPU_VERSION, nullptr, &cpu));
    cpu.activations = static_cast<int32_t>(v[4]);
    cpu.run = mpq_cpu_pool_run;
    cpu.pool = threads();
  }

  static const void* bytes(const Tensor& tensor, size_t wanted, const char* name) {
    if (tensor.type != ort::kUint8 || static_cast<size_t>(tensor.count) != wanted)
      throw Failure{nullptr, std::string(name) + " has " + std::to_string(tensor.count) + " bytes, not " +
                                 std::to_string(wanted)};
    return tensor.data;
  }

 private:
  // Of all sessions together: the runtime lends its own threads to operators since version 17 only. Never ended, since
  // a library has no good moment for that.
  static mpq_cpu_pool* threads() {
    static mpq_cpu_pool* const pool = [] {
      mpq_cpu_pool* made = nullptr;
      const int32_t count = static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
      return mpq_cpu_pool_open(count, &made) ? nullptr : made;
    }();
    if (!pool) throw Failure{nullptr, mpq_cpu_error_text(MPQ_ERROR_MEMORY)};
    return pool;
  }
};

int32_t dtype_of(int type) {
  return type == ort::kFloat ? MPQ_F32 : type == ort::kFloat16 ? MPQ_F16 : type == ort::kBFloat16 ? MPQ_BF16 : -1;
}

void linear(const Context& context) {
  const Tensor x = context.input(0), bias = context.input(5);
  const View view(context, 1, context.input(6));
  const int64_t N = view.weight.out_features, K = view.weight.in_features;
  if (x.shape.empty() || x.shape.back() != K) throw Failure{nullptr, "x must be (..., in_features)"};
  mpq_linear_args a{};
  a.weight = view.weight;
  a.x = x.data;
  a.x_dtype = dtype_of(x.type);
  a.x_row_stride = K;
  a.tokens = x.count / K;
  a.y_row_stride = N;
  if (bias.count) {
    a.bias_dtype = view.bias_dtype;
    a.bias = View::bytes(bias, static_cast<size_t>(N * (a.bias_dtype == MPQ_F32 ? 4 : 2)), "bias");
  }
  check(mpq_cpu_workspace_size(&a, &view.cpu, &a.workspace_bytes));
  const std::unique_ptr<unsigned char[]> workspace(new unsigned char[a.workspace_bytes + 1]);
  a.workspace = workspace.get();
  std::vector<int64_t> shape = x.shape;
  shape.back() = N;
  a.y = context.output(shape);
  check(mpq_cpu_linear(&a, &view.cpu));
}

void embedding(const Context& context) {
  const Tensor ids = context.input(0);
  const View view(context, 1, context.input(5));
  std::vector<int64_t> shape = ids.shape;
  shape.push_back(view.weight.in_features);
  const mpq_embedding_args a{view.weight, static_cast<const int64_t*>(ids.data), ids.count, context.output(shape),
                             MPQ_F32};
  check(mpq_cpu_embedding(&a, &view.cpu));
}

// One operator: what the runtime asks of it, and its call.
struct Operator : ort::CustomOp {
  const char* title;
  std::vector<int> inputs;
  int result;
  void (*call)(const Context& context);
};

const Operator& self(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }

// A kernel has no state but its operator and the runtime's functions.
struct Kernel {
  const ort::Api* api;
  const Operator* op;
};

ort::Status* create(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo*, void** kernel) {
  *kernel = new (std::nothrow) Kernel{api, &self(op)};
  return *kernel ? nullptr : api->create_status(ort::kInvalidArgument, mpq_cpu_error_text(MPQ_ERROR_MEMORY));
}

ort::Status* compute(void* kernel, ort::KernelContext* context) {
  const Kernel& k = *static_cast<const Kernel*>(kernel);
  try {
    k.op->call(Context(*k.api, context));
    return nullptr;
  } catch (const Failure& failure) {
    if (failure.status) return failure.status;
    return k.api->create_status(ort::kInvalidArgument, ("mpq_kernels: " + failure.text).c_str());
  } catch (const std::bad_alloc&) {
    return k.api->create_status(ort::kInvalidArgument, mpq_cpu_error_text(MPQ_ERROR_MEMORY));
  }
}

Operator make(const char* title, std::vector<int> inputs, int result, void (*call)(const Context&)) {
  Operator op{};
  op.version = ort::kApiVersion;
  op.name = [](const ort::CustomOp* o) { return self(o).title; };
  op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.input_type = [](const ort::CustomOp* o, size_t i) { return self(o).inputs[i]; };
  op.input_count = [](const ort::CustomOp* o) { return self(o).inputs.size(); };
  op.output_type = [](const ort::CustomOp* o, size_t) { return self(o).result; };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  const auto required = [](const ort::CustomOp*, size_t) { return 0; };
  op.input_characteristic = op.output_characteristic = op.input_memory = required;
  op.variadic_input_least = op.variadic_output_least = [](const ort::CustomOp*) { return 1; };
  op.variadic_input_same = op.variadic_output_same = [](const ort::CustomOp*) { return 0; };
  op.create_kernel_with_status = create;
  op.compute_with_status = compute;
  op.title = title;
  op.inputs = std::move(inputs);
  op.result = result;
  op.call = call;
  return op;
}

}  // namespace

// What the runtime looks for in a library of operators. Domains are the session's; operators are ours, for ever.
extern "C" MPQ_API ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const ort::Api* api = base->get_api(ort::kApiVersion);
  if (!api) {  // only version 1 is certain to be there: its first functions are the same
    return base->get_api(1)->create_status(ort::kInvalidArgument, "mpq_kernels needs ONNX Runtime 1.16 or later");
  }
  constexpr int kBytes = ort::kUint8;
  static const Operator kLinear =
      make("Linear", {ort::kUndefined, kBytes, kBytes, kBytes, kBytes, kBytes, ort::kInt64}, ort::kUndefined, linear);
  static const Operator kEmbedding =
      make("Embedding", {ort::kInt64, kBytes, kBytes, kBytes, kBytes, ort::kInt64}, ort::kFloat, embedding);
  ort::Domain* domain = nullptr;
  ort::Status* status = api->create_domain("mpq_kernels", &domain);
  if (!status) status = api->domain_add(domain, &kLinear);
  if (!status) status = api->domain_add(domain, &kEmbedding);
  return status ? status : api->add_domain(options, domain);
}

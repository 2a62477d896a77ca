// Handlers of XLA's foreign function interface over the C interface. Compiled on the user's machine, when they are
// first used, against the headers of the jaxlib that is installed: see build.py.
//
// Operands of all: the tensors of a weight, one-dimensional, those that it lacks with no elements; tokens before them.
// Leading dimensions are tokens, so vmap over tokens adds one and changes nothing. Attributes: the table of segments,
// seven integers each (mpq_kernels/format/codes.py, SEGMENT_INTS), out_features, in_features.
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "mpq_cpu.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Table = ffi::Span<const int64_t>;
using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

constexpr size_t kSegmentInts = 7;

ffi::Error invalid(const std::string& text) { return ffi::Error::InvalidArgument("mpq_kernels: " + text); }

ffi::Error error_of(int status) {
  return status == MPQ_OK ? ffi::Error::Success() : invalid(mpq_cpu_error_text(status));
}

int32_t dtype_of(ffi::DataType type) {
  return type == ffi::DataType::F32    ? MPQ_F32
         : type == ffi::DataType::F16  ? MPQ_F16
         : type == ffi::DataType::BF16 ? MPQ_BF16
                                       : -1;
}

// A weight whose tensors have the sizes that its segments ask for.
struct View {
  std::vector<mpq_segment> segments;
  mpq_weight weight{};

  ffi::Error set(const Buffer& qweight, const Buffer& scales, const Buffer& zeros, const Buffer& perm, Table table,
                 int64_t out_features, int64_t in_features) {
    if (table.size() % kSegmentInts) return invalid("segments must hold 7 integers each");
    for (size_t i = 0; i < table.size(); i += kSegmentInts) {
      const int64_t* v = table.begin() + i;
      segments.push_back({v[0], v[1], v[2], v[3], v[5], static_cast<int32_t>(v[4]), static_cast<int32_t>(v[6])});
    }
    weight = {out_features,
              in_features,
              qweight.untyped_data(),
              scales.untyped_data(),
              zeros.element_count() ? zeros.untyped_data() : nullptr,
              perm.element_count() ? static_cast<const int32_t*>(perm.untyped_data()) : nullptr,
              segments.data(),
              static_cast<int32_t>(segments.size()),
              dtype_of(scales.element_type())};
    mpq_weight_bytes wanted;
    if (int status = mpq_cpu_weight_bytes(&weight, &wanted)) return error_of(status);
    if (!weight.perm) wanted.perm = 0;
    for (const auto& [name, held, bytes] :
         {std::tuple{"qweight", &qweight, wanted.qweight}, std::tuple{"scales", &scales, wanted.scales},
          std::tuple{"zeros", &zeros, wanted.zeros}, std::tuple{"perm", &perm, wanted.perm}}) {
      if (held->size_bytes() != bytes)
        return invalid(std::string(name) + " has " + std::to_string(held->size_bytes()) + " bytes, not " +
                       std::to_string(bytes) + ": weights are not batched by vmap, use jax.lax.map");
    }
    return ffi::Error::Success();
  }
};

// Everything of a product but workspace, weight and counters. `rows`: columns of y, as many as bias has for an expert.
ffi::Error product_args(mpq_linear_args& a, const View& view, const Buffer& x, const Buffer& bias, Result& y,
                        int64_t rows) {
  const int64_t K = view.weight.in_features;
  if (static_cast<int64_t>(x.element_count()) % K || dtype_of(x.element_type()) < 0)
    return invalid("x must be (..., in_features) of float32, float16 or bfloat16");
  a.tokens = static_cast<int64_t>(x.element_count()) / K;
  if (static_cast<int64_t>(y->element_count()) != a.tokens * rows || y->element_type() != x.element_type())
    return invalid("y must be (..., out_features) of the dtype of x");
  if (bias.element_count()) {
    if (static_cast<int64_t>(bias.element_count()) != view.weight.out_features)
      return invalid("bias must have out_features elements");
    a.bias = bias.untyped_data();
    a.bias_dtype = dtype_of(bias.element_type());
  }
  a.weight = view.weight;
  a.x = x.untyped_data();
  a.x_dtype = dtype_of(x.element_type());
  a.x_row_stride = K;
  a.y = y->untyped_data();
  a.y_row_stride = rows;
  return ffi::Error::Success();
}

// Rows by number: ids are pairs of 32 bits, because jax has no 64-bit integers unless it is told to.
ffi::Error rows_args(mpq_embedding_args& a, const View& view, const Buffer& ids, Result& out) {
  a.weight = view.weight;
  a.ids = static_cast<const int64_t*>(ids.untyped_data());
  a.count = static_cast<int64_t>(ids.element_count()) / 2;
  a.out = out->untyped_data();
  a.out_dtype = dtype_of(out->element_type());
  const bool fits = static_cast<int64_t>(out->element_count()) == a.count * view.weight.in_features;
  return fits && a.out_dtype >= 0 ? ffi::Error::Success() : invalid("rows must be (..., in_features)");
}

ffi::Error dense_args(mpq_dequantize_args& a, const View& view, Result& out) {
  a.weight = view.weight;
  a.out = out->untyped_data();
  a.out_dtype = dtype_of(out->element_type());
  const bool fits = static_cast<int64_t>(out->element_count()) == view.weight.out_features * view.weight.in_features;
  return fits && a.out_dtype >= 0 ? ffi::Error::Success() : invalid("W must be (out_features, in_features)");
}

// XLA's threads for mpq_cpu. The calling thread works too, and waits only for ranges that others have begun: it may be
// one of the pool itself, all of whose threads may be waiting in this way.
struct Work {
  void (*task)(void*, int64_t, int64_t);
  void* context;
  int64_t n, step;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable done;
  int64_t left;  // elements that are not finished

  // Ranges until none is left. Nothing of the caller's is touched where none was.
  void take_ranges() {
    for (int64_t begin; (begin = next.fetch_add(step)) < n;) {
      const int64_t end = begin + step < n ? begin + step : n;
      task(context, begin, end);
      const std::lock_guard<std::mutex> lock(mutex);
      left -= end - begin;
      if (left == 0) done.notify_all();
    }
  }
};

void run_on_xla(void* pool, int64_t n, void (*task)(void*, int64_t, int64_t), void* context) {
  auto& threads = *static_cast<ffi::ThreadPool*>(pool);
  const int64_t count = threads.num_threads();
  if (count <= 1 || n <= 1) return task(context, 0, n);
  auto work = std::make_shared<Work>();
  work->task = task;
  work->context = context;
  work->n = work->left = n;
  work->step = (n + 4 * count - 1) / (4 * count);  // four ranges a thread: one that is late holds up few
  for (int64_t i = 1; i < count; ++i) threads.Schedule([work] { work->take_ranges(); });
  work->take_ranges();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->done.wait(lock, [&] { return work->left == 0; });
}

// How to compute on XLA's threads, with the best instruction set.
int query(ffi::ThreadPool& threads, int64_t int8, mpq_cpu& cpu) {
  const int status = mpq_cpu_query(MPQ_CPU_VERSION, nullptr, &cpu);
  cpu.activations = int8 ? MPQ_ACTIVATIONS_INT8 : MPQ_ACTIVATIONS_EXACT;
  cpu.run = run_on_xla;
  cpu.pool = &threads;
  return status;
}

#define MPQ_RETURN_IF(call) \
  if (ffi::Error error = (call); error.failure()) return error

// XLA's allocator of scratch memory is one of devices: on the CPU it has none.
struct Workspace {
  std::unique_ptr<unsigned char[]> memory;

  ffi::Error give(mpq_linear_args& a) {
    memory.reset(new (std::nothrow) unsigned char[a.workspace_bytes + 1]);
    a.workspace = memory.get();
    return a.workspace ? ffi::Error::Success() : error_of(MPQ_ERROR_MEMORY);
  }
};

ffi::Error linear_cpu(ffi::ThreadPool threads, Buffer x, Buffer qweight, Buffer scales, Buffer zeros, Buffer perm,
                      Buffer bias, Result y, Table segments, int64_t out_features, int64_t in_features, int64_t int8) {
  View view;
  Workspace workspace;
  mpq_linear_args a{};
  mpq_cpu cpu;
  MPQ_RETURN_IF(view.set(qweight, scales, zeros, perm, segments, out_features, in_features));
  MPQ_RETURN_IF(product_args(a, view, x, bias, y, out_features));
  MPQ_RETURN_IF(error_of(query(threads, int8, cpu)));
  MPQ_RETURN_IF(error_of(mpq_cpu_workspace_size(&a, &cpu, &a.workspace_bytes)));
  MPQ_RETURN_IF(workspace.give(a));
  return error_of(mpq_cpu_linear(&a, &cpu));
}

ffi::Error grouped_linear_cpu(ffi::ThreadPool threads, Buffer x, Buffer qweight, Buffer scales, Buffer zeros,
                              Buffer perm, Buffer bias, Buffer offsets, Result y, Table segments, int64_t out_features,
                              int64_t in_features, int64_t int8) {
  View view;
  Workspace workspace;
  mpq_grouped_args g{};
  mpq_cpu cpu;
  const int64_t experts = static_cast<int64_t>(offsets.element_count()) - 1;
  if (experts < 1 || out_features % experts) return invalid(mpq_cpu_error_text(MPQ_ERROR_GROUPED));
  MPQ_RETURN_IF(view.set(qweight, scales, zeros, perm, segments, out_features, in_features));
  MPQ_RETURN_IF(product_args(g.linear, view, x, bias, y, out_features / experts));
  g.offsets = static_cast<const int32_t*>(offsets.untyped_data());
  g.num_experts = static_cast<int32_t>(experts);
  MPQ_RETURN_IF(error_of(query(threads, int8, cpu)));
  MPQ_RETURN_IF(error_of(mpq_cpu_grouped_workspace_size(&g, &cpu, &g.linear.workspace_bytes)));
  MPQ_RETURN_IF(workspace.give(g.linear));
  return error_of(mpq_cpu_grouped_linear(&g, &cpu));
}

ffi::Error embedding_cpu(ffi::ThreadPool threads, Buffer ids, Buffer qweight, Buffer scales, Buffer zeros, Buffer perm,
                         Result out, Table segments, int64_t out_features, int64_t in_features) {
  View view;
  mpq_embedding_args a{};
  mpq_cpu cpu;
  MPQ_RETURN_IF(view.set(qweight, scales, zeros, perm, segments, out_features, in_features));
  MPQ_RETURN_IF(rows_args(a, view, ids, out));
  MPQ_RETURN_IF(error_of(query(threads, 0, cpu)));
  return error_of(mpq_cpu_embedding(&a, &cpu));
}

ffi::Error dequantize_cpu(ffi::ThreadPool threads, Buffer qweight, Buffer scales, Buffer zeros, Buffer perm, Result out,
                          Table segments, int64_t out_features, int64_t in_features) {
  View view;
  mpq_dequantize_args a{};
  mpq_cpu cpu;
  MPQ_RETURN_IF(view.set(qweight, scales, zeros, perm, segments, out_features, in_features));
  MPQ_RETURN_IF(dense_args(a, view, out));
  MPQ_RETURN_IF(error_of(query(threads, 0, cpu)));
  return error_of(mpq_cpu_dequantize(&a, &cpu));
}

#ifdef MPQ_JAX_CUDA

using Stream = ffi::PlatformStream<void*>;

ffi::Error cuda_error(int status) { return status == MPQ_OK ? ffi::Error::Success() : invalid(mpq_error_text(status)); }

// Of the current device, asked for once.
int query(int32_t ordinal, mpq_device& device) {
  static std::mutex mutex;
  static std::map<int32_t, mpq_device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(ordinal);
  if (found != known.end()) return device = found->second, MPQ_OK;
  const int status = mpq_device_query(ordinal, &device);
  if (status == MPQ_OK) known.emplace(ordinal, device);
  return status;
}

ffi::Error give_workspace(ffi::ScratchAllocator& scratch, mpq_linear_args& a) {
  const auto memory = scratch.Allocate(a.workspace_bytes ? a.workspace_bytes : 1, 64);
  if (!memory) return error_of(MPQ_ERROR_MEMORY);
  a.workspace = *memory;
  return ffi::Error::Success();
}

// Counters are an operand of zeros that is also a result, so that XLA gives no two calls the same ones.
ffi::Error linear_cuda(void* stream, int32_t ordinal, ffi::ScratchAllocator scratch, Buffer x, Buffer qweight,
                       Buffer scales, Buffer zeros, Buffer perm, Buffer bias, Buffer, Result y, Result counters,
                       Table segments, int64_t out_features, int64_t in_features, int64_t int8) {
  View view;
  mpq_linear_args a{};
  mpq_device device;
  if (int8) return invalid("int8 activations are of the CPU");
  MPQ_RETURN_IF(view.set(qweight, scales, zeros, perm, segments, out_features, in_features));
  MPQ_RETURN_IF(product_args(a, view, x, bias, y, out_features));
  if (counters->size_bytes() < MPQ_COUNTER_BYTES) return invalid("too few counters");
  a.counters = counters->untyped_data();
  MPQ_RETURN_IF(cuda_error(query(ordinal, device)));
  MPQ_RETURN_IF(cuda_error(mpq_workspace_size(&a, &device, &a.workspace_bytes)));
  MPQ_RETURN_IF(give_workspace(scratch, a));
  return cuda_error(mpq_linear(&a, &device, stream));
}

ffi::Error grouped_linear_cuda(void* stream, int32_t ordinal, ffi::ScratchAllocator scratch, Buffer x, Buffer qweight,
                               Buffer scales, Buffer zeros, Buffer perm, Buffer bias, Buffer offsets, Result y,
                               Table segments, int64_t out_features, int64_t in_features, int64_t int8) {
  View view;
  mpq_grouped_args g{};
  mpq_device device;
  const int64_t experts = static_cast<int64_t>(offsets.element_count()) - 1;
  if (int8) return invalid("int8 activations are of the CPU");
  if (experts < 1 || out_features % experts) return invalid(mpq_cpu_error_text(MPQ_ERROR_GROUPED));
  MPQ_RETURN_IF(view.set(qweight, scales, zeros, perm, segments, out_features, in_features));
  MPQ_RETURN_IF(product_args(g.linear, view, x, bias, y, out_features / experts));
  g.offsets = static_cast<const int32_t*>(offsets.untyped_data());
  g.num_experts = static_cast<int32_t>(experts);
  MPQ_RETURN_IF(cuda_error(query(ordinal, device)));
  MPQ_RETURN_IF(cuda_error(mpq_grouped_workspace_size(&g, &device, &g.linear.workspace_bytes)));
  MPQ_RETURN_IF(give_workspace(scratch, g.linear));
  return cuda_error(mpq_grouped_linear(&g, &device, stream));
}

ffi::Error embedding_cuda(void* stream, int32_t ordinal, Buffer ids, Buffer qweight, Buffer scales, Buffer zeros,
                          Buffer perm, Result out, Table segments, int64_t out_features, int64_t in_features) {
  View view;
  mpq_embedding_args a{};
  mpq_device device;
  MPQ_RETURN_IF(view.set(qweight, scales, zeros, perm, segments, out_features, in_features));
  MPQ_RETURN_IF(rows_args(a, view, ids, out));
  MPQ_RETURN_IF(cuda_error(query(ordinal, device)));
  return cuda_error(mpq_embedding(&a, &device, stream));
}

ffi::Error dequantize_cuda(void* stream, int32_t ordinal, Buffer qweight, Buffer scales, Buffer zeros, Buffer perm,
                           Result out, Table segments, int64_t out_features, int64_t in_features) {
  View view;
  mpq_dequantize_args a{};
  mpq_device device;
  MPQ_RETURN_IF(view.set(qweight, scales, zeros, perm, segments, out_features, in_features));
  MPQ_RETURN_IF(dense_args(a, view, out));
  MPQ_RETURN_IF(cuda_error(query(ordinal, device)));
  return cuda_error(mpq_dequantize(&a, &device, stream));
}

#endif

// The rest of a binding: operands of a weight, and the attributes of every handler.
template <class Binding>
auto weight(Binding&& bound) {
  return std::move(bound).template Arg<Buffer>().template Arg<Buffer>().template Arg<Buffer>().template Arg<Buffer>();
}
template <class Binding>
auto table(Binding&& bound) {
  return std::move(bound)
      .template Attr<Table>("segments")
      .template Attr<int64_t>("out_features")
      .template Attr<int64_t>("in_features");
}

auto bind_cpu() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mpq_jax_linear_cpu, linear_cpu,
    table(weight(bind_cpu().Arg<Buffer>()).Arg<Buffer>().Ret<Buffer>()).Attr<int64_t>("int8"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mpq_jax_grouped_linear_cpu, grouped_linear_cpu,
    table(weight(bind_cpu().Arg<Buffer>()).Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()).Attr<int64_t>("int8"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mpq_jax_embedding_cpu, embedding_cpu,
                              table(weight(bind_cpu().Arg<Buffer>()).Ret<Buffer>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mpq_jax_dequantize_cpu, dequantize_cpu, table(weight(bind_cpu()).Ret<Buffer>()));

#ifdef MPQ_JAX_CUDA

namespace {

auto bind_cuda() { return ffi::Ffi::Bind().Ctx<Stream>().Ctx<ffi::DeviceOrdinal>(); }
auto bind_cuda_scratch() { return bind_cuda().Ctx<ffi::ScratchAllocator>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mpq_jax_linear_cuda, linear_cuda,
    table(weight(bind_cuda_scratch().Arg<Buffer>()).Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>())
        .Attr<int64_t>("int8"),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mpq_jax_grouped_linear_cuda, grouped_linear_cuda,
    table(weight(bind_cuda_scratch().Arg<Buffer>()).Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()).Attr<int64_t>("int8"),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(mpq_jax_embedding_cuda, embedding_cuda,
                              table(weight(bind_cuda().Arg<Buffer>()).Ret<Buffer>()),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(mpq_jax_dequantize_cuda, dequantize_cuda, table(weight(bind_cuda()).Ret<Buffer>()),
                              {ffi::Traits::kCmdBufferCompatible});

#endif

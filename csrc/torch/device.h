// What the CUDA operators ask of torch and of the CUDA runtime, or of the host simulator in their place: there, tensors
// on the CPU stand for tensors on a device, and the operators are called mpq_simulated::*.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "torch/operands.h"

namespace mpq::device {
struct Versions {
  int runtime, driver;
};
}  // namespace mpq::device

#if defined(MPQ_SIM)

#define MPQ_NAMESPACE mpq_simulated
#define MPQ_KEY CPU

namespace mpq::device {

using torch::stable::Tensor;
using Stream = void*;

inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
inline int32_t index_of(const Tensor&) { return 0; }
inline Place place_of(const Tensor&) { return {true, 0}; }
inline Stream current_stream(int32_t) { return nullptr; }
// The simulator needs no driver.
inline Versions versions() { return {0, 0}; }

// Nothing is captured here.
struct Machine {
  using Stream = device::Stream;
  struct Capture {
    unsigned long long id = 0;
    void* graph = nullptr;
  };
  static Capture capture_of(Stream) { return {}; }
  static void* zeroed(size_t bytes) { return std::memset(::operator new(bytes, std::align_val_t{256}), 0, bytes); }
  static void when_gone(void*, void (*)(void*), void*) {}
};

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

}  // namespace mpq::device

#else

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#define MPQ_NAMESPACE mpq
#define MPQ_KEY CUDA

namespace mpq::device {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using Stream = cudaStream_t;

inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }
inline int32_t index_of(const Tensor& tensor) { return tensor.get_device_index(); }
inline Place place_of(const Tensor& tensor) { return {false, index_of(tensor)}; }

// Torch's current stream. The symbol is in the CUDA part of torch, which a build without CUDA does not have.
inline Stream current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const auto get = reinterpret_cast<Get>([] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  }());
  STD_TORCH_CHECK(get, "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "torch has no current stream on device ", device);
  return static_cast<Stream>(stream);
}

inline void check(const char* what, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// CUDA versions, 1000 major + 10 minor, of the runtime in this library and of the driver; 0 without a driver.
inline Versions versions() {
  Versions found{};
  check("cudaRuntimeGetVersion", cudaRuntimeGetVersion(&found.runtime));
  check("cudaDriverGetVersion", cudaDriverGetVersion(&found.driver));
  return found;
}

// What counters.h asks for.
struct Machine {
  using Stream = cudaStream_t;
  struct Capture {
    unsigned long long id = 0;
    cudaGraph_t graph = nullptr;
  };

  static Capture capture_of(Stream stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    Capture capture;
#if CUDART_VERSION >= 13000
    check("cudaStreamGetCaptureInfo", cudaStreamGetCaptureInfo(stream, &status, &capture.id, &capture.graph));
#else
    check("cudaStreamGetCaptureInfo", cudaStreamGetCaptureInfo_v2(stream, &status, &capture.id, &capture.graph));
#endif
    return status == cudaStreamCaptureStatusActive ? capture : Capture{};
  }

  // A capture forbids calls that could wait for it, unless the thread says that these do not. The zeros are there
  // before the call returns, so that they come before the kernels of any stream.
  static void* zeroed(size_t bytes) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check("cudaThreadExchangeStreamCaptureMode", cudaThreadExchangeStreamCaptureMode(&mode));
    void* memory = nullptr;
    cudaStream_t own = nullptr;
    cudaError_t error = cudaMalloc(&memory, bytes);
    if (!error) error = cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking);
    if (!error) error = cudaMemsetAsync(memory, 0, bytes, own);
    if (!error) error = cudaStreamSynchronize(own);
    if (own) cudaStreamDestroy(own);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (error) cudaFree(memory);
    check("no memory for counters", error);
    return memory;
  }

  static void when_gone(cudaGraph_t graph, void (*call)(void*), void* argument) {
    cudaUserObject_t object = nullptr;
    check("cudaUserObjectCreate", cudaUserObjectCreate(&object, argument, call, 1, cudaUserObjectNoDestructorSync));
    check("cudaGraphRetainUserObject", cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
  }
};

}  // namespace mpq::device

#endif

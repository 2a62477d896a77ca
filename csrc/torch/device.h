// What the CUDA operators ask of torch and of the CUDA runtime, or of the host simulator in their place: there, tensors
// on the CPU stand for tensors on a device, and the operators are called mpq_simulated::*.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "torch/operands.h"

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
// 0 outside of a capture.
inline unsigned long long capture_id(Stream) { return 0; }

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

// Number of the capture that the stream takes part in, 0 outside of any.
inline unsigned long long capture_id(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
  STD_TORCH_CHECK(error == cudaSuccess, "cudaStreamGetCaptureInfo: ", cudaGetErrorString(error));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

}  // namespace mpq::device

#endif

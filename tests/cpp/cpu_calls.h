// For the tests of csrc/cpu: calls of linear and linear_int8 whose buffers notice writes outside of them, and threads.
#pragma once

#include <thread>

#include "cpu/kernels.h"
#include "packed_model.h"

namespace {

// Three threads that take single items in turn.
void run_threads(void*, int64_t n, void (*task)(void*, int64_t, int64_t), void* ctx) {
  std::vector<std::thread> threads;
  for (int64_t id = 0; id < 3; ++id) {
    threads.emplace_back([=] {
      for (int64_t i = n - 1 - id; i >= 0; i -= 3) task(ctx, i, i + 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

const Parallel kSerial{nullptr, nullptr}, kThreads{run_threads, nullptr};
const DType kDTypes[3] = {DType::kF32, DType::kF16, DType::kBF16};

// Tokens of x, rows `stride` elements apart; optional bias; the last result of linear, or of linear_int8.
struct Call {
  Model& model;
  Isa isa;
  DType dtype, bias_dtype;
  int64_t M, stride;
  bool odd, int8 = false;
  LinearInt8 kernel = nullptr;      // in place of that of `isa`
  const Products* pairs = nullptr;  // the same for linear, on AVX-512
  Buffer x, bias, y;
  std::string name;

  Call(Model& m, Isa i, DType d, int64_t tokens, bool with_bias, bool unaligned, const std::string& label)
      : model(m), isa(i), dtype(d), bias_dtype(kDTypes[(static_cast<int>(d) + 1) % 3]), M(tokens), stride(m.K + 3) {
    odd = unaligned;
    name = label + " " + isa_name(isa) + " M=" + std::to_string(M) + " x=" + std::to_string(static_cast<int>(d));
    x = Buffer(static_cast<size_t>(M * stride) * bytes_of(dtype), odd);  // the gap between rows stays NaN
    if (with_bias) bias = Buffer(static_cast<size_t>(model.N) * bytes_of(bias_dtype), odd);
    for (int64_t n = 0; with_bias && n < model.N; ++n) encode(uniform(-1, 1), bias_dtype, bias_at(n));
  }
  unsigned char* x_at(int64_t m, int64_t k) { return x.data() + static_cast<size_t>(m * stride + k) * bytes_of(dtype); }
  unsigned char* y_at(int64_t m, int64_t n) {
    return y.data() + static_cast<size_t>(m * model.N + n) * bytes_of(dtype);
  }
  unsigned char* bias_at(int64_t n) { return bias.data() + static_cast<size_t>(n) * bytes_of(bias_dtype); }
  std::vector<unsigned char> run(const Parallel& parallel) {
    y = Buffer(static_cast<size_t>(M * model.N) * bytes_of(dtype), odd);
    LinearArgs args{x.data(),   dtype,    M,       stride, model.weight(), bias.size ? bias.data() : nullptr,
                    bias_dtype, y.data(), nullptr, 0};
    Buffer workspace(int8 ? linear_int8_workspace_bytes(args) : linear_workspace_bytes(args), odd);
    args.workspace = workspace.data(), args.workspace_bytes = workspace.size;
    if (kernel) {
      kernel(args, parallel);
    } else if (pairs) {
      exact_avx512().linear(args, parallel, pairs);
    } else {
      check((int8 ? linear_int8 : linear)(args, isa, parallel) == kOk, name, "error code");
    }
    check(y.intact() && workspace.intact(), name, "wrote outside y or the workspace");
    return y.bytes;
  }
};

// Whether the last result of `call` is W times x, within what fp32 sums may miss.
void check_values(Call& call, bool bias) {
  const Model& model = call.model;
  const double unit = call.dtype == DType::kF32 ? 0x1p-24 : call.dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  for (int64_t m = 0; m < call.M; ++m) {
    for (int64_t n = 0; n < model.N; ++n) {
      double sum = bias ? decode(call.bias_at(n), call.bias_dtype) : 0.0, size = std::fabs(sum);
      for (int64_t k = 0; k < model.K; ++k) {
        const double x = decode(call.x_at(m, k), call.dtype);
        sum += model.w[n * model.K + k] * x;
        size += model.size[n * model.K + k] * std::fabs(x);
      }
      // K + 16 fp32 roundings of terms that add up to at most `size`, and one rounding to the output dtype.
      const double bound = (model.K + 16) * 0x1p-24 * size + unit * std::fabs(sum) * 1.01 + 0x1p-25;
      check(std::fabs(decode(call.y_at(m, n), call.dtype) - sum) <= bound, call.name, "value");
    }
  }
}

}  // namespace

// Standalone test of csrc/cpu against a scalar packer and a double-precision reference. Needs no torch:
//
//   g++ -std=c++20 -O2 -I csrc tests/cpp/test_cpu_kernels.cpp <objects of csrc/cpu> -pthread -o test && ./test
//
// Every case runs on every instruction set that this machine supports. Prints what was checked; returns 1 on failure.
#include "cpu_calls.h"

namespace {

// Those with exact kernels of their own, for any x or for bf16; the others have the same.
std::vector<Isa> exact_isas() {
  std::vector<Isa> out;
#define MPQ_ADD(name, exact, pairs, ...) \
  if (std::string(#name) == #exact || std::string(#name) == #pairs) out.push_back(Isa::name);
  MPQ_CPU_ISAS(MPQ_ADD, MPQ_ADD)
#undef MPQ_ADD
  return out;
}
const std::vector<Isa> kExactIsas = exact_isas();

void check_one_hot(Model& model, Isa isa, int64_t M, bool odd, const std::string& label) {
  Call call(model, isa, DType::kF32, M, false, odd, label + " one-hot");
  for (int trial = 0; trial < 3; ++trial) {
    std::vector<int64_t> columns;
    for (int64_t m = 0; m < M; ++m)
      columns.push_back(m == 0 && trial == 0 ? model.K - 1 : below(static_cast<int>(model.K)));
    for (int64_t i = 0; i < M * model.K; ++i)
      encode(columns[i / model.K] == i % model.K, call.dtype, call.x_at(i / model.K, i % model.K));
    call.run(kSerial);
    for (int64_t i = 0; i < M * model.N; ++i) {
      const float* want = &model.w[i % model.N * model.K + columns[i / model.N]];
      check(!std::memcmp(call.y_at(i / model.N, i % model.N), want, 4), call.name, "not the bits of W");
    }
  }
}

void check_random(Model& model, Isa isa, DType dtype, int64_t M, bool bias, bool odd, const std::string& label) {
  Call call(model, isa, dtype, M, bias, odd, label + " random");
  for (int64_t i = 0; i < M * model.K; ++i) encode(uniform(-1, 1), dtype, call.x_at(i / model.K, i % model.K));
  const std::vector<unsigned char> first = call.run(kSerial);
  check_values(call, bias);
  check(call.run(kThreads) == first, call.name, "1 and 3 threads differ");
  if (M < 2) return;
  const int64_t bad = below(static_cast<int>(M));
  encode(below(2) ? NAN : INFINITY, dtype, call.x_at(bad, below(static_cast<int>(model.K))));
  const std::vector<unsigned char> poisoned = call.run(kSerial);
  const size_t row = static_cast<size_t>(model.N) * bytes_of(dtype), start = call.y.shift;
  for (int64_t m = 0; m < M; ++m) {
    check(m == bad || !std::memcmp(&poisoned[start + m * row], &first[start + m * row], row), call.name, "NaN spread");
  }
}

// Rounding to int8 moves an element by at most amax / 254 of its block, hence of its token; the same bits for any M.
void check_int8(Model& model, Isa isa, DType dtype, int64_t M, bool bias, bool odd, const std::string& label) {
  Call call(model, isa, dtype, M, bias, odd, label + " int8");
  call.int8 = true;
  for (int64_t i = 0; i < M * model.K; ++i) encode(uniform(-1, 1), dtype, call.x_at(i / model.K, i % model.K));
  const std::vector<unsigned char> first = call.run(kSerial);
  const double unit = dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
  for (int64_t m = 0; m < M; ++m) {
    double amax = 0.0;
    for (int64_t k = 0; k < model.K; ++k) amax = std::fmax(amax, std::fabs(decode(call.x_at(m, k), dtype)));
    for (int64_t n = 0; n < model.N; ++n) {
      double sum = bias ? decode(call.bias_at(n), call.bias_dtype) : 0.0, size = std::fabs(sum), moved = 0.0;
      for (int64_t k = 0; k < model.K; ++k) {
        const double x = decode(call.x_at(m, k), dtype), w = model.w[n * model.K + k];
        sum += w * x;
        moved += std::fabs(w) * amax / 253;
        size += model.size[n * model.K + k] * (std::fabs(x) + amax / 253);
      }
      const double bound = moved + (model.K + 16) * 0x1p-24 * size + unit * (std::fabs(sum) + moved) * 1.01 + 0x1p-25;
      check(std::fabs(decode(call.y_at(m, n), dtype) - sum) <= bound, call.name, "value");
    }
  }
  check(call.run(kThreads) == first, call.name, "1 and 3 threads differ");
}

void check_dequantize(Model& model, Isa isa, DType dtype, bool odd, const std::string& label) {
  Buffer out(static_cast<size_t>(model.N * model.K) * bytes_of(dtype), odd);
  const std::string name = label + " dequantize " + isa_name(isa);
  check(dequantize(model.weight(), out.data(), dtype, isa, kThreads) == kOk, name, "error code");
  check(out.intact(), name, "wrote outside");
  for (int64_t i = 0; i < model.N * model.K; ++i) {
    unsigned char want[4];
    encode(model.w[i], dtype, want);
    check(!std::memcmp(out.data() + i * bytes_of(dtype), want, bytes_of(dtype)), name, "not the bits of W");
  }
}

void check_embedding(Model& model, DType dtype, bool odd, const std::string& label) {
  const std::string name = label + " embedding";
  const int64_t row = model.K * bytes_of(dtype);
  std::vector<int64_t> ids{model.N - 1, 0};
  for (int i = 0; i < 9; ++i) ids.push_back(below(static_cast<int>(model.N)));
  const auto count = static_cast<int64_t>(ids.size());
  Buffer out(static_cast<size_t>(count * row), odd);
  check(embedding(model.weight(), ids.data(), count, out.data(), dtype, kThreads) == kOk, name, "error code");
  check(out.intact(), name, "wrote outside");
  for (int64_t i = 0; i < count * model.K; ++i) {
    unsigned char want[4];
    encode(model.w[ids[i / model.K] * model.K + i % model.K], dtype, want);
    check(!std::memcmp(out.data() + i * bytes_of(dtype), want, bytes_of(dtype)), name, "not the bits of W");
  }
  for (const int64_t bad : {int64_t{-1}, model.N}) {
    check(embedding(model.weight(), &bad, 1, out.data(), dtype, kSerial) == kErrorId, name, "an id outside");
  }
}

const int64_t kTokens[] = {1, 2, 4, 5, 7, 17};
const int64_t kRows[] = {1, 63, 65, 172, 640};

void check_model(const std::vector<BandSpec>& bands, int seed, const std::string& label) {
  const bool odd = seed & 1, permuted = seed & 2, bias = seed & 4;
  Model model = make_model(bands, kDTypes[seed % 3], permuted, odd);
  for (const Isa isa : kIsas) {
    if (supported(isa)) check_int8(model, isa, kDTypes[seed % 3], kTokens[(seed / 3) % 6], bias, odd, label);
  }
  check_embedding(model, kDTypes[seed / 3 % 3], odd, label);
  for (const Isa isa : kExactIsas) {
    if (!supported(isa)) continue;
    check_dequantize(model, isa, kDTypes[seed / 3 % 3], odd, label);
    check_one_hot(model, isa, kTokens[seed % 6], odd, label);
    check_one_hot(model, isa, kTokens[(seed + 2) % 6], odd, label);
    for (int i = 0; i < 2; ++i)
      check_random(model, isa, kDTypes[(seed + i) % 3], kTokens[(seed / 2 + 3 * i) % 6], bias, odd, label);
  }
}

struct ColumnCase {
  int64_t K, group_size;
};

// Groups that are whole chunks of 16 columns, one group over everything, and groups that end inside a chunk.
const ColumnCase kColumnCases[] = {{1, 1},    {63, 63},  {63, 7},   {65, 65},  {65, 5},    {65, 1},    {172, 172},
                                   {172, 43}, {640, 16}, {640, 32}, {640, 64}, {640, 128}, {640, 640}, {640, 5}};

// Every width x columns x zero kind; rows, dtypes, permutation, bias and alignment rotate with the case number.
int check_uniform() {
  int cases = 0;
  for (int bits = 1; bits <= 8; ++bits) {
    for (const ColumnCase& columns : kColumnCases) {
      for (int zero_kind = 0; zero_kind < kZeroKinds; ++zero_kind) {
        const int64_t N = kRows[(cases + cases / 5) % 5];
        const std::string label = "bits=" + std::to_string(bits) + " N=" + std::to_string(N) +
                                  " K=" + std::to_string(columns.K) + " group=" + std::to_string(columns.group_size) +
                                  " zero=" + std::to_string(zero_kind);
        check_model({{N, {{columns.K, bits, columns.group_size, zero_kind}}}}, below(1 << 20), label);
        ++cases;
      }
    }
  }
  return cases;
}

int check_segments() {
  int cases = 0;
  for (const auto& bands : mixed_weights()) {
    for (int seed = 0; seed < 36; seed += 5, ++cases) check_model(bands, seed, "segments " + std::to_string(cases));
  }
  return cases;
}

// More tokens than the workspace holds at a time, in few row blocks, so that tokens are split among work items.
int check_many_tokens() {
  Model model = make_model({{70, {{65, 3, 5, kZeroInt}}}}, DType::kF16, true, true);
  Model chunks = make_model({{70, {{65, 3, 65, kZeroInt}}}}, DType::kF16, true, true);
  for (const Isa isa : kExactIsas) {
    if (!supported(isa)) continue;
    check_random(model, isa, DType::kBF16, 401, true, true, "many tokens");
    check_random(chunks, isa, DType::kBF16, 401, true, true, "many tokens, groups of chunks");
  }
  for (const Isa isa : kIsas) {
    if (supported(isa)) check_int8(model, isa, DType::kBF16, 401, true, true, "many tokens");
  }
  return 1;
}

// Every fp16 and bf16 value, and fp32 values around every rounding step, through the conversions of linear.
int check_conversions() {
  Model model = make_model({{1, {{1, 1, 1, kZeroFloat}}}}, DType::kF32, false, false);
  const float one = 1.0f, zero = -1.0f;  // code 0: w = (0 + 1) * 1; code 1: w = 2
  std::memcpy(model.storage[1].data(), &one, 4);
  std::memcpy(model.storage[2].data(), &zero, 4);
  std::memset(model.storage[0].data(), 0, model.storage[0].size);
  for (const Isa isa : kExactIsas) {
    if (!supported(isa)) continue;
    for (const DType dtype : {DType::kF16, DType::kBF16}) {
      Call call(model, isa, dtype, 65536, false, false, "conversion");
      for (int i = 0; i < 65536; ++i) {
        const uint16_t word = static_cast<uint16_t>(i);
        std::memcpy(call.x_at(i, 0), &word, 2);
      }
      call.run(kSerial);
      for (int i = 0; i < 65536; ++i) {
        const double want = decode(call.x_at(i, 0), dtype), got = decode(call.y_at(i, 0), dtype);
        const bool lost = isa == Isa::avx512bf16 && dtype == DType::kBF16 && std::isinf(want);  // code 0 times Inf
        check(got == want || ((std::isnan(want) || lost) && std::isnan(got)), call.name, "value");
      }
    }
  }
  return 65536;
}

// fp32 values next to, at and between the values of a 16-bit dtype come out of dequantize rounded to nearest even.
int check_rounding() {
  std::vector<float> values = {0.0f,        0x1p-149f, 65519.99f,      65520.0f, 1e30f, 0x1.fefffep127f,
                               0x1.ffp127f, 0x1p-25f,  0x1.000002p-25f};
  for (int i = 0; i < 20000; ++i)
    values.push_back(static_cast<float>(std::ldexp((below(8192) + 0.5 * below(3)), below(44) - 38)));
  while (values.size() % 64) values.push_back(static_cast<float>(uniform(0, 1) * 0x1p-14));
  const int64_t N = static_cast<int64_t>(values.size());
  Model model = make_model({{N, {{1, 1, 1, kZeroFloat}}}}, DType::kF32, false, false);
  const float zero = -1.0f;  // with code 0, w = scale
  std::memset(model.storage[0].data(), 0, model.storage[0].size);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t at = n / 64 * 64 + 8 * (n % 8) + 4 * (n % 16 / 8) + n % 64 / 16;
    model.w[n] = n % 2 ? -values[n] : values[n];
    std::memcpy(model.storage[1].data() + 4 * at, &model.w[n], 4);
    std::memcpy(model.storage[2].data() + 4 * at, &zero, 4);
    model.w[n] += 0.0f;
  }
  for (const Isa isa : kExactIsas) {
    if (!supported(isa)) continue;
    for (const DType dtype : kDTypes) check_dequantize(model, isa, dtype, false, "rounding");
  }
  return static_cast<int>(N);
}

void check_errors() {
  Model model = make_model({{2, {{64, 4, 64, kZeroNone}, {6, 2, 3, kZeroNone}}}}, DType::kF16, false, false);
  float x[70] = {}, y[2] = {7.0f, 7.0f};
  LinearArgs args{x, DType::kF32, 0, 70, model.weight(), nullptr, DType::kF32, y, nullptr, 0};
  check(linear_workspace_bytes(args) == 0 && linear(args, Isa::portable, kSerial) == kOk && y[0] == 7.0f, "errors",
        "M=0");
  args.M = 1;
  std::vector<char> workspace(linear_workspace_bytes(args));
  args.workspace = workspace.data();
  args.workspace_bytes = workspace.size() - 1;
  check(linear(args, Isa::portable, kSerial) == kErrorWorkspace, "errors", "short workspace");
  LinearArgs many = args;
  many.M = kTokenChunk;
  const size_t most = linear_workspace_bytes(many), most_int8 = linear_int8_workspace_bytes(many);
  many.M = 1 << 20;
  check(linear_workspace_bytes(many) == most, "errors", "workspace grows without limit");
  args.workspace_bytes = workspace.size();
  check(linear(args, Isa::portable, kSerial) == kOk, "errors", "valid call");
  std::vector<char> wide(linear_int8_workspace_bytes(args));
  LinearArgs rounded = args;
  rounded.workspace = wide.data(), rounded.workspace_bytes = wide.size() - 1;
  check(linear_int8(rounded, Isa::portable, kSerial) == kErrorWorkspace, "errors", "short workspace of int8");
  check(linear_int8_workspace_bytes(many) == most_int8, "errors", "workspace of int8 grows without limit");
  const auto expect = [&](int want, auto change, const char* what) {
    Model copy = model;
    LinearArgs bad = args;
    bad.weight.segments = copy.segments.data();
    change(bad, copy.segments);
    check(linear(bad, Isa::portable, kSerial) == want && std::strlen(error_text(want)) > 5, "errors", what);
  };
  expect(kErrorShape, [](LinearArgs& a, auto&) { a.M = -1; }, "negative M");
  expect(kErrorNull, [](LinearArgs& a, auto&) { a.x = nullptr; }, "null x");
  expect(kErrorDType, [](LinearArgs& a, auto&) { a.x_dtype = static_cast<DType>(9); }, "unknown dtype");
  expect(kErrorCover, [](LinearArgs& a, auto&) { a.weight.N = 3; }, "missing row");
  expect(kErrorCover, [](LinearArgs& a, auto&) { a.weight.K = 71; }, "missing column");
  expect(kErrorCover, [](LinearArgs& a, auto&) { a.weight.num_segments = 1; }, "missing segment");
  expect(kErrorSegment, [](LinearArgs&, auto& s) { s[0].bits = 9; }, "bits=9");
  expect(kErrorSegment, [](LinearArgs&, auto& s) { s[1].group_size = 4; }, "group_size does not divide");
  expect(kErrorNull, [](LinearArgs&, auto& s) { s[1].zero_kind = kZeroInt; }, "zeros missing");
}

}  // namespace

int main() {
  const int uniform_cases = check_uniform(), segment_cases = check_segments(), many = check_many_tokens();
  const int conversions = check_conversions(), roundings = check_rounding();
  check_errors();
  std::printf("best isa: %s\n", isa_name(best_isa()));
  for (const Isa isa : kIsas) {
    std::printf("%s: %s\n", isa_name(isa), supported(isa) ? "checked" : "not supported here, skipped");
  }
  std::printf("%d uniform, %d segmented, %d many-token weights, %d conversions, %d roundings\n", uniform_cases,
              segment_cases, many, conversions, roundings);
  std::printf("%ld checks, %d failures\n", checks, failures);
  return failures ? 1 : 0;
}

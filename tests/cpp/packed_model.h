// For the C++ kernel tests: a scalar packer written from docs/format.md alone, rounding by arithmetic, and
// buffers that notice writes outside of them. Included by one source file; failed checks are counted here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/cpu.h"
#include "generated/layout.h"

namespace {

using namespace mpq;
using namespace mpq::cpu;

int failures = 0;
long checks = 0;
std::mt19937 rng(1);

void check(bool ok, const std::string& where, const char* what) {
  ++checks;
  if (!ok && ++failures <= 20) std::printf("FAILED: %s: %s\n", where.c_str(), what);
}

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(rng); }
int below(int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); }
size_t bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// Nearest value, ties to even, of a binary format with `precision` significant bits; by arithmetic, not by bit tricks.
double round_to(double value, DType dtype) {
  if (!std::isfinite(value) || value == 0.0) return value;
  if (dtype == DType::kF32) return static_cast<float>(value);
  const bool half = dtype == DType::kF16;
  const int exponent = std::max(std::ilogb(value), half ? -14 : -126);
  const double unit = std::ldexp(1.0, exponent - (half ? 10 : 7));
  const double rounded = std::nearbyint(value / unit) * unit;
  const double limit = half ? 65504.0 : 0x1.fep127;
  return std::fabs(rounded) > limit ? std::copysign(INFINITY, value) : rounded;
}

void encode(double value, DType dtype, void* out) {
  const float f = static_cast<float>(round_to(value, dtype));
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (dtype == DType::kF32) std::memcpy(out, &bits, 4);
  uint16_t word = static_cast<uint16_t>(bits >> 16);
  if (dtype == DType::kF16) {
    const double size = std::fabs(round_to(value, dtype));
    const int e = size == 0.0 ? -14 : std::max(std::ilogb(size), -14);
    const int mantissa = std::isfinite(size) ? static_cast<int>(std::ldexp(size, 10 - e)) : 0;
    word = static_cast<uint16_t>(std::isfinite(size) ? mantissa + (mantissa >= 1024 ? (e + 14) << 10 : 0) : 0x7c00);
    if (std::isnan(size)) word = 0x7e00;
    word |= static_cast<uint16_t>(bits >> 16 & 0x8000);
  }
  if (dtype != DType::kF32) std::memcpy(out, &word, 2);
}

double decode(const void* in, DType dtype) {
  uint32_t bits = 0;
  std::memcpy(&bits, in, bytes_of(dtype));
  if (dtype == DType::kF16) {
    const int e = bits >> 10 & 31, m = bits & 1023;
    const double size = e == 31 ? (m ? NAN : INFINITY) : std::ldexp(e ? m + 1024 : m, std::max(e, 1) - 25);
    return bits & 0x8000 ? -size : size;
  }
  if (dtype == DType::kBF16) bits <<= 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Bytes at an odd address if asked, between red zones.
struct Buffer {
  std::vector<unsigned char> bytes;
  size_t shift, size;
  explicit Buffer(size_t n = 0, bool odd = false) : bytes(n + 129, 0xff), shift(odd ? 65 : 64), size(n) {}
  unsigned char* data() { return bytes.data() + shift; }
  bool intact() const {
    for (size_t i = 0; i < bytes.size(); ++i) {
      if ((i < shift || i >= shift + size) && bytes[i] != 0xff) return false;
    }
    return true;
  }
};

struct SegmentSpec {
  int64_t cols;
  int bits;
  int64_t group_size;
  int zero_kind;
};
struct BandSpec {
  int64_t rows;
  std::vector<SegmentSpec> segments;
};

// Row bands at any row, column segments of different widths, group sizes and zero kinds.
inline std::vector<std::vector<BandSpec>> mixed_weights() {
  const int none = kZeroNone, half = kZeroHalf, whole = kZeroInt, real = kZeroFloat, least = kZeroMin;
  return {
      {{64, {{128, 8, 64, whole}, {512, 3, 128, none}}}, {100, {{320, 4, 64, whole}, {320, 2, 32, half}}}},
      {{1, {{172, 2, 43, least}}}, {63, {{172, 7, 172, half}}}, {65, {{64, 5, 16, real}, {108, 6, 27, least}}}},
      {{172, {{64, 1, 64, none}, {64, 2, 32, real}, {64, 3, 1, none}, {192, 4, 32, least}, {256, 4, 64, real}}},
       {3, {{320, 8, 5, none}, {320, 8, 5, least}}}},
      {{640, {{64, 4, 64, whole}, {1, 8, 1, whole}}}},
  };
}

// A packed weight with what it means: w in original column order, size for error bounds: (code + |zero|) * |scale|, or
// for the kind min code * |scale| + |zero|.
struct Model {
  int64_t N = 0, K = 0;
  DType scale_dtype = DType::kF32;
  std::vector<int32_t> perm;
  std::vector<Segment> segments;
  std::vector<Buffer> storage;
  std::vector<float> w;
  std::vector<double> size;
  Weight weight() {
    return {
        N, K, segments.data(), static_cast<int>(segments.size()), scale_dtype, perm.empty() ? nullptr : perm.data()};
  }
};

void set_code(Segment& s, int64_t col_tiles, int64_t n, int64_t k, int code) {
  const int64_t tile = n / 64 * col_tiles + k / 64;
  const int t = n % 64 / 16, h = n % 16 / 8, g = n % 8, c = k % 64 / 16, m = k % 16 / 8, q = k % 8 / 2, e = k % 2;
  const int lane = 4 * g + q;
  int left = s.bits;
  for (int i = 0; i < kPlaneCount[s.bits]; ++i) {
    const int width = kPlaneWidth[s.bits][i];
    left -= width;
    int index = lane * 4 + c, bit = 16 * e + 8 * m + 4 * (t & 1) + 2 * (t >> 1) + h;
    if (width == 4) index = (c * 32 + lane) * 4 + t, bit = 16 * e + 8 * m + 4 * h;
    if (width == 2)
      index = ((c >> 1) * 32 + lane) * 4 + (c & 1) * 2 + (t >> 1), bit = 16 * e + 8 * m + 4 * (t & 1) + 2 * h;
    char* at = reinterpret_cast<char*>(const_cast<uint32_t*>(s.planes[i])) + 4 * (tile * 128 * width + index);
    uint32_t word;
    std::memcpy(&word, at, 4);
    word |= static_cast<uint32_t>(code >> left & ((1 << width) - 1)) << bit;
    std::memcpy(at, &word, 4);
  }
}

// Padding is poisoned where the kernels promise not to look: codes beyond the columns, scales beyond the rows.
void add_segment(Model& model, int64_t n0, int64_t n1, int64_t k0, const SegmentSpec& spec, bool odd) {
  Segment s{n0, n1, k0, k0 + spec.cols, spec.bits, spec.group_size, spec.zero_kind, {}, nullptr, nullptr};
  const int64_t rows = n1 - n0, row_tiles = (rows + 63) / 64, col_tiles = (spec.cols + 63) / 64;
  const bool none = spec.zero_kind == kZeroNone || spec.zero_kind == kZeroHalf, min = spec.zero_kind == kZeroMin;
  const size_t width = bytes_of(model.scale_dtype), zero_width = spec.zero_kind == kZeroInt ? 1 : width;
  const int64_t groups = spec.cols / spec.group_size, count = groups * row_tiles * 64;
  const auto place = [&](int64_t n, int64_t group) {
    return (n / 64 * groups + group) * 64 + 8 * (n % 8) + 4 * (n % 16 / 8) + n % 64 / 16;
  };
  const auto keep = [&](size_t bytes, int fill) {
    model.storage.emplace_back(bytes, odd);
    std::memset(model.storage.back().data(), fill, bytes);
    return model.storage.back().data();
  };
  for (int i = 0; i < kPlaneCount[s.bits]; ++i) {
    const size_t bytes = static_cast<size_t>(row_tiles * col_tiles * 512 * kPlaneWidth[s.bits][i]);
    s.planes[i] = reinterpret_cast<const uint32_t*>(keep(bytes, 0));
  }
  unsigned char* scales = keep(static_cast<size_t>(count) * width, 0xff);
  unsigned char* zeros = none ? nullptr : keep(static_cast<size_t>(count) * zero_width, 0xff);
  s.scales = scales, s.zeros = zeros;
  const float middle = spec.zero_kind == kZeroHalf || s.bits == 1 ? ((1 << s.bits) - 1) / 2.0f : 1 << (s.bits - 1);
  std::vector<float> scale(count), zero(count, middle);
  for (int64_t i = 0; i < groups * rows; ++i) {
    const int64_t at = place(i % rows, i / rows);
    encode(below(20) ? uniform(-0.1, 0.1) : uniform(-1, 1) * 0x1p-20, model.scale_dtype, scales + at * width);
    scale[at] = static_cast<float>(decode(scales + at * width, model.scale_dtype));
    if (spec.zero_kind == kZeroInt) zero[at] = zeros[at] = static_cast<unsigned char>(below(256));
    if (spec.zero_kind == kZeroFloat || min) {
      encode(min ? uniform(-1, 1) : uniform(-4, 1 << s.bits), model.scale_dtype, zeros + at * width);
      zero[at] = static_cast<float>(decode(zeros + at * width, model.scale_dtype));
    }
  }
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t k = 0; k < col_tiles * 64; ++k) {
      const int code = below(1 << s.bits);
      set_code(s, col_tiles, n, k, code);
      if (k >= spec.cols) continue;
      const int64_t at = place(n, k / spec.group_size);
      const int64_t to = (n0 + n) * model.K + (model.perm.empty() ? k0 + k : model.perm[k0 + k]);
      const double size = std::fabs(static_cast<double>(scale[at]));
      const float centered = static_cast<float>(code) - zero[at], scaled = static_cast<float>(code) * scale[at];
      model.w[to] = (min ? scaled + zero[at] : centered * scale[at]) + 0.0f;
      model.size[to] = min ? code * size + std::fabs(zero[at]) : (code + std::fabs(zero[at])) * size;
    }
  }
  model.segments.push_back(s);
}

Model make_model(const std::vector<BandSpec>& bands, DType scale_dtype, bool permuted, bool odd) {
  Model model;
  model.scale_dtype = scale_dtype;
  for (const SegmentSpec& s : bands[0].segments) model.K += s.cols;
  for (const BandSpec& band : bands) model.N += band.rows;
  for (int32_t k = 0; permuted && k < model.K; ++k) model.perm.push_back(k);
  std::shuffle(model.perm.begin(), model.perm.end(), rng);
  model.w.resize(model.N * model.K);
  model.size.resize(model.N * model.K);
  model.storage.reserve(64);
  int64_t n0 = 0;
  for (const BandSpec& band : bands) {
    int64_t k0 = 0;
    for (const SegmentSpec& s : band.segments) {
      add_segment(model, n0, n0 + band.rows, k0, s, odd);
      k0 += s.cols;
    }
    n0 += band.rows;
  }
  return model;
}

}  // namespace

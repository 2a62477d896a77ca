// The tile registers of AMX in plain C++, for machines without them, as Intel's manual describes palette 1: eight
// registers of at most 16 rows of 64 bytes. What would fault there, or stay behind, is counted here.
//
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TILELOADD, TDPBSUD,
// TDPBF16PS, TILESTORED, TILERELEASE and the exception classes AMX-E1 to AMX-E6.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/tiles/amx.h"

namespace mpq::cpu {

struct TileCounts {
  std::atomic<long> configured, released, dots, misuses;
};
extern TileCounts tile_counts;  // of all threads

namespace {

class SimulatedTiles {
 public:
  static constexpr int64_t kTokens = 16;

  ~SimulatedTiles() { expect(!configured_); }  // state that outlives its task

  void configure(const TileConfig& config) {
    expect(config.palette == 1 && config.start_row == 0);
    for (const uint8_t byte : config.reserved) expect(byte == 0);
    for (int t = 0; t < 16; ++t) {
      expect(config.rows[t] <= (t < 8 ? 16 : 0) && config.bytes[t] <= (t < 8 ? 64 : 0));
      expect((config.rows[t] == 0) == (config.bytes[t] == 0));
    }
    for (int t = 0; t < 8; ++t) registers_[t] = Register{config.rows[t] & 31, config.bytes[t] & 127, {}};
    configured_ = true;
    ++tile_counts.configured;
  }

  void release() {
    expect(configured_);
    for (Register& r : registers_) r = Register{};
    configured_ = false;
    ++tile_counts.released;
  }

  void zero(int t) {
    if (usable(t)) std::memset(registers_[t].data, 0, sizeof registers_[t].data);
  }

  void load(int t, const void* from, int64_t stride) {
    if (!usable(t)) return;
    Register& r = registers_[t];
    std::memset(r.data, 0, sizeof r.data);
    for (int row = 0; row < r.rows; ++row) {
      std::memcpy(r.data[row], static_cast<const char*>(from) + row * stride, static_cast<size_t>(r.bytes));
    }
  }

  void store(int t, void* to, int64_t stride) {
    if (!usable(t)) return;
    const Register& r = registers_[t];
    for (int row = 0; row < r.rows; ++row) {
      std::memcpy(static_cast<char*>(to) + row * stride, r.data[row], static_cast<size_t>(r.bytes));
    }
  }

  template <typename XByte, typename WByte>
  void dot_as(int to, int left, int right) {
    if (!fitting(to, left, right)) return;
    Register& sums = registers_[to];
    const Register &x = registers_[left], &w = registers_[right];
    Register out{sums.rows, sums.bytes, {}};
    for (int m = 0; m < sums.rows; ++m) {
      for (int n = 0; n < sums.bytes / 4; ++n) {
        uint32_t sum;  // wraps, as the instruction does
        std::memcpy(&sum, sums.data[m] + 4 * n, 4);
        for (int k = 0; k < x.bytes; ++k) {
          const int product = static_cast<XByte>(x.data[m][k]) * static_cast<WByte>(w.data[k / 4][4 * n + k % 4]);
          sum += static_cast<uint32_t>(product);
        }
        std::memcpy(out.data[m] + 4 * n, &sum, 4);
      }
    }
    sums = out;
    ++tile_counts.dots;
  }

  // TDPBF16PS: even and odd columns are added up apart, from zero on, in fused steps; subnormal factors and sums are 0.
  void dot_bf16(int to, int left, int right) {
    if (!fitting(to, left, right)) return;
    Register& sums = registers_[to];
    const Register &x = registers_[left], &w = registers_[right];
    for (int m = 0; m < sums.rows; ++m) {
      for (int n = 0; n < sums.bytes / 4; ++n) {
        float parts[2] = {};
        for (int k = 0; k < x.bytes / 4; ++k) {
          for (int e = 0; e < 2; ++e) {
            const float product_of[2] = {bf16(x.data[m] + 4 * k + 2 * e), bf16(w.data[k] + 4 * n + 2 * e)};
            parts[e] = flushed(std::fma(product_of[0], product_of[1], parts[e]));
          }
        }
        float sum;
        std::memcpy(&sum, sums.data[m] + 4 * n, 4);
        sum = flushed(flushed(sum) + flushed(parts[0] + parts[1]));
        std::memcpy(sums.data[m] + 4 * n, &sum, 4);
      }
    }
    ++tile_counts.dots;
  }

  // As AmxTiles has them; dot_bytes is TDPBSUD, signed bytes of X times unsigned bytes of W.
  template <int T>
  void zero() {
    zero(T);
  }
  template <int T>
  void load(const void* from, int64_t stride) {
    load(T, from, stride);
  }
  template <int T>
  void store(void* to, int64_t stride) {
    store(T, to, stride);
  }
  template <int Sums, int X, int W>
  void dot_bytes() {
    dot_as<int8_t, uint8_t>(Sums, X, W);
  }
  template <int Sums, int X, int W>
  void dot_pairs() {
    dot_bf16(Sums, X, W);
  }

 private:
  struct Register {
    int rows, bytes;
    unsigned char data[16][64];
  };

  static float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

  static float bf16(const unsigned char* at) {
    uint16_t half;
    std::memcpy(&half, at, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return flushed(value);
  }

  // Whether the registers of a product can be used, differ, and have shapes that belong together.
  bool fitting(int to, int left, int right) const {
    if (!usable(to) || !usable(left) || !usable(right)) return false;
    const Register &sums = registers_[to], &x = registers_[left], &w = registers_[right];
    const bool fits = to != left && to != right && left != right && sums.bytes % 4 == 0 && x.bytes % 4 == 0 &&
                      sums.rows == x.rows && sums.bytes == w.bytes && x.bytes / 4 == w.rows;
    expect(fits);
    return fits;
  }

  static void expect(bool right) { tile_counts.misuses += !right; }

  bool usable(int t) const {
    const bool right = configured_ && t >= 0 && t < 8 && registers_[t].rows > 0;
    expect(right);
    return right;
  }

  Register registers_[8] = {};
  bool configured_ = false;
};

}  // namespace
}  // namespace mpq::cpu

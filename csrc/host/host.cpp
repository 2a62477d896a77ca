// Host-side packing: codes -> kernel-ready words and back, on all cores. The order of words and bits comes from
// generated/layout.h alone, so that this file has no opinion on the layout.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "generated/layout.h"

namespace py = pybind11;

namespace {

constexpr int kTileCodes = mpq::kTileN * mpq::kTileK;

using Codes = py::array_t<uint8_t, py::array::c_style>;
using Words = py::array_t<int32_t, py::array::c_style>;

struct Shape {
  int64_t n, k;  // true rows and columns
  int bits;

  int64_t row_tiles() const { return (n + mpq::kTileN - 1) / mpq::kTileN; }
  int64_t col_tiles() const { return (k + mpq::kTileK - 1) / mpq::kTileK; }
  int64_t words() const { return row_tiles() * col_tiles() * kTileCodes * bits / 32; }
};

const uint16_t* source_table(int width) {
  return width == 4 ? mpq::kSource4 : width == 2 ? mpq::kSource2 : mpq::kSource1;
}

// Runs task(row_tile) for every row of supertiles; rows are handed out one at a time, since the last may be short.
template <class Task>
void for_each_row_tile(int64_t row_tiles, int threads, const Task& task) {
  const int count = static_cast<int>(std::min<int64_t>(std::max(threads, 1), row_tiles));
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t tile = next++; tile < row_tiles; tile = next++) task(tile);
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < count; ++i) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
}

// One supertile of codes, padded with zero codes; tile: [64][64].
void load_tile(const uint8_t* codes, const Shape& shape, int64_t row_tile, int64_t col_tile, uint8_t* tile) {
  const int64_t n0 = row_tile * mpq::kTileN, k0 = col_tile * mpq::kTileK;
  const int64_t rows = std::min<int64_t>(mpq::kTileN, shape.n - n0),
                cols = std::min<int64_t>(mpq::kTileK, shape.k - k0);
  if (rows < mpq::kTileN || cols < mpq::kTileK) std::memset(tile, 0, kTileCodes);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(tile + r * mpq::kTileK, codes + (n0 + r) * shape.k + k0, cols);
}

void store_tile(uint8_t* codes, const Shape& shape, int64_t row_tile, int64_t col_tile, const uint8_t* tile) {
  const int64_t n0 = row_tile * mpq::kTileN, k0 = col_tile * mpq::kTileK;
  const int64_t rows = std::min<int64_t>(mpq::kTileN, shape.n - n0),
                cols = std::min<int64_t>(mpq::kTileK, shape.k - k0);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(codes + (n0 + r) * shape.k + k0, tile + r * mpq::kTileK, cols);
}

void pack_plane(const uint8_t* tile, int width, int shift, uint32_t* words) {
  const uint16_t* source = source_table(width);
  const int fields = 32 / width;
  const uint32_t mask = (1u << width) - 1;
  for (int w = 0; w < kTileCodes / fields; ++w, source += fields) {
    uint32_t word = 0;
    for (int i = 0; i < fields; ++i) word |= ((tile[source[i]] >> shift) & mask) << (i * width);
    words[w] = word;
  }
}

void unpack_plane(const uint32_t* words, int width, int shift, uint8_t* tile) {
  const uint16_t* source = source_table(width);
  const int fields = 32 / width;
  const uint32_t mask = (1u << width) - 1;
  for (int w = 0; w < kTileCodes / fields; ++w, source += fields)
    for (int i = 0; i < fields; ++i) tile[source[i]] |= ((words[w] >> (i * width)) & mask) << shift;
}

// Calls visit(width, shift, first word of the supertile) for each plane, most significant first.
template <class Visit>
void for_each_plane(const Shape& shape, int64_t tile_index, const Visit& visit) {
  const int64_t tiles = shape.row_tiles() * shape.col_tiles();
  int64_t plane_start = 0;
  int left = shape.bits;
  for (int p = 0; p < mpq::kPlaneCount[shape.bits]; ++p) {
    const int width = mpq::kPlaneWidth[shape.bits][p];
    const int64_t tile_words = kTileCodes * width / 32;
    left -= width;
    visit(width, left, plane_start + tile_index * tile_words);
    plane_start += tiles * tile_words;
  }
}

Shape checked_shape(int64_t n, int64_t k, int bits) {
  if (bits < 1 || bits > 8) throw std::invalid_argument("bits=" + std::to_string(bits) + " is not 1..8");
  if (n < 1 || k < 1) throw std::invalid_argument("codes must have at least one row and one column");
  return {n, k, bits};
}

// codes uint8 [n, k] -> int32 words, planes one after another, each [row tiles][column tiles][128 * width].
Words pack_codes(const Codes& codes, int bits, int threads) {
  if (codes.ndim() != 2) throw std::invalid_argument("codes must be two-dimensional");
  const Shape shape = checked_shape(codes.shape(0), codes.shape(1), bits);
  Words out(shape.words());
  const uint8_t* in = codes.data();
  auto* words = reinterpret_cast<uint32_t*>(out.mutable_data());
  py::gil_scoped_release release;
  for_each_row_tile(shape.row_tiles(), threads, [&](int64_t row) {
    uint8_t tile[kTileCodes];
    for (int64_t col = 0; col < shape.col_tiles(); ++col) {
      load_tile(in, shape, row, col, tile);
      for_each_plane(shape, row * shape.col_tiles() + col,
                     [&](int width, int shift, int64_t start) { pack_plane(tile, width, shift, words + start); });
    }
  });
  return out;
}

// Inverse of pack_codes.
Codes unpack_codes(const Words& packed, int bits, int64_t n, int64_t k, int threads) {
  const Shape shape = checked_shape(n, k, bits);
  if (packed.ndim() != 1 || packed.shape(0) != shape.words())
    throw std::invalid_argument("expected " + std::to_string(shape.words()) + " words");
  Codes out({n, k});
  const auto* words = reinterpret_cast<const uint32_t*>(packed.data());
  uint8_t* codes = out.mutable_data();
  py::gil_scoped_release release;
  for_each_row_tile(shape.row_tiles(), threads, [&](int64_t row) {
    uint8_t tile[kTileCodes];
    for (int64_t col = 0; col < shape.col_tiles(); ++col) {
      std::memset(tile, 0, sizeof tile);
      for_each_plane(shape, row * shape.col_tiles() + col,
                     [&](int width, int shift, int64_t start) { unpack_plane(words + start, width, shift, tile); });
      store_tile(codes, shape, row, col, tile);
    }
  });
  return out;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Packing of integer codes into kernel-ready words.";
  m.attr("LAYOUT_ID") = mpq::kLayoutId;
  m.def("pack_codes", &pack_codes, py::arg("codes").noconvert(), py::arg("bits"), py::arg("threads"));
  m.def("unpack_codes", &unpack_codes, py::arg("packed").noconvert(), py::arg("bits"), py::arg("n"), py::arg("k"),
        py::arg("threads"));
}

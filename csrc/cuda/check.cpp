// Arguments are refused here, before anything is enqueued.
#include "check.h"

#include <climits>
#include <cstdint>

#include "generated/layout.h"
#include "segments.h"

namespace mpq::cuda {

namespace {

bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

bool is_dtype(int32_t dtype) { return dtype == MPQ_F32 || dtype == MPQ_F16 || dtype == MPQ_BF16; }

int check_segment(const mpq_segment& s, const mpq_segment* previous, const mpq_weight& w) {
  if (s.bits < 1 || s.bits > 8 || !is_zero_kind(s.zero)) return MPQ_ERROR_SEGMENT;
  if (s.n0 < 0 || s.n0 >= s.n1 || s.n1 > w.out_features) return MPQ_ERROR_SEGMENT;
  if (s.k0 < 0 || s.k0 >= s.k1 || s.k1 > w.in_features || s.k0 % kTileK != 0) return MPQ_ERROR_SEGMENT;
  if (s.group_size < 1 || (s.k1 - s.k0) % s.group_size != 0) return MPQ_ERROR_SEGMENT;
  if (stores_zeros(s.zero) && !w.zeros) return MPQ_ERROR_NULL;
  const bool same_band = previous && previous->n0 == s.n0 && previous->n1 == s.n1 && previous->k1 == s.k0;
  const bool next_band = s.k0 == 0 && (previous ? previous->n1 == s.n0 && previous->k1 == w.in_features : s.n0 == 0);
  return same_band || next_band ? MPQ_OK : MPQ_ERROR_COVER;
}

}  // namespace

int check_weight(const mpq_weight& w) {
  if (!w.qweight || !w.scales || !w.segments) return MPQ_ERROR_NULL;
  if (w.out_features < 1 || w.in_features < 1 || w.num_segments < 1) return MPQ_ERROR_SHAPE;
  if (w.out_features > INT_MAX || w.in_features > INT_MAX - 4 * kTileK) return MPQ_ERROR_SIZE;
  if (!is_dtype(w.scale_dtype)) return MPQ_ERROR_DTYPE;
  if (!aligned(w.qweight, 16) || !aligned(w.scales, 16) || !aligned(w.zeros, 16) || !aligned(w.perm, 4))
    return MPQ_ERROR_ALIGNMENT;
  int64_t pieces = 0;
  for (int i = 0; i < w.num_segments; ++i) {
    const mpq_segment& s = w.segments[i];
    if (int status = check_segment(s, i ? &w.segments[i - 1] : nullptr, w)) return status;
    pieces += ceil_div(s.n1 - s.n0, kTileN) * ceil_div(s.k1 - s.k0, kTileK) * 32 * s.bits;
  }
  // Codes are addressed in units of 16 bytes by 32-bit numbers: 64 GB.
  if (pieces > UINT32_MAX) return MPQ_ERROR_SIZE;
  const mpq_segment& last = w.segments[w.num_segments - 1];
  return last.n1 == w.out_features && last.k1 == w.in_features ? MPQ_OK : MPQ_ERROR_COVER;
}

int check_linear(const mpq_linear_args& a, int64_t columns_of_y) {
  if (int status = check_weight(a.weight)) return status;
  if (a.tokens < 0) return MPQ_ERROR_SHAPE;
  if (a.tokens > INT_MAX - 64) return MPQ_ERROR_SIZE;
  if (a.x_dtype != MPQ_F16 && a.x_dtype != MPQ_BF16) return MPQ_ERROR_DTYPE;
  if (a.bias && !is_dtype(a.bias_dtype)) return MPQ_ERROR_DTYPE;
  if (a.tokens > 0 && (!a.x || !a.y)) return MPQ_ERROR_NULL;
  if (!aligned(a.x, 2) || !aligned(a.x_gate, 2) || !aligned(a.y, 2) ||
      !aligned(a.bias, a.bias_dtype == MPQ_F32 ? 4 : 2))
    return MPQ_ERROR_ALIGNMENT;
  // Rows may repeat (stride 0) in x, never in y.
  if (a.x_row_stride < 0 || (a.tokens > 1 && a.y_row_stride < columns_of_y)) return MPQ_ERROR_STRIDE;
  return MPQ_OK;
}

int check_device(const mpq_device& device) {
  // 99 KB is the least that any GPU of compute capability 8.0 or later has for one block.
  if (device.capability < 80 || device.multiprocessors < 1 || device.shared_bytes < 99 * 1024) return MPQ_ERROR_DEVICE;
  return MPQ_OK;
}

}  // namespace mpq::cuda

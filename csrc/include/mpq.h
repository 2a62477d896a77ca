/* CUDA kernels for packed weights of any mix of 1..8 bits, as a C interface without torch.
 *
 *     y[M, N] = x[M, K] @ W[N, K]^T + bias,     W = (codes - zeros) * scales, or codes * scales + zeros
 *
 * Raw pointers, shapes and a stream; the caller owns every byte. The functions allocate nothing on the device, throw
 * nothing and wait for nothing: they check their arguments on the host and enqueue kernels on `stream`, so they can be
 * captured into CUDA graphs. What they remember is which kernels a device has been set up for; cudaDeviceReset() makes
 * that wrong. Every function returns MPQ_OK or an error of the enumeration below; mpq_error_text() says
 * it in words. The layout of qweight, scales and zeros is that of docs/format.md: tensors are used as they lie in the
 * file.
 */
#ifndef MPQ_H
#define MPQ_H

#include <stddef.h>
#include <stdint.h>

#define MPQ_VERSION 2 /* of this interface; mpq_version() is that of the library */

#if defined(__GNUC__)
#define MPQ_API __attribute__((visibility("default")))
#else
#define MPQ_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mpq_dtype { MPQ_F32 = 0, MPQ_F16 = 1, MPQ_BF16 = 2 } mpq_dtype;
/* NONE: zeros of 2^(bits-1) (0.5 for 1 bit), HALF: of (2^bits - 1) / 2; neither is stored. INT: uint8. FLOAT, MIN: of
 * the dtype of the scales; with MIN a weight is code * scale + zero. */
typedef enum mpq_zero {
  MPQ_ZERO_NONE = 0,
  MPQ_ZERO_HALF = 1,
  MPQ_ZERO_INT = 2,
  MPQ_ZERO_FLOAT = 3,
  MPQ_ZERO_MIN = 4
} mpq_zero;

typedef enum mpq_status {
  MPQ_OK = 0,
  MPQ_ERROR_NULL = 1,
  MPQ_ERROR_SHAPE = 2,
  MPQ_ERROR_DTYPE = 3,
  MPQ_ERROR_SEGMENT = 4,
  MPQ_ERROR_COVER = 5,
  MPQ_ERROR_ALIGNMENT = 6,
  MPQ_ERROR_STRIDE = 7,
  MPQ_ERROR_WORKSPACE = 8,
  MPQ_ERROR_DEVICE = 9,
  MPQ_ERROR_SIZE = 10,
  MPQ_ERROR_GROUPED = 11,
  /* Of mpq_cpu.h and mpq_model.h alone: */
  MPQ_ERROR_VERSION = 12,
  MPQ_ERROR_ISA = 13,
  MPQ_ERROR_ID = 14,
  MPQ_ERROR_PERM = 15,
  MPQ_ERROR_UNSUPPORTED = 16,
  MPQ_ERROR_MEMORY = 17,
  MPQ_ERROR_FILE = 18,
  MPQ_ERROR_FORMAT = 19,
  MPQ_ERROR_NAME = 20,
  MPQ_ERROR_CUDA = 1000 /* plus a cudaError_t */
} mpq_status;

/* Rows [n0, n1) x columns [k0, k1) of one width. k0 is a multiple of 64; group_size divides k1 - k0. */
typedef struct mpq_segment {
  int64_t n0, n1, k0, k1;
  int64_t group_size;
  int32_t bits; /* 1..8 */
  int32_t zero; /* mpq_zero */
} mpq_segment;

/* Tensors lie on the device and begin at multiples of 16 bytes; `segments` lies on the host and is not kept. */
typedef struct mpq_weight {
  int64_t out_features;        /* N */
  int64_t in_features;         /* K */
  const void* qweight;         /* 32-bit words */
  const void* scales;          /* of scale_dtype */
  const void* zeros;           /* uint8 or scale_dtype (mpq_zero), or null when no segment stores any */
  const int32_t* perm;         /* [K]: packed column j is column perm[j] of x; or null. Values are not checked. */
  const mpq_segment* segments; /* sorted by n0, then k0; those with equal n0 and n1 cover [0, K) */
  int32_t num_segments;
  int32_t scale_dtype; /* mpq_dtype */
} mpq_weight;

/* What the host needs to know of a device. Fill it once with mpq_device_query(). */
typedef struct mpq_device {
  int32_t ordinal;
  int32_t capability;      /* 90 for sm_90 */
  int32_t multiprocessors; /* blocks that run at a time, one on each */
  int32_t shared_bytes;    /* of shared memory that one block may ask for */
} mpq_device;

enum {
  /* The kernel may start, and read weights, before the kernel ahead of it in the stream has finished; it waits before
   * it reads x. Only where no kernel ahead of it writes the weight. Compute capability 9.0 and later; no effect before.
   */
  MPQ_OVERLAP = 1
};

typedef struct mpq_linear_args {
  mpq_weight weight;
  const void* x;      /* [M, K] of x_dtype, columns contiguous */
  const void* x_gate; /* [M, K] with the same stride, or null. Not null: x is replaced by silu(x_gate) * x, each of the
                         two operations rounded to x_dtype */
  int64_t x_row_stride; /* elements */
  int64_t tokens;       /* M */
  const void* bias;     /* [N] of bias_dtype, or null */
  void* y;              /* [M, N] of x_dtype, columns contiguous */
  int64_t y_row_stride; /* elements */
  void* counters; /* MPQ_COUNTER_BYTES, zero at the first use and left zero by every call. One call at a time: calls
                     that may run at the same time, on different streams or in different graphs, need their own. */
  void*
      workspace; /* mpq_workspace_size() bytes, 16-byte aligned, of any content; free again after the call's kernels */
  size_t workspace_bytes;
  int32_t x_dtype;    /* MPQ_F16 or MPQ_BF16; bf16 values must be below 2^48 in magnitude */
  int32_t bias_dtype; /* mpq_dtype */
  uint32_t flags;
} mpq_linear_args;

#define MPQ_COUNTER_BYTES 1024

/* Experts: the weight holds num_experts weights of N rows each, stacked along its rows (out_features = num_experts *
 * N), with no row band across two experts. Rows offsets[e] .. offsets[e + 1] of x belong to expert e. Counters are not
 * used. */
typedef struct mpq_grouped_args {
  mpq_linear_args linear; /* tokens: rows of x and of y in all; y is [tokens, N]; bias [num_experts * N] or null */
  const int32_t* offsets; /* [num_experts + 1] on the device: offsets[0] = 0, not decreasing, the last one = tokens */
  int32_t num_experts;
} mpq_grouped_args;

typedef struct mpq_dequantize_args {
  mpq_weight weight;
  void* out; /* [N, K] of out_dtype, contiguous, columns in their original order */
  int32_t out_dtype;
} mpq_dequantize_args;

/* Rows of W by number: token embeddings. An id outside of [0, N) ends the kernel with a trap, which the stream reports
 * as an error: ids lie on the device and are not read before. */
typedef struct mpq_embedding_args {
  mpq_weight weight;
  const int64_t* ids; /* [count] on the device */
  int64_t count;
  void* out; /* [count, K] of out_dtype, contiguous, columns in their original order */
  int32_t out_dtype;
} mpq_embedding_args;

MPQ_API uint32_t mpq_version(void);
/* Identity of the packed layout that the kernels were built for; equal to mpq_kernels.formats.LAYOUT_ID. */
MPQ_API const char* mpq_layout_id(void);
/* Never null. */
MPQ_API const char* mpq_error_text(int status);

MPQ_API int mpq_device_query(int ordinal, mpq_device* device);
/* Loads every kernel onto the current device, so that no later call does. */
MPQ_API int mpq_warmup(const mpq_device* device);

/* Bytes of workspace that mpq_linear() needs for these arguments; the pointers in them are not read. */
MPQ_API int mpq_workspace_size(const mpq_linear_args* args, const mpq_device* device, size_t* bytes);
/* fp32 accumulation in an order that depends on shapes and on the device alone; one rounding to x_dtype. */
MPQ_API int mpq_linear(const mpq_linear_args* args, const mpq_device* device, void* stream);

MPQ_API int mpq_grouped_workspace_size(const mpq_grouped_args* args, const mpq_device* device, size_t* bytes);
MPQ_API int mpq_grouped_linear(const mpq_grouped_args* args, const mpq_device* device, void* stream);

/* out = fl32(fl32(code - zero) * scale), with MPQ_ZERO_MIN fl32(fl32(code * scale) + zero), rounded to out_dtype, ties
 * to even. */
MPQ_API int mpq_dequantize(const mpq_dequantize_args* args, const mpq_device* device, void* stream);

/* Rows ids[i] of what mpq_dequantize() gives. */
MPQ_API int mpq_embedding(const mpq_embedding_args* args, const mpq_device* device, void* stream);

#ifdef __cplusplus
}
#endif

#endif

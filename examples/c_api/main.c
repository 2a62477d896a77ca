/* The CUDA kernels from plain C: packs a small weight of two widths by hand, asks the library a few things on the host,
 * and multiplies, where there is something to multiply with. See README.md here for how to compile it.
 *
 *     -DMPQ_WITH_CUDA   on the first CUDA device, memory from the CUDA runtime
 *     -DMPQ_WITH_SIM    on the CPU, with a library that was built over csrc/sim
 *     neither           host part only
 *
 * The weight has 70 rows and 192 columns:    | columns 0..127: 4 bits, groups of 64, zeros uint8 | 128..191: 3 bits, |
 *                                            |                                                   | groups of 32      |
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "include/mpq.h"

#if defined(MPQ_WITH_CUDA)
#include <cuda_runtime_api.h>
#elif defined(MPQ_WITH_SIM)
void mpq_sim_allow(const void* address, size_t bytes, uint32_t flags, const char* name);
const char* mpq_sim_error(void);
#endif

enum { N = 70, K = 192, TOKENS = 3, ROW_TILES = 2, PADDED_N = 64 * ROW_TILES, GROUPS = 4, SEGMENTS = 2 };

static const mpq_segment kSegments[SEGMENTS] = {
    {0, N, 0, 128, 64, 4, MPQ_ZERO_INT},
    {0, N, 128, K, 32, 3, MPQ_ZERO_NONE},
};

/* What the kernels read, as it would lie in a file: docs/format.md, sections 3 to 5. */
typedef struct packed {
  uint32_t qweight[128 * ROW_TILES * (2 * 4 + 1 * 3)];
  float scales[GROUPS * PADDED_N];
  uint8_t zeros[2 * PADDED_N];
} packed;

/* ---- a weight, as formulas ---- */

static int bits_of(int k) { return k < 128 ? 4 : 3; }
static unsigned code_of(int n, int k) { return (unsigned)(n * 7 + k * 5 + n * k % 11) & ((1u << bits_of(k)) - 1); }
static int group_of(int k) { return k < 128 ? k / 64 : 2 + (k - 128) / 32; } /* over both segments */
static float scale_of(int n, int group) { return (float)(n % 5 + group + 1) / 64.0f; }
static int zero_of(int n, int group) { return group < 2 ? (n + group) % 16 : 4; } /* without zeros: 2^(bits - 1) */
static float x_of(int token, int k) { return (float)((token * 31 + k * 3) % 17 - 8); }

/* ---- packing ---- */

/* Puts the bits of one field into the plane of its width. `plane`: [ROW_TILES][tiles][128 * width] words. */
static void put(uint32_t* plane, int width, int tiles, int n, int k, unsigned field) {
  const int t = n / 16 % 4, h = n / 8 % 2, g = n % 8;
  const int c = k / 16 % 4, m = k / 8 % 2, q = k / 2 % 4, e = k % 2;
  const int lane = 4 * g + q;
  int word, bit;
  if (width == 4) {
    word = (c * 32 + lane) * 4 + t;
    bit = 16 * e + 8 * m + 4 * h;
  } else if (width == 2) {
    word = ((c >> 1) * 32 + lane) * 4 + (c & 1) * 2 + (t >> 1);
    bit = 16 * e + 8 * m + 4 * (t & 1) + 2 * h;
  } else {
    word = lane * 4 + c;
    bit = 16 * e + 8 * m + 4 * (t & 1) + 2 * (t >> 1) + h;
  }
  plane[(n / 64 * tiles + k / 64) * 128 * width + word] |= (uint32_t)field << bit;
}

/* Place of a row and group among all scales, or zeros: segment, row tile, group, row. Each segment has two groups. */
static int scale_place(int n, int group) {
  return group / 2 * 2 * PADDED_N + (n / 64 * 2 + group % 2) * 64 + 8 * (n % 8) + 4 * (n / 8 % 2) + n / 16 % 4;
}

static void pack(packed* to) {
  uint32_t* four = to->qweight;                   /* segment 0: one plane of width 4 */
  uint32_t* two = four + ROW_TILES * 2 * 128 * 4; /* segment 1: the upper two bits, then the last one */
  uint32_t* one = two + ROW_TILES * 1 * 128 * 2;
  int n, k, group;
  memset(to, 0, sizeof(*to));
  for (n = 0; n < N; ++n) {
    for (k = 0; k < 128; ++k) put(four, 4, 2, n, k, code_of(n, k));
    for (k = 128; k < K; ++k) {
      put(two, 2, 1, n, k - 128, code_of(n, k) >> 1);
      put(one, 1, 1, n, k - 128, code_of(n, k) & 1);
    }
    for (group = 0; group < GROUPS; ++group) to->scales[scale_place(n, group)] = scale_of(n, group);
    for (group = 0; group < 2; ++group) to->zeros[scale_place(n, group)] = (uint8_t)zero_of(n, group);
  }
}

/* ---- bf16: the upper half of a float ---- */

static uint16_t to_bf16(float v) { /* for numbers that bf16 holds */
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return (uint16_t)(bits >> 16);
}

static float from_bf16(uint16_t v) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* ---- the host part ---- */

static mpq_linear_args arguments(const void* qweight, const void* scales, const void* zeros, const void* x, void* y) {
  mpq_linear_args a;
  memset(&a, 0, sizeof(a));
  a.weight.out_features = N;
  a.weight.in_features = K;
  a.weight.qweight = qweight;
  a.weight.scales = scales;
  a.weight.zeros = zeros;
  a.weight.segments = kSegments;
  a.weight.num_segments = SEGMENTS;
  a.weight.scale_dtype = MPQ_F32;
  a.x = x;
  a.x_row_stride = K;
  a.tokens = TOKENS;
  a.y = y;
  a.y_row_stride = N;
  a.x_dtype = MPQ_BF16;
  return a;
}

static void print_refusal(const char* what, int status) {
  printf("refused, %s: %d, %s\n", what, status, mpq_error_text(status));
}

/* Arguments are checked on the host, before a device is touched; the addresses are never read. */
static int host_part(void) {
  const mpq_device h200 = {0, 90, 132, 232448}, turing = {0, 75, 68, 65536};
  const void* somewhere = (const void*)(uintptr_t)4096;
  const mpq_linear_args good = arguments(somewhere, somewhere, somewhere, somewhere, (void*)(uintptr_t)8192);
  mpq_linear_args bad = good;
  mpq_segment segments[SEGMENTS];
  size_t bytes = 0;
  int status;

  printf("version %u\nlayout %s\n", (unsigned)mpq_version(), mpq_layout_id());
  status = mpq_workspace_size(&good, &h200, &bytes);
  if (status != MPQ_OK) return status;
  printf("workspace %lu bytes\n", (unsigned long)bytes);

  bad.weight.qweight = NULL;
  print_refusal("no qweight", mpq_linear(&bad, &h200, NULL));
  bad = good;
  bad.x_dtype = MPQ_F32;
  print_refusal("x of fp32", mpq_linear(&bad, &h200, NULL));
  memcpy(segments, kSegments, sizeof(segments));
  bad = good;
  bad.weight.segments = segments;
  segments[1].bits = 9;
  print_refusal("9 bits", mpq_linear(&bad, &h200, NULL));
  segments[1].bits = 3;
  segments[0].k1 = 64;
  print_refusal("a gap between segments", mpq_linear(&bad, &h200, NULL));
  bad = good;
  bad.weight.scales = (const char*)somewhere + 4;
  print_refusal("scales at an odd place", mpq_linear(&bad, &h200, NULL));
  print_refusal("an old device", mpq_linear(&good, &turing, NULL));
  return MPQ_OK;
}

/* ---- the device part: memory, where there is a device ---- */

#if defined(MPQ_WITH_CUDA)

static int find_device(mpq_device* device) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return 0;
  return mpq_device_query(0, device) == MPQ_OK && device->capability >= 80;
}
static void* to_device(const void* from, size_t bytes, const char* name) {
  void* to = NULL;
  (void)name;
  if (cudaMalloc(&to, bytes) != cudaSuccess || cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice) != cudaSuccess)
    exit(2);
  return to;
}
static void from_device(void* to, const void* from, size_t bytes) {
  if (cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost) != cudaSuccess) exit(2); /* waits for the kernels */
}
static void release(void* memory) { cudaFree(memory); }

#elif defined(MPQ_WITH_SIM)

static int find_device(mpq_device* device) {
  const mpq_device small = {0, 90, 5, 232448};
  *device = small;
  return 1;
}
/* Pieces of one block, each at a multiple of 64 bytes. The simulator knows which bytes a kernel may touch. */
static void* to_device(const void* from, size_t bytes, const char* name) {
  static unsigned char memory[1 << 18];
  static size_t used = 0;
  unsigned char* to = memory + used + (64 - ((uintptr_t)memory + used) % 64) % 64;
  used = (size_t)(to - memory) + bytes;
  if (used > sizeof(memory)) exit(2);
  memcpy(to, from, bytes);
  mpq_sim_allow(to, bytes, 1, name);
  return to;
}
static void from_device(void* to, const void* from, size_t bytes) {
  if (*mpq_sim_error()) puts(mpq_sim_error()), exit(2);
  memcpy(to, from, bytes);
}
static void release(void* memory) { (void)memory; }

#endif

#if defined(MPQ_WITH_CUDA) || defined(MPQ_WITH_SIM)

/* Largest |y - reference|, as a share of what one rounding to bf16 may take: 2^-8 of the reference. */
static double largest_error(const uint16_t* y) {
  double largest = 0;
  int token, n, k;
  for (token = 0; token < TOKENS; ++token) {
    for (n = 0; n < N; ++n) {
      double sum = 0, error;
      for (k = 0; k < K; ++k) {
        const int group = group_of(k);
        sum += ((double)code_of(n, k) - zero_of(n, group)) * scale_of(n, group) * x_of(token, k);
      }
      error = fabs(from_bf16(y[token * N + n]) - sum) / (fabs(sum) / 256 + 1e-6);
      if (!(error <= largest)) largest = error; /* true for NaN */
    }
  }
  return largest;
}

static int device_part(void) {
  static packed weight;
  static uint16_t x[TOKENS * K], y[TOKENS * N];
  static unsigned char counters[MPQ_COUNTER_BYTES]; /* zero */
  mpq_device device;
  mpq_linear_args args;
  void *codes, *scales, *zeros, *x_device, *y_device, *workspace = NULL;
  double error;
  int i, status;

  if (!find_device(&device)) {
    puts("no CUDA device of compute capability 8.0 or later: nothing is multiplied");
    return 0;
  }
  pack(&weight);
  for (i = 0; i < TOKENS * K; ++i) x[i] = to_bf16(x_of(i / K, i % K));
  memset(y, 0xff, sizeof(y)); /* NaN */
  codes = to_device(weight.qweight, sizeof(weight.qweight), "qweight");
  scales = to_device(weight.scales, sizeof(weight.scales), "scales");
  zeros = to_device(weight.zeros, sizeof(weight.zeros), "zeros");
  x_device = to_device(x, sizeof(x), "x");
  y_device = to_device(y, sizeof(y), "y");

  args = arguments(codes, scales, zeros, x_device, y_device);
  args.counters = to_device(counters, sizeof(counters), "counters");
  status = mpq_workspace_size(&args, &device, &args.workspace_bytes);
  if (status == MPQ_OK && args.workspace_bytes > 0) {
    void* nothing = calloc(1, args.workspace_bytes);
    args.workspace = workspace = to_device(nothing, args.workspace_bytes, "workspace");
    free(nothing);
  }
  if (status == MPQ_OK) status = mpq_linear(&args, &device, NULL);
  if (status != MPQ_OK) {
    printf("mpq_linear: %d, %s\n", status, mpq_error_text(status));
    return 1;
  }
  from_device(y, y_device, sizeof(y));
  error = largest_error(y);
  printf("multiplied %d x %d by %d tokens on sm_%d: largest error %.3f of a rounding to bf16\n", N, K, TOKENS,
         (int)device.capability, error);

  release(codes), release(scales), release(zeros), release(x_device), release(y_device);
  release(args.counters), release(workspace);
  /* Sums of fp32 add next to nothing. */
  return error <= 1.01 ? 0 : 1;
}

#else

static int device_part(void) {
  static packed weight;
  pack(&weight);
  printf("packed %lu bytes of codes; compiled without a device\n", (unsigned long)sizeof(weight.qweight));
  (void)group_of, (void)x_of, (void)to_bf16, (void)from_bf16;
  return 0;
}

#endif

int main(void) {
  const int status = host_part();
  if (status != MPQ_OK) {
    printf("unexpected: %d, %s\n", status, mpq_error_text(status));
    return 1;
  }
  return device_part();
}

/* A packed model from plain C: maps a directory that `mpq pack` wrote, and runs one operation on one of its modules.
 * C11, and the library of the package: no torch, no Python. See README.md here for how to compile it.
 *
 *     packed DIR                                             lists the packed modules
 *     packed DIR OPERATION MODULE IN OUT [int8] [threads N]  reads the file IN, writes the file OUT
 *
 *     linear           IN: x [M, K], bf16                                   OUT: y [M, N], bf16
 *     grouped_linear   IN: offsets [experts + 1], int32, then x as above    OUT: y [M, N / experts], bf16
 *     embedding        IN: ids [count], int64                               OUT: rows [count, K], bf16
 *     dequantize       IN: not read                                         OUT: W [N, K], fp32
 *
 * With -DMPQ_WITH_CUDA, `linear` runs once more on the first CUDA device, and the program says how far apart both are.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mpq_model.h"

#if defined(MPQ_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

/* What a call works with; all of it is freed in main(). */
typedef struct run {
  const mpq_module* module;
  mpq_cpu cpu;
  unsigned char* in;
  size_t in_bytes;
  void* out;
  size_t out_bytes;
  void* workspace;
} run;

static int allocate_out(run* r, int64_t rows, int64_t columns, size_t element) {
  r->out_bytes = (size_t)rows * (size_t)columns * element;
  r->out = malloc(r->out_bytes + 1);
  return r->out ? MPQ_OK : MPQ_ERROR_MEMORY;
}

/* x [tokens, K] at `x`, y [tokens, columns] into r->out. */
static mpq_linear_args arguments(const run* r, const void* x, int64_t tokens, int64_t columns) {
  mpq_linear_args a;
  memset(&a, 0, sizeof(a));
  a.weight = r->module->weight;
  a.bias = r->module->bias;
  a.bias_dtype = r->module->bias_dtype;
  a.x = x;
  a.x_dtype = MPQ_BF16;
  a.x_row_stride = r->module->weight.in_features;
  a.tokens = tokens;
  a.y = r->out;
  a.y_row_stride = columns;
  return a;
}

#if defined(MPQ_WITH_CUDA)

static void* to_device(const void* from, size_t bytes) {
  void* to = NULL;
  if (!from) return NULL;
  if (cudaMalloc(&to, bytes) != cudaSuccess || cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice) != cudaSuccess)
    exit(2);
  return to;
}

static float from_bf16(uint16_t v) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* The product of `args` once more, from copies of everything on the device. The process ends soon: nothing is freed. */
static int on_cuda(const run* r, mpq_linear_args a) {
  const mpq_module* m = r->module;
  const uint16_t* host = (const uint16_t*)r->out;
  uint16_t* y = (uint16_t*)malloc(r->out_bytes);
  static const unsigned char zeros[MPQ_COUNTER_BYTES];
  double largest = 0;
  mpq_device device;
  size_t i;
  int count = 0, status;
  if (!y) return MPQ_ERROR_MEMORY;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    puts("no CUDA device: on the CPU only");
    free(y);
    return MPQ_OK;
  }
  status = mpq_device_query(0, &device);
  if (status == MPQ_OK) status = mpq_workspace_size(&a, &device, &a.workspace_bytes);
  if (status != MPQ_OK) return status;
  a.weight.qweight = to_device(m->weight.qweight, m->qweight_bytes);
  a.weight.scales = to_device(m->weight.scales, m->scales_bytes);
  a.weight.zeros = to_device(m->weight.zeros, m->zeros_bytes);
  a.weight.perm = (const int32_t*)to_device(m->weight.perm, m->perm_bytes);
  a.bias = to_device(m->bias, m->bias_bytes);
  a.x = to_device(a.x, (size_t)(a.tokens * m->weight.in_features) * 2);
  a.y = to_device(host, r->out_bytes);
  a.counters = to_device(zeros, sizeof(zeros));
  if (cudaMalloc(&a.workspace, a.workspace_bytes + 1) != cudaSuccess) return MPQ_ERROR_MEMORY;
  status = mpq_linear(&a, &device, NULL);
  if (status == MPQ_OK && cudaMemcpy(y, a.y, r->out_bytes, cudaMemcpyDeviceToHost) != cudaSuccess)
    status = MPQ_ERROR_CUDA;
  for (i = 0; status == MPQ_OK && i < r->out_bytes / 2; ++i) {
    const double d = from_bf16(y[i]) - (double)from_bf16(host[i]);
    if (!(d <= largest && -d <= largest)) largest = d < 0 ? -d : d; /* true for NaN */
  }
  if (status == MPQ_OK) printf("on CUDA: largest difference %g\n", largest);
  free(y);
  return status;
}

#endif

static int linear(run* r) {
  const mpq_weight* w = &r->module->weight;
  const int64_t tokens = (int64_t)(r->in_bytes / 2) / w->in_features;
  mpq_linear_args a;
  int status = allocate_out(r, tokens, w->out_features, 2);
  if (status != MPQ_OK) return status;
  a = arguments(r, r->in, tokens, w->out_features);
  status = mpq_cpu_workspace_size(&a, &r->cpu, &a.workspace_bytes);
  if (status != MPQ_OK) return status;
  a.workspace = r->workspace = malloc(a.workspace_bytes + 1);
  if (!a.workspace) return MPQ_ERROR_MEMORY;
  status = mpq_cpu_linear(&a, &r->cpu);
#if defined(MPQ_WITH_CUDA)
  if (status == MPQ_OK) status = on_cuda(r, a);
#endif
  return status;
}

static int grouped_linear(run* r) {
  const mpq_weight* w = &r->module->weight;
  const int32_t experts = r->module->num_experts;
  const size_t head = sizeof(int32_t) * ((size_t)experts + 1);
  mpq_grouped_args g;
  int64_t tokens;
  int status;
  if (experts < 1) return MPQ_ERROR_GROUPED;
  if (r->in_bytes < head) return MPQ_ERROR_SHAPE;
  tokens = (int64_t)((r->in_bytes - head) / 2) / w->in_features;
  status = allocate_out(r, tokens, w->out_features / experts, 2);
  if (status != MPQ_OK) return status;
  g.linear = arguments(r, r->in + head, tokens, w->out_features / experts);
  g.offsets = (const int32_t*)(const void*)r->in;
  g.num_experts = experts;
  status = mpq_cpu_grouped_workspace_size(&g, &r->cpu, &g.linear.workspace_bytes);
  if (status != MPQ_OK) return status;
  g.linear.workspace = r->workspace = malloc(g.linear.workspace_bytes + 1);
  if (!g.linear.workspace) return MPQ_ERROR_MEMORY;
  return mpq_cpu_grouped_linear(&g, &r->cpu);
}

static int embedding(run* r) {
  mpq_embedding_args a;
  int status;
  a.weight = r->module->weight;
  a.ids = (const int64_t*)(const void*)r->in;
  a.count = (int64_t)(r->in_bytes / sizeof(int64_t));
  a.out_dtype = MPQ_BF16;
  status = allocate_out(r, a.count, a.weight.in_features, 2);
  a.out = r->out;
  return status == MPQ_OK ? mpq_cpu_embedding(&a, &r->cpu) : status;
}

static int dequantize(run* r) {
  mpq_dequantize_args a;
  int status;
  a.weight = r->module->weight;
  a.out_dtype = MPQ_F32;
  status = allocate_out(r, a.weight.out_features, a.weight.in_features, 4);
  a.out = r->out;
  return status == MPQ_OK ? mpq_cpu_dequantize(&a, &r->cpu) : status;
}

static const struct {
  const char* name;
  int (*call)(run* r);
} kOperations[] = {
    {"linear", linear}, {"grouped_linear", grouped_linear}, {"embedding", embedding}, {"dequantize", dequantize}};

/* The whole file; memory from malloc is aligned for any type. */
static int read_file(const char* path, run* r) {
  FILE* file = fopen(path, "rb");
  long bytes = -1;
  if (!file) return MPQ_ERROR_FILE;
  if (fseek(file, 0, SEEK_END) == 0) bytes = ftell(file);
  if (bytes >= 0 && fseek(file, 0, SEEK_SET) == 0) r->in = (unsigned char*)malloc((size_t)bytes + 1);
  if (r->in) r->in_bytes = fread(r->in, 1, (size_t)bytes, file);
  fclose(file);
  return r->in && r->in_bytes == (size_t)bytes ? MPQ_OK : MPQ_ERROR_FILE;
}

static int write_file(const char* path, const run* r) {
  FILE* file = fopen(path, "wb");
  size_t written = 0;
  if (!file) return MPQ_ERROR_FILE;
  written = fwrite(r->out, 1, r->out_bytes, file);
  return fclose(file) == 0 && written == r->out_bytes ? MPQ_OK : MPQ_ERROR_FILE;
}

static void list(const mpq_model* model) {
  int64_t i;
  for (i = 0; i < mpq_model_count(model); ++i) {
    const mpq_module* m = mpq_model_module(model, i);
    printf("%s %ld x %ld, %d segments, %d members, %d experts%s%s\n", m->name, (long)m->weight.out_features,
           (long)m->weight.in_features, (int)m->weight.num_segments, (int)m->num_members, (int)m->num_experts,
           m->bias ? ", bias" : "", m->embedding ? ", embedding" : "");
  }
}

static int operate(const mpq_model* model, int argc, char** argv, mpq_cpu_pool** pool) {
  run r;
  size_t i;
  int k, status = MPQ_ERROR_NAME;
  memset(&r, 0, sizeof(r));
  r.module = mpq_model_find(model, argv[3]);
  if (!r.module) return MPQ_ERROR_NAME;
  if ((status = mpq_cpu_query(MPQ_CPU_VERSION, NULL, &r.cpu)) != MPQ_OK) return status;
  for (k = 6; k < argc; ++k) {
    if (strcmp(argv[k], "int8") == 0) r.cpu.activations = MPQ_ACTIVATIONS_INT8;
    if (strcmp(argv[k], "threads") == 0 && k + 1 < argc) {
      if ((status = mpq_cpu_pool_open(atoi(argv[k + 1]), pool)) != MPQ_OK) return status;
      r.cpu.run = mpq_cpu_pool_run;
      r.cpu.pool = *pool;
    }
  }
  status = read_file(argv[4], &r);
  if (status == MPQ_OK) status = MPQ_ERROR_UNSUPPORTED;
  for (i = 0; r.in && i < sizeof(kOperations) / sizeof(*kOperations); ++i) {
    if (strcmp(argv[2], kOperations[i].name) == 0) status = kOperations[i].call(&r);
  }
  if (status == MPQ_OK) status = write_file(argv[5], &r);
  free(r.in), free(r.out), free(r.workspace);
  return status;
}

int main(int argc, char** argv) {
  mpq_model* model = NULL;
  mpq_cpu_pool* pool = NULL;
  char message[512];
  int status;
  if (argc != 2 && argc < 6) {
    fputs("usage: packed DIR [OPERATION MODULE IN OUT [int8] [threads N]]\n", stderr);
    return 2;
  }
  status = mpq_model_open(MPQ_CPU_VERSION, argv[1], &model, message, sizeof(message));
  if (status != MPQ_OK) {
    fprintf(stderr, "%d: %s\n", status, message);
    return 1;
  }
  if (argc == 2)
    list(model);
  else
    status = operate(model, argc, argv, &pool);
  if (status != MPQ_OK) fprintf(stderr, "%d: %s\n", status, mpq_cpu_error_text(status));
  mpq_cpu_pool_close(pool);
  mpq_model_close(model);
  return status != MPQ_OK;
}

/* The CPU kernels as a C interface: the structures of mpq.h, with memory of the host. Library: libmpq_cpu.
 *
 *     mpq_cpu cpu;                       what mpq_device is for CUDA: instruction set, rounding of x, threads
 *     mpq_cpu_query(MPQ_CPU_VERSION, NULL, &cpu);
 *     mpq_cpu_workspace_size(&args, &cpu, &args.workspace_bytes);
 *     mpq_cpu_linear(&args, &cpu);
 *
 * The caller owns every byte. A call reads and writes what its arguments point to and nothing else; there is no hidden
 * state, so any number of threads may call at the same time. It runs on the calling thread and on those of cpu->run,
 * and is done when it returns. Pointers may be unaligned (weights are mapped files). Every function returns MPQ_OK or
 * an error of mpq_status, which mpq_cpu_error_text() says in words; after an error nothing has been written.
 *
 * Against mpq.h: x and y may be fp32 too; y is contiguous; x_gate must be null; counters and flags are not used.
 */
#ifndef MPQ_CPU_H
#define MPQ_CPU_H

#include "mpq.h"

/* Of this interface. A library serves programs that were compiled for its own number only: mpq_cpu_query() and
 * mpq_model_open() compare. What is added without a new number has a symbol version of its own. */
#define MPQ_CPU_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mpq_activations {
  MPQ_ACTIVATIONS_EXACT = 0, /* x as it is, sums in fp32 */
  MPQ_ACTIVATIONS_INT8 = 1   /* x rounded to int8 for each token and block of columns, integer sums within a block */
} mpq_activations;

/* Calls task(context, begin, end) over disjoint ranges that cover [0, n), on any threads, and returns when all are
 * done. Results do not depend on how the ranges are cut. */
typedef void (*mpq_cpu_run)(void* pool, int64_t n, void (*task)(void* context, int64_t begin, int64_t end),
                            void* context);

/* How to compute. mpq_cpu_query() fills it; the last three may then be set. */
typedef struct mpq_cpu {
  int32_t isa;         /* number of an instruction set */
  int32_t activations; /* mpq_activations, of mpq_cpu_linear() and mpq_cpu_grouped_linear() */
  mpq_cpu_run run;     /* null: the calling thread alone */
  void* pool;          /* handed to run */
} mpq_cpu;

/* MPQ_CPU_VERSION of the library. */
MPQ_API uint32_t mpq_cpu_version(void);
/* Identity of the packed layout that the kernels were built for; equal to mpq_kernels.format.codes.LAYOUT_ID. */
MPQ_API const char* mpq_cpu_layout_id(void);
/* Never null; knows every mpq_status. */
MPQ_API const char* mpq_cpu_error_text(int status);

/* version: MPQ_CPU_VERSION. isa: name of an instruction set, or null for the best one of this machine. */
MPQ_API int mpq_cpu_query(uint32_t version, const char* isa, mpq_cpu* cpu);
/* Name of an instruction set; null for a number that is none. */
MPQ_API const char* mpq_cpu_isa_name(int32_t isa);

/* Threads of our own, for callers that have none: set cpu->run = mpq_cpu_pool_run and cpu->pool = pool. `threads`
 * counts the calling one. Calls that share a pool take turns. */
typedef struct mpq_cpu_pool mpq_cpu_pool;
MPQ_API int mpq_cpu_pool_open(int32_t threads, mpq_cpu_pool** pool);
MPQ_API void mpq_cpu_pool_run(void* pool, int64_t n, void (*task)(void* context, int64_t begin, int64_t end),
                              void* context);
/* When no call uses it; null is allowed. */
MPQ_API void mpq_cpu_pool_close(mpq_cpu_pool* pool);

/* Bytes that the tensors of a weight must have; its pointers are not read. perm: if there is one. What comes from a
 * file or from another program should be compared: the kernels cannot. */
typedef struct mpq_weight_bytes {
  size_t qweight, scales, zeros, perm;
} mpq_weight_bytes;
MPQ_API int mpq_cpu_weight_bytes(const mpq_weight* weight, mpq_weight_bytes* bytes);

/* Bytes of workspace for these arguments, bounded in the tokens; the pointers to tensors in them are not read. */
MPQ_API int mpq_cpu_workspace_size(const mpq_linear_args* args, const mpq_cpu* cpu, size_t* bytes);
/* The sum plus bias is rounded once, to nearest even, to x_dtype. */
MPQ_API int mpq_cpu_linear(const mpq_linear_args* args, const mpq_cpu* cpu);

/* Offsets lie on the host; mpq_cpu_grouped_workspace_size() reads them. */
MPQ_API int mpq_cpu_grouped_workspace_size(const mpq_grouped_args* args, const mpq_cpu* cpu, size_t* bytes);
MPQ_API int mpq_cpu_grouped_linear(const mpq_grouped_args* args, const mpq_cpu* cpu);

/* As mpq_dequantize(): the same bits. */
MPQ_API int mpq_cpu_dequantize(const mpq_dequantize_args* args, const mpq_cpu* cpu);

/* Rows ids[i] of what mpq_cpu_dequantize() gives; MPQ_ERROR_ID for an id outside of [0, N). */
MPQ_API int mpq_cpu_embedding(const mpq_embedding_args* args, const mpq_cpu* cpu);

#ifdef __cplusplus
}
#endif

#endif

/* Packed models from C: maps the safetensors files of a directory that mpq_kernels packed, and gives their weights as
 * the kernels of mpq_cpu.h take them. For CUDA, copy the tensors to the device. Library: libmpq_cpu.
 *
 * Files are distrusted: config.json, the index and every header are checked when the model is opened, as docs/format.md
 * asks of readers; values of tensors are not. What is given out belongs to the model and stays until it is closed. An
 * opened model is only read, so threads may share it. A file that is cut short while it is mapped ends the process.
 */
#ifndef MPQ_MODEL_H
#define MPQ_MODEL_H

#include "mpq_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mpq_model mpq_model;

/* Rows [n0, n1) of a fused module: what the dense model calls `name`, beside the module itself. */
typedef struct mpq_member {
  const char* name;
  int64_t n0, n1;
} mpq_member;

/* A packed module. */
typedef struct mpq_module {
  const char* name; /* in full, as in config.json: "model.layers.0.mlp.down_proj" */
  mpq_weight weight;
  const void* bias; /* [N], or null */
  int32_t bias_dtype;
  int32_t num_experts; /* of mpq_grouped_args; 0 for all but the experts of a mixture */
  int32_t embedding;   /* 1 for weights whose rows are looked up by number */
  int32_t num_members; /* 0 for what is not fused */
  const mpq_member* members;
  size_t qweight_bytes, scales_bytes, zeros_bytes, perm_bytes, bias_bytes; /* to copy them to a device */
} mpq_module;

/* Any tensor of the files, such as one that was not packed. */
typedef struct mpq_tensor {
  const char* dtype;    /* as safetensors names it: "BF16" */
  const int64_t* shape; /* [rank] */
  int32_t rank;
  const void* data;
  size_t bytes;
} mpq_tensor;

/* version: MPQ_CPU_VERSION. message: of message_bytes bytes, or null; says in words what is wrong, "" when nothing is.
 * After an error *model is null. */
MPQ_API int mpq_model_open(uint32_t version, const char* directory, mpq_model** model, char* message,
                           size_t message_bytes);
/* null is allowed. */
MPQ_API void mpq_model_close(mpq_model* model);

/* Packed modules, in the order of the model. */
MPQ_API int64_t mpq_model_count(const mpq_model* model);
/* null where there is none. */
MPQ_API const mpq_module* mpq_model_module(const mpq_model* model, int64_t index);
MPQ_API const mpq_module* mpq_model_find(const mpq_model* model, const char* name);

/* MPQ_ERROR_NAME where there is no such tensor. */
MPQ_API int mpq_model_tensor(const mpq_model* model, const char* name, mpq_tensor* tensor);

#ifdef __cplusplus
}
#endif

#endif

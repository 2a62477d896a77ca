// The instruction sets of the CPU backend, best first: names, choice and kernels of each come from this list alone. To
// add one, write a row and, for each kind of kernels that it does not share with another set, a file in cpu/instances.
//
//   row(name, choice, exact, pairs, int8, refusal)
//
//   name      Isa::name, and what users call it
//   choice    kUnasked: taken where it is the first that works; kAsked: only by name
//   exact     the set whose instances/exact_*.cpp it uses: linear and dequantize
//   pairs     the set whose instances/pairs_*.cpp it uses for bf16 x, where that set works too; portable has none
//   int8      the set whose instances/int8_*.cpp it uses: linear_int8
//   refusal   why it cannot be used here, or nullptr; evaluated in dispatch.cpp
//
// x86_row is for those of x86-64; on other machines their names are known and refused.
//
// AMX comes last, and only when asked for, because its speed has not been measured.
#pragma once

// clang-format off: a table.
#define MPQ_CPU_ISAS(row, x86_row)                                                                                     \
  x86_row(avx512bf16, kUnasked, avx512,   avx512bf16, avx512vnni,                                                      \
          unless(supported(Isa::avx512vnni) && __builtin_cpu_supports("avx512bf16")))                                  \
  x86_row(avx512vnni, kUnasked, avx512,   portable,   avx512vnni,                                                      \
          unless(supported(Isa::avx512) && __builtin_cpu_supports("avx512vnni")))                                      \
  x86_row(avx512,     kUnasked, avx512,   portable,   avx512,                                                          \
          unless(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                            \
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))                            \
  x86_row(avxvnni,    kUnasked, avx2,     portable,   avxvnni,    unless(supported(Isa::avx2) && has_avx_vnni()))      \
  x86_row(avx2,       kUnasked, avx2,     portable,   avx2,                                                            \
          unless(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))   \
  row(    portable,   kUnasked, portable, portable,   portable,   nullptr)                                             \
  x86_row(amx,        kAsked,   avx512,   avx512bf16, amx,        amx_refusal())
// clang-format on

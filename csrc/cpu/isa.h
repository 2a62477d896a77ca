// The instruction sets of the CPU backend, best first: names, choice and kernels of each come from this list alone. To
// add one, write a row and, for each kind of kernels that it does not share with another set, a file in cpu/instances.
//
//   row(name, exact, pairs, int8, refusal)
//
//   name      Isa::name, and what users call it
//   exact     the set whose instances/exact_*.cpp it uses: linear and dequantize
//   pairs     the set whose instances/pairs_*.cpp it uses for bf16 x, where that set works too; portable has none
//   int8      the set whose instances/int8_*.cpp it uses: linear_int8
//   refusal   why it cannot be used here, or nullptr; evaluated in dispatch.cpp
//
// x86_row is for those of x86-64; on other machines their names are known and refused.
//
// What each set is the fastest for, and whose measurement says so: docs/cli.md, "Which kernels run on a CPU".
#pragma once

// clang-format off: a table.
#define MPQ_CPU_ISAS(row, x86_row)                                                                                     \
  x86_row(amx,        avx512,   amx,        amx,        amx_refusal())                                                 \
  x86_row(avx512bf16, avx512,   avx512bf16, avx512vnni,                                                                \
          unless(supported(Isa::avx512vnni) && __builtin_cpu_supports("avx512bf16")))                                  \
  x86_row(avx512vnni, avx512,   portable,   avx512vnni,                                                                \
          unless(supported(Isa::avx512) && __builtin_cpu_supports("avx512vnni")))                                      \
  x86_row(avx512,     avx512,   portable,   avx512,                                                                    \
          unless(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                            \
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")))                            \
  x86_row(avxvnni,    avx2,     portable,   avxvnni,    unless(supported(Isa::avx2) && has_avx_vnni()))                \
  x86_row(avx2,       avx2,     portable,   avx2,                                                                      \
          unless(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))   \
  row(    portable,   portable, portable,   portable,   nullptr)
// clang-format on

// Everything that kernels ask of the machine: memory, copies, barriers, tensor cores, launches. Kernels include this
// file and no other header of the machine; it has one implementation in PTX and one on the host, where the threads of
// a block are fibers, so that the same kernel sources run without a GPU.
#pragma once

#if defined(__CUDACC__)
#include "ptx.cuh"
#else
#include "sim/device.h"
#endif

// What the kernels of the simulator's tests share.
#pragma once

#include <cstddef>

#include "cuda/device.cuh"

struct Params {
  const void* in0;
  const void* in1;
  void* out;
  void* workspace;
};

struct Entry {
  const char* name;
  void (*kernel)(Params);
};

extern const Entry kBugs[];  // sim_bugs.cpp
extern const size_t kBugCount;

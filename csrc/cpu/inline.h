// What kernels are inlined by: the compiler's own limits would leave a call in the innermost loop.
#pragma once

#define MPQ_INLINE inline __attribute__((always_inline))

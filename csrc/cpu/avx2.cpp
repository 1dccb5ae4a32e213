#include "system_headers.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define DELTAMEM_ISA avx2
#define DELTAMEM_VECTOR_BYTES 32
#include "instantiate.h"

extern const deltamem::Kernels deltamem::kAvx2 = deltamem::avx2::kernels("avx2");

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

#include "system_headers.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma")
#endif

#define DELTAMEM_ISA avx512
#define DELTAMEM_VECTOR_BYTES 64
#include "instantiate.h"

extern const deltamem::Kernels deltamem::kAvx512 = deltamem::avx512::kernels("avx512");

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

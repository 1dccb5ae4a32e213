#include "headers.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,fma")
#endif

#define DELTAMEM_ISA avx512
#define DELTAMEM_VECTOR_BYTES 64
#include "kernels.h"

extern const deltamem::Kernels deltamem::kAvx512{
    "avx512",
    deltamem::avx512::forward,
    deltamem::avx512::backward,
    deltamem::avx512::step,
    deltamem::avx512::kGroup,
    deltamem::avx512::project,
    deltamem::avx512::kSegmentColumns,
    deltamem::avx512::segments};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

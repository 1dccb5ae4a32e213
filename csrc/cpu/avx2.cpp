#include "headers.h"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define DELTAMEM_ISA avx2
#define DELTAMEM_VECTOR_BYTES 32
#include "kernels.h"

extern const deltamem::Kernels deltamem::kAvx2{
    "avx2",
    deltamem::avx2::forward,
    deltamem::avx2::backward,
    deltamem::avx2::step,
    deltamem::avx2::kGroup,
    deltamem::avx2::project,
    deltamem::avx2::kSegmentColumns,
    deltamem::avx2::segments};

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif

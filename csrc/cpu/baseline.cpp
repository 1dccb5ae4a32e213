// What every processor of the architecture has: SSE2 on x86-64, NEON on 64-bit Arm.
#define DELTAMEM_ISA baseline
#define DELTAMEM_VECTOR_BYTES 16
#include "kernels.h"

extern const deltamem::Kernels deltamem::kBaseline{
    "baseline",
    deltamem::baseline::forward,
    deltamem::baseline::backward,
    deltamem::baseline::step,
    deltamem::baseline::kGroup,
    deltamem::baseline::project,
    deltamem::baseline::kSegmentColumns,
    deltamem::baseline::segments};

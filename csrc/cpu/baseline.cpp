// The instruction set of every processor of the architecture: SSE2 on x86-64, NEON on 64-bit Arm.
#define DELTAMEM_ISA baseline
#define DELTAMEM_VECTOR_BYTES 16
#include "instantiate.h"

extern const deltamem::Kernels deltamem::kBaseline = deltamem::baseline::kernels("baseline");

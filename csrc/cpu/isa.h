// The CPU kernels of each instruction set.
#pragma once

#include "../problem.h"

namespace deltamem {

// The work on sequences x heads [begin, end): any split over threads gives the same bits.
struct Kernels {
  const char* isa;
  void (*forward)(const Problem&, const ForwardOutput&, int64_t begin, int64_t end);
  void (*backward)(const Problem&, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                   const BackwardOutput&, int64_t begin, int64_t end);
  void (*step)(const Problem&, const Step&, int64_t begin, int64_t end);  // over the rows
};

extern const Kernels kBaseline, kAvx2, kAvx512;

}  // namespace deltamem

// The kernels of one instruction set, for every dtype and rank. Included by one translation unit for each, which
// names it in DELTAMEM_ISA and says how many bytes its vectors have.
#pragma once

#include "scan.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

template <int R>
using Known = std::integral_constant<int, R>;

// Calls f with the Scan for this problem: ranks that δ-mem uses are known to the compiler, in lanes no wider than
// the rank.
template <class F>
void with_scan(const Problem& p, F&& f) {
  constexpr int wide = DELTAMEM_VECTOR_BYTES / sizeof(float);
  if (p.double_precision) return f(Scan<double, wide / 2, int>{});
  switch (p.R) {
    case 4: return f(Scan<float, 4, Known<4>>{});
    case 8: return f(Scan<float, (wide < 8 ? wide : 8), Known<8>>{});
    case 16: return f(Scan<float, wide, Known<16>>{});
    default: return f(Scan<float, wide, int>{});
  }
}

inline void forward(const Problem& p, const ForwardOutput& out, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.forward(p, out, begin, end); });
}

inline void backward(const Problem& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                     const BackwardOutput& out, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.backward(p, d_reads, d_final_state, checkpoints, out, begin, end); });
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

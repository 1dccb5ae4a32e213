// The kernels of one instruction set, for every dtype and rank. Included by one translation unit for each, which
// names it in DELTAMEM_ISA and says how many bytes its vectors have.
#pragma once

#include "projection.h"
#include "segments.h"
#include "step.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

// Ranks that δ-mem uses are known to the compiler. A vector holds as many heads as have room in it.
template <int R>
using Known = std::integral_constant<int, R>;

constexpr int kWide = DELTAMEM_VECTOR_BYTES / sizeof(float);

template <int R>
struct KnownRank : Tasks<Scan<float, kWide, Known<R>, (kWide > R ? kWide / R : 1)>,
                         Scan<float, (kWide < R ? kWide : R), Known<R>>>,
                   StepScan<float, (kWide < R ? kWide : R), Known<R>> {
};

template <class T, int W = DELTAMEM_VECTOR_BYTES / sizeof(T)>
struct AnyRank : Tasks<Scan<T, W, int>, Scan<T, W, int>>, StepScan<T, W, int> {};

template <class F>
void with_scan(const Problem& p, F&& f) {
  if (p.double_precision) return f(AnyRank<double>{});
  switch (p.R) {
    case 4: return f(KnownRank<4>{});
    case 8: return f(KnownRank<8>{});
    case 16: return f(KnownRank<16>{});
    default: return f(AnyRank<float>{});
  }
}

inline void forward(const Problem& p, const ForwardOutput& out, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.forward(p, out, begin, end); });
}

inline void backward(const Problem& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                     const BackwardOutput& out, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.backward(p, d_reads, d_final_state, checkpoints, out, begin, end); });
}

inline void step(const Problem& p, const Step& s, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.step(p, s, begin, end); });
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

// The kernels of one instruction set, for every dtype and rank. Included by one translation unit for each, which
// names it in DELTAMEM_ISA and says how many bytes its vectors have.
#pragma once

#include "chunked.h"
#include "correction.h"
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
                   StepScan<float, (kWide < R ? kWide : R), Known<R>>,
                   ChunkedScan<float, (kWide < R ? kWide : R), Known<R>> {};

template <class T, int W = DELTAMEM_VECTOR_BYTES / sizeof(T)>
struct AnyRank : Tasks<Scan<T, W, int>, Scan<T, W, int>>, StepScan<T, W, int>, ChunkedScan<T, W, int> {};

template <class F>
void with_scan(const Problem& p, F&& f) {
  if (p.double_precision) return f(AnyRank<double>{});
#if !defined(__x86_64__) || DELTAMEM_VECTOR_BYTES > 16  // who has but SSE2 does not wait for minutes to compile the rest
  switch (p.R) {
    case 4: return f(KnownRank<4>{});
    case 8: return f(KnownRank<8>{});
    case 16: return f(KnownRank<16>{});
  }
#endif
  f(AnyRank<float>{});
}

inline void forward(const Problem& p, const ForwardOutput& out, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.forward(p, out, begin, end); });
}

inline void backward(const Problem& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                     const BackwardOutput& out, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.backward(p, d_reads, d_final_state, checkpoints, out, begin, end); });
}

inline void maps(const Problem& p, const Operand* d_reads, void* maps, const Piece* pieces, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.maps(p, d_reads, maps, pieces, begin, end); });
}

inline void fold(const Problem& p, bool adjoint, const Operand& end_state, const void* maps, void* states,
                 int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.fold(p, adjoint, end_state, maps, states, begin, end); });
}

inline void forward_pieces(const Problem& p, const ForwardOutput& out, const Piece* pieces, int64_t begin,
                           int64_t end) {
  with_scan(p, [&](auto scan) { scan.forward_pieces(p, out, pieces, begin, end); });
}

inline void backward_pieces(const Problem& p, const Operand& d_reads, const Operand& d_final_state,
                            const void* checkpoints, const void* d_checkpoints, const BackwardOutput& out,
                            const Piece* pieces, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) {
    scan.backward_pieces(p, d_reads, d_final_state, checkpoints, d_checkpoints, out, pieces, begin, end);
  });
}

inline void step(const Problem& p, const Step& s, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.step(p, s, begin, end); });
}

template <class F>
void with_correct(const Correction& c, F&& f) {
  if (c.double_precision) return f(Correct<double, DELTAMEM_VECTOR_BYTES / sizeof(double)>{c});
  f(Correct<float, kWide>{c});
}

template <class F>
void in_parallel(ForRange run, int64_t n, int64_t work, const F& f) {
  // Below some ten microseconds a second thread costs more than it brings.
  const int64_t grain = work < 1000000 ? 1000000 / (work + 1) : 1;
  run(n, grain, &f, [](const void* body, int64_t begin, int64_t end) { (*static_cast<const F*>(body))(begin, end); });
}

inline void correct(const Correction& c, ForRange run) {
  with_correct(c, [&](const auto& kernel) {
    typedef std::decay_t<decltype(kernel.factor)> T;
    thread_local Arena arena;
    arena.reset(Arena::piece<T>(kernel.packed_size()));
    T* packed = arena.take<T>(kernel.packed_size());
    kernel.pack(packed);
    in_parallel(run, c.B * c.T, c.D * (c.K + 4),
                [&](int64_t begin, int64_t end) { kernel.forward(packed, begin, end); });
  });
}

inline void correct_backward(const Correction& c, const CorrectionGradients& out, ForRange run) {
  with_correct(c, [&](const auto& kernel) {
    typedef std::decay_t<decltype(kernel.factor)> T;
    thread_local Arena arena;
    const size_t sums_size = kernel.sums_size() * out.groups;
    arena.reset(Arena::piece<T>(kernel.packed_size()) + Arena::piece<T>(sums_size));
    T *packed = arena.take<T>(kernel.packed_size()), *sums = arena.take<T>(sums_size);
    kernel.pack(packed);
    in_parallel(run, out.groups, 3 * c.B * c.T / out.groups * c.D * (c.K + 4),
                [&](int64_t begin, int64_t end) { kernel.backward(out, packed, sums, begin, end); });
    kernel.finish_sums(out, sums);
  });
}

inline constexpr Kernels kernels(const char* isa) {
  return {isa,  forward, backward, step, maps, fold, forward_pieces, backward_pieces, correct, correct_backward,
          kGroup, project, kSegmentColumns, segments};
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

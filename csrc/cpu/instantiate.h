// Instantiates the kernels of one instruction set for every dtype and rank. Each instruction set has a translation unit
// that includes this file and defines DELTAMEM_ISA, its name, and DELTAMEM_VECTOR_BYTES, the size of its vectors.
#pragma once

#include "chunk_scan.h"
#include "correction.h"
#include "projection.h"
#include "segment_mean.h"
#include "step.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

// The ranks that δ-mem uses are compile-time constants. A vector holds as many heads as fit.
template <int R>
using Known = std::integral_constant<int, R>;

constexpr int kWide = DELTAMEM_VECTOR_BYTES / sizeof(float);

template <int R>
struct KnownRank : TaskRunner<Scan<float, kWide, Known<R>, (kWide > R ? kWide / R : 1)>,
                              Scan<float, (kWide < R ? kWide : R), Known<R>>>,
                   StepScan<float, (kWide < R ? kWide : R), Known<R>>,
                   ChunkedScan<float, (kWide < R ? kWide : R), Known<R>> {};

template <class T, int W = DELTAMEM_VECTOR_BYTES / sizeof(T)>
struct AnyRank : TaskRunner<Scan<T, W, int>, Scan<T, W, int>>, StepScan<T, W, int>, ChunkedScan<T, W, int> {};

template <class F>
void with_scan(const ScanArgs& p, F&& f) {
  if (p.double_precision) return f(AnyRank<double>{});
#if !defined(__x86_64__) || DELTAMEM_VECTOR_BYTES > 16  // for SSE2 they are not worth the minutes to compile
  switch (p.R) {
    case 4: return f(KnownRank<4>{});
    case 8: return f(KnownRank<8>{});
    case 16: return f(KnownRank<16>{});
  }
#endif
  f(AnyRank<float>{});
}

inline void forward(const ScanArgs& p, const ScanOutput& out, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.forward(p, out, begin, end); });
}

inline void backward(const ScanArgs& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                     const ScanGradients& out, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.backward(p, d_reads, d_final_state, checkpoints, out, begin, end); });
}

inline void maps(const ScanArgs& p, const Operand* d_reads, void* maps, const ChunkIndex* chunks, int64_t begin,
                 int64_t end) {
  with_scan(p, [&](auto scan) { scan.maps(p, d_reads, maps, chunks, begin, end); });
}

inline void fold(const ScanArgs& p, bool adjoint, const Operand& end_state, const void* maps, void* states,
                 int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.fold(p, adjoint, end_state, maps, states, begin, end); });
}

inline void forward_chunks(const ScanArgs& p, const ScanOutput& out, const ChunkIndex* chunks, int64_t begin,
                           int64_t end) {
  with_scan(p, [&](auto scan) { scan.forward_chunks(p, out, chunks, begin, end); });
}

inline void backward_chunks(const ScanArgs& p, const Operand& d_reads, const Operand& d_final_state,
                            const void* checkpoints, const void* d_checkpoints, const ScanGradients& out,
                            const ChunkIndex* chunks, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) {
    scan.backward_chunks(p, d_reads, d_final_state, checkpoints, d_checkpoints, out, chunks, begin, end);
  });
}

inline void step(const ScanArgs& p, const StepArgs& s, int64_t begin, int64_t end) {
  with_scan(p, [&](auto scan) { scan.step(p, s, begin, end); });
}

template <class F>
void with_correct(const CorrectionArgs& c, F&& f) {
  if (c.double_precision) return f(Correct<double, DELTAMEM_VECTOR_BYTES / sizeof(double)>{c});
  f(Correct<float, kWide>{c});
}

// Calls f(begin, end) on parts of [0, n); `work` is the number of multiply-adds of one task.
template <class F>
void in_parallel(ForRange run, int64_t n, int64_t work, const F& f) {
  // A second thread pays only from about ten microseconds of work on.
  const int64_t grain = work < 1000000 ? 1000000 / (work + 1) : 1;
  run(n, grain, &f, [](const void* body, int64_t begin, int64_t end) { (*static_cast<const F*>(body))(begin, end); });
}

inline void correct(const CorrectionArgs& c, ForRange run) {
  with_correct(c, [&](const auto& kernel) {
    typedef typename std::decay_t<decltype(kernel)>::Value T;
    thread_local Arena arena;
    arena.reset(Arena::bytes<T>(kernel.packed_size()));
    T* packed = arena.take<T>(kernel.packed_size());
    kernel.pack(packed);
    in_parallel(run, c.B * c.T, c.D * (c.K + 4),
                [&](int64_t begin, int64_t end) { kernel.forward(packed, begin, end); });
  });
}

inline void correct_backward(const CorrectionArgs& c, const CorrectionGradients& out, ForRange run) {
  with_correct(c, [&](const auto& kernel) {
    typedef typename std::decay_t<decltype(kernel)>::Value T;
    thread_local Arena arena;
    const size_t sums_size = kernel.sums_size() * out.groups;
    arena.reset(Arena::bytes<T>(kernel.packed_size()) + Arena::bytes<T>(sums_size));
    T *packed = arena.take<T>(kernel.packed_size()), *sums = arena.take<T>(sums_size);
    kernel.pack(packed);
    in_parallel(run, out.groups, 3 * c.B * c.T / out.groups * c.D * (c.K + 4),
                [&](int64_t begin, int64_t end) { kernel.backward(out, packed, sums, begin, end); });
    kernel.finish_sums(out, sums);
  });
}

inline constexpr Kernels kernels(const char* isa) {
  return {isa,  forward, backward, step, maps, fold, forward_chunks, backward_chunks, correct, correct_backward,
          kProjectionGroup, project, kSegmentColumns, segments};
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

// The kernels of one instruction set, as the bindings call them.
#pragma once

#include "../core/layer_args.h"
#include "../core/scan_args.h"

namespace deltamem {

// A chunk of one head of one sequence.
struct ChunkIndex {
  int64_t task;   // sequence n * H + head h
  int64_t first;  // its first token, counted from the start of the sequence
};

// The number of values in the map of a chunk; see cpu/chunk_scan.h.
constexpr int64_t map_size(int64_t R) { return (R + 1) * R * ((R + 15) / 16 * 16); }

// Calls call(body, begin, end) on parts of [0, n), on several threads if each gets at least `grain`.
typedef void (*ForRange)(int64_t n, int64_t grain, const void* body,
                         void (*call)(const void* body, int64_t begin, int64_t end));

// Each function runs tasks [begin, end). The split over threads does not change the results. A task is a sequence and
// head, one of the chunks given, or what the comment says. maps are [B, T / 64, H, map_size(R)], and states have the
// layout of the checkpoints.
struct Kernels {
  const char* isa;
  void (*forward)(const ScanArgs&, const ScanOutput&, int64_t begin, int64_t end);
  void (*backward)(const ScanArgs&, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                   const ScanGradients&, int64_t begin, int64_t end);
  void (*step)(const ScanArgs&, const StepArgs&, int64_t begin, int64_t end);  // a task is a row
  void (*maps)(const ScanArgs&, const Operand* d_reads, void* maps, const ChunkIndex*, int64_t begin, int64_t end);
  void (*fold)(const ScanArgs&, bool adjoint, const Operand& end_state, const void* maps, void* states, int64_t begin,
               int64_t end);
  void (*forward_chunks)(const ScanArgs&, const ScanOutput&, const ChunkIndex*, int64_t begin, int64_t end);
  void (*backward_chunks)(const ScanArgs&, const Operand& d_reads, const Operand& d_final_state,
                          const void* checkpoints, const void* d_checkpoints, const ScanGradients&, const ChunkIndex*,
                          int64_t begin, int64_t end);
  void (*correct)(const CorrectionArgs&, ForRange);
  void (*correct_backward)(const CorrectionArgs&, const CorrectionGradients&, ForRange);
  int group;  // tokens of a task of memory_projection
  void (*project)(const ProjectionArgs&, int64_t begin, int64_t end);
  int columns;  // columns of a task of segment_mean
  void (*segments)(const SegmentArgs&, int64_t begin, int64_t end);  // a task is a batch row and block of columns
};

extern const Kernels kBaseline, kAvx2, kAvx512;

}  // namespace deltamem

// The CPU kernels of each instruction set.
#pragma once

#include "../layer.h"

namespace deltamem {

// A chunk of one head: the sequence x head, and the first of its tokens, counted from the sequence's start.
struct Piece {
  int64_t task, first;
};

// What a chunk does to a state (forward) or to the gradient of one (adjoint): numbers of its map, see cpu/chunked.h.
constexpr int64_t map_size(int64_t R) { return (R + 1) * R * ((R + 15) / 16 * 16); }

// Calls call(body, begin, end) on parts of [0, n), on several threads where each has a part of `grain` or more.
typedef void (*ForRange)(int64_t n, int64_t grain, const void* body,
                         void (*call)(const void* body, int64_t begin, int64_t end));

// The work on sequences x heads [begin, end), or on the pieces: any split over threads gives the same bits. Between
// chunks, `states` has the layout of the checkpoints: maps are [B, T / 64, H] and map_size(R) numbers each.
struct Kernels {
  const char* isa;
  void (*forward)(const Problem&, const ForwardOutput&, int64_t begin, int64_t end);
  void (*backward)(const Problem&, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                   const BackwardOutput&, int64_t begin, int64_t end);
  void (*step)(const Problem&, const Step&, int64_t begin, int64_t end);  // over the rows
  void (*maps)(const Problem&, const Operand* d_reads, void* maps, const Piece*, int64_t begin, int64_t end);
  void (*fold)(const Problem&, bool adjoint, const Operand& end_state, const void* maps, void* states, int64_t begin,
               int64_t end);
  void (*forward_pieces)(const Problem&, const ForwardOutput&, const Piece*, int64_t begin, int64_t end);
  void (*backward_pieces)(const Problem&, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                          const void* d_checkpoints, const BackwardOutput&, const Piece*, int64_t begin, int64_t end);
  void (*correct)(const Correction&, ForRange);
  void (*correct_backward)(const Correction&, const CorrectionGradients&, ForRange);
  int group;  // tokens that memory_projection takes at a time
  void (*project)(const Projection&, int64_t begin, int64_t end);  // over the groups
  int columns;  // numbers of a token that segment_mean takes at a time
  void (*segments)(const Segments&, int64_t begin, int64_t end);  // over rows of the batch x blocks of columns
};

extern const Kernels kBaseline, kAvx2, kAvx512;

}  // namespace deltamem

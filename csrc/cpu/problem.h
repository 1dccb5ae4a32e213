// What a call of the CPU kernels is given: raw pointers, strides in elements, no torch.
#pragma once

#include <cstdint>

#include "../delta_rule.h"

namespace deltamem {

// A state is kept for backward before every 64th token of a sequence.
constexpr int kCheckpointInterval = 64;

enum class DType : int { f16, bf16, f32, f64 };

// [B, T, H, R] (a gate per head has stride 0 over the rows) or, for a state, [N, H, R, R]; data is null where absent.
struct Operand {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {};
};

struct Problem {
  int64_t B, T, H, R, N;
  Mode mode;
  bool double_precision;
  Operand q, k, v, beta, decay, write, initial_state;
  const bool* mask;  // [B, T], null where absent
  int64_t mask_stride[2];
  const int64_t* cu_seqlens;  // [N + 1], null where N sequences of T tokens each stand in B = N rows
};

// Contiguous, in the dtype of the arithmetic (but reads, in q's); checkpoints null where backward is not wanted.
struct ForwardOutput {
  Operand reads;
  void* final_state;
  void* checkpoints;  // [B, T / 64, H, R, R]
};

// Each gradient contiguous, in the shape and dtype of its operand; data is null where nobody asks for it.
struct BackwardOutput {
  Operand q, k, v, beta, decay, write;
  bool beta_per_head, decay_per_head, write_per_head;
  Operand initial_state;
};

// delta_step: N rows of T tokens (operands [N, T, H, R] in a Problem with B = N), each on a slot of a pool of states.
struct Step {
  Operand state;           // [slots, H, R, R]
  Operand intermediate;      // of one row, [T, H, R, R]: the state after each token; data is null where absent
  Operand reads;             // [N, T, H, R]
  const int64_t* from;       // [N]: the slot a row starts from, or kNoSlot: it reads zeros and touches nothing
  const int64_t* to;         // [N, T]: the slot that gets the state after a token, or kNoSlot
  int64_t intermediate_row;  // stride between the rows of intermediate
};
constexpr int64_t kNoSlot = -1;

// attention_correction and its fused form: B x T rows of D numbers; K = H R. An operand's strides are those of batch
// row, token, and number, the last (reads: head before number; weight: row before column, no others); data is null
// where absent.
struct Correction {
  int64_t B, T, D, H, R, K;
  bool double_precision;
  Operand base, reads, weight, gain, norm_weight, cos, sin, out;
  double scale, norm_eps;
  int64_t head_dim;  // 0: the norm is over the correction
};

// Gradients, contiguous; data is null where nobody asks. Sums over rows are those of `groups` of rows, each in order.
struct CorrectionGradients {
  Operand d_out, base, reads, weight, gain, norm_weight;
  int64_t groups;
};

// Calls call(body, begin, end) on parts of [0, n), on several threads where each has a part of `grain` or more.
typedef void (*ForRange)(int64_t n, int64_t grain, const void* body,
                         void (*call)(const void* body, int64_t begin, int64_t end));

// A chunk of one head: the sequence x head, and the first of its tokens, counted from the sequence's start.
struct Piece {
  int64_t task, first;
};

// What a chunk does to a state (forward) or to the gradient of one (adjoint): numbers of its map, see cpu/chunked.h.
constexpr int64_t map_size(int64_t R) { return (R + 1) * R * ((R + 15) / 16 * 16); }

// The work on sequences x heads [begin, end), or on the pieces: any split over threads gives the same bits. Between
// chunks, `states` has the layout of the checkpoints: maps are [B, T / 64, H] and map_size(R) numbers each.
// memory_projection: B sequences of T tokens of D numbers. Weights have unit stride along D and, but in double
// precision, where they are double, one dtype. Results are contiguous, in the dtype of the arithmetic.
constexpr double kNormEps = 1e-6;
struct Gate {
  Operand weight, bias;  // [rows, D], [rows]; no rows where the gate is absent, no bias data where that is
  int64_t rows;
  void* out;
};
struct Projection {
  int64_t B, T, D, H, R;
  bool double_precision, normalize;
  Operand x, qkv_weight;
  Gate gates[2];  // beta, decay
  void *q, *k, *v, *norms;  // norms [2, B, T, H], of q and k before the division
  int64_t rows() const { return 3 * H * R + gates[0].rows + gates[1].rows; }
};

// segment_mean: means [B, M, D] of x [B, T, D], contiguous, in x's dtype.
struct Segments {
  int64_t B, T, D, M;
  Operand x;
  const int64_t* ids;  // [B, T], from 0 to M - 1, or negative: the token belongs to none
  const int32_t* counts;  // [B, M]
  void* means;
};

// The work on sequences x heads [begin, end): any split over threads gives the same bits.
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

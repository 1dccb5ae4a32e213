// The arguments of the scan: delta_update forward and backward, and delta_step.
#pragma once

#include "operand.h"

namespace deltamem {

// A state is kept for backward before every 64th token of a sequence.
constexpr int kCheckpointInterval = 64;

// Operands of tokens are [B, T, H, R], where a gate per head has stride 0 over the rows; states are [N, H, R, R].
struct ScanArgs {
  int64_t B, T, H, R, N;
  Mode mode;
  bool double_precision;
  Operand q, k, v, beta, decay, write, initial_state;
  const bool* mask;  // [B, T], null where absent
  int64_t mask_stride[2];
  const int64_t* cu_seqlens;  // [N + 1] bounds of the sequences packed in one row; null: N = B sequences of T tokens
};

// All are contiguous and have the dtype of the arithmetic, except that reads have q's dtype.
struct ScanOutput {
  Operand reads;
  void* final_state;
  void* checkpoints;  // [B, T / 64, H, R, R], null where backward is not wanted
};

// Each gradient is contiguous and has the shape and dtype of its operand; data is null where it is not wanted.
struct ScanGradients {
  Operand q, k, v, beta, decay, write;
  bool beta_per_head, decay_per_head, write_per_head;
  Operand initial_state;
};

constexpr int64_t kNoSlot = -1;

// delta_step on a CPU: each of N rows has T tokens (operands [N, T, H, R] in a ScanArgs with B = N) and uses a slot of
// the pool of states.
struct StepArgs {
  Operand state;             // [slots, H, R, R]
  Operand intermediate;      // the state after each token, [T, H, R, R], of the first row; data is null where absent
  Operand reads;             // [N, T, H, R]
  const int64_t* from;       // [N]: the slot a row starts from; with kNoSlot the row reads zeros and writes nothing
  const int64_t* to;         // [N, T]: the slot that gets the state after a token, or kNoSlot
  int64_t intermediate_row;  // stride between the rows of intermediate
};

inline namespace DELTAMEM_ISA {

// The index among the checkpoints [B, T / 64] of the state before token `first` of the sequence that starts at token
// `start` of batch row b. `first` is a positive multiple of 64. Rounding down leaves each packed sequence enough room.
DELTAMEM_INLINE int64_t checkpoint_index(const ScanArgs& p, int64_t b, int64_t start, int64_t first) {
  return b * (p.T / kCheckpointInterval) + start / kCheckpointInterval + first / kCheckpointInterval - 1;
}

// States [N, H, R, R] or checkpoints [B, T / 64, H, R, R] as one contiguous operand of dtype T.
template <class T>
DELTAMEM_INLINE Operand contiguous_states(const ScanArgs& p, const void* data) {
  return {const_cast<void*>(data), kDType<T>, {p.H * p.R * p.R, p.R * p.R, p.R, 1}};
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

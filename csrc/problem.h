// What a call of the kernels is given: raw pointers, strides in elements, no torch.
#pragma once

#include <cstdint>

#include "delta_rule.h"

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

// Numbers of an int32 or int64 array; data is null where absent.
struct Indices {
  const void* data = nullptr;
  bool wide = false;
  int64_t stride[2] = {};
  DELTAMEM_INLINE int64_t at(int64_t i, int64_t j = 0) const {
    const int64_t offset = i * stride[0] + j * stride[1];
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

// delta_step on a CPU: N rows of T tokens (operands [N, T, H, R] in a Problem with B = N), each on a slot of a pool of states.
struct Step {
  Operand state;           // [slots, H, R, R]
  Operand intermediate;      // of one row, [T, H, R, R]: the state after each token; data is null where absent
  Operand reads;             // [N, T, H, R]
  const int64_t* from;       // [N]: the slot a row starts from, or kNoSlot: it reads zeros and touches nothing
  const int64_t* to;         // [N, T]: the slot that gets the state after a token, or kNoSlot
  int64_t intermediate_row;  // stride between the rows of intermediate
};
constexpr int64_t kNoSlot = -1;

}  // namespace deltamem

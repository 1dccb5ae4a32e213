// The operations on a GPU, as the host calls them: no torch here, and no word of CUDA but the stream.
#pragma once

#include "../layer.h"

namespace deltamem {

// delta_step on a GPU, which finds the slots itself: one outside of the pool is treated as the pad, and so is a row
// whose number of accepted tokens is not from 1 to T.
struct PoolStep {
  Operand state;             // [slots, H, R, R]
  Operand intermediate;      // of one row, [T, H, R, R]; data is null where absent
  Operand reads;             // [N, T, H, R]
  int64_t intermediate_row;  // stride between the rows of intermediate
  int64_t slots, pad;
  Indices indices, accepted;  // [N] or [N, T]; [N]
  bool each, last;            // whether each token's state goes to its slot, the last one to the row's
};

typedef void* Stream;  // cudaStream_t

namespace cuda {

// Sequences of at least chunked_from tokens run in chunks, all at once; shorter ones token by token. Whoever calls
// chooses it (backends/scan.py).

// What a call needs besides its results: bytes of workspace, and for forward in chunks checkpoints also where nobody
// keeps them.
struct Needs {
  int64_t workspace;
  bool checkpoints;
};
Needs forward_needs(const Problem& p, int64_t chunked_from);
Needs backward_needs(const Problem& p, int64_t chunked_from);

// Launches; the error, 0 where there is none.
int forward(const Problem& p, int64_t chunked_from, const ForwardOutput& out, void* workspace, Stream stream);
int backward(const Problem& p, int64_t chunked_from, const Operand& d_reads, const Operand& d_final_state,
             const void* checkpoints, const BackwardOutput& out, void* workspace, Stream stream);
int step(const Problem& p, const PoolStep& s, Stream stream);
int project(const Projection& p, Stream stream);
int correct(const Correction& c, Stream stream);
// Through rotary and norm: c.out gets the gradient of what the norm is over, or is absent where there is neither; out.base
// the same in another dtype; out.reads [rows, K] and out.norm_weight [groups, D], zeros before, in the arithmetic's.
int correct_adjoint(const Correction& c, const CorrectionGradients& out, Stream stream);

}  // namespace cuda
}  // namespace deltamem

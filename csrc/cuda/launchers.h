// The operations on a GPU, as the bindings call them. Includes neither torch nor CUDA.
#pragma once

#include "../core/layer_args.h"
#include "../core/scan_args.h"

namespace deltamem {

// delta_step on a GPU. The kernel reads the slots itself. It treats a slot outside the pool as padding, and likewise a
// row whose number of accepted tokens is not from 1 to T.
struct PoolStepArgs {
  Operand state;             // [slots, H, R, R]
  Operand intermediate;      // the state after each token, [T, H, R, R], of the first row; data is null where absent
  Operand reads;             // [N, T, H, R]
  int64_t intermediate_row;  // stride between the rows of intermediate
  int64_t slots, pad;
  Indices indices, accepted;  // [N] or [N, T]; [N]
  bool each;                  // whether the state after each token is stored to the token's slot
  bool last;                  // whether the state after the last token is stored to the row's slot
};

typedef void* Stream;  // cudaStream_t

namespace cuda {

// Sequences of at least chunked_from tokens run in parallel chunks, shorter ones token by token. The caller chooses
// chunked_from (backends/scan.py).

// What a call needs besides its results: bytes of workspace, and whether forward needs memory for the checkpoints even
// if they are not kept.
struct Needs {
  int64_t workspace;
  bool checkpoints;
};
Needs forward_needs(const ScanArgs& p, int64_t chunked_from);
Needs backward_needs(const ScanArgs& p, int64_t chunked_from);

// These launch kernels and return the error code, 0 on success.
int forward(const ScanArgs& p, int64_t chunked_from, const ScanOutput& out, void* workspace, Stream stream);
int backward(const ScanArgs& p, int64_t chunked_from, const Operand& d_reads, const Operand& d_final_state,
             const void* checkpoints, const ScanGradients& out, void* workspace, Stream stream);
int step(const ScanArgs& p, const PoolStepArgs& s, Stream stream);
int project(const ProjectionArgs& p, Stream stream);
int correct(const CorrectionArgs& c, Stream stream);
// The gradients through rotary embedding and norm. c.out gets the gradient of the norm's input, and is absent if there
// is neither norm nor rotary embedding; out.base gets the same in base's dtype. out.reads [rows, K] and out.norm_weight
// [groups, D], which must be zeros before the call, have the dtype of the arithmetic.
int correct_adjoint(const CorrectionArgs& c, const CorrectionGradients& out, Stream stream);

// The scans that `forward` and `backward` launch: of whole sequences, and of the chunks of long ones.
int forward_scan(const ScanArgs& p, const ScanOutput& out, int64_t chunked_from, Stream stream);
int backward_scan(const ScanArgs& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                  const void* d_checkpoints, const ScanGradients& out, void* history, int64_t chunked_from,
                  Stream stream);
int64_t history_bytes(const ScanArgs& p, int64_t chunked_from);

}  // namespace cuda
}  // namespace deltamem

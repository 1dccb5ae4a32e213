// What a call of the kernels around the scan is given: as in problem.h, raw pointers and strides in elements, no torch.
#pragma once

#include "problem.h"

namespace deltamem {

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

}  // namespace deltamem

// The arguments of the operations around the scan: memory_projection, segment_mean and attention_correction.
#pragma once

#include "operand.h"

namespace deltamem {

// l2norm divides by at least this.
constexpr double kNormEps = 1e-6;

struct Gate {
  Operand weight, bias;  // [rows, D], [rows]; bias data is null where absent
  int64_t rows;          // 0 where the gate is absent
  void* out;
};

// memory_projection of B sequences of T tokens of D numbers. On a CPU the weights have unit stride along D and share
// one dtype, which is float64 in double precision; a GPU takes any strides and dtypes. Results are contiguous and have
// the dtype of the arithmetic.
struct ProjectionArgs {
  int64_t B, T, D, H, R;
  bool double_precision, normalize;
  Operand x;              // [B, T, D]
  Operand qkv_weight[3];  // of q, k and v, each [H R, D]
  Gate gates[2];          // beta, decay
  void *q, *k, *v;        // [B, T, H, R]
  void* norms;            // [2, B, T, H]: the norms of q and k before the division
  int64_t rows() const { return 3 * H * R + gates[0].rows + gates[1].rows; }
};

// segment_mean: the means [B, M, D] of x [B, T, D], contiguous, in x's dtype.
struct SegmentArgs {
  int64_t B, T, D, M;
  Operand x;
  const int64_t* ids;     // [B, T], from 0 to M - 1; negative: the token belongs to no segment
  const int32_t* counts;  // [B, M]
  void* means;
};

// attention_correction and its fused form, of B x T rows of D numbers; K = H R. Strides are those of batch row, token,
// head (of reads) and number, except that the weight [D, K] has the strides of its columns in [1] and [3] and of its
// rows in [2]. data is null where an operand is absent.
struct CorrectionArgs {
  int64_t B, T, D, H, R, K;
  bool double_precision;
  Operand base, reads, weight, gain, norm_weight, cos, sin, out;
  double scale, norm_eps;
  int64_t head_dim;  // 0: the norm is over the correction
};

// Gradients are contiguous; data is null where one is not wanted. Sums over rows are taken within `groups` groups of
// rows, each in order.
struct CorrectionGradients {
  Operand d_out, base, reads, weight, gain, norm_weight;
  int64_t groups;
};

}  // namespace deltamem

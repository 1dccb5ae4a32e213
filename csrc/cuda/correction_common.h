// What attention_correction and its gradients share. A block has a few rows, which share the loads of the weight. A row
// is divided into segments: the heads of the attention layer, or the whole row if the norm is over it, or else kColumns
// columns. The warps of a block divide the segments among them, and the lanes of a warp the columns of a segment. The
// bits of a row do not depend on the other rows.
#pragma once

#include "operand_access.h"  // first: core/delta_rule.h needs the fma of device.h
#include "launchers.h"

namespace deltamem {

constexpr int kCorrectRows = 4;
constexpr int64_t kColumns = 128;  // of a segment without heads and norm
#ifdef __CUDACC__
constexpr int kCorrectWarps = 16;
#else
constexpr int kCorrectWarps = 2;
#endif

template <class T>
DELTAMEM_DEVICE T sum_over_lanes(T x) {
  DELTAMEM_UNROLL
  for (int n = kWarp / 2; n; n /= 2) x += __shfl_xor_sync(kAllLanes, x, n);
  return x;
}

// The rows of a block. Past the last row, the last one is loaded again and not stored.
template <class T>
struct CorrectedRows {
  const CorrectionArgs& c;
  T factor;
  int64_t b[kCorrectRows], t[kCorrectRows];
  int count;

  DELTAMEM_DEVICE CorrectedRows(const CorrectionArgs& c, int64_t first) : c(c) {
    const int64_t rows = c.B * c.T;
    DELTAMEM_UNROLL
    for (int m = 0; m < kCorrectRows; ++m) {
      const int64_t row = first + m < rows ? first + m : rows - 1;
      b[m] = row / c.T, t[m] = row % c.T;
    }
    count = int(rows - first < kCorrectRows ? rows - first : kCorrectRows);
    factor = T(c.scale) * (c.gain.data ? load<T>(c.gain, 0, AnyDtype{}) : T(1));
  }

  DELTAMEM_DEVICE T value(const Operand& x, int m, int64_t d) const {
    return load<T>(x, offset(x, b[m], t[m], 0, d), AnyDtype{});
  }
  DELTAMEM_DEVICE void store_out(T x, int m, int64_t d) const {
    if (m < count) store(x, c.out, offset(c.out, b[m], t[m], 0, d));
  }

  // Column d of each row of the norm's input: the corrected row if there are heads, otherwise the correction.
  DELTAMEM_DEVICE void column(int64_t d, T* y) const {
    T sums[kCorrectRows] = {};
    with_operand_dtype<T>(c.weight, [&](auto of_weight) {
      with_operand_dtype<T>(c.reads, [&](auto of_reads) {
        for (int64_t h = 0; h < c.H; ++h)
          for (int64_t r = 0; r < c.R; ++r) {
            const T w = load<T>(c.weight, offset(c.weight, 0, 0, d, h * c.R + r), of_weight);
            DELTAMEM_UNROLL
            for (int m = 0; m < kCorrectRows; ++m)
              sums[m] = fma(w, load<T>(c.reads, offset(c.reads, b[m], t[m], h, r), of_reads), sums[m]);
          }
      });
    });
    DELTAMEM_UNROLL
    for (int m = 0; m < kCorrectRows; ++m) {
      y[m] = sums[m] * factor;
      if (c.head_dim) y[m] = value(c.base, m, d) + y[m];
    }
  }

  // 1 / RMS of a segment of n columns, in every lane, from each lane's sum of squares.
  DELTAMEM_DEVICE void inverse_rms(const T* squares, int64_t n, T* inverse) const {
    DELTAMEM_UNROLL
    for (int m = 0; m < kCorrectRows; ++m)
      inverse[m] = T(1) / ::sqrt(sum_over_lanes(squares[m]) / T(n) + T(c.norm_eps));
  }
};

inline int64_t segment_columns(const CorrectionArgs& c) {
  return c.head_dim ? c.head_dim : c.norm_weight.data ? c.D : kColumns;
}
inline int correct_threads(const CorrectionArgs& c) {
  const int64_t columns = segment_columns(c), segments = (c.D + columns - 1) / columns;
  return int(segments < kCorrectWarps ? segments : kCorrectWarps) * kWarp;
}

}  // namespace deltamem

// What the correction and its adjoint share: rows, their segments and the columns of what a norm is over. A block has a
// few rows, which share the weights; its warps share the segments of a row, and the lanes of a warp the columns of a
// segment: all of a row where that is normed, a head of the attention layer, or else some columns. A row has the same
// bits wherever it stands.
#pragma once

#include "tile.h"

namespace deltamem {

constexpr int kCorrectRows = 4;
constexpr int64_t kColumns = 128;  // of a segment where nothing asks for more
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

// Rows beyond the last are the last again, and are not stored.
template <class T>
struct CorrectedRows {
  const Correction& c;
  T factor;
  int64_t b[kCorrectRows], t[kCorrectRows];
  int count;

  DELTAMEM_DEVICE CorrectedRows(const Correction& c, int64_t first) : c(c) {
    const int64_t rows = c.B * c.T;
    DELTAMEM_UNROLL
    for (int m = 0; m < kCorrectRows; ++m) {
      const int64_t row = first + m < rows ? first + m : rows - 1;
      b[m] = row / c.T, t[m] = row % c.T;
    }
    count = int(rows - first < kCorrectRows ? rows - first : kCorrectRows);
    factor = T(c.scale) * (c.gain.data ? load<T>(c.gain, 0, Any{}) : T(1));
  }

  DELTAMEM_DEVICE T number(const Operand& x, int m, int64_t d) const {
    return load<T>(x, offset(x, b[m], t[m], 0, d), Any{});
  }
  DELTAMEM_DEVICE void put(T x, int m, int64_t d) const {
    if (m < count) store(x, c.out, offset(c.out, b[m], t[m], 0, d));
  }

  // Column d of what a norm is over: the correction; with heads, the corrected row.
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
      if (c.head_dim) y[m] = number(c.base, m, d) + y[m];
    }
  }

  // Of squares that the lanes have added up, over a segment of n columns: 1 / RMS, in every lane.
  DELTAMEM_DEVICE void inverse_rms(const T* squares, int64_t n, T* inverse) const {
    DELTAMEM_UNROLL
    for (int m = 0; m < kCorrectRows; ++m)
      inverse[m] = T(1) / ::sqrt(sum_over_lanes(squares[m]) / T(n) + T(c.norm_eps));
  }
};

inline int64_t segment_columns(const Correction& c) {
  return c.head_dim ? c.head_dim : c.norm_weight.data ? c.D : kColumns;
}
inline int correct_threads(const Correction& c) {
  const int64_t columns = segment_columns(c), segments = (c.D + columns - 1) / columns;
  return int(segments < kCorrectWarps ? segments : kCorrectWarps) * kWarp;
}

}  // namespace deltamem

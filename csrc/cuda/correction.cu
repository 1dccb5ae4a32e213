// The correction of a projection's output, and what an attention layer does to a query or key next; the formulas are at
// the top of backends/reference_correction.py. A block has a few rows, which share the weights; its warps share the
// segments of a row, and the lanes of a warp the columns of a segment: all of a row where that is normed, a head of the
// attention layer, or else some columns. A row has the same bits wherever it stands.
#include "tile.h"

namespace deltamem {

constexpr int kCorrectRows = 4;
constexpr int64_t kColumns = 128;  // of a segment where nothing asks for more
#ifdef __CUDACC__
constexpr int kCorrectWarps = 16;
#else
constexpr int kCorrectWarps = 2;
#endif

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

  // 1 / RMS of the segment [begin, end) of each row.
  DELTAMEM_DEVICE void inverse_rms(int64_t begin, int64_t end, T* inverse) const {
    T squares[kCorrectRows] = {};
    for (int64_t d = begin + threadIdx.x % kWarp; d < end; d += kWarp) {
      T y[kCorrectRows];
      column(d, y);
      DELTAMEM_UNROLL
      for (int m = 0; m < kCorrectRows; ++m) squares[m] = fma(y[m], y[m], squares[m]);
    }
    DELTAMEM_UNROLL
    for (int m = 0; m < kCorrectRows; ++m) {
      DELTAMEM_UNROLL
      for (int n = kWarp / 2; n; n /= 2) squares[m] += __shfl_xor_sync(kAllLanes, squares[m], n);
      inverse[m] = T(1) / ::sqrt(squares[m] / T(end - begin) + T(c.norm_eps));
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kCorrectWarps* kWarp, 1)
    correct_kernel(const __grid_constant__ Correction c, int64_t columns) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const CorrectedRows<T> rows(c, int64_t(blockIdx.x) * kCorrectRows);
  for (int64_t begin = warp * columns; begin < c.D; begin += warps * columns) {
    const int64_t end = begin + columns < c.D ? begin + columns : c.D;
    T inverse[kCorrectRows];
    // In place the lanes write what others of the warp have read: they have, once their sums have met.
    if (c.norm_weight.data) rows.inverse_rms(begin, end, inverse);
    auto column = [&](int64_t d, T* y) {
      rows.column(d, y);
      if (!c.norm_weight.data) return;
      const T weight = load<T>(c.norm_weight, (d - begin) * c.norm_weight.stride[3], Any{});
      DELTAMEM_UNROLL
      for (int m = 0; m < kCorrectRows; ++m) y[m] = y[m] * inverse[m] * weight;
    };
    if (c.cos.data) {
      const int64_t half = columns / 2;
      for (int64_t i = lane; i < half; i += kWarp) {
        T first[kCorrectRows], second[kCorrectRows];
        column(begin + i, first), column(begin + half + i, second);
        DELTAMEM_UNROLL
        for (int m = 0; m < kCorrectRows; ++m) {
          const T of_first = first[m] * rows.number(c.cos, m, i);
          const T of_second = second[m] * rows.number(c.cos, m, half + i);
          rows.put(fnma(second[m], rows.number(c.sin, m, i), of_first), m, begin + i);
          rows.put(fma(first[m], rows.number(c.sin, m, half + i), of_second), m, begin + half + i);
        }
      }
    } else {
      for (int64_t d = begin + lane; d < end; d += kWarp) {
        T y[kCorrectRows];
        column(d, y);
        DELTAMEM_UNROLL
        for (int m = 0; m < kCorrectRows; ++m) rows.put(c.head_dim ? y[m] : rows.number(c.base, m, d) + y[m], m, d);
      }
    }
  }
}

namespace cuda {

int correct(const Correction& c, Stream stream) {
  if (c.D == 0) return 0;
  const int64_t columns = c.head_dim ? c.head_dim : c.norm_weight.data ? c.D : kColumns;
  const int64_t segments = (c.D + columns - 1) / columns, blocks = (c.B * c.T + kCorrectRows - 1) / kCorrectRows;
  const int threads = int(segments < kCorrectWarps ? segments : kCorrectWarps) * kWarp;
  return c.double_precision ? launch(correct_kernel<double>, blocks, threads, 0, stream, c, columns)
                            : launch(correct_kernel<float>, blocks, threads, 0, stream, c, columns);
}

}  // namespace cuda
}  // namespace deltamem

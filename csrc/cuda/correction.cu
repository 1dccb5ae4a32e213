// attention_correction forward, with the norm and rotary embedding of an attention layer in its fused form. The
// formulas are in backends/reference/correction.py.
#include "correction_common.h"

namespace deltamem {

template <class T>
__global__ void __launch_bounds__(kCorrectWarps* kWarp, 1)
    correct_kernel(const __grid_constant__ CorrectionArgs c, int64_t columns) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const CorrectedRows<T> rows(c, int64_t(blockIdx.x) * kCorrectRows);
  for (int64_t begin = warp * columns; begin < c.D; begin += warps * columns) {
    const int64_t end = begin + columns < c.D ? begin + columns : c.D;
    T inverse[kCorrectRows];
    // In place, lanes overwrite values that other lanes of the warp need for the norm. The sum over lanes is a barrier.
    if (c.norm_weight.data) {
      T squares[kCorrectRows] = {};
      for (int64_t d = begin + lane; d < end; d += kWarp) {
        T y[kCorrectRows];
        rows.column(d, y);
        DELTAMEM_UNROLL
        for (int m = 0; m < kCorrectRows; ++m) squares[m] = fma(y[m], y[m], squares[m]);
      }
      rows.inverse_rms(squares, end - begin, inverse);
    }
    auto column = [&](int64_t d, T* y) {
      rows.column(d, y);
      if (!c.norm_weight.data) return;
      const T weight = load<T>(c.norm_weight, (d - begin) * c.norm_weight.stride[3], AnyDtype{});
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
          const T of_first = first[m] * rows.value(c.cos, m, i);
          const T of_second = second[m] * rows.value(c.cos, m, half + i);
          rows.store_out(fnma(second[m], rows.value(c.sin, m, i), of_first), m, begin + i);
          rows.store_out(fma(first[m], rows.value(c.sin, m, half + i), of_second), m, begin + half + i);
        }
      }
    } else {
      for (int64_t d = begin + lane; d < end; d += kWarp) {
        T y[kCorrectRows];
        column(d, y);
        DELTAMEM_UNROLL
        for (int m = 0; m < kCorrectRows; ++m)
          rows.store_out(c.head_dim ? y[m] : rows.value(c.base, m, d) + y[m], m, d);
      }
    }
  }
}

namespace cuda {

int correct(const CorrectionArgs& c, Stream stream) {
  if (c.D == 0) return 0;
  const int64_t columns = segment_columns(c), blocks = (c.B * c.T + kCorrectRows - 1) / kCorrectRows;
  const int threads = correct_threads(c);
  return c.double_precision ? launch(correct_kernel<double>, blocks, threads, 0, stream, c, columns)
                            : launch(correct_kernel<float>, blocks, threads, 0, stream, c, columns);
}

}  // namespace cuda
}  // namespace deltamem

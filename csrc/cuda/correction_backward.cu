// Gradients of attention_correction, except those of the weight and the gain, which are computed from these: through
// rotary embedding and norm to the corrected rows and the reads. The formulas are in backends/reference/correction.py.
#include "correction_common.h"

namespace deltamem {

// A block runs a group of rows, a few at a time; cuda/launchers.h describes the results. One lane adds up an element of
// the norm weight's gradient, over the rows of the group in order.
template <class T>
__global__ void __launch_bounds__(kCorrectWarps* kWarp, 1)
    adjoint_kernel(const __grid_constant__ CorrectionArgs c, const __grid_constant__ CorrectionGradients out,
                   int64_t columns, int64_t rows_of_group) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t all = c.B * c.T, group = blockIdx.x, first = group * rows_of_group;
  const int64_t last = first + rows_of_group < all ? first + rows_of_group : all, half = columns / 2;
  T* const d_norm = out.norm_weight.data ? static_cast<T*>(out.norm_weight.data) + group * c.D : nullptr;
  for (int64_t row = first; row < last; row += kCorrectRows) {
    const CorrectedRows<T> rows(c, row);
    for (int64_t begin = warp * columns; (c.norm_weight.data || c.cos.data) && begin < c.D; begin += warps * columns) {
      const int64_t end = begin + columns < c.D ? begin + columns : c.D;
      // The gradient of the norm's result: d_out through the transposed rotation.
      auto gradient = [&](int m, int64_t d) {
        const T g = rows.value(out.d_out, m, d);
        if (!c.cos.data) return g;
        const int64_t i = d - begin, other = i < half ? i + half : i - half;
        const T turned = g * rows.value(c.cos, m, i);
        const T across = rows.value(out.d_out, m, begin + other), sine = rows.value(c.sin, m, other);
        return i < half ? fma(across, sine, turned) : fnma(across, sine, turned);
      };
      auto norm_weight = [&](int64_t d) {
        return load<T>(c.norm_weight, (d - begin) * c.norm_weight.stride[3], AnyDtype{});
      };
      T inverse[kCorrectRows], along[kCorrectRows];
      if (c.norm_weight.data) {
        T squares[kCorrectRows] = {}, products[kCorrectRows] = {};
        for (int64_t d = begin + lane; d < end; d += kWarp) {
          T y[kCorrectRows];
          rows.column(d, y);
          const T weight = norm_weight(d);
          DELTAMEM_UNROLL
          for (int m = 0; m < kCorrectRows; ++m) {
            squares[m] = fma(y[m], y[m], squares[m]);
            products[m] = fma(gradient(m, d) * weight, y[m], products[m]);
          }
        }
        rows.inverse_rms(squares, end - begin, inverse);
        DELTAMEM_UNROLL
        for (int m = 0; m < kCorrectRows; ++m)
          along[m] = sum_over_lanes(products[m]) / T(end - begin) * inverse[m] * inverse[m] * inverse[m];
      }
      for (int64_t d = begin + lane; d < end; d += kWarp) {
        T y[kCorrectRows], of_norm = T(0);
        if (c.norm_weight.data) rows.column(d, y);
        DELTAMEM_UNROLL
        for (int m = 0; m < kCorrectRows; ++m) {
          T g = gradient(m, d);
          if (c.norm_weight.data) {
            if (m < rows.count) of_norm = fma(g, y[m] * inverse[m], of_norm);
            g = fnma(y[m], along[m], g * norm_weight(d) * inverse[m]);
          }
          rows.store_out(g, m, d);
          if (out.base.data && m < rows.count) store(g, out.base, (row + m) * c.D + d);
        }
        if (d_norm) d_norm[d] = row == first ? of_norm : d_norm[d] + of_norm;
      }
    }
    if (!out.reads.data) continue;
    __syncthreads();  // all columns of the gradient have been stored
    const Operand& rows_of = c.out.data ? c.out : out.d_out;
    for (int64_t k = warp; k < c.K; k += warps) {
      T sums[kCorrectRows] = {};
      for (int64_t d = lane; d < c.D; d += kWarp) {
        const T w = load<T>(c.weight, offset(c.weight, 0, 0, d, k), AnyDtype{});
        DELTAMEM_UNROLL
        for (int m = 0; m < kCorrectRows; ++m) sums[m] = fma(w, rows.value(rows_of, m, d), sums[m]);
      }
      DELTAMEM_UNROLL
      for (int m = 0; m < kCorrectRows; ++m) {
        const T sum = sum_over_lanes(sums[m]);
        if (lane == 0 && m < rows.count) static_cast<T*>(out.reads.data)[(row + m) * c.K + k] = sum;
      }
    }
  }
}

namespace cuda {

int correct_adjoint(const CorrectionArgs& c, const CorrectionGradients& out, Stream stream) {
  const int64_t columns = segment_columns(c), rows = c.B * c.T;
  const int64_t parts = (rows + kCorrectRows - 1) / kCorrectRows;
  const int64_t of_group = (parts + out.groups - 1) / out.groups;
  const int64_t blocks = parts ? (parts + of_group - 1) / of_group : 0;
  const int threads = out.reads.data ? kCorrectWarps * kWarp : correct_threads(c);
  const auto run = [&](auto kernel) {
    return launch(kernel, blocks, threads, 0, stream, c, out, columns, of_group * kCorrectRows);
  };
  return c.double_precision ? run(adjoint_kernel<double>) : run(adjoint_kernel<float>);
}

}  // namespace cuda
}  // namespace deltamem

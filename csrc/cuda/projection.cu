// memory_projection forward. A block has a few tokens. Its warps divide the heads of q, k, v and the gates among them,
// and the lanes of a warp divide the columns. The bits of a dot product do not depend on the other tokens and weight
// rows.
#include "scan_tiles.h"

namespace deltamem {

constexpr int kTokens = 4, kWeightRows = kWarp / kTokens;  // so that each lane gets one of the warp's dot products
#ifdef __CUDACC__
constexpr int kProjectWarps = 8;
#else
constexpr int kProjectWarps = 2;
#endif

// Sums 2 N values over all lanes. With N = kWarp / 2, lane i gets the sum of value i. The order of the additions is the
// same for each sum.
template <int N, class T>
DELTAMEM_DEVICE T sums_over_lanes(T* x) {
  const bool upper = threadIdx.x & N;
  DELTAMEM_UNROLL
  for (int i = 0; i < N; ++i) {
    const T mine = upper ? x[i + N] : x[i], others = upper ? x[i] : x[i + N];
    x[i] = mine + __shfl_xor_sync(kAllLanes, others, N);
  }
  if constexpr (N > 1)
    return sums_over_lanes<N / 2>(x);
  else
    return x[0];
}

// The weight rows of a unit of work: those of one head of q, k or v, or R rows of a gate (fewer for its last unit).
// They begin at row `row` of `weight`, and their results at `row` of the token's `width` results.
struct HeadRows {
  Operand weight, bias;
  int64_t row, count, width;
  void* out;
  bool normed, gate;
};

DELTAMEM_DEVICE HeadRows head_rows(const ProjectionArgs& p, int64_t unit) {
  const int64_t part = unit / p.H;
  if (part < 3) {
    void* const out = part == 0 ? p.q : part == 1 ? p.k : p.v;
    const int64_t row = unit % p.H * p.R;
    return {p.qkv_weight[part], {}, row, p.R, p.H * p.R, out, p.normalize && part < 2, false};
  }
  const int64_t of_beta = (p.gates[0].rows + p.R - 1) / p.R, index = unit - 3 * p.H;
  const bool beta = index < of_beta;
  const Gate& gate = p.gates[beta ? 0 : 1];
  const int64_t row = (beta ? index : index - of_beta) * p.R, left = gate.rows - row;
  return {gate.weight, gate.bias, row, left < p.R ? left : p.R, gate.rows, gate.out, false, true};
}

template <class T>
__global__ void __launch_bounds__(kProjectWarps* kWarp, 1)
    project_kernel(const __grid_constant__ ProjectionArgs p, int64_t units) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t tokens = p.B * p.T, first_token = int64_t(blockIdx.x) * kTokens;
  // Past the last token or weight row the last one is loaded again, and its result is not stored.
  int64_t x_at[kTokens];
  DELTAMEM_UNROLL
  for (int m = 0; m < kTokens; ++m) {
    const int64_t token = first_token + m < tokens ? first_token + m : tokens - 1;
    x_at[m] = offset(p.x, token / p.T, token % p.T, 0, 0);
  }
  const int64_t token = first_token + lane % kTokens;

  for (int64_t unit = warp; unit < units; unit += warps) {
    const HeadRows rows = head_rows(p, unit);
    T* const out = static_cast<T*>(rows.out) + token * rows.width + rows.row;
    T squares = T(0);
    for (int64_t first = 0; first < rows.count; first += kWeightRows) {
      int64_t w_at[kWeightRows];
      DELTAMEM_UNROLL
      for (int n = 0; n < kWeightRows; ++n)
        w_at[n] = (rows.row + (first + n < rows.count ? first + n : rows.count - 1)) * rows.weight.stride[0];
      T sums[kWarp] = {};
      with_operand_dtype<T>(p.x, [&](auto of_x) {
        with_operand_dtype<T>(rows.weight, [&](auto of_weight) {
          for (int64_t d = lane; d < p.D; d += kWarp) {
            T x[kTokens];
            DELTAMEM_UNROLL
            for (int m = 0; m < kTokens; ++m) x[m] = load<T>(p.x, x_at[m] + d * p.x.stride[2], of_x);
            DELTAMEM_UNROLL
            for (int n = 0; n < kWeightRows; ++n) {
              const T w = load<T>(rows.weight, w_at[n] + d * rows.weight.stride[1], of_weight);
              DELTAMEM_UNROLL
              for (int m = 0; m < kTokens; ++m) sums[n * kTokens + m] = fma(w, x[m], sums[n * kTokens + m]);
            }
          }
        });
      });
      T y = sums_over_lanes<kWarp / 2>(sums);
      const int64_t row = first + lane / kTokens;
      if (row >= rows.count) continue;
      if (rows.bias.data) y += load<T>(rows.bias, (rows.row + row) * rows.bias.stride[0], AnyDtype{});
      if (rows.gate) y = T(1) / (T(1) + ::exp(-y));
      if (rows.normed) y = ::tanh(y), squares = fma(y, y, squares);
      if (token < tokens) out[row] = y;
    }
    if (!rows.normed) continue;
    DELTAMEM_UNROLL
    for (int n = kTokens; n < kWarp; n *= 2) squares += __shfl_xor_sync(kAllLanes, squares, n);
    if (token >= tokens) continue;
    const T length = ::sqrt(squares), norm = length < T(kNormEps) ? T(kNormEps) : length;  // NaN stays NaN
    if (lane < kTokens) static_cast<T*>(p.norms)[(unit / p.H * tokens + token) * p.H + unit % p.H] = norm;
    for (int64_t row = lane / kTokens; row < rows.count; row += kWeightRows) out[row] /= norm;
  }
}

namespace cuda {

int project(const ProjectionArgs& p, Stream stream) {
  int64_t units = 3 * p.H;
  for (const Gate& gate : p.gates) units += (gate.rows + p.R - 1) / p.R;
  const int threads = int(units < kProjectWarps ? units : kProjectWarps) * kWarp;
  const int64_t blocks = (p.B * p.T + kTokens - 1) / kTokens;
  return p.double_precision ? launch(project_kernel<double>, blocks, threads, 0, stream, p, units)
                            : launch(project_kernel<float>, blocks, threads, 0, stream, p, units);
}

}  // namespace cuda
}  // namespace deltamem

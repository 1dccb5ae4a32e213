// memory_projection forward. A block has a few tokens; its warps share the heads of q, k, v and the gates, the lanes of
// a warp the columns of x and W. A dot product has the same bits whatever tokens and rows of W stand beside it.
#include "tile.h"

namespace deltamem {

constexpr int kTokens = 4, kRowsOfW = kWarp / kTokens;  // each lane ends with one of the products of a warp
#ifdef __CUDACC__
constexpr int kProjectWarps = 8;
#else
constexpr int kProjectWarps = 2;
#endif

// The sums over all lanes of 2 N numbers each: with N half a warp, lane i gets the i-th. Every sum adds up its lanes in
// the same order.
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

// The R rows of W that a warp has at a time, a head's (of the last ones of a gate there may be less): from `first` on in
// `weight`, and from `row` on among the `width` results of a token.
struct HeadRows {
  Operand weight, bias;
  int64_t first, count, row, width;
  void* out;
  bool normed, gate;
};

DELTAMEM_DEVICE HeadRows head_rows(const Projection& p, int64_t unit) {
  const int64_t part = unit / p.H;
  if (part < 3) {
    void* const out = part == 0 ? p.q : part == 1 ? p.k : p.v;
    return {p.qkv_weight, {}, unit * p.R, p.R, unit % p.H * p.R, p.H * p.R, out, p.normalize && part < 2, false};
  }
  const int64_t of_beta = (p.gates[0].rows + p.R - 1) / p.R, index = unit - 3 * p.H;
  const bool beta = index < of_beta;
  const Gate& gate = p.gates[beta ? 0 : 1];
  const int64_t row = (beta ? index : index - of_beta) * p.R, left = gate.rows - row;
  return {gate.weight, gate.bias, row, left < p.R ? left : p.R, row, gate.rows, gate.out, false, true};
}

template <class T>
__global__ void __launch_bounds__(kProjectWarps* kWarp, 1)
    project_kernel(const __grid_constant__ Projection p, int64_t units) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t tokens = p.B * p.T, first_token = int64_t(blockIdx.x) * kTokens;
  // Tokens and rows beyond the last are the last again, and do not count.
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
    for (int64_t first = 0; first < rows.count; first += kRowsOfW) {
      int64_t w_at[kRowsOfW];
      DELTAMEM_UNROLL
      for (int n = 0; n < kRowsOfW; ++n)
        w_at[n] = (rows.first + (first + n < rows.count ? first + n : rows.count - 1)) * rows.weight.stride[0];
      T sums[kWarp] = {};
      with_operand_dtype<T>(p.x, [&](auto of_x) {
        with_operand_dtype<T>(rows.weight, [&](auto of_weight) {
          for (int64_t d = lane; d < p.D; d += kWarp) {
            T x[kTokens];
            DELTAMEM_UNROLL
            for (int m = 0; m < kTokens; ++m) x[m] = load<T>(p.x, x_at[m] + d * p.x.stride[2], of_x);
            DELTAMEM_UNROLL
            for (int n = 0; n < kRowsOfW; ++n) {
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
      if (rows.bias.data) y += load<T>(rows.bias, (rows.first + row) * rows.bias.stride[0], Any{});
      if (rows.gate) y = T(1) / (T(1) + ::exp(-y));
      if (rows.normed) y = ::tanh(y), squares = fma(y, y, squares);
      if (token < tokens) out[row] = y;
    }
    if (!rows.normed) continue;
    DELTAMEM_UNROLL
    for (int n = kTokens; n < kWarp; n *= 2) squares += __shfl_xor_sync(kAllLanes, squares, n);
    if (token >= tokens) continue;
    const T length = ::sqrt(squares), norm = length < T(kNormEps) ? T(kNormEps) : length;  // a NaN stays one
    if (lane < kTokens) static_cast<T*>(p.norms)[(unit / p.H * tokens + token) * p.H + unit % p.H] = norm;
    for (int64_t row = lane / kTokens; row < rows.count; row += kRowsOfW) out[row] /= norm;
  }
}

namespace cuda {

int project(const Projection& p, Stream stream) {
  int64_t units = 3 * p.H;
  for (const Gate& gate : p.gates) units += (gate.rows + p.R - 1) / p.R;
  const int threads = int(units < kProjectWarps ? units : kProjectWarps) * kWarp;
  const int64_t blocks = (p.B * p.T + kTokens - 1) / kTokens;
  return p.double_precision ? launch(project_kernel<double>, blocks, threads, 0, stream, p, units)
                            : launch(project_kernel<float>, blocks, threads, 0, stream, p, units);
}

}  // namespace cuda
}  // namespace deltamem

// delta_update with the chunks of a sequence in parallel. A chunk maps a state row s to s M + b.
// 1. The maps of all chunks run at once: the scan of virtual rows, which are the unit vectors, without values, for M,
//    and zero, with values, for b.
// 2. Folding the maps in order gives the state before each chunk.
// 3. The scans of all chunks run at once.
// Backward does the same with the gradient of the state, from the last chunk to the first. Its maps come from the scan
// with the tokens in reverse, where d_reads take the place of the values.
#include "launch_plan.h"

namespace deltamem {

// The R + 1 virtual rows of a map, each as the R rows of a state.
template <int R>
struct VirtualRows {
  static constexpr int rows = R + 1;
  static constexpr int threads = (R * rows + kWarp - 1) / kWarp * kWarp;
  static constexpr int numbers = kChunk * R;
};

// maps is [segment, head, virtual row, row, column]. The map of the last chunk (backward: of the first) is not needed.
template <int R, bool kBackward>
__global__ void __launch_bounds__(VirtualRows<R>::threads, 1)
    maps_kernel(const __grid_constant__ ScanArgs p, const __grid_constant__ Operand d_reads, float* maps,
                const __grid_constant__ Plan plan) {
  constexpr int numbers = VirtualRows<R>::numbers;
  float* const tile = shared_memory<float>();
  const int thread = threadIdx.x, virtual_row = thread / R, row = thread % R;
  Task task;
  for (int64_t index = blockIdx.x; index < plan.tasks; index += gridDim.x) {
    if (!find_task(p, plan, index, task) || (kBackward ? task.first == 0 : task.is_last())) continue;
    const int tokens = int(task.end - task.first);
    fetch<R>(p, plan, task, task.first, tokens, R, tile, numbers, kBackward ? &d_reads : nullptr, thread,
          VirtualRows<R>::threads);
    __syncthreads();
    if (virtual_row <= R) {
      float S[R];
      DELTAMEM_UNROLL
      for (int j = 0; j < R; ++j) S[j] = j == virtual_row ? 1.f : 0.f;
      for (int i = 0; i < tokens; ++i) {
        const int t = (kBackward ? tokens - 1 - i : i) * R;
        Token<float, R> x;
        x.template load<kBackward>(tile, numbers, t + row, t);
        const float held = dot(S, x.k, R);
        if (kBackward) {
          const float d_read = virtual_row == R ? x.d_read : 0.f, erased = x.erase * held;
          DELTAMEM_UNROLL
          for (int j = 0; j < R; ++j) S[j] = gradient_before(S[j], x.keep, erased, x.k[j], d_read, x.q[j]);
        } else {
          write_token(S, x.k, x.keep, change_by(x.erase, held, virtual_row == R ? x.value : 0.f), R);
        }
      }
      float* const map = maps + ((index * VirtualRows<R>::rows + virtual_row) * R + row) * R;
      DELTAMEM_UNROLL
      for (int j = 0; j < R; ++j) map[j] = S[j];
    }
    __syncthreads();
  }
}

// Computes the state before each chunk except the first (backward: its gradient), and stores it as the checkpoint. A
// thread has one element of the state; R threads of a warp have a row.
template <int R, bool kBackward>
__global__ void fold_kernel(const __grid_constant__ ScanArgs p, const __grid_constant__ Operand start,
                            const float* maps, float* states, const __grid_constant__ Plan plan) {
  const int thread = threadIdx.x, row = thread / R % R, column = thread % R;
  for (int64_t index = blockIdx.x; index < p.N * p.H; index += gridDim.x) {
    const int64_t n = index / p.H, h = index % p.H;
    const Task task = whole_sequence(p, n);
    const int64_t chunks = (task.length + kChunk - 1) / kChunk;
    if (task.length < plan.chunked_from || chunks < 2) continue;
    const bool counts = row < p.R && column < p.R;
    float s = 0.f;
    if (start.data && counts)
      s = load<float>(start, n * start.stride[0] + h * start.stride[1] + row * start.stride[2] +
                                 column * start.stride[3], AnyDtype{});
    auto chunk = [&](int64_t i) { return kBackward ? chunks - 1 - i : i; };
    auto load_map = [&](int64_t i, float* map) {
      const int64_t c = chunk(i), segment = c ? p.N + task.checkpoint(p, c * kChunk) : n;
      const float* const from = maps + (segment * p.H + h) * VirtualRows<R>::rows * R * R + row * R + column;
      DELTAMEM_UNROLL
      for (int v = 0; v <= R; ++v) map[v] = from[v * R * R];
    };
    float next[R + 1];
    load_map(0, next);
    for (int64_t i = 0; i < chunks - 1; ++i) {
      float map[R + 1], s_row[R];
      DELTAMEM_UNROLL
      for (int v = 0; v <= R; ++v) map[v] = next[v];
      load_map(i + 1 < chunks - 1 ? i + 1 : i, next);
      DELTAMEM_UNROLL
      for (int v = 0; v < R; ++v) s_row[v] = __shfl_sync(kAllLanes, s, v, R);
      s = dot(s_row, map, R) + map[R];
      const int64_t slot = task.checkpoint(p, (kBackward ? chunk(i) : chunk(i) + 1) * kChunk);
      if (counts && thread < R * R) states[((slot * p.H + h) * p.R + row) * p.R + column] = s;
    }
  }
}

namespace cuda {
namespace {

constexpr int kLargestRank = 16;  // of the kernels that compute maps, which do not exist in double precision

template <class F>
int with_map_rank(const ScanArgs& p, F&& f) {
  if (p.R <= 4) return f(Known<4>{});
  if (p.R <= 8) return f(Known<8>{});
  return f(Known<kLargestRank>{});
}

// chunked_from, or kNever if no sequence of the call can run in chunks.
int64_t limit(const ScanArgs& p, int64_t chunked_from) {
  const bool can = !p.double_precision && p.R <= kLargestRank;
  return can && p.T > kChunk && p.T >= chunked_from ? chunked_from : kNever;
}

int64_t rounded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

int64_t maps_bytes(const ScanArgs& p, int64_t limit) {
  const int64_t R = p.R <= 4 ? 4 : p.R <= 8 ? 8 : kLargestRank;
  return rounded(plan_for(p, 1, limit).tasks * (R + 1) * R * R * int64_t(sizeof(float)));
}
int64_t states_bytes(const ScanArgs& p) {
  return rounded(p.B * (p.T / kChunk) * p.H * p.R * p.R * int64_t(sizeof(float)));
}

template <bool kBackward>
int fold_chunks(const ScanArgs& p, int64_t limit, const Operand& d_reads, const Operand& start, float* maps,
                float* states, Stream stream) {
  const Plan plan = plan_for(p, 1, limit);
  return with_map_rank(p, [&](auto rank) {
    constexpr int R = rank();
    constexpr int parts = kBackward ? int(kBackwardParts) : int(kForwardParts);
    const size_t shared = parts * VirtualRows<R>::numbers * sizeof(float);
    const int error = launch(maps_kernel<R, kBackward>, plan.tasks, VirtualRows<R>::threads, shared, stream, p, d_reads,
                             maps, plan);
    if (error) return error;
    return launch(fold_kernel<R, kBackward>, p.N * p.H, R * R < kWarp ? kWarp : R * R, 0, stream, p, start, maps,
                  states, plan);
  });
}

}  // namespace

Needs forward_needs(const ScanArgs& p, int64_t chunked_from) {
  const int64_t from = limit(p, chunked_from);
  if (from == kNever) return {0, false};
  return {maps_bytes(p, from), true};
}

Needs backward_needs(const ScanArgs& p, int64_t chunked_from) {
  const int64_t from = limit(p, chunked_from);
  if (from == kNever) return {history_bytes(p, kNever), true};
  return {maps_bytes(p, from) + states_bytes(p) + history_bytes(p, from), true};
}

int forward(const ScanArgs& p, int64_t chunked_from, const ScanOutput& out, void* workspace, Stream stream) {
  const int64_t from = limit(p, chunked_from);
  if (from == kNever) return forward_scan(p, out, kNever, stream);
  const int error = fold_chunks<false>(p, from, {}, p.initial_state, static_cast<float*>(workspace),
                                       static_cast<float*>(out.checkpoints), stream);
  return error ? error : forward_scan(p, out, from, stream);
}

int backward(const ScanArgs& p, int64_t chunked_from, const Operand& d_reads, const Operand& d_final_state,
             const void* checkpoints, const ScanGradients& out, void* workspace, Stream stream) {
  const int64_t from = limit(p, chunked_from);
  if (from == kNever)
    return backward_scan(p, d_reads, d_final_state, checkpoints, nullptr, out, workspace, kNever, stream);
  char* const memory = static_cast<char*>(workspace);
  float* const states = reinterpret_cast<float*>(memory + maps_bytes(p, from));
  const int error =
      fold_chunks<true>(p, from, d_reads, d_final_state, static_cast<float*>(workspace), states, stream);
  if (error) return error;
  return backward_scan(p, d_reads, d_final_state, checkpoints, states, out,
                       memory + maps_bytes(p, from) + states_bytes(p), from, stream);
}

}  // namespace cuda
}  // namespace deltamem

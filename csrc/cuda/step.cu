// delta_step: a few tokens for each of many rows, with states in a pool.
#include "launch_plan.h"

namespace deltamem {

DELTAMEM_DEVICE bool in_pool(const PoolStepArgs& s, int64_t slot) {
  return slot >= 0 && slot < s.slots && slot != s.pad;
}

// The slot that row n starts from, or kNoSlot, with which the row reads zeros and writes nothing.
DELTAMEM_DEVICE int64_t start_slot(const PoolStepArgs& s, int64_t n, int64_t T) {
  if (!s.indices.data) return n;
  int64_t slot = s.indices.at(n);
  if (!in_pool(s, slot)) return kNoSlot;
  if (s.accepted.data) {
    const int64_t accepted = s.accepted.at(n);
    if (accepted < 1 || accepted > T) return kNoSlot;
    slot = s.indices.at(n, accepted - 1);
  }
  return in_pool(s, slot) ? slot : kNoSlot;
}

template <class T, int R>
__global__ void __launch_bounds__(Shape<T, R>::scanners, 1)
    step_kernel(const __grid_constant__ ScanArgs p, const __grid_constant__ PoolStepArgs s,
                const __grid_constant__ Plan plan) {
  typedef Shape<T, R> Block;
  constexpr int numbers = Block::numbers, reads = kForwardParts;
  const int lanes = plan.heads * R, tile_tokens = numbers / lanes < kChunk ? numbers / lanes : kChunk;
  const int thread = threadIdx.x, lane = thread % lanes, head = lane / R * R;
  const int columns = columns_of<T, R, 64>(p);
  T* const tile = shared_memory<T>();
  Task task;
  for (int64_t index = blockIdx.x; index < plan.tasks; index += gridDim.x) {
    if (!find_task(p, plan, index, task)) continue;
    const Lane at(p, task, lane, R);
    const bool stores = thread < lanes;
    const int64_t n = task.n, start = start_slot(s, n, p.T);
    Operand intermediate = s.intermediate;
    if (intermediate.data)
      with_dtype(intermediate.dtype, [&](auto dtype) {
        intermediate.data = static_cast<decltype(dtype)*>(intermediate.data) + n * s.intermediate_row;
      });
    T S[R];
    for (int64_t first = 0; first < p.T; first += tile_tokens) {
      const int tokens = int(p.T - first < tile_tokens ? p.T - first : tile_tokens);
      fetch<R>(p, plan, task, first, tokens, lanes, tile, numbers, nullptr, thread, Block::scanners);
      if (first == 0 && start != kNoSlot) load_state(p, s.state, start, at, S, columns);
      __syncthreads();
      for (int t = 0; t < tokens; ++t) {
        Token<T, R> x;
        x.template load<false>(tile, numbers, t * lanes + lane, t * lanes + head);
        T read = T(0);
        if (start != kNoSlot) {
          read = dot(S, x.q, columns);
          write_token(S, x.k, x.keep, change_by(x.erase, dot(S, x.k, columns), x.value), columns);
        }
        if (!stores) continue;
        tile[reads * numbers + t * lanes + lane] = read;
        if (start == kNoSlot) continue;
        store_state(p, S, intermediate, first + t, at, columns);
        if (s.each) {
          const int64_t slot = s.indices.at(n, first + t);
          if (in_pool(s, slot)) store_state(p, S, s.state, slot, at, columns);
        }
      }
      __syncthreads();
      for (int t = thread / lanes; at.valid && t < tokens; t += Block::scanners / lanes)
        store(tile[reads * numbers + t * lanes + lane], s.reads, offset(s.reads, n, first + t, at.head, at.row));
    }
    if (s.last && stores && start != kNoSlot && p.T > 0) store_state(p, S, s.state, start, at, columns);
    __syncthreads();
  }
}

namespace cuda {

int step(const ScanArgs& p, const PoolStepArgs& s, Stream stream) {
  return with_rank(p, [&](auto number, auto rank) {
    typedef decltype(number) T;
    constexpr int R = rank();
    typedef Shape<T, R> Block;
    const Plan plan = plan_for(p, heads_in_block(p.H, R), kNever);
    const size_t shared = (kForwardParts + 1) * Block::numbers * sizeof(T);
    return launch(step_kernel<T, R>, p.T ? plan.tasks : 0, Block::scanners, shared, stream, p, s, plan);
  });
}

}  // namespace cuda
}  // namespace deltamem

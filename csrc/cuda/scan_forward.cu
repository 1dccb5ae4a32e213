// delta_update forward. A lane runs one state row, with its columns in registers, through the tokens of its task.
#include "launch_plan.h"

namespace deltamem {

template <class T, int R>
__global__ void __launch_bounds__(Shape<T, R>::threads, Shape<T, R>::resident)
    forward_kernel(const __grid_constant__ ScanArgs p, const __grid_constant__ ScanOutput out,
                   const __grid_constant__ Plan plan) {
  typedef Shape<T, R> Block;
  constexpr int parts = kForwardParts + 1, reads = kForwardParts;
  const int lanes = plan.heads * R;
  const int tile_tokens = Block::numbers / lanes < kChunk ? Block::numbers / lanes : kChunk;
  const bool mover = threadIdx.x >= Block::scanners;
  const int thread = mover ? threadIdx.x - Block::scanners : threadIdx.x;
  const int lane = thread % lanes, head = lane / R * R;  // scanners past the last lane repeat others and store nothing
  const int columns = columns_of<T, R, 64>(p);
  T* const memory = shared_memory<T>();
  const Operand checkpoints = contiguous_states<T>(p, out.checkpoints);

  Task task;
  for (int64_t index = blockIdx.x; index < plan.tasks; index += gridDim.x) {
    if (!find_task(p, plan, index, task)) continue;
    const Lane at(p, task, lane, R);
    const bool stores = !mover && thread < lanes;
    T S[R];
    if (task.first)
      load_state(p, checkpoints, task.checkpoint(p, task.first), at, S, columns);
    else
      load_state(p, p.initial_state, task.n, at, S, columns);

    auto first_of = [&](int64_t i) { return task.first + i * tile_tokens; };
    auto tokens_of = [&](int64_t i) {
      const int64_t left = task.end - first_of(i);
      return int(left < tile_tokens ? left : tile_tokens);
    };
    auto tile_of = [&](int64_t i) { return memory + (i & 1) * parts * Block::numbers; };

    pipeline(
        mover, (task.end - task.first + tile_tokens - 1) / tile_tokens,
        [&](int64_t i) {
          fetch<R>(p, plan, task, first_of(i), tokens_of(i), lanes, tile_of(i), Block::numbers, nullptr, thread,
                Block::movers);
        },
        [&](int64_t i) {
          const int64_t first = first_of(i);
          if (out.checkpoints && stores && first > task.first && first % kChunk == 0)
            store_state(p, S, checkpoints, task.checkpoint(p, first), at, columns);
          T* const tile = tile_of(i);
          const int tokens = tokens_of(i);
          Token<T, R> next;
          next.template load<false>(tile, Block::numbers, lane, head);
          for (int t = 0; t < tokens; ++t) {
            const Token<T, R> x = next;
            const int ahead = (t + 1 < tokens ? t + 1 : t) * lanes;
            next.template load<false>(tile, Block::numbers, ahead + lane, ahead + head);
            const T read = dot(S, x.q, columns), held = dot(S, x.k, columns);
            if (stores) tile[reads * Block::numbers + t * lanes + lane] = read;
            write_token(S, x.k, x.keep, change_by(x.erase, held, x.value), columns);
          }
        },
        [&](int64_t i) {
          const T* tile = tile_of(i) + reads * Block::numbers;
          const int tokens = tokens_of(i);
          if (!at.valid) return;
          for (int j = thread / lanes; j < tokens; j += Block::movers / lanes) {
            const int64_t t = task.start + first_of(i) + j;
            const T read = is_active(p, task.b, t) ? tile[j * lanes + lane] : T(0);
            store(read, out.reads, offset(out.reads, task.b, t, at.head, at.row));
          }
        });
    if (stores && task.is_last()) store_state(p, S, contiguous_states<T>(p, out.final_state), task.n, at, columns);
  }
}

namespace cuda {

int forward_scan(const ScanArgs& p, const ScanOutput& out, int64_t chunked_from, Stream stream) {
  return with_rank(p, [&](auto number, auto rank) {
    typedef decltype(number) T;
    constexpr int R = rank();
    typedef Shape<T, R> Block;
    const Plan plan = plan_for(p, heads_in_block(p.H, R), chunked_from);
    const size_t shared = 2 * (kForwardParts + 1) * Block::numbers * sizeof(T);
    return launch(forward_kernel<T, R>, plan.tasks, Block::threads, shared, stream, p, out, plan);
  });
}

}  // namespace cuda
}  // namespace deltamem

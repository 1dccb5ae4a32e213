// delta_update backward. From the last chunk to the first, a lane runs its state row again from the checkpoint, keeping
// the state before each token, and then takes the gradient of the row back through the tokens. Sums over rows have a
// fixed order.
#include "launch_plan.h"

namespace deltamem {

// The parts of a tile after the operands: the results of the scanners, which the movers store. q and k have a part for
// each warp, with the sums over its rows.
template <int Warps>
struct ResultParts {
  static constexpr int keep = kBackwardParts, erase = keep + 1, value = erase + 1, q = value + 1, k = q + Warps,
                       parts = k + Warps;
};

// Each lane has the columns of one row. Sums them over a group of 2 Half lanes; lane j of the group gets the sum of
// column j.
template <int Half, class T>
DELTAMEM_DEVICE T sum_columns(T* columns, int lane) {
  if constexpr (Half > 0) {
    const bool upper = lane & Half;
    DELTAMEM_UNROLL
    for (int j = 0; j < Half; ++j) {
      const T low = columns[j], high = columns[j + Half];
      columns[j] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, Half);
    }
    return sum_columns<Half / 2>(columns, lane);
  } else {
    return columns[0];
  }
}
// The same for columns [first, first + Group), where those from `count` on are zeros.
template <int Group, class T>
DELTAMEM_DEVICE T sum_rows(const T* columns, int first, int count, int lane) {
  T sums[Group];
  DELTAMEM_UNROLL
  for (int j = 0; j < Group; ++j) sums[j] = first + j < count ? columns[first + j] : T(0);
  return sum_columns<Group / 2>(sums, lane);
}

// The gradients of a token's gates and v in row r, from those of keep, erase and value in the tile.
template <class T, class X>
DELTAMEM_DEVICE GateGradients<T> gate_gradients(const ScanArgs& p, const Task& task, int64_t t, int64_t h, int64_t r,
                                            const T* tile, int numbers, int first_part, X dtype, T& d_v) {
  T beta, decay;
  const Gates<T> g = gates_at<T>(p, task, t, h, r, dtype, beta, decay);
  const T v = load<T>(p.v, offset(p.v, task.b, t, h, r), dtype), d_value = tile[(first_part + 2) * numbers];
  d_v = g.write * d_value;
  const Gates<T> d{tile[first_part * numbers], tile[(first_part + 1) * numbers], d_value * v};
  return gates_adjoint(p.mode, !p.decay.data, T(1), beta, decay, d);
}

template <class T, int R>
__global__ void __launch_bounds__(Shape<T, R>::threads, Shape<T, R>::resident)
    backward_kernel(const __grid_constant__ ScanArgs p, const __grid_constant__ Operand d_reads,
                    const __grid_constant__ Operand d_final_state, const void* checkpoints, const void* d_checkpoints,
                    const __grid_constant__ ScanGradients out, T* history, const __grid_constant__ Plan plan) {
  typedef Shape<T, R> Block;
  typedef ResultParts<Block::warps> Parts;
  constexpr int numbers = Block::numbers, group = R < kWarp ? R : kWarp;
  const int lanes = plan.heads * R;
  const int tile_tokens = numbers / lanes < kChunk ? numbers / lanes : kChunk, tiles = kChunk / tile_tokens;
  const bool mover = threadIdx.x >= Block::scanners;
  const int thread = mover ? threadIdx.x - Block::scanners : threadIdx.x;
  const int lane = thread % lanes, head = lane / R * R;
  const int columns = columns_of<T, R, 32>(p);
  T* const memory = shared_memory<T>();
  // history [block, token of the chunk, column, scanner] holds the states before the tokens.
  T* const states = history + int64_t(blockIdx.x) * kChunk * R * Block::scanners + thread;

  Task task;
  for (int64_t index = blockIdx.x; index < plan.tasks; index += gridDim.x) {
    if (!find_task(p, plan, index, task)) continue;
    const Lane at(p, task, lane, R);
    const bool stores = !mover && thread < lanes;
    T S[R], G[R];
    if (task.is_last())
      load_state(p, d_final_state, task.n, at, G, columns);
    else
      load_state(p, contiguous_states<T>(p, d_checkpoints), task.checkpoint(p, task.end), at, G, columns);

    // The pipeline visits the tiles of each chunk twice: in order to replay the states, then in reverse for the
    // adjoint. Tiles past the last token are empty.
    const int64_t chunks = (task.end - task.first + kChunk - 1) / kChunk;
    auto chunk_of = [&](int64_t i) { return task.first + (chunks - 1 - i / (2 * tiles)) * kChunk; };
    auto is_replay = [&](int64_t i) { return i % (2 * tiles) < tiles; };
    auto in_chunk = [&](int64_t i) {
      const int visit = int(i % (2 * tiles));
      return (visit < tiles ? visit : 2 * tiles - 1 - visit) * tile_tokens;
    };
    auto tokens_of = [&](int64_t i) {
      const int64_t left = task.end - chunk_of(i) - in_chunk(i);
      return int(left < 0 ? 0 : left < tile_tokens ? left : tile_tokens);
    };
    auto tile_of = [&](int64_t i) { return memory + (i & 1) * Parts::parts * numbers; };

    auto replay = [&](const T* tile, int tokens, T* before) {
      for (int t = 0; t < tokens; ++t, before += R * Block::scanners) {
        Token<T, R> x;
        x.template load<false>(tile, numbers, t * lanes + lane, t * lanes + head);
DELTAMEM_UNROLL
        for (int j = 0; j < columns; ++j) before[j * Block::scanners] = S[j];
        write_token(S, x.k, x.keep, change_by(x.erase, dot(S, x.k, columns), x.value), columns);
      }
    };

    auto adjoint = [&](T* tile, int tokens, const T* before) {
      if (tokens == 0) return;
      before += (tokens - 1) * R * Block::scanners;
DELTAMEM_UNROLL
      for (int j = 0; j < columns; ++j) S[j] = before[j * Block::scanners];
      for (int t = tokens - 1; t >= 0; --t) {
        Token<T, R> x;
        x.template load<true>(tile, numbers, t * lanes + lane, t * lanes + head);
        T d_q[R], d_k[R];
        const TokenGradients<T> d = token_adjoint(G, S, x.q, x.k, x.keep, x.erase, x.value, dot(S, x.k, columns),
                                                  x.d_read, d_q, d_k, columns);
        if (t > 0) before -= R * Block::scanners;
DELTAMEM_UNROLL
        for (int j = 0; j < columns; ++j) S[j] = before[j * Block::scanners];
        T* const left = tile + t * lanes;
        if (stores) {
          left[Parts::keep * numbers + lane] = d.keep;
          left[Parts::erase * numbers + lane] = d.erase;
          left[Parts::value * numbers + lane] = d.value;
        }
        // d_q and d_k are zeros in invalid lanes.
        const int warp = thread / kWarp;
DELTAMEM_UNROLL
        for (int j = 0; j < R; j += group) {
          const int column = R <= kWarp ? lane : j + thread % kWarp;
          if (out.q.data) {
            const T sum = sum_rows<group>(d_q, j, columns, thread);
            if (stores) left[(Parts::q + warp) * numbers + column] = sum;
          }
          if (out.k.data) {
            const T sum = sum_rows<group>(d_k, j, columns, thread);
            if (stores) left[(Parts::k + warp) * numbers + column] = sum;
          }
        }
      }
    };

    auto store_results = [&](const T* tile, int tokens, int64_t first) {
      if (!at.valid) return;
      for (int i = thread / lanes; i < tokens; i += Block::movers / lanes) {
        const int64_t t = task.start + first + i;
        const bool active = is_active(p, task.b, t);
        const T* const from = tile + i * lanes + lane;
        auto store_row = [&](const Operand& x, T value) {
          if (x.data) store(active ? value : T(0), x, offset(x, task.b, t, at.head, at.row));
        };
        T d_q = from[Parts::q * numbers], d_k = from[Parts::k * numbers];
DELTAMEM_UNROLL
        for (int w = 1; w < Block::warps; ++w) {
          d_q += from[(Parts::q + w) * numbers];
          d_k += from[(Parts::k + w) * numbers];
        }
        store_row(out.q, d_q), store_row(out.k, d_k);
        // The gradient of a gate per head is the sum over the rows, which the lane of the first row computes.
        const bool sums = at.row == 0 && (out.beta_per_head || out.decay_per_head || out.write_per_head);
        T d_v;
        GateGradients<T> d, all;
        with_operands_dtype<T, R>(p, plan, [&](auto dtype) {
          d = all = gate_gradients(p, task, t, at.head, at.row, from, numbers, Parts::keep, dtype, d_v);
          for (int r = 1; sums && r < p.R; ++r) {
            T other;
            const GateGradients<T> more =
                gate_gradients(p, task, t, at.head, r, from + r, numbers, Parts::keep, dtype, other);
            all.beta += more.beta, all.decay += more.decay, all.write += more.write;
          }
        });
        auto store_gate = [&](const Operand& x, bool per_head, T row, T head) {
          if (!per_head || sums) store_row(x, per_head ? head : row);
        };
        store_row(out.v, d_v);
        store_gate(out.beta, out.beta_per_head, d.beta, all.beta);
        store_gate(out.decay, out.decay_per_head, d.decay, all.decay);
        store_gate(out.write, out.write_per_head, d.write, all.write);
      }
    };

    pipeline(
        mover, chunks * 2 * tiles,
        [&](int64_t i) {
          fetch<R>(p, plan, task, chunk_of(i) + in_chunk(i), tokens_of(i), lanes, tile_of(i), numbers, &d_reads, thread,
                Block::movers);
        },
        [&](int64_t i) {
          T* const before = states + int64_t(in_chunk(i)) * R * Block::scanners;
          if (i % (2 * tiles) == 0) {
            if (chunk_of(i))
              load_state(p, contiguous_states<T>(p, checkpoints), task.checkpoint(p, chunk_of(i)), at, S, columns);
            else
              load_state(p, p.initial_state, task.n, at, S, columns);
          }
          if (is_replay(i))
            replay(tile_of(i), tokens_of(i), before);
          else
            adjoint(tile_of(i), tokens_of(i), before);
        },
        [&](int64_t i) {
          if (!is_replay(i)) store_results(tile_of(i), tokens_of(i), chunk_of(i) + in_chunk(i));
        });
    if (stores && task.first == 0) store_state(p, G, out.initial_state, task.n, at, columns);
  }
}

namespace cuda {
namespace {

constexpr int64_t kBlocks = 1024;  // more than a GPU runs at a time; each block needs memory for its own history

template <class T, int R>
int64_t blocks(const Plan& plan) {
  return plan.tasks < kBlocks ? plan.tasks : kBlocks;
}

}  // namespace

int64_t history_bytes(const ScanArgs& p, int64_t chunked_from) {
  int64_t bytes = 0;
  with_rank(p, [&](auto number, auto rank) {
    typedef decltype(number) T;
    constexpr int R = rank();
    const Plan plan = plan_for(p, heads_in_block(p.H, R), chunked_from);
    bytes = blocks<T, R>(plan) * kChunk * R * Shape<T, R>::scanners * int64_t(sizeof(T));
    return 0;
  });
  return bytes;
}

int backward_scan(const ScanArgs& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                  const void* d_checkpoints, const ScanGradients& out, void* history, int64_t chunked_from,
                  Stream stream) {
  return with_rank(p, [&](auto number, auto rank) {
    typedef decltype(number) T;
    constexpr int R = rank();
    typedef Shape<T, R> Block;
    Plan plan = plan_for(p, heads_in_block(p.H, R), chunked_from);
    const size_t shared = 2 * ResultParts<Block::warps>::parts * Block::numbers * sizeof(T);
    return launch(backward_kernel<T, R>, blocks<T, R>(plan), Block::threads, shared, stream, p, d_reads, d_final_state,
                  checkpoints, d_checkpoints, out, static_cast<T*>(history), plan);
  });
}

}  // namespace cuda
}  // namespace deltamem

// What the scan kernels share: the tokens and heads that a block works on, and tiles, which hold the operands of a few
// tokens in shared memory, in the dtype of the arithmetic. The lanes of a tile are the state rows of one or more heads.
#pragma once

#include "operand_access.h"  // first: core/delta_rule.h needs the fma of device.h
#include "launchers.h"

namespace deltamem {

constexpr int kChunk = kCheckpointInterval;
#ifdef __CUDACC__
constexpr int kMovers = 128;  // threads that load tiles: enough loads in flight that the scan does not wait
#else
constexpr int kMovers = 32;
#endif

// The threads of a block for ranks up to R: scanners, one for each lane, then movers, which load tiles and store
// results.
template <class T, int R>
struct Shape {
  static constexpr int scanners = R < kWarp ? kWarp : R;
  static constexpr int warps = scanners / kWarp;
  static constexpr int movers = kMovers < R ? R : kMovers;
  static constexpr int threads = scanners + movers;
  static constexpr int resident = R <= 16 ? 2 : 1;  // blocks per multiprocessor, which bounds the registers
  static constexpr int numbers = (R > kWarp ? 1024 : 2048) / sizeof(T);  // elements of each operand in a tile
};

// The number of columns to compute: the constant R, so that the compiler keeps a row in registers, or the actual rank
// if R exceeds Most, where a row does not fit, and in double precision.
template <class T, int R, int Most>
DELTAMEM_DEVICE int columns_of(const ScanArgs& p) {
  return sizeof(T) == 8 || R > Most ? int(p.R) : R;
}

// How the work is divided into tasks. Each chunk of a sequence of at least chunked_from tokens is a task.
struct Plan {
  int heads = 1;  // of a task
  int64_t groups = 0, tasks = 0;  // groups of heads; tasks
  int64_t chunked_from = 0;
  bool same_dtype = false;  // whether all operands have q's dtype
};

// The tokens [first, end) of a sequence, either one chunk or all of them, for the plan's number of heads from `head`
// on.
struct Task {
  int64_t n, b, start, length;  // sequence n has `length` tokens from token `start` of batch row b
  int64_t first, end, head;

  DELTAMEM_DEVICE bool is_last() const { return end == length; }
  DELTAMEM_DEVICE int64_t checkpoint(const ScanArgs& p, int64_t at) const { return checkpoint_index(p, b, start, at); }
};

// Clamps the bounds of cu_seqlens to [0, T], because the host does not read and check them.
DELTAMEM_DEVICE int64_t bound(const ScanArgs& p, int64_t n) {
  const int64_t at = p.cu_seqlens[n];
  return at < 0 ? 0 : at > p.T ? p.T : at;
}

DELTAMEM_DEVICE Task whole_sequence(const ScanArgs& p, int64_t n) {
  Task task{n, n, 0, p.T, 0, p.T, 0};
  if (p.cu_seqlens) {
    task.b = 0, task.start = bound(p, n);
    const int64_t stop = bound(p, n + 1);
    task.length = task.end = stop > task.start ? stop - task.start : 0;
  }
  return task;
}

// Segment i < N is sequence i or its first chunk. Each further segment is the chunk after one of the checkpoints.
// Returns false if the segment has no tokens to run.
DELTAMEM_DEVICE bool find_segment(const ScanArgs& p, int64_t chunked_from, int64_t i, Task& task) {
  if (i < p.N) {
    task = whole_sequence(p, i);
    if (task.length >= chunked_from && task.length > kChunk) task.end = kChunk;
    return true;
  }
  const int64_t slot = i - p.N;
  if (p.cu_seqlens) {  // only the last sequence that starts before the slot's end can own the slot
    int64_t low = 0, high = p.N;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (bound(p, middle) / kChunk <= slot ? low : high) = middle;
    }
    task = whole_sequence(p, low);
    task.first = (slot - task.start / kChunk + 1) * kChunk;
  } else {
    task = whole_sequence(p, slot / (p.T / kChunk));
    task.first = (slot % (p.T / kChunk) + 1) * kChunk;
  }
  if (task.length < chunked_from || task.first <= 0 || task.first >= task.length) return false;
  if (task.end > task.first + kChunk) task.end = task.first + kChunk;
  return true;
}

DELTAMEM_DEVICE bool find_task(const ScanArgs& p, const Plan& plan, int64_t index, Task& task) {
  if (!find_segment(p, plan.chunked_from, index / plan.groups, task)) return false;
  task.head = index % plan.groups * plan.heads;
  return true;
}

// The head and row of a lane. Lanes past the last head or row are not valid; they load the last one instead, so that
// loads need no condition.
struct Lane {
  int64_t head, row;
  bool valid;
  DELTAMEM_DEVICE Lane(const ScanArgs& p, const Task& task, int lane, int R)
      : head(task.head + lane / R), row(lane % R) {
    valid = head < p.H && row < p.R;
    if (head >= p.H) head = p.H - 1;
    if (row >= p.R) row = p.R - 1;
  }
};

// Calls f with a value of the dtype that all operands of the tokens share, or with AnyDtype.
template <class T, int R, class F>
DELTAMEM_DEVICE void with_operands_dtype(const ScanArgs& p, const Plan& plan, F&& f) {
  if constexpr (sizeof(T) == 8 || R > 16) {
    f(AnyDtype{});  // other ranks are rare and not worth the compile time
  } else {
    if (!plan.same_dtype) return f(AnyDtype{});
    with_dtype(p.q.dtype, [&](auto dtype) {
      if constexpr (sizeof(dtype) < 8) f(dtype);
    });
  }
}
// False for masked tokens.
DELTAMEM_DEVICE bool is_active(const ScanArgs& p, int64_t b, int64_t t) {
  return !p.mask || p.mask[b * p.mask_stride[0] + t * p.mask_stride[1]];
}

template <class T, class X>
DELTAMEM_DEVICE Gates<T> gates_at(const ScanArgs& p, const Task& task, int64_t t, int64_t h, int64_t r, X dtype,
                                  T& beta, T& decay) {
  beta = load<T>(p.beta, offset(p.beta, task.b, t, h, r), dtype);
  decay = p.decay.data ? load<T>(p.decay, offset(p.decay, task.b, t, h, r), dtype) : T(1);
  const T write = p.write.data ? load<T>(p.write, offset(p.write, task.b, t, h, r), dtype) : beta;
  return gates(p.mode, !p.decay.data, T(1), beta, decay, write);
}

// The parts of a tile. Each has `numbers` elements.
enum TilePart { kQ, kK, kKeep, kErase, kValue, kForwardParts, kDRead = kForwardParts, kBackwardParts };

// Loads tokens [first, first + tokens) of the task into a tile. In masked tokens and invalid lanes the state stays as
// it is. d_reads is null if it is not needed.
template <int R, class T>
DELTAMEM_DEVICE void fetch(const ScanArgs& p, const Plan& plan, const Task& task, int64_t first, int tokens, int lanes,
                           T* tile, int numbers, const Operand* d_reads, int thread, int threads) {
  const int lane = thread % lanes;
  const Lane at(p, task, lane, R);
  with_operands_dtype<T, R>(p, plan, [&](auto dtype) {
    DELTAMEM_UNROLL_BY(2)
    for (int i = thread / lanes; i < tokens; i += threads / lanes) {
      const int64_t t = task.start + first + i;
      const T q = load<T>(p.q, offset(p.q, task.b, t, at.head, at.row), dtype);
      const T k = load<T>(p.k, offset(p.k, task.b, t, at.head, at.row), dtype);
      const T v = load<T>(p.v, offset(p.v, task.b, t, at.head, at.row), dtype);
      T beta, decay;
      const Gates<T> g = gates_at<T>(p, task, t, at.head, at.row, dtype, beta, decay);
      const bool active = at.valid && is_active(p, task.b, t);
      T* out = tile + i * lanes + lane;
      out[kQ * numbers] = active ? q : T(0);
      out[kK * numbers] = active ? k : T(0);
      out[kKeep * numbers] = active ? g.keep : T(1);
      out[kErase * numbers] = active ? g.erase : T(0);
      out[kValue * numbers] = active ? g.write * v : T(0);
      if (d_reads) {
        T d = T(0);
        if (active && d_reads->data) d = load<T>(*d_reads, offset(*d_reads, task.b, t, at.head, at.row), AnyDtype{});
        out[kDRead * numbers] = d;
      }
    }
  });
}

// Loads a row of a state; without states the row is zeros.
template <class T>
DELTAMEM_DEVICE void load_state(const ScanArgs& p, const Operand& states, int64_t n, Lane at, T* S, int columns) {
  DELTAMEM_UNROLL
  for (int j = 0; j < columns; ++j) S[j] = T(0);
  if (!states.data || !at.valid) return;
  const int64_t from = n * states.stride[0] + at.head * states.stride[1] + at.row * states.stride[2];
  with_dtype(states.dtype, [&](auto dtype) {
    DELTAMEM_UNROLL
    for (int j = 0; j < columns; ++j)
      if (j < p.R) S[j] = load<T>(states, from + j * states.stride[3], dtype);
  });
}
template <class T>
DELTAMEM_DEVICE void store_state(const ScanArgs& p, const T* S, const Operand& states, int64_t n, Lane at,
                                 int columns) {
  if (!states.data || !at.valid) return;
  const int64_t to = n * states.stride[0] + at.head * states.stride[1] + at.row * states.stride[2];
  with_dtype(states.dtype, [&](auto dtype) {
    DELTAMEM_UNROLL
    for (int j = 0; j < columns; ++j)
      if (j < p.R) convert_to(S[j], static_cast<decltype(dtype)*>(states.data)[to + j * states.stride[3]]);
  });
}
// The columns of a token's query or key, in registers, or in the tile if they do not fit.
template <class T, int R, bool kInRegisters = (R <= 16 && sizeof(T) == 4)>
struct Columns {
  T x[R];
  DELTAMEM_DEVICE void load(const T* from) { memcpy(x, __builtin_assume_aligned(from, 16), sizeof(x)); }
  DELTAMEM_DEVICE T operator[](int j) const { return x[j]; }
};
template <class T, int R>
struct Columns<T, R, false> {
  const T* x;
  DELTAMEM_DEVICE void load(const T* from) { x = static_cast<const T*>(__builtin_assume_aligned(from, 16)); }
  DELTAMEM_DEVICE T operator[](int j) const { return x[j]; }
};

// The factors of one token for one lane.
template <class T, int R>
struct Token {
  Columns<T, R> q, k;
  T keep, erase, value, d_read;
  template <bool kBackward>
  DELTAMEM_DEVICE void load(const T* tile, int numbers, int at, int head) {
    q.load(tile + kQ * numbers + head), k.load(tile + kK * numbers + head);
    keep = tile[kKeep * numbers + at], erase = tile[kErase * numbers + at], value = tile[kValue * numbers + at];
    if (kBackward) d_read = tile[kDRead * numbers + at];
  }
};

// While the scanners run tile i, the movers load tile i + 1 and store the results of tile i - 1.
template <class Fetch, class Scan, class Store>
DELTAMEM_DEVICE void pipeline(bool mover, int64_t tiles, Fetch&& fetch, Scan&& scan, Store&& store) {
  for (int64_t i = -1; i <= tiles; ++i) {
    if (mover) {
      if (i + 1 < tiles) fetch(i + 1);
      if (i > 0) store(i - 1);
    } else if (i >= 0 && i < tiles) {
      scan(i);
    }
    __syncthreads();
  }
}

}  // namespace deltamem

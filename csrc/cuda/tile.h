// What all kernels share: which tokens and heads a block works on, and how their operands come to shared memory as
// numbers of the arithmetic, in tiles of a few tokens. In a tile the lanes are the rows of some heads side by side.
#pragma once

#include "device.h"
#include "kernels.h"

namespace deltamem {

constexpr int kChunk = kCheckpointInterval;
#ifdef __CUDACC__
constexpr int kMovers = 128;  // threads that load: enough loads on their way that the scan does not wait
#else
constexpr int kMovers = 32;
#endif

// A block for a rank of at most R: scanners, one for each lane, then movers.
template <class T, int R>
struct Shape {
  static constexpr int scanners = R < kWarp ? kWarp : R;
  static constexpr int warps = scanners / kWarp;
  static constexpr int movers = kMovers < R ? R : kMovers;
  static constexpr int threads = scanners + movers;
  static constexpr int resident = R <= 16 ? 2 : 1;  // blocks on a multiprocessor: bounds the registers
  static constexpr int numbers = (R > kWarp ? 1024 : 2048) / sizeof(T);  // of an operand in a tile
};

// How many columns a row has: R, known to the compiler, which then keeps them in registers; or, for ranks larger than
// Most, which have no room there, and in double precision, as many as there are.
template <class T, int R, int Most>
DELTAMEM_DEVICE int columns_of(const Problem& p) {
  return sizeof(T) == 8 || R > Most ? int(p.R) : R;
}

// How the work is cut. Sequences of at least chunked_from tokens are cut into chunks, a task each.
struct Plan {
  int heads = 1;  // of a task, side by side
  int64_t groups = 0, tasks = 0;
  int64_t chunked_from = 0;
  bool same_dtype = false;  // all operands
};

// The tokens [first, end) of one sequence, a chunk or all, for some heads from `head` on.
struct Task {
  int64_t n, b, start, length;  // the sequence, its row of the batch, its tokens there
  int64_t first, end, head;

  DELTAMEM_DEVICE bool is_last() const { return end == length; }
  // Where the state before token `at` (a multiple of the interval, not 0) is kept: rounding the start down leaves every
  // sequence of a packed batch the room it needs.
  DELTAMEM_DEVICE int64_t checkpoint(const Problem& p, int64_t at) const {
    return b * (p.T / kChunk) + start / kChunk + at / kChunk - 1;
  }
};

// Tokens are in [0, T] whatever cu_seqlens holds: the host does not read it.
DELTAMEM_DEVICE int64_t bound(const Problem& p, int64_t n) {
  const int64_t at = p.cu_seqlens[n];
  return at < 0 ? 0 : at > p.T ? p.T : at;
}

DELTAMEM_DEVICE Task whole_sequence(const Problem& p, int64_t n) {
  Task task{n, n, 0, p.T, 0, p.T, 0};
  if (p.cu_seqlens) {
    task.b = 0, task.start = bound(p, n);
    const int64_t stop = bound(p, n + 1);
    task.length = task.end = stop > task.start ? stop - task.start : 0;
  }
  return task;
}

// Segment i: the first N are the sequences or their first chunks, then follows a chunk for each checkpoint.
DELTAMEM_DEVICE bool find_segment(const Problem& p, int64_t chunked_from, int64_t i, Task& task) {
  if (i < p.N) {
    task = whole_sequence(p, i);
    if (task.length >= chunked_from && task.length > kChunk) task.end = kChunk;
    return true;
  }
  const int64_t slot = i - p.N;
  if (p.cu_seqlens) {  // the last sequence that starts before the slot's end is the only one that can own it
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

DELTAMEM_DEVICE bool find_task(const Problem& p, const Plan& plan, int64_t index, Task& task) {
  if (!find_segment(p, plan.chunked_from, index / plan.groups, task)) return false;
  task.head = index % plan.groups * plan.heads;
  return true;
}

// Where lane number `lane` of a task reads: lanes past the last head or row read the last one again, and do not count.
struct Lane {
  int64_t head, row;
  bool counts;
  DELTAMEM_DEVICE Lane(const Problem& p, const Task& task, int lane, int R) : head(task.head + lane / R), row(lane % R) {
    counts = head < p.H && row < p.R;
    if (head >= p.H) head = p.H - 1;
    if (row >= p.R) row = p.R - 1;
  }
};

DELTAMEM_DEVICE int64_t offset(const Operand& x, int64_t b, int64_t t, int64_t h, int64_t r) {
  return b * x.stride[0] + t * x.stride[1] + h * x.stride[2] + r * x.stride[3];
}

// One number of an operand: of dtype X, or of any. Where all have one dtype, no branch stands between the loads, and
// many are on their way at a time.
struct Any {};
template <class T, class X>
DELTAMEM_DEVICE T load(const Operand& x, int64_t at, X) {
  return number<T>(static_cast<const X*>(x.data)[at]);
}
template <class T>
DELTAMEM_DEVICE T load(const Operand& x, int64_t at, Any) {
  T loaded{};
  with_dtype(x.dtype, [&](auto dtype) { loaded = load<T>(x, at, dtype); });
  return loaded;
}
template <class T, int R, class F>
DELTAMEM_DEVICE void with_operands_dtype(const Problem& p, const Plan& plan, F&& f) {
  if constexpr (sizeof(T) == 8 || R > 16) {
    f(Any{});  // the usual ranks are worth the compiler's time
  } else {
    if (!plan.same_dtype) return f(Any{});
    with_dtype(p.q.dtype, [&](auto dtype) {
      if constexpr (sizeof(dtype) < 8) f(dtype);
    });
  }
}
template <class T, class F>
DELTAMEM_DEVICE void with_operand_dtype(const Operand& x, F&& f) {
  if constexpr (sizeof(T) == 8)
    f(Any{});  // double precision is not worth the compiler's time
  else
    with_dtype(x.dtype, [&](auto dtype) {
      if constexpr (sizeof(dtype) < 8) f(dtype);
    });
}
template <class T>
DELTAMEM_DEVICE void store(T x, const Operand& out, int64_t at) {
  with_dtype(out.dtype, [&](auto dtype) { put_number(x, static_cast<decltype(dtype)*>(out.data)[at]); });
}

DELTAMEM_DEVICE bool counts(const Problem& p, int64_t b, int64_t t) {
  return !p.mask || p.mask[b * p.mask_stride[0] + t * p.mask_stride[1]];
}

template <class T, class X>
DELTAMEM_DEVICE Gates<T> gates_at(const Problem& p, const Task& task, int64_t t, int64_t h, int64_t r, X dtype, T& beta,
                                  T& decay) {
  beta = load<T>(p.beta, offset(p.beta, task.b, t, h, r), dtype);
  decay = p.decay.data ? load<T>(p.decay, offset(p.decay, task.b, t, h, r), dtype) : T(1);
  const T write = p.write.data ? load<T>(p.write, offset(p.write, task.b, t, h, r), dtype) : beta;
  return gates(p.mode, !p.decay.data, T(1), beta, decay, write);
}

// The pieces of a tile, `numbers` each.
enum Piece { kQ, kK, kKeep, kErase, kValue, kForwardPieces, kDRead = kForwardPieces, kBackwardPieces };

// Tokens [first, first + tokens) of the task into a tile. A token that the mask leaves out, as well as a lane that does
// not count, keeps all, erases nothing and writes nothing. d_reads is null where it is not wanted.
template <int R, class T>
DELTAMEM_DEVICE void fetch(const Problem& p, const Plan& plan, const Task& task, int64_t first, int tokens, int lanes,
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
      const bool counted = at.counts && counts(p, task.b, t);
      T* out = tile + i * lanes + lane;
      out[kQ * numbers] = counted ? q : T(0);
      out[kK * numbers] = counted ? k : T(0);
      out[kKeep * numbers] = counted ? g.keep : T(1);
      out[kErase * numbers] = counted ? g.erase : T(0);
      out[kValue * numbers] = counted ? g.write * v : T(0);
      if (d_reads) {
        T d = T(0);
        if (counted && d_reads->data) d = load<T>(*d_reads, offset(*d_reads, task.b, t, at.head, at.row), Any{});
        out[kDRead * numbers] = d;
      }
    }
  });
}

// A row of a state, zeros where there is none.
template <class T>
DELTAMEM_DEVICE void load_state(const Problem& p, const Operand& states, int64_t n, Lane at, T* S, int columns) {
  DELTAMEM_UNROLL
  for (int j = 0; j < columns; ++j) S[j] = T(0);
  if (!states.data || !at.counts) return;
  const int64_t from = n * states.stride[0] + at.head * states.stride[1] + at.row * states.stride[2];
  with_dtype(states.dtype, [&](auto dtype) {
    DELTAMEM_UNROLL
    for (int j = 0; j < columns; ++j)
      if (j < p.R) S[j] = load<T>(states, from + j * states.stride[3], dtype);
  });
}
template <class T>
DELTAMEM_DEVICE void store_state(const Problem& p, const T* S, const Operand& states, int64_t n, Lane at,
                                 int columns) {
  if (!states.data || !at.counts) return;
  const int64_t to = n * states.stride[0] + at.head * states.stride[1] + at.row * states.stride[2];
  with_dtype(states.dtype, [&](auto dtype) {
    DELTAMEM_UNROLL
    for (int j = 0; j < columns; ++j)
      if (j < p.R) put_number(S[j], static_cast<decltype(dtype)*>(states.data)[to + j * states.stride[3]]);
  });
}
template <class T>
DELTAMEM_DEVICE Operand contiguous_states(const Problem& p, const void* data) {
  return {const_cast<void*>(data), sizeof(T) == 8 ? DType::f64 : DType::f32, {p.H * p.R * p.R, p.R * p.R, p.R, 1}};
}

// The columns of a token's query or key: in registers, or left in the tile where they would be too many.
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

// What a lane needs of a token.
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

// Tile i is scanned while the movers fetch tile i + 1 and put away what came of tile i - 1.
template <class Fetch, class Scan, class Put>
DELTAMEM_DEVICE void pipeline(bool mover, int64_t tiles, Fetch&& fetch, Scan&& scan, Put&& put) {
  for (int64_t i = -1; i <= tiles; ++i) {
    if (mover) {
      if (i + 1 < tiles) fetch(i + 1);
      if (i > 0) put(i - 1);
    } else if (i >= 0 && i < tiles) {
      scan(i);
    }
    __syncthreads();
  }
}

}  // namespace deltamem

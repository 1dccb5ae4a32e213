// memory_projection on a CPU: x W^T, then tanh, l2norm and sigmoid, for one group of tokens at a time.
//
// x and the weights are read as they are in memory. A vector runs along D, and the partial sums in its lanes are added
// up at the end. The bits of a dot product do not depend on the other tokens and rows that are computed with it.
#pragma once

#include "arena.h"
#include "load_store.h"
#include "activations.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

template <class T, int W>
struct Project {
  typedef Vec<T, W> L;
  static constexpr int kBlock = 640;  // columns at a time, so that those of a few tokens stay in the L1 cache
  static constexpr int kMaxTokens = W > 1 ? W / 2 : 1;  // at a time: W sums are kMaxTokens tokens times two weight rows

  // Adds the products of columns [begin, end) of M tokens and W / M weight rows to sums [W / M, M].
  template <int M, class Weight>
  static void add_products(const T* const* x, const Weight* const* rows, int64_t begin, int64_t end, L* sums) {
    constexpr int N = W / M;
    L sum[W];
    for (int i = 0; i < W; ++i) sum[i] = sums[i];
    const auto step = [&](auto&& load_x, auto&& load_row) {
      L token[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) token[m] = load_x(x[m]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const L row = load_row(rows[n]);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[n * M + m] = fma(token[m], row, sum[n * M + m]);
      }
    };
    int64_t d = begin;
    for (; d + W <= end; d += W)
      step([&](const T* p) { return L::load(p + d); }, [&](const Weight* p) { return load<W>(p + d); });
    if (d < end)
      step([&](const T* p) { return load_some(p + d, int(end - d)); },
           [&](const Weight* p) { return load_some(p + d, int(end - d)); });
    for (int i = 0; i < W; ++i) sums[i] = sum[i];
  }

  template <int N, class From>
  DELTAMEM_INLINE static L load(const From* p) {
    L v;
    convert<N>(p, reinterpret_cast<T*>(&v));
    return v;
  }
  template <class From>
  static L load_some(const From* p, int count) {
    T buffer[W] = {};
    for (int i = 0; i < count; ++i) convert<1>(p + i, buffer + i);
    return L::load(buffer);
  }

  struct Scratch {
    T* logits;          // [rows, W tokens]
    T* x;               // [W tokens, D], if x has to be converted
    const void** rows;  // the weight rows of q, k, v and the gates
    L* sums;            // [rows, kMaxTokens]
    T* bias;            // of the gates
  };

  // Sets logits[n * W + m] to weight row n times token m, for up to W tokens, M at a time.
  template <int M, class Weight>
  static void project(const ProjectionArgs& p, const T* const* x, int count, const Scratch& scratch, T* logits) {
    if constexpr (M > 1) {
      if (count < M) return project<M / 2, Weight>(p, x, count, scratch, logits);
    }
    const int64_t N = W / M, blocks = (p.D + kBlock - 1) / kBlock;
    const int64_t width = blocks ? ((p.D + blocks - 1) / blocks + W - 1) / W * W : W;
    const int64_t rows = (p.rows() + N - 1) / N * N;  // rounded up; load_rows repeats the last one
    fill(reinterpret_cast<T*>(scratch.sums), rows * M * W, T(0));
    const auto* const* row = reinterpret_cast<const Weight* const*>(scratch.rows);
    for (int64_t begin = 0; begin < p.D; begin += width)
      for (int64_t n = 0; n < rows; n += N)
        add_products<M>(x, row + n, begin, begin + width < p.D ? begin + width : p.D, scratch.sums + n * M);
    for (int64_t n = 0; n < rows; n += N) {
      T dots[W];
      sum_lanes<W>(scratch.sums + n * M).store(dots);
      for (int64_t i = 0; i < N && n + i < p.rows(); ++i)
        for (int m = 0; m < M; ++m) logits[(n + i) * W + m] = dots[i * M + m];
    }
    if (count > M) project<M, Weight>(p, x + M, count - M, scratch, logits + M);
  }

  // Applies tanh and l2norm to the R logits of a head, in place. Each lane has one token.
  static void normalize(T* logits, int64_t R, T* norms) {
    L squares{};
    for (int64_t r = 0; r < R; ++r) {
      const L t = tanh(L::load(logits + r * W));
      squares = fma(t, t, squares);
      t.store(logits + r * W);
    }
    squares.store(norms);
    for (int m = 0; m < W; ++m) {
      const T norm = std::is_same_v<T, float> ? T(__builtin_sqrtf(float(norms[m]))) : T(__builtin_sqrt(norms[m]));
      norms[m] = norm < T(kNormEps) ? T(kNormEps) : norm;
    }
    const L norm = L::load(norms);
    for (int64_t r = 0; r < R; ++r) L{L::load(logits + r * W).x / norm.x}.store(logits + r * W);
  }

  // Copies `columns` logits of `count` tokens to rows first, first + 1, ... of out, [tokens, columns].
  static void store_columns(const T* logits, int64_t columns, void* out, int64_t first, int count) {
    T* p = static_cast<T*>(out) + first * columns;
    for (int m = 0; m < count; ++m, p += columns)
      for (int64_t n = 0; n < columns; ++n) p[n] = logits[n * W + m];
  }

  // Activations, and the results of `count` tokens from `first` on.
  static void finish(const ProjectionArgs& p, int64_t first, int count, const Scratch& scratch) {
    const int64_t width = p.H * p.R;
    T* logits = scratch.logits;
    for (int64_t part = 0; part < 2; ++part, logits += width * W) {  // q, k
      for (int64_t h = 0; p.normalize && h < p.H; ++h) {
        T norms[W];
        normalize(logits + h * p.R * W, p.R, norms);
        T* out = static_cast<T*>(p.norms) + (part * p.B * p.T + first) * p.H + h;
        for (int m = 0; m < count; ++m) out[m * p.H] = norms[m];
      }
      store_columns(logits, width, part ? p.k : p.q, first, count);
    }
    store_columns(logits, width, p.v, first, count);
    logits += width * W;
    const T* bias = scratch.bias;
    for (const Gate& gate : p.gates) {
      for (int64_t n = 0; n < gate.rows; ++n, ++bias)
        sigmoid(L::load(logits + n * W) + L::splat(*bias)).store(logits + n * W);
      store_columns(logits, gate.rows, gate.out, first, count);
      logits += gate.rows * W;
    }
  }

  static void load_rows(const ProjectionArgs& p, const Scratch& scratch) {
    int64_t n = 0;
    const auto append = [&](const Operand& weight, int64_t rows) {
      with_dtype(weight.dtype, [&](auto tag) {
        for (int64_t i = 0; i < rows; ++i)
          scratch.rows[n++] = static_cast<const decltype(tag)*>(weight.data) + i * weight.stride[0];
      });
    };
    for (const Operand& weight : p.qkv_weight) append(weight, p.H * p.R);
    T* bias = scratch.bias;
    for (const Gate& gate : p.gates) {
      append(gate.weight, gate.rows);
      for (int64_t i = 0; i < gate.rows; ++i, ++bias) {
        *bias = 0;
        if (gate.bias.data) with_dtype(gate.bias.dtype, [&](auto tag) {
          convert<1>(static_cast<const decltype(tag)*>(gate.bias.data) + i * gate.bias.stride[0], bias);
        });
      }
    }
    for (; n < p.rows() + W; ++n) scratch.rows[n] = scratch.rows[p.rows() - 1];
  }

  // Runs the tokens of groups [begin, end). A group has W tokens.
  template <class Weight>
  static void run(const ProjectionArgs& p, int64_t begin, int64_t end) {
    const int64_t rows = p.rows() + W, tokens = p.B * p.T;
    const bool in_place = p.x.dtype == kDType<T> && p.x.stride[2] == 1;
    thread_local Arena arena;
    arena.reset(Arena::bytes<T>(rows * W) + Arena::bytes<T>(in_place ? 0 : W * p.D) + Arena::bytes<void*>(rows) +
                Arena::bytes<L>(rows * kMaxTokens) + Arena::bytes<T>(rows));
    Scratch scratch{};
    scratch.logits = arena.take<T>(rows * W);
    scratch.x = arena.take<T>(in_place ? 0 : W * p.D);
    scratch.rows = arena.take<const void*>(rows);
    scratch.sums = arena.take<L>(rows * kMaxTokens);
    scratch.bias = arena.take<T>(rows);
    load_rows(p, scratch);
    for (int64_t first = begin * W; first < end * W && first < tokens; first += W) {
      const int count = int(tokens - first < W ? tokens - first : W);
      const T* x[W];
      if (count < W) fill(scratch.logits, rows * W, T(0));
      for (int m = 0; m < count; ++m) {
        const int64_t offset = (first + m) / p.T * p.x.stride[0] + (first + m) % p.T * p.x.stride[1];
        x[m] = in_place ? static_cast<const T*>(p.x.data) + offset : stage_token(p, offset, scratch.x + m * p.D);
      }
      project<kMaxTokens, Weight>(p, x, count, scratch, scratch.logits);
      finish(p, first, count, scratch);
    }
  }

  // Converts a token of x to T.
  static const T* stage_token(const ProjectionArgs& p, int64_t offset, T* out) {
    with_dtype(p.x.dtype, [&](auto tag) {
      const auto* x = static_cast<const decltype(tag)*>(p.x.data) + offset;
      if (p.x.stride[2] == 1) {
        int64_t d = 0;
        for (; d + W <= p.D; d += W) convert<W>(x + d, out + d);
        for (; d < p.D; ++d) convert<1>(x + d, out + d);
      } else {
        for (int64_t d = 0; d < p.D; ++d) convert<1>(x + d * p.x.stride[2], out + d);
      }
    });
    return out;
  }
};

// Tokens of a group in float32; in double precision a group has half as many.
constexpr int kProjectionGroup = DELTAMEM_VECTOR_BYTES / 4;

inline void project(const ProjectionArgs& p, int64_t begin, int64_t end) {
  constexpr int kBytes = DELTAMEM_VECTOR_BYTES;
  if (p.double_precision) return Project<double, kBytes / 8>::run<double>(p, 2 * begin, 2 * end);
  switch (p.qkv_weight[0].dtype) {
    case DType::bf16: return Project<float, kBytes / 4>::run<BFloat16>(p, begin, end);
    case DType::f16: return Project<float, kBytes / 4>::run<Half>(p, begin, end);
    default: return Project<float, kBytes / 4>::run<float>(p, begin, end);
  }
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

// delta_step on a CPU: a few tokens for each of many rows, with states in a pool. Where delta_update stages a chunk of
// one sequence, delta_step stages the tokens of a group of rows.
#pragma once

#include "scan.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

template <class T, int W, class Rank>
struct StepScan : Scan<T, W, Rank> {
  typedef Scan<T, W, Rank> Base;
  typedef typename Base::L L;
  typedef typename Base::Block Block;
  typedef StagedTokens<T, W, Rank, 1> Staged;

  static void step(const ScanArgs& p, const StepArgs& s, int64_t begin, int64_t end) {
    const int64_t group = p.T < kChunk ? kChunk / p.T : 1;  // rows
    const int width = Staged::padded(p.R);
    thread_local Arena arena;
    arena.reset(Staged::bytes(p, group * p.T) + Arena::bytes<T>(group * p.T * width) + Arena::bytes<T>(p.R * width));
    Staged staged(p, Base::rank(p), arena, group * p.T);
    T* reads = arena.take<T>(group * p.T * width);
    T* S = arena.take<T>(p.R * width);
    for (int64_t first = begin; first < end; first += group) {
      const int64_t rows = end - first < group ? end - first : group;
      for (int64_t h = 0; h < p.H; ++h) {
        stage_rows(staged, first, rows, h);
        with_mode(p, [&](auto mode, auto coupled) {
          for (int64_t n = 0; n < rows; ++n) row<mode(), coupled()>(staged, s, first + n, h, n * p.T, S, reads);
        });
        for_each_token(p.T, first, rows, h, s.reads, [&](const Operand& x, Span span, int64_t t) {
          unstage(x, span, staged.R, reads + t * width, int(p.T * width));
        });
      }
    }
  }

  // Calls f(operand, span, t) for each token t. The span holds token t of all rows: the rows stand in for the tokens of
  // a sequence.
  template <class F>
  static void for_each_token(int64_t T_, int64_t first, int64_t rows, int64_t h, const Operand& x, F&& f) {
    const Operand by_row{x.data, x.dtype, {x.stride[1], x.stride[0], x.stride[2], x.stride[3]}};
    for (int64_t t = 0; t < T_; ++t) f(by_row, Span{t, first, h, int(rows)}, t);
  }

  static void stage_rows(Staged& staged, int64_t first, int64_t rows, int64_t h) {
    const int width = staged.width(), stride = int(staged.p.T) * width;
    staged.n = int(rows * staged.p.T);
    staged.load_rows([&](const Operand& x, T* buffer) {
      if (staged.p.T == 1 && width == staged.R && x.dtype == kDType<T> && x.stride[3] == 1)
        return typename Staged::Rows{{Span{first, 0, h, 1}.template begin<T>(x)}, ptrdiff_t(x.stride[0])};
      for_each_token(staged.p.T, first, rows, h, x, [&](const Operand& by_row, Span span, int64_t t) {
        stage(by_row, span, staged.R, buffer + t * width, stride, width);
      });
      return staged.staged_at(buffer);
    });
  }

  // The usual case: one token and a state of the arithmetic's dtype that is a single block. The state stays in
  // registers.
  template <Mode mode, bool coupled>
  DELTAMEM_INLINE static void one_token(const Staged& c, const StepArgs& s, int64_t n, int64_t h, int64_t at,
                                        T* reads) {
    T* pool = static_cast<T*>(s.state.data) + h * s.state.stride[1];
    L S[W];
    load_square<W>(pool + s.from[n] * s.state.stride[0], s.state.stride[2], S);
    dot(S, c.q.columns(int(at)), c.R).store(reads + at * W);
    const L held = dot(S, c.k.columns(int(at)), c.R);
    const auto token = c.template token<mode, coupled>(at, 0);
    write_token(S, c.k.columns(int(at)), token.keep, change_by(token.erase, held, token.value), c.R);
    if (s.to[n] != kNoSlot) store_square<W>(S, pool + s.to[n] * s.state.stride[0], s.state.stride[2]);
  }

  // The tokens of row n, which are staged from index `at` on.
  template <Mode mode, bool coupled>
  static void row(const Staged& c, const StepArgs& s, int64_t n, int64_t h, int64_t at, T* memory, T* reads) {
    const int64_t tokens = c.p.T;
    const int width = c.width();
    if (s.from[n] == kNoSlot) {
      fill(reads + at * width, tokens * width, T(0));
      return;
    }
    Operand intermediate = s.intermediate;
    if (intermediate.data) with_dtype(intermediate.dtype, [&](auto tag) {
      intermediate.data = static_cast<decltype(tag)*>(intermediate.data) + n * s.intermediate_row;
    });
    if (width != c.R) fill(memory, c.R * width, T(0));  // lanes past the last row of the state
    if constexpr (Base::kKnownRank) {
      if (W == c.R && tokens == 1 && s.state.dtype == kDType<T> && s.state.stride[3] == 1 && !intermediate.data)
        return one_token<mode, coupled>(c, s, n, h, at, reads);
    }
    load_state<W>(s.state, s.from[n], h, c.R, memory, 0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int i = 0; i < width; i += W) {
        Block S(memory + i * c.R, c.R);
        dot(*S, c.q.columns(int(at + t)), c.R).store(reads + (at + t) * width + i);
        const L held = dot(*S, c.k.columns(int(at + t)), c.R);
        const auto token = c.template token<mode, coupled>(at + t, i);
        write_token(*S, c.k.columns(int(at + t)), token.keep, change_by(token.erase, held, token.value), c.R);
        S.write_back(c.R);
      }
      if (s.to[n * tokens + t] != kNoSlot) store_state<W>(memory, 0, c.R, s.state, s.to[n * tokens + t], h);
      if (s.intermediate.data) store_state<W>(memory, 0, c.R, intermediate, t, h);
    }
  }
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

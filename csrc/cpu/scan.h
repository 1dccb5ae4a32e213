// delta_update on a CPU, forward and backward: sequences x heads are the tasks, the rows of a state run in blocks of
// W lanes, the tokens in chunks.
#pragma once

#include "chunk.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

constexpr int kMaxRank = 128;

// Rank is std::integral_constant where the compiler knows it, which keeps a block of the state in registers, or int.
template <class T, int W, class Rank>
struct Scan {
  typedef Vec<T, W> L;
  typedef Broadcast<T, W> X;
  static constexpr bool kKnownRank = !std::is_same_v<Rank, int>;

  static constexpr int columns() {
    if constexpr (kKnownRank)
      return Rank::value;
    else
      return 0;
  }

  // A block of W rows of a state, R columns of W lanes.
  struct Block {
    L known[kKnownRank ? columns() : 1];
    L* memory;
    DELTAMEM_INLINE Block(T* at, Rank R) : memory(reinterpret_cast<L*>(at)) {
      if (kKnownRank)
        for (int j = 0; j < R; ++j) known[j] = memory[j];
    }
    DELTAMEM_INLINE L* operator*() { return kKnownRank ? known : memory; }
    DELTAMEM_INLINE void put_back(Rank R) {
      if (kKnownRank)
        for (int j = 0; j < R; ++j) memory[j] = known[j];
    }
  };

  static Operand contiguous_states(const Problem& p, const void* data) {
    return {const_cast<void*>(data), kDType<T>, {p.H * p.R * p.R, p.R * p.R, p.R, 1}};
  }

  // One head of one sequence, and what both directions need of it.
  struct Head {
    const Problem& p;
    Sequence s;
    Chunk<T, W, Rank> chunk;
    T* S;  // [blocks, R, W]

    static size_t bytes(const Problem& p) {
      return Chunk<T, W, Rank>::bytes(p) + Arena::piece<T>(p.R * Chunk<T, W, Rank>::padded(p.R));
    }
    Head(const Problem& p, Rank R, int64_t task, Arena& arena)
        : p(p), s(p, task), chunk(p, R, arena), S(arena.take<T>(R * chunk.width())) {}

    void start_from(const Operand& state, int64_t n) {
      fill(S, chunk.R * chunk.width(), T(0));
      if (state.data) load_state<W>(state, n, s.h, chunk.R, S);
    }

    // The chunk's tokens into the rows of block i. `before(t, S k)` sees the state that token t finds.
    template <class F>
    DELTAMEM_INLINE void write_tokens(L* S, int i, F&& before) const {
      const auto& c = chunk;
      L held = dot(S, X{c.k[0]}, c.R);
      for (int t = 0; t < c.span.n; ++t) {
        const int at = t * c.width() + i;
        before(t, held);
        const L keep = L::load(c.keep + at);
        const L change = change_by(L::load(c.erase + at), held, L::load(c.value + at));
        // The last token has no next key: any will do, its overlap is 0 and nothing asks for the result.
        const L ahead = dot(S, X{c.k[t + 1 < c.span.n ? t + 1 : t]}, c.R);
        held = held_next(keep, ahead, change, L::splat(c.overlap[t]));
        write_token(S, X{c.k[t]}, keep, change, c.R);
      }
    }
  };

  struct Forward : Head {
    using Head::chunk, Head::p, Head::s;
    T* reads;  // [kChunk, width]

    static size_t bytes(const Problem& p) {
      return Head::bytes(p) + Arena::piece<T>(kChunk * Chunk<T, W, Rank>::padded(p.R));
    }
    Forward(const Problem& p, Rank R, int64_t task, Arena& arena)
        : Head(p, R, task, arena), reads(arena.take<T>(kChunk * chunk.width())) {}

    void run(const ForwardOutput& out) {
      this->start_from(p.initial_state, s.n);
      for (int64_t first = 0; first < s.length; first += kChunk) {
        if (first && out.checkpoints)
          store_state<W>(this->S, chunk.R, contiguous_states(p, out.checkpoints), s.checkpoint(p, first), s.h);
        chunk.load(s.chunk(first));
        for (int i = 0; i < chunk.width(); i += W) scan(i);
        chunk.for_tokens_left_out([&](int t) { fill(reads + t * chunk.width(), chunk.width(), T(0)); });
        unstage(out.reads, chunk.span, chunk.R, reads, chunk.width());
      }
      store_state<W>(this->S, chunk.R, contiguous_states(p, out.final_state), s.n, s.h);
    }

    void scan(int i) {
      const auto& c = chunk;
      Block S(this->S + i * c.R, c.R);
      this->write_tokens(*S, i, [&](int t, L) { dot(*S, X{c.q[t]}, c.R).store(reads + t * c.width() + i); });
      S.put_back(c.R);
    }
  };

  struct Backward : Head {
    using Head::chunk, Head::p, Head::s;
    const BackwardOutput& out;
    T *G, *history, *held;                                // [blocks, R, W], [kChunk, R, W], [kChunk, W]
    T *d_reads, *d_q, *d_k, *d_keep, *d_erase, *d_value;  // [kChunk, width]

    static size_t bytes(const Problem& p) {
      const size_t width = Chunk<T, W, Rank>::padded(p.R);
      return Head::bytes(p) + Arena::piece<T>(p.R * width) + Arena::piece<T>(kChunk * p.R * W) +
             Arena::piece<T>(kChunk * W) + 6 * Arena::piece<T>(kChunk * width);
    }
    Backward(const Problem& p, const BackwardOutput& out, Rank R, int64_t task, Arena& arena)
        : Head(p, R, task, arena), out(out) {
      G = arena.take<T>(R * chunk.width());
      history = arena.take<T>(kChunk * R * W), held = arena.take<T>(kChunk * W);
      for (T** piece : {&d_reads, &d_q, &d_k, &d_keep, &d_erase, &d_value})
        *piece = arena.take<T>(kChunk * chunk.width());
    }

    void run(const Operand& grad_reads, const Operand& grad_final, const void* checkpoints) {
      fill(G, chunk.R * chunk.width(), T(0));
      if (grad_final.data) load_state<W>(grad_final, s.n, s.h, chunk.R, G);
      for (int64_t first = (s.length + kChunk - 1) / kChunk * kChunk - kChunk; first >= 0; first -= kChunk) {
        if (first)
          this->start_from(contiguous_states(p, checkpoints), s.checkpoint(p, first));
        else
          this->start_from(p.initial_state, s.n);
        chunk.load(s.chunk(first));
        if (grad_reads.data)
          stage(grad_reads, chunk.span, chunk.R, chunk.width(), false, d_reads);
        else
          fill(d_reads, kChunk * chunk.width(), T(0));
        chunk.for_tokens_left_out([&](int t) { fill(d_reads + t * chunk.width(), chunk.width(), T(0)); });
        for (int i = 0; i < chunk.width(); i += W) replay(i), scan(i);
        write_out();
      }
      if (out.initial_state.data) store_state<W>(G, chunk.R, out.initial_state, s.n, s.h);
    }

    // The states before each token of the chunk, for the rows of block i.
    void replay(int i) {
      const auto& c = chunk;
      Block S(this->S + i * c.R, c.R);
      this->write_tokens(*S, i, [&](int t, L held_by_state) {
        L* before = reinterpret_cast<L*>(history) + t * c.R;
        for (int j = 0; j < c.R; ++j) before[j] = (*S)[j];
        held_by_state.store(held + t * W);
      });
    }

    void scan(int i) {
      const auto& c = chunk;
      Block G(this->G + i * c.R, c.R);
      constexpr int padded = ((kKnownRank ? columns() : kMaxRank) + W - 1) / W * W;
      L q_share[padded], k_share[padded];
      for (int j = c.R; j < c.padded(c.R); ++j) q_share[j] = k_share[j] = L{};
      for (int t = c.span.n - 1; t >= 0; --t) {
        const int at = t * c.width() + i;
        const L* before = reinterpret_cast<const L*>(history) + t * c.R;
        const TokenGradients<L> d = token_adjoint(
            *G, before, X{c.q[t]}, X{c.k[t]}, L::load(c.keep + at), L::load(c.erase + at), L::load(c.value + at),
            L::load(held + t * W), L::load(d_reads + at), q_share, k_share, c.R);
        d.keep.store(d_keep + at), d.erase.store(d_erase + at), d.value.store(d_value + at);
        if (out.q.data) add_rows(q_share, d_q + t * c.width(), i > 0);
        if (out.k.data) add_rows(k_share, d_k + t * c.width(), i > 0);
      }
      G.put_back(c.R);
    }

    DELTAMEM_INLINE void add_rows(L* share, T* sum, bool more) const {
      for (int j = 0; j < chunk.R; j += W) {
        L rows = sum_lanes(share + j);
        if (more) rows = rows + L::load(sum + j);
        rows.store(sum + j);
      }
    }

    // From the gradients of keep, erase and value to those of the operands, and out. What v gets overwrites d_reads,
    // which this chunk is done with.
    void write_out() {
      chunk.adjoint_of_gates(d_keep, d_erase, d_value, d_reads);
      chunk.for_tokens_left_out([&](int t) {
        for (T* x : {d_q, d_k, d_reads, d_keep, d_erase, d_value}) fill(x + t * chunk.width(), chunk.width(), T(0));
      });
      auto put = [&](const Operand& x, const T* rows, bool per_head = false) {
        if (x.data) unstage(x, chunk.span, chunk.R, rows, chunk.width(), per_head);
      };
      put(out.q, d_q), put(out.k, d_k), put(out.v, d_reads);
      put(out.beta, d_erase, out.beta_per_head);
      put(out.decay, d_keep, out.decay_per_head);
      put(out.write, d_value, out.write_per_head);
    }
  };

  static void forward(const Problem& p, const ForwardOutput& out, int64_t begin, int64_t end) {
    thread_local Arena arena;
    for (int64_t task = begin; task < end; ++task) {
      arena.reset(Forward::bytes(p));
      Forward(p, rank(p), task, arena).run(out);
    }
  }

  static void backward(const Problem& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                       const BackwardOutput& out, int64_t begin, int64_t end) {
    thread_local Arena arena;
    for (int64_t task = begin; task < end; ++task) {
      arena.reset(Backward::bytes(p));
      Backward(p, out, rank(p), task, arena).run(d_reads, d_final_state, checkpoints);
    }
  }

  static Rank rank(const Problem& p) {
    if constexpr (kKnownRank)
      return {};
    else
      return int(p.R);
  }
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

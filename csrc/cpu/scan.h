// delta_update on a CPU, forward and backward: sequences x heads are the tasks, the rows of a state run in blocks of
// W lanes, the tokens in chunks. Where a vector has room for P heads, P tasks run in it side by side: the chain of
// dependent operations of one token leaves half of the arithmetic units idle. It gives each head the same bits.
#pragma once

#include "chunk.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

constexpr int kMaxRank = 128;

// Rank is std::integral_constant where the compiler knows it, which keeps a block of the state in registers, or int.
template <class T, int W, class Rank, int P = 1>
struct Scan {
  typedef Vec<T, W> L;
  static constexpr bool kKnownRank = !std::is_same_v<Rank, int>;

  static constexpr int columns() {
    if constexpr (kKnownRank)
      return Rank::value;
    else
      return 0;
  }

  static Rank rank(const Problem& p) {
    if constexpr (kKnownRank)
      return {};
    else
      return int(p.R);
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

  // P heads on their way through their tokens, and what both directions need of them.
  struct Heads {
    const Problem& p;
    Sequence s[P];
    Chunk<T, W, Rank, P> chunk;
    T* S;  // [blocks, R, W]

    static size_t bytes(const Problem& p) {
      return decltype(chunk)::bytes(p) + Arena::piece<T>(p.R * decltype(chunk)::padded(p.R));
    }
    Heads(const Problem& p, const Sequence* tasks, Arena& arena)
        : p(p), chunk(p, rank(p), arena), S(arena.take<T>(chunk.R * chunk.width())) {
      for (int i = 0; i < P; ++i) s[i] = tasks[i];
    }

    void load(const Operand& states, T* S) const {
      fill(S, chunk.R * chunk.width(), T(0));
      for (int i = 0; states.data && i < P; ++i) load_state<W>(states, s[i].n, s[i].h, chunk.R, S, i * chunk.R);
    }
    void load_checkpoint(const void* checkpoints, int64_t first, T* S) const {
      fill(S, chunk.R * chunk.width(), T(0));
      for (int i = 0; i < P; ++i)
        load_state<W>(contiguous_states(p, checkpoints), s[i].checkpoint(p, first), s[i].h, chunk.R, S, i * chunk.R);
    }

    void load_before(const void* checkpoints, int64_t first) {
      first ? load_checkpoint(checkpoints, first, S) : load(p.initial_state, S);
    }

    // The chunk's tokens into the rows of block i. `before(t, S k)` sees the state that token t finds. Without values
    // the tokens erase and decay only.
    template <Mode mode, bool coupled, bool values = true, class F>
    DELTAMEM_INLINE void write_tokens(L* S, int i, F&& before) const {
      const auto& c = chunk;
      L held = dot(S, c.k.columns(0), c.R);
      for (int t = 0; t < c.n; ++t) {
        before(t, held);
        const auto token = c.template token<mode, coupled>(t, i);
        const L change = change_by(token.erase, held, values ? token.value : L{});
        // The last token has no next key: any will do, its overlap is 0 and nothing asks for the result.
        const L ahead = dot(S, c.k.columns(t + 1 < c.n ? t + 1 : t), c.R);
        held = held_next(token.keep, ahead, change, c.overlap_at(t));
        write_token(S, c.k.columns(t), token.keep, change, c.R);
      }
    }
  };

  struct Forward : Heads {
    using Heads::chunk, Heads::p, Heads::s, Heads::S;
    T* reads;  // [kChunk, width]

    static size_t bytes(const Problem& p) { return Heads::bytes(p) + Arena::piece<T>(kChunk * padded(p)); }
    Forward(const Problem& p, const Sequence* tasks, Arena& arena)
        : Heads(p, tasks, arena), reads(arena.take<T>(kChunk * chunk.width())) {}

    void run(const ForwardOutput& out) {
      this->load_before(out.checkpoints, s[0].begin);
      for (int64_t first = s[0].begin; first < s[0].end; first += kChunk) {
        for (int i = 0; first > s[0].begin && out.checkpoints && i < P; ++i)
          store_state<W>(S, i * chunk.R, chunk.R, contiguous_states(p, out.checkpoints), s[i].checkpoint(p, first),
                         s[i].h);
        chunk.load(s, first);
        const bool in_place = chunk.in_place(out.reads);
        T* to = in_place ? chunk.span[0].template begin<T>(out.reads) : reads;
        const ptrdiff_t stride = in_place ? out.reads.stride[1] : chunk.width();
        with_mode(p, [&](auto mode, auto coupled) { scan<mode(), coupled()>(to, stride); });
        if (in_place) continue;
        chunk.leave_out(T(0), reads);
        for (int i = 0; i < P; ++i) unstage(out.reads, chunk.span[i], chunk.R, reads + i * chunk.R, chunk.width());
      }
      for (int i = 0; s[0].end == s[0].length && i < P; ++i)
        store_state<W>(S, i * chunk.R, chunk.R, contiguous_states(p, out.final_state), s[i].n, s[i].h);
    }

    template <Mode mode, bool coupled>
    void scan(T* reads, ptrdiff_t stride) {
      const auto& c = chunk;
      for (int i = 0; i < c.width(); i += W) {
        Block S(this->S + i * c.R, c.R);
        this->template write_tokens<mode, coupled>(*S, i, [&](int t, L) { dot(*S, c.q.columns(t), c.R).store(reads + t * stride + i); });
        S.put_back(c.R);
      }
    }
  };

  struct Backward : Heads {
    using Heads::chunk, Heads::p, Heads::s, Heads::S;
    const BackwardOutput& out;
    T *G, *history, *held;  // [blocks, R, W], [kChunk, R, W], [kChunk, W]
    T *d_reads, *buffers[6];  // [kChunk, width]
    struct Rows {
      T* data;
      ptrdiff_t stride;
    } d_q, d_k, d_v, d_beta, d_decay, d_write;  // where they belong if they can be written there, or in a buffer

    static size_t bytes(const Problem& p) {
      return Heads::bytes(p) + Arena::piece<T>(p.R * padded(p)) + Arena::piece<T>(kChunk * p.R * W) +
             Arena::piece<T>(kChunk * W) + 7 * Arena::piece<T>(kChunk * padded(p));
    }
    Backward(const Problem& p, const BackwardOutput& out, const Sequence* tasks, Arena& arena)
        : Heads(p, tasks, arena), out(out) {
      G = arena.take<T>(chunk.R * chunk.width());
      history = arena.take<T>(kChunk * chunk.R * W), held = arena.take<T>(kChunk * W);
      d_reads = arena.take<T>(kChunk * chunk.width());
      for (T*& piece : buffers) piece = arena.take<T>(kChunk * chunk.width());
    }

    // grad_checkpoints: where the chunks of a sequence run side by side.
    void run(const Operand& grad_reads, const Operand& grad_final, const void* checkpoints,
             const void* grad_checkpoints = nullptr) {
      if (s[0].end == s[0].length)
        this->load(grad_final, G);
      else
        this->load_checkpoint(grad_checkpoints, s[0].end, G);
      for (int64_t first = (s[0].end + kChunk - 1) / kChunk * kChunk - kChunk; first >= s[0].begin; first -= kChunk) {
        this->load_before(checkpoints, first);
        chunk.load(s, first);
        if (grad_reads.data)
          chunk.copied(grad_reads, d_reads);
        else
          fill(d_reads, kChunk * chunk.width(), T(0));
        chunk.leave_out(T(0), d_reads);
        choose_rows();
        with_mode(p, [&](auto mode, auto coupled) {
          for (int i = 0; i < chunk.width(); i += W) {
            replay<mode(), coupled()>(i);
            scan<mode(), coupled()>(i);
          }
        });
        write_out();
      }
      for (int i = 0; s[0].begin == 0 && out.initial_state.data && i < P; ++i)
        store_state<W>(G, i * chunk.R, chunk.R, out.initial_state, s[i].n, s[i].h);
    }

    // The states before each token of the chunk, for the rows of block i.
    template <Mode mode, bool coupled>
    void replay(int i) {
      const auto& c = chunk;
      Block S(this->S + i * c.R, c.R);
      this->template write_tokens<mode, coupled>(*S, i, [&](int t, L held_by_state) {
        L* before = reinterpret_cast<L*>(history) + t * c.R;
        for (int j = 0; j < c.R; ++j) before[j] = (*S)[j];
        held_by_state.store(held + t * W);
      });
    }

    template <Mode mode, bool coupled>
    void scan(int i) {
      const auto& c = chunk;
      Block G(this->G + i * c.R, c.R);
      constexpr int most = (kKnownRank ? columns() : kMaxRank) + W;
      L q_share[most], k_share[most];
      for (int j = c.R; j < most; ++j) q_share[j] = k_share[j] = L{};
      for (int t = c.n - 1; t >= 0; --t) {
        const L* before = reinterpret_cast<const L*>(history) + t * c.R;
        const auto token = c.template token<mode, coupled>(t, i);
        const TokenGradients<L> d =
            token_adjoint(*G, before, c.q.columns(t), c.k.columns(t), token.keep, token.erase, token.value,
                          L::load(held + t * W), L::load(d_reads + t * c.width() + i), q_share, k_share, c.R);
        const auto of = c.template adjoint<mode, coupled>(t, i, d);
        of.v.store(d_v.data + t * d_v.stride + i);
        of.beta.store(d_beta.data + t * d_beta.stride + i);
        if (!coupled) of.decay.store(d_decay.data + t * d_decay.stride + i);
        if (mode == Mode::affine) of.write.store(d_write.data + t * d_write.stride + i);
        if (out.q.data) add_rows(q_share, d_q.data + t * d_q.stride, i > 0);
        if (out.k.data) add_rows(k_share, d_k.data + t * d_k.stride, i > 0);
      }
      G.put_back(c.R);
    }

    DELTAMEM_INLINE void add_rows(L* share, T* sum, bool more) const {
      constexpr int group = W / P;
      for (int j = 0; j < chunk.R; j += group) {
        L rows = sum_lanes<group>(share + j);
        if (more) rows = rows + L::load(sum + j);
        rows.store(sum + j);
      }
    }

    template <class F>
    void for_each_gradient(F&& f) {
      f(d_q, buffers[0], out.q, false), f(d_k, buffers[1], out.k, false), f(d_v, buffers[2], out.v, false);
      f(d_beta, buffers[3], out.beta, out.beta_per_head);
      f(d_decay, buffers[4], out.decay, out.decay_per_head);
      f(d_write, buffers[5], out.write, out.write_per_head);
    }

    // Between the rows of other heads many streams of stores, often a multiple of 4 KiB apart, would fight for the
    // same few lines of the cache: such gradients go by way of a buffer.
    void choose_rows() {
      for_each_gradient([&](Rows& rows, T* buffer, const Operand& x, bool per_head) {
        const bool in_place = x.data && !per_head && x.stride[1] == chunk.width() && chunk.in_place(x);
        rows = in_place ? Rows{chunk.span[0].template begin<T>(x), ptrdiff_t(x.stride[1])} : Rows{buffer, chunk.width()};
      });
    }

    void write_out() {
      for_each_gradient([&](Rows& rows, T* buffer, const Operand& x, bool per_head) {
        if (!x.data || rows.data != buffer) return;
        chunk.leave_out(T(0), buffer);
        for (int i = 0; i < P; ++i)
          unstage(x, chunk.span[i], chunk.R, buffer + i * chunk.R, chunk.width(), per_head);
      });
    }
  };

  static size_t padded(const Problem& p) { return Chunk<T, W, Rank, P>::padded(p.R); }

  // Runs the task, or P of them where as many of one length follow; returns how many.
  template <class Direction, class Run, class... Arguments>
  static int run(const Problem& p, int64_t task, int64_t end, Run&& run, const Arguments&... arguments) {
    Sequence tasks[P];
    if (task + P > end) return 0;
    for (int i = 0; i < P; ++i) {
      tasks[i] = Sequence(p, task + i);
      if (tasks[i].length != tasks[0].length) return 0;
    }
    thread_local Arena arena;
    arena.reset(Direction::bytes(p));
    Direction direction(p, arguments..., tasks, arena);
    run(direction);
    return P;
  }
};

// The tasks [begin, end), as many side by side as Wide takes, the rest by One.
template <class Wide, class One>
struct Tasks {
  static void forward(const Problem& p, const ForwardOutput& out, int64_t begin, int64_t end) {
    auto run = [&](auto& heads) { heads.run(out); };
    for (int64_t task = begin; task < end;) {
      int done = Wide::template run<typename Wide::Forward>(p, task, end, run);
      task += done ? done : One::template run<typename One::Forward>(p, task, end, run);
    }
  }

  static void backward(const Problem& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                       const BackwardOutput& out, int64_t begin, int64_t end) {
    auto run = [&](auto& heads) { heads.run(d_reads, d_final_state, checkpoints); };
    for (int64_t task = begin; task < end;) {
      int done = Wide::template run<typename Wide::Backward>(p, task, end, run, out);
      task += done ? done : One::template run<typename One::Backward>(p, task, end, run, out);
    }
  }
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

// delta_update on a CPU, forward and backward. A task is one head of one sequence. Tokens run in chunks, and the rows
// of a state in blocks of W lanes, one vector each. If P heads fit into a vector, P tasks run together: the dependent
// operations of a single head leave half of the arithmetic units idle. A head gets the same bits either way.
#pragma once

#include "staged_tokens.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

constexpr int kMaxRank = 128;

// Rank is a std::integral_constant, which lets the compiler keep a block of the state in registers, or int.
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

  static Rank rank(const ScanArgs& p) {
    if constexpr (kKnownRank)
      return {};
    else
      return int(p.R);
  }

  // W rows of a state: R columns of W lanes. With a known rank it is a copy in registers, which write_back stores.
  struct Block {
    L known[kKnownRank ? columns() : 1];
    L* memory;
    DELTAMEM_INLINE Block(T* at, Rank R) : memory(reinterpret_cast<L*>(at)) {
      if (kKnownRank)
        for (int j = 0; j < R; ++j) known[j] = memory[j];
    }
    DELTAMEM_INLINE L* operator*() { return kKnownRank ? known : memory; }
    DELTAMEM_INLINE void write_back(Rank R) {
      if (kKnownRank)
        for (int j = 0; j < R; ++j) memory[j] = known[j];
    }
  };

  // P heads with the tokens of a chunk and their states: what forward and backward share.
  struct Heads {
    const ScanArgs& p;
    Sequence s[P];
    StagedTokens<T, W, Rank, P> chunk;
    T* S;  // [blocks, R, W]

    static size_t bytes(const ScanArgs& p) {
      return decltype(chunk)::bytes(p) + Arena::bytes<T>(p.R * decltype(chunk)::padded(p.R));
    }
    Heads(const ScanArgs& p, const Sequence* tasks, Arena& arena)
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
        load_state<W>(contiguous_states<T>(p, checkpoints), s[i].checkpoint(p, first), s[i].h, chunk.R, S, i * chunk.R);
    }

    // The state before token `first`.
    void load_before(const void* checkpoints, int64_t first) {
      first ? load_checkpoint(checkpoints, first, S) : load(p.initial_state, S);
    }

    // Applies the chunk's tokens to the rows of block i, and calls before(t, S k) before each. Without `values` the
    // tokens only decay and erase.
    template <Mode mode, bool coupled, bool values = true, class F>
    DELTAMEM_INLINE void write_tokens(L* S, int i, F&& before) const {
      const auto& c = chunk;
      L held = dot(S, c.k.columns(0), c.R);
      for (int t = 0; t < c.n; ++t) {
        before(t, held);
        const auto token = c.template token<mode, coupled>(t, i);
        const L change = change_by(token.erase, held, values ? token.value : L{});
        // The last token has no next key. It uses its own, whose overlap is 0, and the result is not used.
        const L ahead = dot(S, c.k.columns(t + 1 < c.n ? t + 1 : t), c.R);
        held = held_next(token.keep, ahead, change, c.overlap_at(t));
        write_token(S, c.k.columns(t), token.keep, change, c.R);
      }
    }
  };

  struct Forward : Heads {
    using Heads::chunk, Heads::p, Heads::s, Heads::S;
    T* reads;  // [kChunk, width]

    static size_t bytes(const ScanArgs& p) { return Heads::bytes(p) + Arena::bytes<T>(kChunk * padded(p)); }
    Forward(const ScanArgs& p, const Sequence* tasks, Arena& arena)
        : Heads(p, tasks, arena), reads(arena.take<T>(kChunk * chunk.width())) {}

    void run(const ScanOutput& out) {
      this->load_before(out.checkpoints, s[0].begin);
      for (int64_t first = s[0].begin; first < s[0].end; first += kChunk) {
        for (int i = 0; first > s[0].begin && out.checkpoints && i < P; ++i)
          store_state<W>(S, i * chunk.R, chunk.R, contiguous_states<T>(p, out.checkpoints), s[i].checkpoint(p, first),
                         s[i].h);
        chunk.load(s, first);
        const bool in_place = chunk.in_place(out.reads);
        T* to = in_place ? chunk.span[0].template begin<T>(out.reads) : reads;
        const ptrdiff_t stride = in_place ? out.reads.stride[1] : chunk.width();
        with_mode(p, [&](auto mode, auto coupled) { scan<mode(), coupled()>(to, stride); });
        if (in_place) continue;
        chunk.fill_masked(reads, T(0));
        for (int i = 0; i < P; ++i) unstage(out.reads, chunk.span[i], chunk.R, reads + i * chunk.R, chunk.width());
      }
      for (int i = 0; s[0].end == s[0].length && i < P; ++i)
        store_state<W>(S, i * chunk.R, chunk.R, contiguous_states<T>(p, out.final_state), s[i].n, s[i].h);
    }

    template <Mode mode, bool coupled>
    void scan(T* reads, ptrdiff_t stride) {
      const auto& c = chunk;
      for (int i = 0; i < c.width(); i += W) {
        Block S(this->S + i * c.R, c.R);
        this->template write_tokens<mode, coupled>(
            *S, i, [&](int t, L) { dot(*S, c.q.columns(t), c.R).store(reads + t * stride + i); });
        S.write_back(c.R);
      }
    }
  };

  struct Backward : Heads {
    using Heads::chunk, Heads::p, Heads::s, Heads::S;
    const ScanGradients& out;
    T* G;               // gradient of the state, [blocks, R, W]
    T *history, *held;  // S and S k before each token of the chunk, [kChunk, R, W] and [kChunk, W]
    T *d_reads, *buffers[6];  // [kChunk, width]
    struct Rows {
      T* data;
      ptrdiff_t stride;
    } d_q, d_k, d_v, d_beta, d_decay, d_write;  // in the results, or in `buffers`: see choose_rows

    static size_t bytes(const ScanArgs& p) {
      return Heads::bytes(p) + Arena::bytes<T>(p.R * padded(p)) + Arena::bytes<T>(kChunk * p.R * W) +
             Arena::bytes<T>(kChunk * W) + 7 * Arena::bytes<T>(kChunk * padded(p));
    }
    Backward(const ScanArgs& p, const ScanGradients& out, const Sequence* tasks, Arena& arena)
        : Heads(p, tasks, arena), out(out) {
      G = arena.take<T>(chunk.R * chunk.width());
      history = arena.take<T>(kChunk * chunk.R * W), held = arena.take<T>(kChunk * W);
      d_reads = arena.take<T>(kChunk * chunk.width());
      for (T*& buffer : buffers) buffer = arena.take<T>(kChunk * chunk.width());
    }

    // grad_checkpoints: gradients of the states between chunks, if the chunks of a sequence run in parallel.
    void run(const Operand& grad_reads, const Operand& grad_final, const void* checkpoints,
             const void* grad_checkpoints = nullptr) {
      if (s[0].end == s[0].length)
        this->load(grad_final, G);
      else
        this->load_checkpoint(grad_checkpoints, s[0].end, G);
      for (int64_t first = (s[0].end + kChunk - 1) / kChunk * kChunk - kChunk; first >= s[0].begin; first -= kChunk) {
        this->load_before(checkpoints, first);
        chunk.load(s, first);
        chunk.load_d_reads(grad_reads, d_reads);
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

    // Runs the chunk forward again and keeps the states before its tokens, for the rows of block i.
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

    // Takes the gradient of the state back through the chunk, for the rows of block i.
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
      G.write_back(c.R);
    }

    // Adds the shares of block i's rows to a row of d_q or d_k.
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

    // A gradient goes through a buffer unless the rows of consecutive tokens are adjacent in memory. Rows between those
    // of other heads would make many streams of stores, often a multiple of 4 KiB apart, which compete for the same
    // cache lines.
    void choose_rows() {
      for_each_gradient([&](Rows& rows, T* buffer, const Operand& x, bool per_head) {
        const bool in_place = x.data && !per_head && x.stride[1] == chunk.width() && chunk.in_place(x);
        rows = {buffer, chunk.width()};
        if (in_place) rows = {chunk.span[0].template begin<T>(x), ptrdiff_t(x.stride[1])};
      });
    }

    void write_out() {
      for_each_gradient([&](Rows& rows, T* buffer, const Operand& x, bool per_head) {
        if (!x.data || rows.data != buffer) return;
        chunk.fill_masked(buffer, T(0));
        for (int i = 0; i < P; ++i)
          unstage(x, chunk.span[i], chunk.R, buffer + i * chunk.R, chunk.width(), per_head);
      });
    }
  };

  static size_t padded(const ScanArgs& p) { return StagedTokens<T, W, Rank, P>::padded(p.R); }

  // Runs P tasks from `task` on and returns P, or returns 0 if fewer remain or their sequences differ in length.
  template <class Direction, class Run, class... Arguments>
  static int run(const ScanArgs& p, int64_t task, int64_t end, Run&& run, const Arguments&... arguments) {
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

// Runs tasks [begin, end): several at a time with Wide where it takes them, otherwise one at a time with One.
template <class Wide, class One>
struct TaskRunner {
  static void forward(const ScanArgs& p, const ScanOutput& out, int64_t begin, int64_t end) {
    auto run = [&](auto& heads) { heads.run(out); };
    for (int64_t task = begin; task < end;) {
      int done = Wide::template run<typename Wide::Forward>(p, task, end, run);
      task += done ? done : One::template run<typename One::Forward>(p, task, end, run);
    }
  }

  static void backward(const ScanArgs& p, const Operand& d_reads, const Operand& d_final_state, const void* checkpoints,
                       const ScanGradients& out, int64_t begin, int64_t end) {
    auto run = [&](auto& heads) { heads.run(d_reads, d_final_state, checkpoints); };
    for (int64_t task = begin; task < end;) {
      int done = Wide::template run<typename Wide::Backward>(p, task, end, run, out);
      task += done ? done : One::template run<typename One::Backward>(p, task, end, run, out);
    }
  }
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

// delta_update with the chunks of a sequence side by side. A chunk takes row i of a state, s, to s M_i + b_i: the scan
// itself, run on R + 1 virtual states, whose rows are all the unit vector m, without values, or zeros, with them. The
// gradient of a state goes back through M_i transposed (one token's map is symmetric), and d_reads add to it: the same,
// run from the last token to the first. Then the maps are folded into the states between the chunks, and all chunks
// run at once, from there.
#pragma once

#include "scan.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

// A map is [R + 1, blocks, R, W]: virtual state m, its rows in blocks of W lanes, its columns; state R is b.
template <class T, int W, class Rank>
struct ChunkedScan {
  typedef Scan<T, W, Rank> Base;
  typedef Vec<T, W> L;
  typedef typename Base::Block Block;

  struct Maps : Base::Heads {
    using Base::Heads::chunk, Base::Heads::p, Base::Heads::s, Base::Heads::S;
    T* d_reads;

    static size_t bytes(const Problem& p) { return Base::Heads::bytes(p) + Arena::piece<T>(kChunk * Base::padded(p)); }
    Maps(const Problem& p, const Sequence& sequence, Arena& arena)
        : Base::Heads(p, &sequence, arena), d_reads(arena.take<T>(kChunk * chunk.width())) {}

    void run(const Operand* grad_reads, T* map) {
      chunk.load(s, s[0].begin);
      if (grad_reads) {
        if (grad_reads->data)
          chunk.copied(*grad_reads, d_reads);
        else
          fill(d_reads, kChunk * chunk.width(), T(0));
        chunk.leave_out(T(0), d_reads);
      }
      const int size = chunk.R * chunk.width();
      with_mode(p, [&](auto mode, auto coupled) {
        for (int m = 0; m <= chunk.R; ++m, map += size)
          for (int i = 0; i < chunk.width(); i += W) {
            L* of_block = reinterpret_cast<L*>(map + i * chunk.R);
            for (int j = 0; j < chunk.R; ++j) of_block[j] = L::splat(T(j == m));
            Block virtual_state(map + i * chunk.R, chunk.R);
            if (grad_reads)
              m < chunk.R ? back<mode(), coupled(), false>(*virtual_state, i)
                          : back<mode(), coupled(), true>(*virtual_state, i);
            else if (m < chunk.R)
              this->template write_tokens<mode(), coupled(), false>(*virtual_state, i, [](int, L) {});
            else
              this->template write_tokens<mode(), coupled()>(*virtual_state, i, [](int, L) {});
            virtual_state.put_back(chunk.R);
          }
      });
    }

    template <Mode mode, bool coupled, bool values>
    DELTAMEM_INLINE void back(L* G, int i) const {
      const auto& c = chunk;
      for (int t = c.n - 1; t >= 0; --t) {
        const auto token = c.template token<mode, coupled>(t, i);
        const L erased = token.erase * dot(G, c.k.columns(t), c.R);
        const L d_read = values ? L::load(d_reads + t * c.width() + i) : L{};
        state_adjoint(G, c.q.columns(t), c.k.columns(t), token.keep, erased, d_read, c.R);
      }
    }
  };

  static T* map_of(const Problem& p, const void* maps, const Sequence& s, int64_t first) {
    return static_cast<T*>(const_cast<void*>(maps)) + (s.checkpoint(p, first) * p.H + s.h) * map_size(p.R);
  }

  // The map of a chunk lies where the state that it leads to does: behind the chunk, or for the adjoint before it.
  static void maps(const Problem& p, const Operand* d_reads, void* maps, const Piece* pieces, int64_t begin,
                   int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence s(p, pieces[i]);
      const int64_t first = d_reads ? s.begin : s.end;
      if (first == 0 || first == s.length) continue;
      thread_local Arena arena;
      arena.reset(Maps::bytes(p));
      Maps(p, s, arena).run(d_reads, map_of(p, maps, s, first));
    }
  }

  struct Fold : Base::Heads {
    using Base::Heads::chunk, Base::Heads::p, Base::Heads::s, Base::Heads::S;
    using Base::Heads::Heads;

    void run(bool adjoint, const Operand& end_state, const void* maps, void* states) {
      this->load(end_state, S);
      const int64_t last = (s[0].length - 1) / kChunk * kChunk;
      for (int64_t i = kChunk; i <= last; i += kChunk) {
        const int64_t first = adjoint ? last + kChunk - i : i;
        follow(map_of(p, maps, s[0], first));
        store_state<W>(S, 0, chunk.R, Base::contiguous_states(p, states), s[0].checkpoint(p, first), s[0].h);
      }
    }

    void follow(const T* map) {
      const int size = chunk.R * chunk.width();
      L next[Base::kKnownRank ? Base::columns() : kMaxRank];
      for (int i = 0; i < chunk.width(); i += W) {
        L* s = reinterpret_cast<L*>(S + i * chunk.R);
        const L* m = reinterpret_cast<const L*>(map + i * chunk.R);
        for (int j = 0; j < chunk.R; ++j) {
          next[j] = m[chunk.R * (size / W) + j];
          for (int row = 0; row < chunk.R; ++row) next[j] = fma(s[row], m[row * (size / W) + j], next[j]);
        }
        for (int j = 0; j < chunk.R; ++j) s[j] = next[j];
      }
    }
  };

  static void fold(const Problem& p, bool adjoint, const Operand& end_state, const void* maps, void* states,
                   int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Sequence s(p, task);
      thread_local Arena arena;
      arena.reset(Fold::bytes(p));
      Fold(p, &s, arena).run(adjoint, end_state, maps, states);
    }
  }

  template <class Direction, class... Arguments>
  static Direction piece(const Problem& p, const Piece& piece, const Arguments&... arguments) {
    const Sequence s(p, piece);
    thread_local Arena arena;
    arena.reset(Direction::bytes(p));
    return Direction(p, arguments..., &s, arena);
  }

  static void forward_pieces(const Problem& p, const ForwardOutput& out, const Piece* pieces, int64_t begin,
                             int64_t end) {
    for (int64_t i = begin; i < end; ++i) piece<typename Base::Forward>(p, pieces[i]).run(out);
  }

  static void backward_pieces(const Problem& p, const Operand& d_reads, const Operand& d_final_state,
                              const void* checkpoints, const void* d_checkpoints, const BackwardOutput& out,
                              const Piece* pieces, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      piece<typename Base::Backward>(p, pieces[i], out).run(d_reads, d_final_state, checkpoints, d_checkpoints);
  }
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

// delta_update with the chunks of a sequence in parallel.
//
// A chunk maps row i of a state, s, to s M_i + b_i. Running the scan on R + 1 virtual states gives the map: state m < R
// has the unit vector m in each row and runs without values, and state R starts at zero and runs with values. Folding
// the maps in order gives the states between the chunks. From these all chunks run at once.
//
// Backward works alike, from the last token to the first. A gradient goes back through M_i transposed (the map of a
// single token is symmetric), and d_reads take the place of the values.
#pragma once

#include "scan.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

// A map is [R + 1, blocks, R, W]: virtual state, block of W rows, column, row.
template <class T, int W, class Rank>
struct ChunkedScan {
  typedef Scan<T, W, Rank> Base;
  typedef Vec<T, W> L;
  typedef typename Base::Block Block;

  struct ChunkMap : Base::Heads {
    using Base::Heads::chunk, Base::Heads::p, Base::Heads::s, Base::Heads::S;
    T* d_reads;

    static size_t bytes(const ScanArgs& p) { return Base::Heads::bytes(p) + Arena::bytes<T>(kChunk * Base::padded(p)); }
    ChunkMap(const ScanArgs& p, const Sequence& sequence, Arena& arena)
        : Base::Heads(p, &sequence, arena), d_reads(arena.take<T>(kChunk * chunk.width())) {}

    void run(const Operand* grad_reads, T* map) {
      chunk.load(s, s[0].begin);
      if (grad_reads) chunk.load_d_reads(*grad_reads, d_reads);
      const int size = chunk.R * chunk.width();
      with_mode(p, [&](auto mode, auto coupled) {
        for (int m = 0; m <= chunk.R; ++m, map += size)
          for (int i = 0; i < chunk.width(); i += W) {
            L* of_block = reinterpret_cast<L*>(map + i * chunk.R);
            for (int j = 0; j < chunk.R; ++j) of_block[j] = L::splat(T(j == m));
            Block virtual_state(map + i * chunk.R, chunk.R);
            if (grad_reads)
              m < chunk.R ? run_back<mode(), coupled(), false>(*virtual_state, i)
                          : run_back<mode(), coupled(), true>(*virtual_state, i);
            else if (m < chunk.R)
              this->template write_tokens<mode(), coupled(), false>(*virtual_state, i, [](int, L) {});
            else
              this->template write_tokens<mode(), coupled()>(*virtual_state, i, [](int, L) {});
            virtual_state.write_back(chunk.R);
          }
      });
    }

    template <Mode mode, bool coupled, bool with_d_reads>
    DELTAMEM_INLINE void run_back(L* G, int i) const {
      const auto& c = chunk;
      for (int t = c.n - 1; t >= 0; --t) {
        const auto token = c.template token<mode, coupled>(t, i);
        const L erased = token.erase * dot(G, c.k.columns(t), c.R);
        const L d_read = with_d_reads ? L::load(d_reads + t * c.width() + i) : L{};
        state_adjoint(G, c.q.columns(t), c.k.columns(t), token.keep, erased, d_read, c.R);
      }
    }
  };

  static T* map_of(const ScanArgs& p, const void* maps, const Sequence& s, int64_t first) {
    return static_cast<T*>(const_cast<void*>(maps)) + (s.checkpoint(p, first) * p.H + s.h) * map_size(p.R);
  }

  // The map of a chunk has the index of the state that it leads to: the state after the chunk, or for backward the one
  // before it. The maps of the last chunk, or for backward of the first, are not needed.
  static void maps(const ScanArgs& p, const Operand* d_reads, void* maps, const ChunkIndex* chunks, int64_t begin,
                   int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sequence s(p, chunks[i]);
      const int64_t first = d_reads ? s.begin : s.end;
      if (first == 0 || first == s.length) continue;
      thread_local Arena arena;
      arena.reset(ChunkMap::bytes(p));
      ChunkMap(p, s, arena).run(d_reads, map_of(p, maps, s, first));
    }
  }

  // Takes the states before a sequence, or the gradients after it, through the maps of its chunks.
  struct Fold : Base::Heads {
    using Base::Heads::chunk, Base::Heads::p, Base::Heads::s, Base::Heads::S;
    using Base::Heads::Heads;

    void run(bool adjoint, const Operand& end_state, const void* maps, void* states) {
      this->load(end_state, S);
      const int64_t last = (s[0].length - 1) / kChunk * kChunk;
      for (int64_t i = kChunk; i <= last; i += kChunk) {
        const int64_t first = adjoint ? last + kChunk - i : i;
        apply(map_of(p, maps, s[0], first));
        store_state<W>(S, 0, chunk.R, contiguous_states<T>(p, states), s[0].checkpoint(p, first), s[0].h);
      }
    }

    void apply(const T* map) {
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

  static void fold(const ScanArgs& p, bool adjoint, const Operand& end_state, const void* maps, void* states,
                   int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Sequence s(p, task);
      thread_local Arena arena;
      arena.reset(Fold::bytes(p));
      Fold(p, &s, arena).run(adjoint, end_state, maps, states);
    }
  }

  template <class Direction, class... Arguments>
  static Direction one_chunk(const ScanArgs& p, const ChunkIndex& index, const Arguments&... arguments) {
    const Sequence s(p, index);
    thread_local Arena arena;
    arena.reset(Direction::bytes(p));
    return Direction(p, arguments..., &s, arena);
  }

  static void forward_chunks(const ScanArgs& p, const ScanOutput& out, const ChunkIndex* chunks, int64_t begin,
                             int64_t end) {
    for (int64_t i = begin; i < end; ++i) one_chunk<typename Base::Forward>(p, chunks[i]).run(out);
  }

  static void backward_chunks(const ScanArgs& p, const Operand& d_reads, const Operand& d_final_state,
                              const void* checkpoints, const void* d_checkpoints, const ScanGradients& out,
                              const ChunkIndex* chunks, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      one_chunk<typename Base::Backward>(p, chunks[i], out).run(d_reads, d_final_state, checkpoints, d_checkpoints);
  }
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

// A chunk of one head's tokens, staged: after this, the loop over tokens knows neither modes nor dtypes nor masks.
#pragma once

#include "staging.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

constexpr int kChunk = kCheckpointInterval;

// Memory of one thread, carved up in order, each piece on a cache line. No container of the standard library: its
// functions would be shared with the translation units for older processors.
class Arena {
 public:
  ~Arena() { std::free(memory_); }
  void reset(size_t bytes) {
    if (size_ < bytes) {
      std::free(memory_);
      memory_ = static_cast<char*>(std::aligned_alloc(kLine, bytes));
      size_ = bytes;
    }
    next_ = memory_;
  }
  template <class T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += piece<T>(count);
    return p;
  }
  template <class T>
  static size_t piece(size_t count) {
    return (count * sizeof(T) + kLine - 1) / kLine * kLine;
  }

 private:
  static constexpr size_t kLine = 64;
  char *memory_ = nullptr, *next_ = nullptr;
  size_t size_ = 0;
};

template <class T>
DELTAMEM_INLINE void fill(T* p, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

// Calls f with the mode, and whether decay is 1 - beta, as constants.
template <class F>
DELTAMEM_INLINE void with_mode(const Problem& p, F&& f) {
  auto decay = [&](auto mode) { p.decay.data ? f(mode, std::false_type{}) : f(mode, std::true_type{}); };
  switch (p.mode) {
    case Mode::standard: return decay(std::integral_constant<Mode, Mode::standard>{});
    case Mode::lambda_outside: return decay(std::integral_constant<Mode, Mode::lambda_outside>{});
    case Mode::no_lambda: return f(std::integral_constant<Mode, Mode::no_lambda>{}, std::true_type{});
    case Mode::affine: return f(std::integral_constant<Mode, Mode::affine>{}, std::false_type{});
  }
}

// The sequence and head of a task, its row of the batch and its tokens there.
struct Sequence {
  int64_t n, h, b, start, length;
  Sequence() = default;
  Sequence(const Problem& p, int64_t task) : n(task / p.H), h(task % p.H) {
    b = p.cu_seqlens ? 0 : n;
    start = p.cu_seqlens ? p.cu_seqlens[n] : 0;
    length = p.cu_seqlens ? p.cu_seqlens[n + 1] - start : p.T;
  }
  Span chunk(int64_t first) const {
    return {b, start + first, h, int(length - first < kChunk ? length - first : kChunk)};
  }
  // Where the state before token `first` (a multiple of the interval, not 0) is kept: rounding the start down leaves
  // every sequence of a packed batch the room it needs.
  int64_t checkpoint(const Problem& p, int64_t first) const {
    return b * (p.T / kCheckpointInterval) + start / kCheckpointInterval + first / kCheckpointInterval - 1;
  }
};

// The tokens of P heads (with sequences of one length) side by side: vectors of rows have width() numbers, P times R,
// or for one head whole blocks of W lanes. A token that the mask leaves out has keep = 1 and zeros everywhere else,
// whatever stood there.
template <class T, int W, class Rank, int P>
struct Chunk {
  const Problem& p;
  Rank R;
  int n = 0;
  Span span[P];
  Rows<T> q, k, v, beta, decay, write;
  T *keep, *erase, *value;  // [kChunk, width]; value = write v
  T* overlap;               // each key times the next, 0 behind the last: see overlap_at

  static constexpr int padded(int64_t R) { return P == 1 ? int((R + W - 1) / W * W) : W; }
  DELTAMEM_INLINE int width() const { return padded(R); }
  static size_t bytes(const Problem& p, int64_t tokens = kChunk) {
    return 10 * Arena::piece<T>(tokens * padded(p.R));
  }
  Chunk(const Problem& p, Rank R, Arena& arena, int64_t tokens = kChunk) : p(p), R(R) {
    for (T** piece : {&keep, &erase, &value, &overlap}) *piece = arena.take<T>(tokens * width());
    for (T*& piece : buffers_) piece = arena.take<T>(tokens * width());
  }

  void load(const Sequence* s, int64_t first) {
    for (int i = 0; i < P; ++i) span[i] = s[i].chunk(first);
    n = span[0].n;
    load_rows([&](const Operand& x, T* buffer) {
      return in_place(x) ? Rows<T>{span[0].template begin<T>(x), ptrdiff_t(x.stride[1])} : copied(x, buffer);
    });
    leave_out(T(1), keep);
    for (T* x : {erase, value, buffers_[0], buffers_[1]}) leave_out(T(0), x);
    multiply_keys();
  }

  // All operands by `rows(operand, buffer)`, and what the gates make of them.
  template <class F>
  DELTAMEM_INLINE void load_rows(F&& rows) {
    q = rows(p.q, buffers_[0]), k = rows(p.k, buffers_[1]), v = rows(p.v, buffers_[2]);
    beta = rows(p.beta, buffers_[3]);
    if (p.decay.data) decay = rows(p.decay, buffers_[4]);
    if (p.write.data) write = rows(p.write, buffers_[5]);
    with_mode(p, [&](auto mode, auto coupled) { combine_gates<mode(), coupled()>(); });
  }

  Rows<T> copied(const Operand& x, T* buffer) const {
    for (int i = 0; i < P; ++i) stage(x, span[i], R, buffer + i * R, width(), P == 1 ? width() : int(R));
    return {buffer, width()};
  }

  // `value` into the rows of the tokens that the mask leaves out.
  void leave_out(T value, T* rows) const {
    for (int i = 0; p.mask && i < P; ++i)
      for (int t = 0; t < n; ++t)
        if (!p.mask[span[i].b * p.mask_stride[0] + (span[i].first + t) * p.mask_stride[1]])
          fill(rows + t * width() + i * R, P == 1 ? width() : int(R), value);
  }

  DELTAMEM_INLINE Vec<T, W> overlap_at(int t) const {
    return Broadcast<T, W, P>{overlap + t / kGroup * W}[t % kGroup];
  }

  // On entry the gradients of keep, erase and value; on return those of decay, beta and write in their places, and
  // that of v in d_v.
  void adjoint_of_gates(T* d_keep, T* d_erase, T* d_value, T* d_v) const {
    with_mode(p, [&](auto mode, auto coupled) { adjoint_of_gates<mode(), coupled()>(d_keep, d_erase, d_value, d_v); });
  }

 private:
  typedef Vec<T, W> L;
  static constexpr int kGroup = W / P;  // lanes of a head
  T* buffers_[6];

  bool in_place(const Operand& x) const {
    if (p.mask || width() != P * R || x.dtype != kDType<T> || x.stride[3] != 1) return false;
    for (int i = 1; i < P; ++i)
      if (x.stride[2] != R || span[i].h != span[0].h + i || span[i].first != span[0].first || span[i].b != span[0].b)
        return false;
    return true;
  }

  void multiply_keys() {
    for (int t = 0; t < n; t += kGroup) {
      L products[kGroup];
      for (int l = 0; l < kGroup; ++l) {
        products[l] = L{};
        if (t + l + 1 < n)
          for (int j = 0; j < width(); j += W)
            products[l] = fma(L::load(k[t + l] + j), L::load(k[t + l + 1] + j), products[l]);
      }
      sum_lanes<kGroup>(products).store(overlap + t / kGroup * W);
    }
  }

  struct Raw {
    L beta, decay, write;
  };
  template <Mode mode, bool coupled>
  DELTAMEM_INLINE Raw raw(int t, int i) const {
    const L b = L::load(beta[t] + i);
    return {b, coupled ? b : L::load(decay[t] + i), mode == Mode::affine ? L::load(write[t] + i) : b};
  }

  template <Mode mode, bool coupled>
  void combine_gates() {
    const L one = L::splat(T(1));
    T *keep = this->keep, *erase = this->erase, *value = this->value;
    for (int t = 0, end = n; t < end; ++t)
      for (int i = 0; i < width(); i += W) {
        const Raw x = raw<mode, coupled>(t, i);
        const Gates<L> g = gates(mode, coupled, one, x.beta, x.decay, x.write);
        g.keep.store(keep + t * width() + i);
        g.erase.store(erase + t * width() + i);
        (g.write * L::load(v[t] + i)).store(value + t * width() + i);
      }
  }

  template <Mode mode, bool coupled>
  void adjoint_of_gates(T* d_keep, T* d_erase, T* d_value, T* d_v) const {
    const L one = L::splat(T(1));
    for (int t = 0, end = n; t < end; ++t)
      for (int i = 0; i < width(); i += W) {
        const int at = t * width() + i;
        const Raw x = raw<mode, coupled>(t, i);
        const L d_write_v = L::load(d_value + at);
        const Gates<L> d{L::load(d_keep + at), L::load(d_erase + at), d_write_v * L::load(v[t] + i)};
        const GateGradients<L> g = gates_adjoint(mode, coupled, one, x.beta, x.decay, d);
        g.beta.store(d_erase + at), g.decay.store(d_keep + at), g.write.store(d_value + at);
        (d_write_v * gates(mode, coupled, one, x.beta, x.decay, x.write).write).store(d_v + at);
      }
  }
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

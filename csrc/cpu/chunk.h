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

// The sequence and head of a task, its row of the batch and its tokens there, of which [begin, end) are to be run.
struct Sequence {
  int64_t n, h, b, start, length, begin, end;
  Sequence() = default;
  Sequence(const Problem& p, int64_t task) : n(task / p.H), h(task % p.H) {
    b = p.cu_seqlens ? 0 : n;
    start = p.cu_seqlens ? p.cu_seqlens[n] : 0;
    length = p.cu_seqlens ? p.cu_seqlens[n + 1] - start : p.T;
    begin = 0, end = length;
  }
  Sequence(const Problem& p, const Piece& piece) : Sequence(p, piece.task) {
    begin = piece.first;
    end = length - begin < kChunk ? length : begin + kChunk;
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
// or for one head whole blocks of W lanes. A token that the mask leaves out has decay = 1 and zeros everywhere else,
// whatever stood there: in every mode it then keeps all, erases nothing and writes nothing.
template <class T, int W, class Rank, int P>
struct Chunk {
  typedef Vec<T, W> L;

  const Problem& p;
  Rank R;
  int n = 0;
  Span span[P];
  typedef deltamem::Rows<T, W, P> Rows;
  Rows q, k, v, beta, decay, write;
  T* overlap;  // each key times the next, 0 behind the last: see overlap_at

  static constexpr int padded(int64_t R) { return P == 1 ? int((R + W - 1) / W * W) : W; }
  DELTAMEM_INLINE int width() const { return padded(R); }
  static size_t bytes(const Problem& p, int64_t tokens = kChunk) {
    return 7 * Arena::piece<T>(tokens * padded(p.R));
  }
  Chunk(const Problem& p, Rank R, Arena& arena, int64_t tokens = kChunk) : p(p), R(R) {
    overlap = arena.take<T>(tokens * width());
    for (T*& piece : buffers_) piece = arena.take<T>(tokens * width());
  }

  void load(const Sequence* s, int64_t first) {
    for (int i = 0; i < P; ++i) span[i] = s[i].chunk(first);
    n = span[0].n;
    load_rows([&](const Operand& x, T* buffer) {
      if (p.mask || width() != P * R || x.dtype != kDType<T> || x.stride[3] != 1) return copied(x, buffer);
      Rows rows;
      for (int i = 0; i < P; ++i) rows.data[i] = span[i].template begin<T>(x);
      rows.stride = ptrdiff_t(x.stride[1]);
      return rows;
    });
    if (p.mask)
      for (int i = 0; i < 6; ++i) leave_out(T(i == 4 ? 1 : 0), buffers_[i]);
    multiply_keys();
  }

  // Whether results can be written to x as whole vectors.
  bool in_place(const Operand& x) const {
    if (p.mask || width() != P * R || x.dtype != kDType<T> || x.stride[3] != 1) return false;
    for (int i = 1; i < P; ++i)
      if (span[i].template begin<T>(x) != span[0].template begin<T>(x) + i * R) return false;
    return true;
  }

  // All operands by `rows(operand, buffer)`.
  template <class F>
  DELTAMEM_INLINE void load_rows(F&& rows) {
    q = rows(p.q, buffers_[0]), k = rows(p.k, buffers_[1]), v = rows(p.v, buffers_[2]);
    beta = rows(p.beta, buffers_[3]);
    if (p.decay.data) decay = rows(p.decay, buffers_[4]);
    if (p.write.data) write = rows(p.write, buffers_[5]);
  }

  Rows copied(const Operand& x, T* buffer) const {
    for (int i = 0; i < P; ++i) stage(x, span[i], R, buffer + i * R, width(), P == 1 ? width() : int(R));
    return staged_at(buffer);
  }
  Rows staged_at(const T* buffer) const {
    Rows rows;
    for (int i = 0; i < P; ++i) rows.data[i] = buffer + i * R;
    rows.stride = width();
    return rows;
  }

  // `value` into the rows of the tokens that the mask leaves out.
  void leave_out(T value, T* rows) const {
    for (int i = 0; p.mask && i < P; ++i)
      for (int t = 0; t < n; ++t)
        if (!p.mask[span[i].b * p.mask_stride[0] + (span[i].first + t) * p.mask_stride[1]])
          fill(rows + t * width() + i * R, P == 1 ? width() : int(R), value);
  }

  DELTAMEM_INLINE Vec<T, W> overlap_at(int t) const {
    if constexpr (P == 1)
      return L::splat(overlap[t]);
    else
      return Broadcast<T, W, P>{L::load(overlap + t / kGroup * W)}[t % kGroup];
  }

  // What token t does to the rows from i on, value = write v.
  struct Token {
    L keep, erase, value;
  };
  template <Mode mode, bool coupled>
  DELTAMEM_INLINE Token token(int t, int i) const {
    const Raw x = raw<mode, coupled>(t, i);
    const Gates<L> g = gates(mode, coupled, L::splat(T(1)), x.beta, x.decay, x.write);
    return {g.keep, g.erase, g.write * v.load(t, i)};
  }

  // From the gradients of keep, erase and value to those of the operands.
  struct TokenAdjoint {
    L v, beta, decay, write;
  };
  template <Mode mode, bool coupled>
  DELTAMEM_INLINE TokenAdjoint adjoint(int t, int i, TokenGradients<L> d) const {
    const L one = L::splat(T(1));
    const Raw x = raw<mode, coupled>(t, i);
    const Gates<L> of_gates{d.keep, d.erase, d.value * v.load(t, i)};
    const GateGradients<L> g = gates_adjoint(mode, coupled, one, x.beta, x.decay, of_gates);
    return {d.value * gates(mode, coupled, one, x.beta, x.decay, x.write).write, g.beta, g.decay, g.write};
  }

 private:
  static constexpr int kGroup = W / P;  // lanes of a head
  T* buffers_[6];

  DELTAMEM_INLINE L product_of_keys(int t) const {
    L product{};
    for (int j = 0; j < width(); j += W) product = fma(k.load(t, j), k.load(t + 1, j), product);
    return product;
  }

  void multiply_keys() {
    L products[kGroup];
    int t = 0;
    for (; t + kGroup < n; t += kGroup) {
      for (int l = 0; l < kGroup; ++l) products[l] = product_of_keys(t + l);
      sum_lanes<kGroup>(products).store(overlap + t / kGroup * W);
    }
    for (int l = 0; l < kGroup; ++l) products[l] = t + l + 1 < n ? product_of_keys(t + l) : L{};
    sum_lanes<kGroup>(products).store(overlap + t / kGroup * W);
  }

  struct Raw {
    L beta, decay, write;
  };
  template <Mode mode, bool coupled>
  DELTAMEM_INLINE Raw raw(int t, int i) const {
    const L b = beta.load(t, i);
    return {b, coupled ? b : decay.load(t, i), mode == Mode::affine ? write.load(t, i) : b};
  }
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

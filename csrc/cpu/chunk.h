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

// Vectors of rows are padded to width(), whole blocks of W lanes. A token that the mask leaves out has keep = 1 and
// zeros everywhere else, whatever stood there.
template <class T, int W, class Rank>
struct Chunk {
  const Problem& p;
  Rank R;
  Span span{};
  Rows<T> q, k, v, beta, decay, write;
  T *keep, *erase, *value;  // [kChunk, width]; value = write v
  T* overlap;               // [kChunk]: each key times the next, 0 behind the last

  static constexpr int padded(int64_t R) { return int((R + W - 1) / W * W); }
  DELTAMEM_INLINE int width() const { return padded(R); }
  static size_t bytes(const Problem& p) { return 9 * Arena::piece<T>(kChunk * padded(p.R)) + Arena::piece<T>(kChunk); }

  Chunk(const Problem& p, Rank R, Arena& arena) : p(p), R(R) {
    for (T** piece : {&keep, &erase, &value}) *piece = arena.take<T>(kChunk * width());
    for (T*& piece : buffers_) piece = arena.take<T>(kChunk * width());
    overlap = arena.take<T>(kChunk);
  }

  void load(Span s) {
    span = s;
    T** buffer = buffers_;
    auto rows = [&](const Operand& x) {
      return stage<T>(x, span, R, width(), !p.mask && width() == R, *buffer++);
    };
    q = rows(p.q), k = rows(p.k), v = rows(p.v), beta = rows(p.beta);
    if (p.decay.data) decay = rows(p.decay);
    if (p.write.data) write = rows(p.write);
    with_mode(p, [&](auto mode, auto coupled) { combine_gates<mode(), coupled()>(); });
    for_tokens_left_out([&](int t) {
      fill(keep + t * width(), width(), T(1));
      for (T* x : {erase, value}) fill(x + t * width(), width(), T(0));
      for (T* x : {buffers_[0], buffers_[1]}) fill(x + t * width(), width(), T(0));
    });
    multiply_keys();
  }

  template <class F>
  DELTAMEM_INLINE void for_tokens_left_out(F&& f) const {
    if (p.mask)
      for (int t = 0; t < span.n; ++t)
        if (!p.mask[span.b * p.mask_stride[0] + (span.first + t) * p.mask_stride[1]]) f(t);
  }

  // On entry the gradients of keep, erase and value; on return those of decay, beta and write in their places, and
  // that of v in d_v.
  void adjoint_of_gates(T* d_keep, T* d_erase, T* d_value, T* d_v) const {
    with_mode(p, [&](auto mode, auto coupled) { adjoint_of_gates<mode(), coupled()>(d_keep, d_erase, d_value, d_v); });
  }

 private:
  typedef Vec<T, W> L;
  T* buffers_[6];

  struct Raw {
    L beta, decay, write;
  };
  template <Mode mode, bool coupled>
  DELTAMEM_INLINE Raw raw(int t, int i) const {
    const L b = L::load(beta[t] + i);
    return {b, coupled ? b : L::load(decay[t] + i), mode == Mode::affine ? L::load(write[t] + i) : b};
  }

  void multiply_keys() {
    for (int t = 0; t < span.n; t += W) {
      L products[W];
      for (int l = 0; l < W; ++l) {
        products[l] = L{};
        if (t + l + 1 < span.n)
          for (int j = 0; j < width(); j += W)
            products[l] = fma(L::load(k[t + l] + j), L::load(k[t + l + 1] + j), products[l]);
      }
      sum_lanes(products).store(overlap + t);
    }
  }

  template <Mode mode, bool coupled>
  void combine_gates() {
    const L one = L::splat(T(1));
    T *keep = this->keep, *erase = this->erase, *value = this->value;
    for (int t = 0, n = span.n; t < n; ++t)
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
    for (int t = 0; t < span.n; ++t)
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

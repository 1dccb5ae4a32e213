// The operands of a chunk of tokens, staged for the scan: converted to the arithmetic's dtype, with the mask applied.
// The loop over tokens then needs no branches.
#pragma once

#include "arena.h"
#include "load_store.h"

namespace deltamem {
inline namespace DELTAMEM_ISA {

constexpr int kChunk = kCheckpointInterval;

// Calls f with the mode, and whether decay is coupled to beta, as std::integral_constants.
template <class F>
DELTAMEM_INLINE void with_mode(const ScanArgs& p, F&& f) {
  auto decay = [&](auto mode) { p.decay.data ? f(mode, std::false_type{}) : f(mode, std::true_type{}); };
  switch (p.mode) {
    case Mode::standard: return decay(std::integral_constant<Mode, Mode::standard>{});
    case Mode::lambda_outside: return decay(std::integral_constant<Mode, Mode::lambda_outside>{});
    case Mode::no_lambda: return f(std::integral_constant<Mode, Mode::no_lambda>{}, std::true_type{});
    case Mode::affine: return f(std::integral_constant<Mode, Mode::affine>{}, std::false_type{});
  }
}

// Task n * H + h of the scan: sequence n and head h. The sequence has `length` tokens from token `start` of batch row
// b; its tokens [begin, end) are run.
struct Sequence {
  int64_t n, h, b, start, length, begin, end;
  Sequence() = default;
  Sequence(const ScanArgs& p, int64_t task) : n(task / p.H), h(task % p.H) {
    b = p.cu_seqlens ? 0 : n;
    start = p.cu_seqlens ? p.cu_seqlens[n] : 0;
    length = p.cu_seqlens ? p.cu_seqlens[n + 1] - start : p.T;
    begin = 0, end = length;
  }
  Sequence(const ScanArgs& p, const ChunkIndex& chunk) : Sequence(p, chunk.task) {
    begin = chunk.first;
    end = length - begin < kChunk ? length : begin + kChunk;
  }
  Span chunk(int64_t first) const {
    return {b, start + first, h, int(length - first < kChunk ? length - first : kChunk)};
  }
  int64_t checkpoint(const ScanArgs& p, int64_t first) const { return checkpoint_index(p, b, start, first); }
};

// The tokens of P heads whose sequences have the same length. A token's row has width() values: P R for several heads,
// which then fill a vector, or for one head R rounded up to whole vectors. Masked tokens get decay = 1 and zeros in all
// other operands, so that in every mode they leave the state as it is.
template <class T, int W, class Rank, int P>
struct StagedTokens {
  typedef Vec<T, W> L;

  const ScanArgs& p;
  Rank R;
  int n = 0;
  Span span[P];
  typedef deltamem::Rows<T, W, P> Rows;
  Rows q, k, v, beta, decay, write;
  T* overlap;  // dot products of each key with the next, 0 after the last: see overlap_at

  static constexpr int padded(int64_t R) { return P == 1 ? int((R + W - 1) / W * W) : W; }
  DELTAMEM_INLINE int width() const { return padded(R); }
  static size_t bytes(const ScanArgs& p, int64_t tokens = kChunk) {
    return 7 * Arena::bytes<T>(tokens * padded(p.R));
  }
  StagedTokens(const ScanArgs& p, Rank R, Arena& arena, int64_t tokens = kChunk) : p(p), R(R) {
    overlap = arena.take<T>(tokens * width());
    for (T*& buffer : buffers_) buffer = arena.take<T>(tokens * width());
  }

  void load(const Sequence* s, int64_t first) {
    for (int i = 0; i < P; ++i) span[i] = s[i].chunk(first);
    n = span[0].n;
    load_rows([&](const Operand& x, T* buffer) {
      if (!has_vector_rows(x)) return copied(x, buffer);
      Rows rows;
      for (int i = 0; i < P; ++i) rows.data[i] = span[i].template begin<T>(x);
      rows.stride = ptrdiff_t(x.stride[1]);
      return rows;
    });
    if (p.mask)
      for (int i = 0; i < 6; ++i) fill_masked(buffers_[i], T(i == 4 ? 1 : 0));
    compute_overlaps();
  }

  // Whether results can be stored to x as whole vectors.
  bool in_place(const Operand& x) const {
    if (!has_vector_rows(x)) return false;
    for (int i = 1; i < P; ++i)
      if (span[i].template begin<T>(x) != span[0].template begin<T>(x) + i * R) return false;
    return true;
  }

  // Sets the rows of each operand to `rows(operand, buffer)`.
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

  // The gradient of the reads, with zeros for masked tokens and if it is absent.
  void load_d_reads(const Operand& x, T* buffer) const {
    if (x.data)
      copied(x, buffer);
    else
      fill(buffer, kChunk * width(), T(0));
    fill_masked(buffer, T(0));
  }

  // Sets the rows of the masked tokens to `value`.
  void fill_masked(T* rows, T value) const {
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

  // The factors of token t for rows i to i + W - 1; value = write v.
  struct Token {
    L keep, erase, value;
  };
  template <Mode mode, bool coupled>
  DELTAMEM_INLINE Token token(int t, int i) const {
    const GateOperands x = gate_operands<mode, coupled>(t, i);
    const Gates<L> g = gates(mode, coupled, L::splat(T(1)), x.beta, x.decay, x.write);
    return {g.keep, g.erase, g.write * v.load(t, i)};
  }

  // The gradients of the operands, from those of keep, erase and value.
  struct TokenAdjoint {
    L v, beta, decay, write;
  };
  template <Mode mode, bool coupled>
  DELTAMEM_INLINE TokenAdjoint adjoint(int t, int i, TokenGradients<L> d) const {
    const L one = L::splat(T(1));
    const GateOperands x = gate_operands<mode, coupled>(t, i);
    const Gates<L> of_gates{d.keep, d.erase, d.value * v.load(t, i)};
    const GateGradients<L> g = gates_adjoint(mode, coupled, one, x.beta, x.decay, of_gates);
    return {d.value * gates(mode, coupled, one, x.beta, x.decay, x.write).write, g.beta, g.decay, g.write};
  }

 private:
  static constexpr int kGroup = W / P;  // lanes per head
  T* buffers_[6];

  // Whether whole vectors can be loaded from and stored to the rows of x where they are.
  bool has_vector_rows(const Operand& x) const {
    return !p.mask && width() == P * R && x.dtype == kDType<T> && x.stride[3] == 1;
  }

  DELTAMEM_INLINE L product_of_keys(int t) const {
    L product{};
    for (int j = 0; j < width(); j += W) product = fma(k.load(t, j), k.load(t + 1, j), product);
    return product;
  }

  void compute_overlaps() {
    L products[kGroup];
    int t = 0;
    for (; t + kGroup < n; t += kGroup) {
      for (int l = 0; l < kGroup; ++l) products[l] = product_of_keys(t + l);
      sum_lanes<kGroup>(products).store(overlap + t / kGroup * W);
    }
    for (int l = 0; l < kGroup; ++l) products[l] = t + l + 1 < n ? product_of_keys(t + l) : L{};
    sum_lanes<kGroup>(products).store(overlap + t / kGroup * W);
  }

  struct GateOperands {
    L beta, decay, write;
  };
  template <Mode mode, bool coupled>
  DELTAMEM_INLINE GateOperands gate_operands(int t, int i) const {
    const L b = beta.load(t, i);
    return {b, coupled ? b : decay.load(t, i), mode == Mode::affine ? write.load(t, i) : b};
  }
};

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

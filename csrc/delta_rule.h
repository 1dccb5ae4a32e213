// One token of the delta rule and its adjoint, the only statement of the mathematics in C++.
//
// A lane holds one state row, its columns in an array of lanes. `L` is a float or double on a GPU, where the rows
// are the threads, and a vector of rows on a CPU; it needs + - *, fma(a, b, c) = a b + c and fnma(a, b, c) = c - a b.
// `X` is what stands in a column of the token's query or key: the same number for all rows.
#pragma once

#ifdef __CUDACC__
#define DELTAMEM_INLINE __host__ __device__ __forceinline__
#define DELTAMEM_UNROLL _Pragma("unroll")  // or the columns of a lane would not be in registers
#else
#define DELTAMEM_INLINE inline __attribute__((always_inline))
#define DELTAMEM_UNROLL
#endif

// Translation units compiled for different instruction sets must not share an inline function: each names its own.
#ifndef DELTAMEM_ISA
#define DELTAMEM_ISA baseline
#endif

namespace deltamem {

enum class Mode : int { standard, lambda_outside, no_lambda, affine };

inline namespace DELTAMEM_ISA {

// S <- Diag(keep) S - Diag(erase) (S k) k^T + Diag(write) v k^T
template <class L>
struct Gates {
  L keep, erase, write;
};

// `decay` is read only where it is free (not coupled to beta), `write` only in the affine mode, where beta is erase
// and decay is keep.
template <class L>
DELTAMEM_INLINE Gates<L> gates(Mode mode, bool coupled, L one, L beta, L decay, L write) {
  if (mode == Mode::affine) return {decay, beta, write};
  if (mode == Mode::no_lambda) return {one, beta, beta};
  if (coupled) decay = one - beta;
  if (mode == Mode::standard) return {decay, beta, beta};
  return {decay, decay * beta, beta};
}

// The gradients of beta, decay and write, from those of keep, erase and write.
template <class L>
struct GateGradients {
  L beta, decay, write;
};

template <class L>
DELTAMEM_INLINE GateGradients<L> gates_adjoint(Mode mode, bool coupled, L one, L beta, L decay, Gates<L> d) {
  if (mode == Mode::affine) return {d.erase, d.keep, d.write};
  if (mode == Mode::no_lambda) return {d.erase + d.write, d.keep, d.write};
  GateGradients<L> out{d.erase + d.write, d.keep, d.write};
  if (mode == Mode::lambda_outside) {
    if (coupled) decay = one - beta;
    out.beta = fma(decay, d.erase, d.write);
    out.decay = fma(beta, d.erase, d.keep);
  }
  if (coupled) out.beta = out.beta - out.decay;
  return out;
}

// S x, four partial sums: the chain of dependent operations is what one token costs.
template <class L, class X>
DELTAMEM_INLINE L dot(const L* S, const X& x, int R) {
  L even = S[0] * x[0];
  if (R == 1) return even;
  L odd = S[1] * x[1];
  if (R < 4) return R == 2 ? even + odd : fma(S[2], x[2], even) + odd;
  L even2 = S[2] * x[2], odd2 = S[3] * x[3];
  int j = 4;
  DELTAMEM_UNROLL
  for (; j + 4 <= R; j += 4) {
    even = fma(S[j], x[j], even);
    odd = fma(S[j + 1], x[j + 1], odd);
    even2 = fma(S[j + 2], x[j + 2], even2);
    odd2 = fma(S[j + 3], x[j + 3], odd2);
  }
  if (j < R) even = fma(S[j], x[j], even);
  if (j + 1 < R) odd = fma(S[j + 1], x[j + 1], odd);
  if (j + 2 < R) even2 = fma(S[j + 2], x[j + 2], even2);
  return (even + odd) + (even2 + odd2);
}

// What a token adds to S along its key, from `held`, what the state held for this key (S k), and value = write v.
template <class L>
DELTAMEM_INLINE L change_by(L erase, L held, L value) {
  return fnma(erase, held, value);
}

template <class L, class X>
DELTAMEM_INLINE void write_token(L* S, const X& k, L keep, L change, int R) {
  DELTAMEM_UNROLL
  for (int j = 0; j < R; ++j) S[j] = fma(change, k[j], keep * S[j]);
}

// S k of the next token without waiting for this one's write: from `ahead`, the state before this token times the next
// key, and `overlap`, this key times the next. It takes the dot product off the chain of dependent operations.
template <class L>
DELTAMEM_INLINE L held_next(L keep, L ahead, L change, L overlap) {
  return fma(change, overlap, keep * ahead);
}

// A column of the state's gradient, from behind a token to before it; erased = erase (G k).
template <class L, class C>
DELTAMEM_INLINE L gradient_before(L G, L keep, L erased, C k, L d_read, C q) {
  return fma(d_read, q, fnma(erased, k, keep * G));
}

template <class L, class X>
DELTAMEM_INLINE void state_adjoint(L* G, const X& q, const X& k, L keep, L erased, L d_read, int R) {
  for (int j = 0; j < R; ++j) G[j] = gradient_before(G[j], keep, erased, k[j], d_read, q[j]);
}

// The adjoint of one token: G, the gradient of the state after it, becomes that of the state before it. S is the
// state before the token, held = S k. d_q[j] and d_k[j] are this row's share: the caller adds up the rows.
template <class L>
struct TokenGradients {
  L keep, erase, value;
};

template <class L, class X>
DELTAMEM_INLINE TokenGradients<L> token_adjoint(L* G, const L* S, const X& q, const X& k, L keep, L erase, L value,
                                                L held, L d_read, L* d_q, L* d_k, int R) {
  const L Gk = dot(G, k, R);
  const L d_keep = dot(G, S, R);
  const L change = change_by(erase, held, value);
  const L erased = erase * Gk;
  DELTAMEM_UNROLL
  for (int j = 0; j < R; ++j) {
    d_q[j] = d_read * S[j];
    d_k[j] = fnma(erased, S[j], change * G[j]);
  }
  state_adjoint(G, q, k, keep, erased, d_read, R);
  return {d_keep, L{} - held * Gk, Gk};
}

}  // namespace DELTAMEM_ISA
}  // namespace deltamem

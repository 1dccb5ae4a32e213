// The delta rule of one token and its adjoint. CPU and CUDA kernels share this file.
//
// The rows of a state are independent, so each runs in a lane of its own; S[j] is column j of the row. A value of type
// L holds one number per row: a float or double on a GPU, where each thread has one row, and a SIMD vector of rows on a
// CPU. L needs + - *, fma(a, b, c) = a b + c and fnma(a, b, c) = c - a b. Indexing an X gives a column of the token's
// query or key, which is the same for all rows.
#pragma once

#ifdef __CUDACC__
#define DELTAMEM_INLINE __host__ __device__ __forceinline__
#define DELTAMEM_UNROLL _Pragma("unroll")  // arrays stay in registers only if loops over them are unrolled
#else
#define DELTAMEM_INLINE inline __attribute__((always_inline))
#define DELTAMEM_UNROLL
#endif

// Each instruction set has its own inline namespace. Otherwise the linker could keep the AVX-512 copy of an inline
// function and call it on a processor without AVX-512.
#ifndef DELTAMEM_ISA
#define DELTAMEM_ISA baseline
#endif

namespace deltamem {

enum class Mode : int { standard, lambda_outside, no_lambda, affine };

inline namespace DELTAMEM_ISA {

// The factors of the rule S <- Diag(keep) S - Diag(erase) (S k) k^T + Diag(write) v k^T.
template <class L>
struct Gates {
  L keep, erase, write;
};

// If `coupled`, decay is 1 - beta and the argument is not read. The affine mode takes the factors directly: erase from
// beta, keep from decay; the other modes do not read `write`.
template <class L>
DELTAMEM_INLINE Gates<L> gates(Mode mode, bool coupled, L one, L beta, L decay, L write) {
  if (mode == Mode::affine) return {decay, beta, write};
  if (mode == Mode::no_lambda) return {one, beta, beta};
  if (coupled) decay = one - beta;
  if (mode == Mode::standard) return {decay, beta, beta};
  return {decay, decay * beta, beta};
}

// The gradients of the operands beta, decay and write.
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

// S x. Four partial sums shorten the chain of dependent operations, which bounds the time of a token.
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

// The coefficient c of the token's rank-one update c k^T, from `held` = S k, the value the state holds for this key,
// and value = write v.
template <class L>
DELTAMEM_INLINE L change_by(L erase, L held, L value) {
  return fnma(erase, held, value);
}

template <class L, class X>
DELTAMEM_INLINE void write_token(L* S, const X& k, L keep, L change, int R) {
  DELTAMEM_UNROLL
  for (int j = 0; j < R; ++j) S[j] = fma(change, k[j], keep * S[j]);
}

// S k of the next token, without waiting for this token's write: `ahead` is the state before this token times the next
// key, and `overlap` is this key times the next key. This takes the dot product off the chain of dependent operations.
template <class L>
DELTAMEM_INLINE L held_next(L keep, L ahead, L change, L overlap) {
  return fma(change, overlap, keep * ahead);
}

// A column of the gradient of the state before a token, from G, that of the state after it; erased = erase (G k).
template <class L, class C>
DELTAMEM_INLINE L gradient_before(L G, L keep, L erased, C k, L d_read, C q) {
  return fma(d_read, q, fnma(erased, k, keep * G));
}

template <class L, class X>
DELTAMEM_INLINE void state_adjoint(L* G, const X& q, const X& k, L keep, L erased, L d_read, int R) {
  for (int j = 0; j < R; ++j) G[j] = gradient_before(G[j], keep, erased, k[j], d_read, q[j]);
}

template <class L>
struct TokenGradients {
  L keep, erase, value;
};

// The adjoint of one token. G is the gradient of the state after the token and becomes that of the state before it. S
// is the state before the token, and held = S k. d_q[j] and d_k[j] get this row's share; the caller adds up the rows.

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
